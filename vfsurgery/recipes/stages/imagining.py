"""The stage that makes calibration images of the networks themselves, for the stages behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.recipes.bench import Bench, Told, Write
from vfsurgery.recipes.sections import AsTuple, Count
from vfsurgery.recipes.stage import Place, Stage, stage
from vfsurgery.stats.imagined import imagine

PICTURES = (".png", ".svg", ".pdf")


@stage("imagine", decides=True, kept=False, needs_images=False)
class Imagine(Stage):
    """Options of :func:`vfsurgery.imagine`. Stages behind it calibrate on these images, and not on those of ``data``.

    ``files`` are written of them: ``.safetensors`` has them all, a picture a grid of some.
    """

    images: Count | None = None
    how: Literal["auto", "leaves", "statistics"] = "auto"
    steps: Count | None = None
    memory: Annotated[float, Field(gt=0)] = 4.0
    files: Annotated[tuple[str, ...], AsTuple] = ()

    def follow(self, at: Place) -> Place:
        for file in self.files:
            if Path(file).name != file or not file.endswith((WEIGHTS, *PICTURES)):
                raise ValueError(
                    f"{file!r} can hold no images: name a file that ends in {WEIGHTS}, or a picture in .png"
                )
        return replace(at.writing(self.files), imagined=True)

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        models, lab = [*bench.models.values()], bench.lab
        options = self.model_dump(exclude={"files"})
        found = imagine(models, example_inputs=lab.example(models[0]), seed=lab.seed, progress=lab.progress, **options)
        writes = [Write(file, found.save if file.endswith(WEIGHTS) else found.plot) for file in self.files]
        lines = str(found.report).splitlines()
        return {}, Told(lines=lines, values=found.report.to_dict(), images=found, writes=writes)

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        behind = super().after(bench, models, told)
        return replace(behind, lab=replace(bench.lab, imagined=told.images))

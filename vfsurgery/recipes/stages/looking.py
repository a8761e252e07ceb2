"""Stages that leave networks as they are: evaluation, the line between sources, diagnosis, files, imagined images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from vfsurgery.checkpoints import PROGRAM, WEIGHTS, save_network
from vfsurgery.errors import RecipeError, explain
from vfsurgery.recipes.bench import Bench, Told, Write
from vfsurgery.recipes.sections import AsTuple, Count, FileNames
from vfsurgery.recipes.stage import MERGED, Place, Stage, Table, file_of, stage
from vfsurgery.scoring.barriers import barrier
from vfsurgery.scoring.diagnosis import diagnose
from vfsurgery.scoring.evaluation import ENSEMBLE
from vfsurgery.scoring.flip_rates import flips
from vfsurgery.scoring.measured import Measured
from vfsurgery.scoring.tables import percents, scores_of
from vfsurgery.stats.imagined import imagine
from vfsurgery.tracing.examples import example_inputs_of

PICTURES = (".png", ".svg", ".pdf")


class Scoring(Table):
    """What classifies images: which ones, and whether to count what the sources had right and the merge has not."""

    data: Literal["train", "calibration", "test"] = "test"
    flips: bool = False

    def check_flips(self, behind: Place) -> None:
        """Flips are of a merge."""
        if self.flips and not behind.merged:
            raise ValueError("flips are counted between sources and what they were merged into")

    def scored(self, told: Told, bench: Bench, lines: list[str]) -> None:
        """Say what there is, and the flips of the network on the bench."""
        told.lines = lines
        told.rows = {label: 100 * score.accuracy for label, score in told.scores.items()} | told.rows
        told.values["scores"] = {label: asdict(score) for label, score in told.scores.items()}
        if self.flips:
            merged, data = bench.networks[MERGED].model, bench.lab.part(self.data)
            told.flips = flips(bench.first, merged, data, progress=bench.lab.progress)
            told.values["flips"] = told.flips.to_dict()
            told.lines += str(told.flips).splitlines()


@stage("evaluate")
class Evaluate(Scoring):
    """Accuracy and loss of the sources, their ensemble, and what was made of them."""

    def follow(self, at: Place) -> Place:
        self.check_rows(at.rows)
        self.check_flips(at)
        return at

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        told = Told(scores=bench.score(self.data))
        self.scored(told, bench, [*scores_of(told.scores, bench.first, self.published)])
        return {}, told

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        # the ensemble is of the networks that later stages change, unless they went into a merge
        own = {row: row for row in told.scores if row != ENSEMBLE or not bench.ends}
        return replace(bench, shown=Measured(told.rows, told.scores, self.published, own, {"flips": told.flips}))


@stage("barrier", needs_report=True)
class Line(Table):
    """Accuracy and loss on the straight line between two sources, through their merge, and a plot of it.

    Its rows say by how many points the line sags, naively averaged, aligned, and renormalized too.
    """

    ROWS: ClassVar[tuple[str, ...]] = ("barrier naive", "barrier aligned", "barrier renormalized")

    alphas: Annotated[int, Field(ge=3)] = 11

    @field_validator("alphas")
    @classmethod
    def _midpoint_is_there(cls, alphas: int) -> int:
        if alphas % 2 == 0:
            raise ValueError(f"alphas is {alphas}: only odd numbers of points have the midpoint among them")
        return alphas

    def follow(self, at: Place) -> Place:
        self.check_rows(self.ROWS)
        if not at.merged or len(at.sources) != 2:
            raise ValueError("barrier stands behind a merge of two sources")
        return at.writing([f"{at.run}_barrier.png"])

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        lab = bench.lab
        options: Any = {"through": bench.networks[MERGED].model, "alphas": self.alphas, "seed": lab.seed}
        options |= {"calibration": lab.part("calibration"), "progress": lab.progress}
        a, b = bench.first.values()
        found = barrier(a, b, lab.part("test"), **options)
        rows = {f"barrier {name}": 100 * curve.accuracy_barrier for name, curve in found.curves.items()}
        return {}, Told(lines=[*percents(rows, self.published)], values=found.to_dict(), rows=rows, barrier=found)

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        found, before = told.barrier, bench.shown
        assert found is not None
        rows, published = {**before.rows, **told.rows}, {**before.published, **self.published}
        shown = replace(before, rows=rows, published=published, figures={**before.figures, "barrier": found})
        plot = Write(f"{bench.lab.run}_barrier.png", found.plot, "accuracy and loss on the way between the sources")
        return replace(bench, shown=shown).wrote(plot)


@stage("diagnose", kept=False, needs_report=True, without_labels=True)
class Diagnose(Stage):
    """The page that shows where features vanish, with the figures that were measured of the network."""

    page: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.html$", max_length=100)] | None = None

    def follow(self, at: Place) -> Place:
        if not at.merged and not at.pruned:
            raise ValueError("diagnose compares a network with what it was made from: put it behind merge or prune")
        return at.writing_each([self.page or f"{at.run}.html"])

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        told, lab = Told(), bench.lab
        for name, net in bench.networks.items():
            both = [net.model] if net.before is None else [net.before, net.model]
            images = lab.part("calibration")
            *before, found = (diagnose(model, net.origins, images, progress=lab.progress) for model in both)
            own = bench.shown.own.get(name)
            figures = {
                "scores": bench.shown.scores or None,
                "own": own if own in bench.shown.scores else None,
                "before": next(iter(before), None),
                "imagined": lab.imagined,
                **bench.shown.figures,
            }
            file = file_of(self.page or f"{lab.run}.html", name, bench.networks)
            told.writes.append(Write(file, partial(found.page, report=net.report, **figures)))
            told.lines.append(f"{name}: {found.verdict}")
            told.values[name] = found.to_dict()
        return {}, told


@stage("export", whole="files", needs_images=False, kept=False)
class Export(Stage):
    """Files of the networks as they are here: weights, programs or ONNX, written once all has succeeded."""

    files: FileNames = ()

    def names(self, run: str, preserved: bool) -> tuple[str, ...]:
        """Those of the files, by default one with the name of the run."""
        return self.files or (f"{run}{PROGRAM if preserved else WEIGHTS}",)

    def follow(self, at: Place) -> Place:
        for file in self.files if at.preserved else ():
            if file.endswith(WEIGHTS):
                raise ValueError(f"with preserve the network itself is another one: write {file} as .pt2 or .onnx")
        return at.writing_each(self.names(at.run, at.preserved))

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        told, lab, first = Told(), bench.lab, next(iter(bench.first.values()))
        preserved = any(isinstance(model, torch.fx.GraphModule) for model in bench.models.values())
        for file in self.names(lab.run, preserved):
            inputs = () if file.endswith(WEIGHTS) else example_inputs_of(first, lab.example(first))
            for name, net in bench.networks.items():
                target = file_of(file, name, bench.networks)
                if file.endswith(WEIGHTS) and isinstance(net.model, torch.fx.GraphModule):
                    fact = f"{target} cannot hold {name}: its graph is not that of its class any more"
                    remedy = f"export it whole, as {Path(target).stem}.pt2 or .onnx; --resume then goes on from here"
                    raise RecipeError(explain(fact, remedy=remedy))
                known = {"model": next(iter(lab.sections.values())).model, "recipe": lab.recipe, **net.metadata}
                write = partial(save_network, net.model, inputs, metadata=known)
                told.writes.append(Write(target, write, name=name, net=net, shown=bench.shown))
                told.lines.append(target)
        return {}, told


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

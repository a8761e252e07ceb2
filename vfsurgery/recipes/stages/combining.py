"""The stage that combines networks which were fine-tuned from one of the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from torch import nn

from vfsurgery.merging.merge import merge
from vfsurgery.recipes import entries
from vfsurgery.recipes.bench import Bench, Net, Told
from vfsurgery.recipes.sections import AsTuple
from vfsurgery.recipes.stage import MERGED, Misplaced, Place, Stage, stage
from vfsurgery.records.results import report_of

Numbers = Annotated[tuple[float, ...] | None, AsTuple]


@stage("combine", changes=True, joins=True, needs_images=False)
class Combine(Stage):
    """Options of :func:`vfsurgery.merge` with a base: ``base`` names the source that all others were fine-tuned from.

    Without a ``method`` several are tried, at several scales, and judged on held-out images; without images it is the
    mean. Several values of ``scale`` are tried in the same way.

    >>> Combine(base="pretrained", method={"ties": {"density": 0.1}}).arguments()["combine"].density
    0.1
    """

    base: str
    method: entries.CombinerEntry = "auto"
    scale: Numbers = None
    weights: Numbers = None
    renormalize: entries.Normalizations = "auto"

    def parts(self) -> Sequence[Any]:
        methods = [] if self.method == "auto" else [entries.build_combiner(self.method)]
        return [*methods, *([] if self.renormalize == "auto" else entries.build_passes(self.renormalize))]

    def follow(self, at: Place) -> Place:
        if at.merged:
            raise ValueError("there is one network left, and nothing to combine it with")
        if self.base not in at.networks:
            raise Misplaced(f"{self.base!r} is no source; there are {', '.join(at.networks)}", "base")
        tuned = len(at.networks) - 1
        if not tuned:
            raise ValueError("there is the base alone, and nothing that was fine-tuned from it")
        if self.weights is not None and len(self.weights) != tuned:
            raise Misplaced(f"{tuned} networks are combined, and {len(self.weights)} weights given", "weights")
        return replace(at, networks=(MERGED,), pruned=False)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`vfsurgery.merge`, but the base."""
        return {
            "combine": entries.build_combiner(self.method),
            "scale": self.scale,
            "weights": self.weights,
            "renormalize": entries.build_normalizations(self.renormalize),
        }

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        models, options = {**bench.models}, self.arguments()
        base = models.pop(self.base)
        if bench.lab.calibration is None:
            options["example_inputs"] = bench.lab.example(base)
        merged = merge([*models.values()], base=base, **bench.lab.common, **options)
        report = report_of(merged)
        return {MERGED: merged}, Told(lines=str(report).splitlines(), values=report.to_dict())

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        tuned = tuple(model for name, model in bench.models.items() if name != self.base)
        merged = Net(models[MERGED], origins=tuned)
        return replace(bench, networks={MERGED: merged}, ends=bench.networks)

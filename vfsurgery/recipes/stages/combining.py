"""The stage that combines networks which were fine-tuned from one of the sources."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from vfsurgery.merging.merge import merge
from vfsurgery.recipes import sections
from vfsurgery.recipes.bench import Bench
from vfsurgery.recipes.sections import AsTuple
from vfsurgery.recipes.stage import Misplaced, Place, stage
from vfsurgery.recipes.stages.surgery import Joining

Numbers = Annotated[tuple[float, ...] | None, AsTuple]


@stage("combine", changes=True, joins=True, needs_images=False)
class Combine(Joining):
    """Options of :func:`vfsurgery.merge` with a base: ``base`` names the source that all others were fine-tuned from.

    Without a ``method`` several are tried, at several scales, and judged on held-out images; without images it is the
    mean. Several values of ``scale`` are tried in the same way.

    >>> Combine(base="pretrained", method={"ties": {"density": 0.1}}).arguments()["combine"].density
    0.1
    """

    base: str
    method: sections.CombinerEntry = "auto"
    scale: Numbers = None
    weights: Numbers = None
    renormalize: sections.Normalizations = "auto"

    def follow(self, at: Place) -> Place:
        behind = super().follow(at)
        if self.base not in at.networks:
            raise Misplaced(f"{self.base!r} is no source; there are {', '.join(at.networks)}", "base")
        tuned = len(at.networks) - 1
        if not tuned:
            raise ValueError("there is the base alone, and nothing that was fine-tuned from it")
        if self.weights is not None and len(self.weights) != tuned:
            raise Misplaced(f"{tuned} networks are combined, and {len(self.weights)} weights given", "weights")
        return behind

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`vfsurgery.merge`, but the base."""
        given = super().arguments()
        return {key: given[key] for key in ("scale", "weights", "renormalize")} | {"combine": given["method"]}

    def joined(self, bench: Bench) -> nn.Module:
        base = bench.models[self.base]
        return merge(self._tuned(bench), base=base, **bench.lab.given(base), **self.arguments())

    def known_of(self, bench: Bench) -> dict[str, Any]:
        return {"origins": tuple(self._tuned(bench))}

    def _tuned(self, bench: Bench) -> list[nn.Module]:
        return [model for name, model in bench.models.items() if name != self.base]

"""Closed-form REPAIR: the statistics of merged units from those of the aligned sources, without running the merge.

If the layers before a unit were as good as the sources', it would be the weighted mean of the sources' units, with

``mu^ = sum_i w_i mu_i``, ``sigma^^2 = sum_ij w_i w_j rho_ij sigma_i sigma_j``

where ``rho_ij`` is the correlation of the matched units of sources ``i`` and ``j`` (Jordan et al., REPAIR, 2023, the
variant that needs no statistics of the interpolated network). That sum is the variance of ``sum_i w_i f_i``, so the
mean itself is formed on each batch and its moments are taken; no matrix of correlations is needed, for however many
sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from vfsurgery.passes.base import Context
from vfsurgery.passes.mixture import Mixture
from vfsurgery.passes.producers import Producer
from vfsurgery.passes.renormalize import Goal, Renormalize, above_rounding, to_both
from vfsurgery.stats.moments import Moments


@dataclass(frozen=True, kw_only=True)
class ClosedFormRepair(Renormalize):
    """Give every unit the mean and deviation of its sources, taking it for the weighted mean of theirs.

    Exact for layers that read the input, or what all sources agree on; deeper down it does not see what earlier layers
    lose beyond what their own correction gives back. The merged model is never run: one pass over the data runs all
    sources, their units in the merged model's order. Matching comes first, so after matching on activations it is a
    second pass over the sources. Of one batch it holds the targets' activations once, for one source.
    """

    name: ClassVar[str] = "closed-form-repair"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``s = goal std / sigma^``, ``t = goal mean - s * mu^``."""
        return to_both(moments, mean, std)

    def statistics(
        self, graph_module: fx.GraphModule, context: Context, targets: Sequence[Producer]
    ) -> Iterator[tuple[Producer, Moments, Goal]]:
        """Run the sources side by side on every batch."""
        mixture = Mixture(targets, context)
        for images in context.images(f"{self.name}: statistics of the aligned sources"):
            mixture.see(images)
        for target in targets:
            node = target.node
            goal = self.goal([moments[node] for moments in mixture.sources], context.weights_of(target.weight))
            yield target, above_rounding(mixture.mean[node], goal[1], mixture.types[node]), goal

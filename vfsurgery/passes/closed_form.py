"""Closed-form REPAIR: the statistics of merged units from those of the aligned sources, without running the merge.

If the layers before a unit were as good as the sources', it would be the weighted mean of the sources' units, with

``mu^ = sum_i w_i mu_i``, ``sigma^^2 = sum_ij w_i w_j rho_ij sigma_i sigma_j``

where ``rho_ij`` is the correlation of the matched units of sources ``i`` and ``j`` (Jordan et al., REPAIR, 2023, the
variant that needs no statistics of the interpolated network). That sum is the variance of ``sum_i w_i f_i``, so the
mean itself is formed on each batch and its moments are taken; no matrix of correlations is needed, for however many
sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.passes.base import Context
from vfsurgery.passes.producers import Producer
from vfsurgery.passes.renormalize import Goal, Renormalize, above_rounding, to_both
from vfsurgery.stats.collect import image_dtype
from vfsurgery.stats.correlation import Centred
from vfsurgery.stats.moments import Moments
from vfsurgery.stats.prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class ClosedFormRepair(Renormalize):
    """Give every unit the mean and deviation of its sources, taking it for the weighted mean of theirs.

    Exact for layers that read the input, or what all sources agree on; deeper down it does not see what earlier layers
    lose beyond what their own correction gives back. The merged model is never run: one pass over the data runs all
    sources, their units in the merged model's order. Matching comes first, so after matching on activations it is a
    second pass over the sources. Of one batch it holds all targets' activations, once for however many sources.

    >>> import vfsurgery as surgery
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2))
    >>> images = torch.randn(200, 4)
    >>> merged = surgery.merge(a, b, data=[images], matching="identity", renormalize=ClosedFormRepair())
    >>> found, *goals = (model[0](images).std(0) for model in (merged, a, b))
    >>> torch.allclose(found, (goals[0] + goals[1]) / 2)
    True
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
            goal = self.goal([moments[node] for moments in mixture.sources], context.weights)
            yield target, above_rounding(mixture.mean[node], goal[1], mixture.types[node]), goal


class Mixture:
    """Moments of the aligned sources' units, one entry per source, and of the weighted mean of these units."""

    def __init__(self, targets: Sequence[Producer], context: Context) -> None:
        self.sources: list[dict[str, Moments]] = [{} for _ in context.sources]
        self.mean: dict[str, Moments] = {}
        self.types: dict[str, torch.dtype] = {}
        self._parts: dict[str, _Part] = {}
        self._runs = [
            Prefix(source.graph_module, {target.node: self._watcher(target, number, context) for target in targets})
            for number, source in enumerate(context.sources)
        ]

    def see(self, images: Tensor) -> None:
        """Add one batch, ``(batch, channels, height, width)``."""
        for run in self._runs:
            run.run(images.to(image_dtype(run.module)))

    def _watcher(self, target: Producer, number: int, context: Context) -> Callable[[Tensor], None]:
        node, weight = target.node, context.weights[number]
        order = target.order(context.groups, context.permutations[number])
        places = None if order is None else order.to(context.sources[number].device).unsqueeze(1)

        def see(value: Tensor) -> None:
            units = Centred.of(value, places, target.dim)
            self.types[node] = value.dtype
            _add(self.sources[number], node, units.moments)
            samples, mean = units.samples.mul_(weight), weight * units.moments.mean
            if number:
                before = self._parts[node]
                samples, mean = before.samples.add_(samples), before.mean + mean
            self._parts[node] = _Part(samples, mean)
            if number == len(context.sources) - 1:
                _add(self.mean, node, self._parts.pop(node).moments())

        return see


@dataclass(frozen=True)
class _Part:
    """The weighted sum over the sources seen so far: ``samples`` about their means ``(units, samples)``, and means."""

    samples: Tensor
    mean: Tensor

    def moments(self) -> Moments:
        squares = torch.linalg.vector_norm(self.samples, dim=1).double() ** 2
        return Moments(self.samples.shape[1], self.mean, squares)


def _add(totals: dict[str, Moments], node: str, batch: Moments) -> None:
    totals[node] = totals[node].merge(batch) if node in totals else batch

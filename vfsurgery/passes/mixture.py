"""The aligned sources side by side: moments of their units in the merged model's order, and of their weighted mean.

What permutations do to moments is known without looking again; what maps of units do is not, nor is the mean of matched
units. Both take a pass over the sources once the matching is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.passes.base import Context
from vfsurgery.passes.producers import Producer
from vfsurgery.stats.correlation import Centred
from vfsurgery.stats.moments import Moments, add_batch, row_squares
from vfsurgery.stats.precision import taken_by
from vfsurgery.stats.prefix import Prefix


class Mixture:
    """Moments of the aligned sources' units, one entry per source, and of the weighted mean of these units."""

    def __init__(self, targets: Sequence[Producer], context: Context) -> None:
        self.sources: list[dict[str, Moments]] = [{} for _ in context.sources]
        self.mean: dict[str, Moments] = {}
        self.types: dict[str, torch.dtype] = {}
        self._parts: dict[str, _Part] = {}
        self._runs = [
            Prefix(source.graph_module, {target.site.key: self._watcher(target, number, context) for target in targets})
            for number, source in enumerate(context.sources)
        ]

    def see(self, images: Tensor) -> None:
        """Add one batch, ``(batch, channels, height, width)``."""
        for run in self._runs:
            run.run(taken_by(run.module, images))

    def _watcher(self, target: Producer, number: int, context: Context) -> Callable[[Tensor], None]:
        node, weight = target.node, context.weights_of(target.weight)[number]
        orders = context.permutations[number]
        order, mapped = target.order(context.groups, orders), target.is_mapped(context.groups, orders)
        places = None if order is None or mapped else order.to(context.sources[number].device).unsqueeze(1)

        def see(value: Tensor) -> None:
            value = target.aligned(value, context.groups, orders) if mapped else value
            units = Centred.of(value, places, target.dim)
            self.types[node] = value.dtype
            add_batch(self.sources[number], node, units.moments)
            samples, mean = units.samples.mul_(weight), weight * units.moments.mean
            if number:
                before = self._parts[node]
                samples, mean = before.samples.add_(samples), before.mean + mean
            self._parts[node] = _Part(samples, mean)
            if number == len(context.sources) - 1:
                add_batch(self.mean, node, self._parts.pop(node).moments())

        return see


@dataclass(frozen=True)
class _Part:
    """The weighted sum over the sources seen so far: ``samples`` about their means ``(units, samples)``, and means."""

    samples: Tensor
    mean: Tensor

    def moments(self) -> Moments:
        return Moments(self.samples.shape[1], self.mean, row_squares(self.samples))

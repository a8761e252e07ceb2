"""The aligned sources side by side: moments of their units in the merged model's order, and of their weighted mean.

What permutations do to moments is known without looking again; what maps of units do is not, nor is the mean of matched
units. Both take a pass over the sources once the matching is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vfsurgery.passes.base import Context
from vfsurgery.passes.producers import Producer
from vfsurgery.stats.collect import image_dtype
from vfsurgery.stats.moments import Moments
from vfsurgery.stats.prefix import Prefix


class Mixture:
    """Moments of the aligned sources' units, one entry per source, and of the weighted mean of these units."""

    def __init__(self, targets: Sequence[Producer], context: Context) -> None:
        self.sources: list[dict[str, Moments]] = [{} for _ in context.sources]
        self.mean: dict[str, Moments] = {}
        self.types: dict[str, torch.dtype] = {}
        self._sums: dict[str, Tensor] = {}
        self._runs = [
            Prefix(
                source.graph_module,
                {target.node: self._watcher(target, number, context) for target in targets},
            )
            for number, source in enumerate(context.sources)
        ]

    def see(self, images: Tensor) -> None:
        """Add one batch, ``(batch, channels, height, width)``."""
        for run in self._runs:
            run.run(images.to(image_dtype(run.module)))

    def _watcher(self, target: Producer, number: int, context: Context) -> Callable[[Tensor], None]:
        weight, orders = context.weights[number], context.permutations[number]

        def see(value: Tensor) -> None:
            units = target.aligned(value, context.groups, orders)
            _add(self.sources[number], target, units)
            self.types[target.node] = value.dtype
            wide = torch.promote_types(value.dtype, torch.float32)
            if number == 0:
                self._sums[target.node] = units.to(wide) * weight
            else:
                self._sums[target.node].add_(units, alpha=weight)
            if number == len(context.sources) - 1:
                _add(self.mean, target, self._sums.pop(target.node))

        return see


def _add(totals: dict[str, Moments], target: Producer, units: Tensor) -> None:
    batch = Moments.of(units, dim=target.dim)
    totals[target.node] = totals[target.node].merge(batch) if target.node in totals else batch

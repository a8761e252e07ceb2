"""Combination of aligned sources by another method than the average: ``theta_0 + scale * combined(tau_1, ..., tau_T)``.

The methods are those of :mod:`vfsurgery.combining`; here they meet the graph and the orders of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, fx

from vfsurgery.combining.base import Combiner, InMemory, Store, Trait
from vfsurgery.combining.running import Combination, Listing
from vfsurgery.discovery.maps import Order, map_tensor
from vfsurgery.groups import GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.tracing.sources import canonical_state

Base: TypeAlias = Mapping[str, Tensor] | Literal["first", "mean"] | None
"""A checkpoint's tensors by canonical key; or the first aligned source, or the mean of all."""


@dataclass(frozen=True, kw_only=True)
class Combine(Pass):
    """Write what a method makes of the aligned sources into the graph module's own tensors.

    ``traits`` say what each tensor is, and ``weights`` has a number for each source.
    """

    combiner: Combiner
    base: Base
    weights: tuple[float, ...]
    traits: Mapping[str, Trait] = field(repr=False)
    name: ClassVar[str] = "combine"
    needs_sources: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Combine under the orders in ``context.permutations``."""
        targets = canonical_state(graph_module)
        stores: list[Store] = [
            Aligned(source.state, context.groups, orders)
            for source, orders in zip(context.sources, context.permutations, strict=True)
        ]
        shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        dtypes = {name: tensor.dtype for name, tensor in targets.items()}
        base: Store | None = MeanOf(stores) if self.base == "mean" else stores[0] if self.base == "first" else None
        if isinstance(self.base, Mapping):
            base = InMemory(self.base)
        listing = Listing(shapes, dtypes, {name: self.traits[name] for name in targets})
        combination = Combination(
            listing, stores, base, self.combiner, self.weights, context.seed, context.notes
        )  # fmt: skip
        for name, start, part in combination.parts():
            target, whole = targets[name], (start, part.numel()) == (0, targets[name].numel())
            if whole:
                target.copy_(part.reshape(target.shape))
            elif target.is_contiguous():
                target.view(-1)[start : start + part.numel()] = part
            else:  # laid out otherwise, as channels last
                at = torch.arange(start, start + part.numel(), device=part.device)
                target[torch.unravel_index(at, target.shape)] = part
        return graph_module


class Aligned:
    """A source's tensors with its units in the order of the first."""

    def __init__(self, state: Mapping[str, Tensor], groups: GroupSet, orders: Mapping[str, Order]) -> None:
        self.state, self.groups, self.orders = state, groups, orders
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`~vfsurgery.combining.base.Store`; the last tensor is kept, since it comes in parts."""
        if self._last is None or self._last[0] != name:
            self._last = name, map_tensor(name, self.state[name], self.groups, self.orders).reshape(-1)
        return self._last[1][start:stop]


@dataclass(frozen=True)
class MeanOf:
    """The mean of several stores, as a store."""

    stores: Sequence[Store]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`~vfsurgery.combining.base.Store`; integers are those of the first."""
        first = self.stores[0].read(name, start, stop)
        if not first.is_floating_point():
            return first
        total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
        for store in self.stores[1:]:
            total.add_(store.read(name, start, stop))
        return total.div_(len(self.stores))

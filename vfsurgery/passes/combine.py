"""Combination of aligned sources by another method than the average: ``theta_0 + scale * combined(tau_1, ..., tau_T)``.

The methods are those of :mod:`vfsurgery.combining`; here they meet the graph and the orders of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, fx

from vfsurgery.combining.base import Combiner, InMemory, Store, Trait
from vfsurgery.combining.running import TRAINED, Combination, Listing
from vfsurgery.discovery.maps import Order, map_tensor
from vfsurgery.groups import GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.tracing.sources import Source, canonical_state

Base: TypeAlias = Mapping[str, Tensor] | Literal["first", "mean"] | None
"""A checkpoint's tensors by canonical key; or the first aligned source, or the mean of all."""


@dataclass(frozen=True, kw_only=True)
class Combine(Pass):
    """Write what a method makes of the aligned sources into the graph module's own tensors.

    ``traits`` say what each tensor is, and ``weights`` has a number for each source. ``line`` keeps what the method
    came to, for other scales of it.
    """

    combiner: Combiner
    base: Base
    weights: tuple[float, ...]
    traits: Mapping[str, Trait] = field(repr=False)
    line: Line | None = field(default=None, repr=False)
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
            listing, stores, base, self.combiner, self.weights, context.seed, context.notes,
            traced=self._traced(context),
            images=lambda source: context.images_of(source, f"{self.combiner.name}: source {source}"),
        )  # fmt: skip
        if self.line is not None:
            self.line.write(combination, [{**orders} for orders in context.permutations], targets)
            return graph_module
        _write(combination, targets)
        return graph_module

    def _traced(self, context: Context) -> list[Source]:
        """The sources to be run on images, with their units in the order of the first."""
        if not self.combiner.needs_data:
            return []
        found: list[Source] = []
        for source, orders in zip(context.sources, context.permutations, strict=True):
            aligned = source.clone() if orders else source
            for name, tensor in source.state.items() if orders else ():
                aligned.state[name].copy_(map_tensor(name, tensor, context.groups, orders))
            found.append(aligned)
        return found


def _write(combination: Combination, targets: Mapping[str, Tensor]) -> None:
    """Write a result into tensors, however they are laid out."""
    for name, start, part in combination.parts():
        target, whole = targets[name], (start, part.numel()) == (0, targets[name].numel())
        if whole:
            target.copy_(part.reshape(target.shape))
        elif target.is_contiguous():
            target.view(-1)[start : start + part.numel()] = part
        else:  # laid out otherwise, as channels last
            at = torch.arange(start, start + part.numel(), device=part.device)
            target[torch.unravel_index(at, target.shape)] = part


class Line:
    """What one method makes of some sources, at scales 0 and 1: all others lie on the line through both.

    So to try several scales takes hardly longer than one, and one model more in memory. Rounding aside, that is what
    the method gives at each of them.
    """

    def __init__(self) -> None:
        self._of: object = None
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}

    def write(self, combination: Combination, orders: object, targets: Mapping[str, Tensor]) -> None:
        """Write the result at the scale that is asked for."""
        unscaled = replace(combination, combiner=combination.combiner.scaled(1.0))
        of = repr(unscaled.combiner), orders
        if self._of != of:
            self._of, self._ends = None, {}
            _write(unscaled, targets)
            base, shapes = combination.base, combination.listing.shapes
            for name, trait in unscaled.settled.items():
                end = targets[name].clone()
                start = end
                if trait.kind in TRAINED:
                    start = torch.zeros_like(end)
                    if base is not None:
                        start = base.read(name, 0, end.numel()).reshape(shapes[name]).to(end)
                self._ends[name] = start, end
            self._of = of
        for name, (start, end) in self._ends.items():
            if start is not end:
                exact = torch.promote_types(end.dtype, torch.float32)
                targets[name].copy_(torch.lerp(start.to(exact), end.to(exact), combination.combiner.scale))
            else:
                targets[name].copy_(end)


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

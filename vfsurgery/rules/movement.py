"""Reshape and permute chains: exact bookkeeping of where each index goes.

A chain such as ``view -> transpose -> view`` is followed on *factors*: each input dim starts as one factor, a reshape
cuts factors where the new dims need it, a permute reorders dims. In the end each input and output dim is a product of
the same elementary factors. A dim whose factors come back in another order (a channel shuffle) is a fixed reordering.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from vfsurgery.axes import AxisRef, Constraint, Expression, Fresh, Product, Take, pin, tie
from vfsurgery.rules.registry import rule
from vfsurgery.tracing.ops import PERMUTES, RESHAPES, Op, Step


@dataclass(eq=False, slots=True)
class Factor:
    """One factor of a dim; ``parts`` once a reshape has cut it."""

    size: int
    parts: list[Factor] = field(default_factory=list["Factor"])

    def leaves(self) -> Iterator[Factor]:
        """The elementary factors, slowest first."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


@rule(nn.Flatten, nn.Unflatten, nn.Identity, *RESHAPES, *PERMUTES)
def movement(op: Op) -> Iterator[Constraint]:
    """Tie input and output dims through the elementary factors of the chain; pin them if a reshape fits none."""
    start = [Factor(size) for size in op.input.shape]
    end = _follow([[factor] for factor in start], op.steps)
    if end is None:
        for axis in (*op.input.axes(), *op.output.axes()):
            yield pin(axis, f"{op.name} cuts across units")
        return
    sources = [_leaves([factor]) for factor in start]
    targets = [_leaves(factors) for factors in end]
    numbers = {leaf: number for number, leaf in enumerate(leaf for leaves in sources for leaf in leaves)}
    reordered: set[int] = set()
    for dim, leaves in enumerate(targets):
        source = next((i for i, other in enumerate(sources) if leaves and set(other) == set(leaves)), None)
        if source is None:
            yield tie(op.output.axis(dim), _product(leaves, numbers))
        else:
            reordered.add(source)
            yield tie(op.output.axis(dim), _reordered(op.input.axis(source), sources[source], leaves))
    for dim, leaves in enumerate(sources):
        if dim not in reordered:
            yield tie(op.input.axis(dim), _product(leaves, numbers))


def _follow(dims: list[list[Factor]], steps: tuple[Step, ...]) -> list[list[Factor]] | None:
    for step in steps:
        if step.order is not None:
            dims = [dims[dim] for dim in step.order]
            continue
        regrouped = _regroup(_leaves([factor for factors in dims for factor in factors]), step.shape)
        if regrouped is None:
            return None
        dims = regrouped
    return dims


def _regroup(factors: list[Factor], shape: tuple[int, ...]) -> list[list[Factor]] | None:
    """Distribute factors over dims of the given sizes, cutting them where needed; ``None`` if they do not fit."""
    queue = list(factors)
    dims: list[list[Factor]] = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            if not queue:
                return None
            factor = queue.pop(0)
            if factor.size > size:
                if factor.size % size:
                    return None
                factor.parts = [Factor(size), Factor(factor.size // size)]
                queue.insert(0, factor.parts[1])
                factor = factor.parts[0]
            if size % factor.size:
                return None
            size //= factor.size
            dim.append(factor)
        dims.append(dim)
    return dims


def _leaves(factors: list[Factor]) -> list[Factor]:
    return [leaf for factor in factors for leaf in factor.leaves() if leaf.size > 1]


def _product(leaves: list[Factor], numbers: dict[Factor, int]) -> Expression:
    return Product(tuple(Fresh(f"factor {numbers[leaf]}", leaf.size) for leaf in leaves))


def _reordered(axis: AxisRef, source: list[Factor], target: list[Factor]) -> Expression:
    if source == target:
        return axis
    grid = np.arange(math.prod(leaf.size for leaf in source)).reshape([leaf.size for leaf in source])
    order = grid.transpose([source.index(leaf) for leaf in target]).reshape(-1)
    return Take(axis, tuple(order.tolist()))

"""Reshape and permute chains: exact bookkeeping of where each index goes.

A chain such as ``view -> transpose -> view`` is followed on *factors*: each input dim starts as one factor, a reshape
cuts factors where the new dims need it, a permute reorders dims. In the end each input and output dim is a product of
the same elementary factors. A dim whose factors come back in another order (a channel shuffle) is a fixed reordering.

Where single indices are picked from a dim in the end (``q, k, v = qkv.view(B, N, 3, heads, d).unbind(2)``), what lies
inside that factor belongs to one index alone: the input axis is ``heads_q x d_q + heads_k x d_k + heads_v x d_v``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import (
    AxisRef,
    Concat,
    Constraint,
    Expression,
    Fixed,
    Fresh,
    Product,
    Take,
    allows,
    tie,
)
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import PERMUTES, PICK, RESHAPES, Op, Step


@dataclass(eq=False, slots=True)
class Factor:
    """One factor of a dim; ``parts`` once a reshape has cut it, ``mixed`` if one has cut across its units."""

    size: int
    parts: list[Factor] = field(default_factory=list["Factor"])
    mixed: bool = False

    def leaves(self) -> Iterator[Factor]:
        """The elementary factors, slowest first."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


@rule(nn.Flatten, nn.Unflatten, nn.Identity, *RESHAPES, *PERMUTES, PICK)
def movement(op: Op) -> Iterator[Constraint]:
    """Tie input and output dims through the elementary factors of the chain; pin those that a reshape cuts across."""
    if 0 in op.input.shape:
        return
    yield allows(Symmetry.GENERAL_LINEAR, *op.input.axes())
    start = [Factor(size) for size in op.input.shape]
    end = _follow([[factor] for factor in start], op.steps)
    sources = [_leaves([factor]) for factor in start]
    targets = [_leaves(factors) for factors in end]
    names = _Names(sources, targets.pop(op.pick.dim) if op.pick else [], f"{op.name} cuts across units")
    whole: set[int] = set()
    for piece, output in enumerate(op.outputs):
        index = op.pick.indices[piece] if op.pick else 0
        for dim, leaves in enumerate(targets):
            source = next((i for i, other in enumerate(sources) if leaves and set(other) == set(leaves)), None)
            if source is None:
                yield tie(output.axis(dim), names.product(leaves, index))
            else:
                whole.add(source)
                yield tie(output.axis(dim), _reordered(op.input.axis(source), sources[source], leaves))
    for dim, leaves in enumerate(sources):
        if dim not in whole and set(leaves) - set(names.picked):
            yield tie(op.input.axis(dim), names.source(leaves))


class _Names:
    """Names the elementary factors of a chain; those inside the factor that is picked from have one name per index."""

    def __init__(self, sources: list[list[Factor]], picked: list[Factor], mixed: str) -> None:
        self.picked = picked
        self._mixed = mixed
        self._numbers = {leaf: number for number, leaf in enumerate(leaf for leaves in sources for leaf in leaves)}
        self._inside: set[Factor] = set()
        for leaves in sources:
            if len(picked) == 1 and picked[0] in leaves:
                self._inside = set(leaves[leaves.index(picked[0]) + 1 :])

    def product(self, leaves: list[Factor], index: int) -> Expression:
        """The product of factors as it is at one index of the factor that is picked from."""
        return Product(tuple(self._name(leaf, index) for leaf in leaves))

    def source(self, leaves: list[Factor]) -> Expression:
        """An input axis: the factors before the one that is picked from, times what lies at each of its indices."""
        place = next((place for place, leaf in enumerate(leaves) if leaf in self.picked), None)
        if place is None or not self._inside:
            return self.product(leaves, 0)
        parts = tuple(self.product(leaves[place + 1 :], index) for index in range(leaves[place].size))
        return Product((*(self._name(leaf, 0) for leaf in leaves[:place]), Concat(parts)))

    def _name(self, leaf: Factor, index: int) -> Expression:
        if leaf.mixed:
            return Fixed(leaf.size, self._mixed)
        if leaf in self.picked:
            return Fixed(leaf.size, "single positions are picked")
        return Fresh(f"factor {self._numbers[leaf]}" + f" at {index}" * (leaf in self._inside), leaf.size)


def _follow(dims: list[list[Factor]], steps: tuple[Step, ...]) -> list[list[Factor]]:
    for step in steps:
        if step.order is not None:
            dims = [dims[dim] for dim in step.order]
        else:
            dims = _reshape(_leaves([factor for factors in dims for factor in factors]), step.shape)
    return dims


def _reshape(factors: list[Factor], shape: tuple[int, ...]) -> list[list[Factor]]:
    """Distribute factors over dims of the given sizes.

    Sizes are multiplied on both sides until they agree, which splits the reshape into independent ones of a few factors
    and dims each. Where factors cannot be cut to fit (7 x 8 into 8 x 7), they are mixed and new ones take their place.
    """
    queue, dims = list(factors), list[list[Factor]]()
    group: list[int] = []
    for size in shape:
        group.append(size)
        taken, product = 0, 1
        while product < math.prod(group):
            product *= queue[taken].size
            taken += 1
        if product == math.prod(group):
            dims += _regroup(queue[:taken], group) or _mix(queue[:taken], group)
            queue, group = queue[taken:], []
    return dims


def _mix(factors: list[Factor], shape: list[int]) -> list[list[Factor]]:
    for leaf in _leaves(factors):
        leaf.mixed = True
    return [[Factor(size, mixed=True)] for size in shape]


def _regroup(factors: list[Factor], shape: list[int]) -> list[list[Factor]] | None:
    """Distribute factors over dims of the given sizes, cutting them where needed; ``None`` if they do not fit."""
    queue = list(factors)
    dims: list[list[Factor]] = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            factor = queue.pop(0)
            if factor.size > size:
                if factor.size % size:
                    return None
                factor.parts = [Factor(size, mixed=factor.mixed), Factor(factor.size // size, mixed=factor.mixed)]
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


def _reordered(axis: AxisRef, source: list[Factor], target: list[Factor]) -> Expression:
    if source == target:
        return axis
    grid = np.arange(math.prod(leaf.size for leaf in source)).reshape([leaf.size for leaf in source])
    order = grid.transpose([source.index(leaf) for leaf in target]).reshape(-1)
    return Take(axis, tuple(order.tolist()))

"""Assignment of nested groups, from the inside out: heads to heads, and inside each pair of heads dims to dims.

The similarity of block ``i`` of a with block ``j`` of b is what the best orders of the units inside them reach,

``S[i, j] = U[i, j] + sum over inner groups g of  max over orders P of  <M_g[i, j], P>``,

with ``U`` from what belongs to whole blocks alone; the outer assignment maximises the sum of ``S`` over the pairs.
Inner assignments are solved only for pairs that may be chosen: the others keep an upper bound (each unit with its best
partner), and when an outer assignment picks solved pairs only, it is optimal.

Where one order must serve all blocks, it is the best for the sum over the chosen pairs, and both are improved in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfsurgery.groups import GroupSet, Permutation, PermutationGroup
from vfsurgery.matching.assignment import assign

Matrix = NDArray[np.float64]

ENUMERATED = 4
"""Up to so many units inside a block all orders are tried, for all pairs of blocks at once."""
ROUNDS = 10
"""Most turns between outer orders and the orders that serve all blocks."""


@dataclass(frozen=True)
class Family:
    """An outer group with the groups inside its units; a group by itself has none."""

    outer: PermutationGroup
    inners: tuple[PermutationGroup, ...] = ()

    @property
    def groups(self) -> tuple[PermutationGroup, ...]:
        """All of its groups, the outer one first."""
        return (self.outer, *self.inners)

    @property
    def units(self) -> int:
        """Size of the largest assignment in it."""
        return max(self.outer.size * group.size if group.outer else group.size for group in self.groups)


def families(groups: GroupSet) -> list[Family]:
    """All groups as families, in the order of their outer groups."""
    inside: dict[str, list[PermutationGroup]] = {}
    for group in groups:
        if group.outer:
            inside.setdefault(group.outer, []).append(group)
    return [Family(group, tuple(inside.get(group.name, ()))) for group in groups if not group.outer]


@dataclass
class BlockAssignment:
    """Finds the orders of one family.

    ``outer`` is ``U``, or ``None``. ``inner`` has for each inner group the similarities of all units inside all blocks,
    ``(blocks * size, blocks * size)``, block by block; ``shared`` for those whose one order serves all blocks what is
    known beside the blocks, ``(size, size)`` or ``None``.
    """

    blocks: int
    outer: Tensor | None = None
    inner: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    shared: Mapping[str, Tensor | None] = field(default_factory=dict[str, "Tensor | None"])

    def __post_init__(self) -> None:
        self._whole = np.zeros((self.blocks, self.blocks)) if self.outer is None else _host(self.outer)
        self._pairs = {name: _blockwise(_host(matrix), self.blocks) for name, matrix in self.inner.items()}
        self._solved: dict[tuple[str, int, int], tuple[tuple[int, ...], float]] = {}

    def solve(self) -> dict[str, Permutation]:
        """The best orders: the outer group's under the name ``""``, inner ones by name."""
        order = self._outer_order(self._whole, list(self._pairs))
        best = self._orders_inside(order)
        if not self.shared:
            return best
        total = self.total(best)
        for _ in range(ROUNDS):  # now that the shared orders are known, the blocks may pair otherwise
            whole = self._whole + sum(self._under(name, best[name]) for name in self.shared)
            found = self._orders_inside(self._outer_order(whole, [n for n in self._pairs if n not in self.shared]))
            if (reached := self.total(found)) <= total:
                break
            best, total = found, reached
        return best

    def total(self, orders: Mapping[str, Permutation]) -> float:
        """The summed similarity that orders reach."""
        outer = np.asarray(orders[""].order)
        rows = np.arange(self.blocks)
        total = float(self._whole[rows, outer].sum())
        for name, pairs in self._pairs.items():
            size = pairs.shape[2]
            inner = np.asarray(_every_block(orders[name], self.blocks, size)).reshape(self.blocks, size) % size
            total += float(pairs[rows[:, None], outer[:, None], np.arange(size), inner].sum())
        for name, flat in self.shared.items():
            if flat is not None:
                total += float(_host(flat)[np.arange(len(flat)), np.asarray(orders[name].order)].sum())
        return total

    def _outer_order(self, whole: Matrix, names: list[str]) -> tuple[int, ...]:
        """The best assignment of blocks if the units inside each pair of them are ordered at their best."""
        if not names:
            return assign(torch.from_numpy(whole)).permutation.order
        values, solved = whole.copy(), np.ones(whole.shape, dtype=bool)
        for name in names:
            bound, exact = _bound(self._pairs[name])
            values += bound
            solved &= exact
        while True:
            order = assign(torch.from_numpy(values)).permutation.order
            open_pairs = [(i, j) for i, j in enumerate(order) if not solved[i, j]]
            if not open_pairs:
                return order
            for i, j in open_pairs:
                values[i, j] = whole[i, j] + sum(self._solve_pair(name, i, j)[1] for name in names)
                solved[i, j] = True

    def _orders_inside(self, outer: tuple[int, ...]) -> dict[str, Permutation]:
        orders = {"": Permutation(outer)}
        for name, pairs in self._pairs.items():
            if name in self.shared:
                chosen, flat = pairs[np.arange(self.blocks), np.asarray(outer)].sum(0), self.shared[name]
                matrix = torch.from_numpy(chosen if flat is None else chosen + _host(flat))
                orders[name] = assign(matrix).permutation
            else:
                inside = [self._solve_pair(name, i, j)[0] for i, j in enumerate(outer)]
                orders[name] = joined(inside)
        return orders

    def _under(self, name: str, order: Permutation) -> Matrix:
        """The similarity of each pair of blocks under one order for all of them."""
        return self._pairs[name][:, :, np.arange(order.size), np.asarray(order.order)].sum(-1)

    def _solve_pair(self, name: str, i: int, j: int) -> tuple[tuple[int, ...], float]:
        if (name, i, j) not in self._solved:
            found = assign(torch.from_numpy(self._pairs[name][i, j]))
            self._solved[name, i, j] = (found.permutation.order, found.total)
        return self._solved[name, i, j]


def joined(inside: list[tuple[int, ...]]) -> Permutation:
    """One order of all units from the orders inside each block.

    >>> joined([(1, 0), (0, 1)]).order
    (1, 0, 2, 3)
    """
    return Permutation(tuple(block * len(order) + unit for block, order in enumerate(inside) for unit in order))


def whole_order(outer: Permutation, inner: Permutation, size: int) -> Permutation:
    """The order of all units inside blocks that results when the blocks move and then the units inside each.

    >>> whole_order(Permutation((1, 0)), Permutation((0, 1, 3, 2)), 2).order
    (2, 3, 1, 0)
    """
    inside = _every_block(inner, outer.size, size)
    return Permutation(tuple(outer.order[place // size] * size + unit % size for place, unit in enumerate(inside)))


def _every_block(order: Permutation, blocks: int, size: int) -> tuple[int, ...]:
    """An order of all units, from one that serves all blocks if need be."""
    return order.order if order.size == blocks * size else joined([order.order] * blocks).order


def _host(matrix: Tensor) -> Matrix:
    return matrix.detach().to("cpu", torch.float64).numpy()


def _blockwise(matrix: Matrix, blocks: int) -> Matrix:
    """``(blocks * size, blocks * size)`` as ``(blocks of a, blocks of b, size, size)``."""
    size = len(matrix) // blocks
    return np.ascontiguousarray(matrix.reshape(blocks, size, blocks, size).transpose(0, 2, 1, 3))


def _bound(pairs: Matrix) -> tuple[Matrix, NDArray[np.bool_]]:
    """For each pair of blocks the best similarity, or a bound above it, and whether it is exact."""
    size = pairs.shape[2]
    if size <= ENUMERATED:
        units = np.arange(size)
        sums = (pairs[:, :, units, list(order)].sum(-1) for order in itertools.permutations(range(size)))
        return np.maximum.reduce(list(sums)), np.ones(pairs.shape[:2], dtype=bool)
    return np.minimum(pairs.max(3).sum(2), pairs.max(2).sum(2)), np.zeros(pairs.shape[:2], dtype=bool)

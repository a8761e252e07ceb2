"""Heads: which belong together, and the map of the units inside each pair.

They are paired by what does not depend on the matrices inside them: with ``M+`` of queries and ``M-`` of keys,
``<M+, M->`` is the product of both heads' ``W_q' W_k``. Inside a pair, both heads are brought to equal second moments
of their two sides, which leaves a rotation; the Procrustes problem of both sides together gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, UnitMap
from vfsurgery.groups import Member, PermutationGroup, Symmetry
from vfsurgery.matching.base import Gain
from vfsurgery.matching.nested import BlockAssignment
from vfsurgery.matching.similarity import is_matrix, member_rows
from vfsurgery.matching.streams import norms_of, procrustes, scaled
from vfsurgery.stats.correlation import CrossMoments, mean_correlation

TINY = 1e-13
"""Share of a mean second moment that is added to every direction, so that none is divided by nothing."""
LARGEST_CONDITION = 1e6
"""Of the map of a head: a worse one would drown units in rounding, and a rotation has to do."""

Shown = Mapping[str, Sequence[CrossMoments]]
"""Cross moments by group name, one for each place where its units are read."""


@dataclass(frozen=True)
class Heads:
    """Heads and the groups inside them; one head that no group numbers, where ``outer`` is ``None``."""

    outer: PermutationGroup | None
    inners: tuple[PermutationGroup, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.outer is None else self.outer.size

    @property
    def groups(self) -> tuple[PermutationGroup, ...]:
        """All of their groups."""
        return self.inners if self.outer is None else (self.outer, *self.inners)


class HeadMatching:
    """Heads of a, to which those of b are matched by weights, and by activations where there are any."""

    def __init__(
        self,
        heads: Heads,
        a: Mapping[str, Tensor],
        moments: Shown | None = None,
        duals: Mapping[str, Sequence[bool]] | None = None,
    ) -> None:
        self.heads, self.count = heads, heads.count
        self.mapped = [group for group in heads.inners if group.symmetry.is_continuous]
        self.ordered = [group for group in heads.inners if not group.symmetry.is_continuous]
        self.moments, self.duals, self.states = moments or {}, duals or {}, (a, a)
        self.own = {group.name: self._gauge(group, a) for group in self.mapped}

    def solve(self, b: Mapping[str, Tensor], gains: dict[str, Gain]) -> dict[str, Order]:
        """Pair the heads, then find the map of each pair."""
        self.states = (self.states[0], b)
        self.sides = {group.name: self._sides(group, self.duals.get(group.name, ())) for group in self.mapped}
        pairs, orders = ((0,), dict[str, Order]()) if self.heads.outer is None else self._pair(self.heads.outer, gains)
        return orders | {group.name: self._map(group, pairs) for group in self.mapped}

    def _pair(self, outer: PermutationGroup, gains: dict[str, Gain]) -> tuple[tuple[int, ...], dict[str, Order]]:
        """Which head belongs to which, with the orders of heads and of units that only have orders."""
        whole = torch.zeros(self.count, self.count, dtype=torch.float64)
        for group in self.mapped:
            score = _alike(*self.sides[group.name])
            whole += group.size * score / score.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        for member in outer.members:
            if self._alone(member):
                rows = [member_rows(state[member.parameter], member) for state in self.states]
                if len(rows[0]) == self.count:
                    whole += _normalized(*rows).to(whole)
        inner = {group.name: self._between(group) for group in self.ordered}
        shared = {group.name: None for group in self.ordered if group.blocks == 1}
        assignment = BlockAssignment(self.count, whole, inner, shared)
        solved = assignment.solve()
        name = outer.name
        unmoved = {"": outer.identity(), **{group.name: group.identity() for group in self.ordered}}
        before, after = (assignment.total(orders) / self.count for orders in (unmoved, solved))
        gains[name] = Gain(name, before, after, solved[""].moved)
        return solved[""].order, {name: solved[""], **{group.name: solved[group.name] for group in self.ordered}}

    def _sides(self, group: PermutationGroup, duals: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """``M+`` and ``M-`` of all pairs of heads, ``(heads, heads, size, size)``: of the units, and of their duals.

        Activations count where there are any, else weights.
        """
        readings = self.moments.get(group.name, ())
        found: list[Tensor] = []
        for side in (False, True):
            shown = [scaled(each) for each, dual in zip(readings, duals, strict=False) if dual is side]
            if not shown:
                shown = [_normalized(*rows) for rows in self._rows(group, side)]
            size = group.size * self.count
            total = torch.stack(shown).sum(0) if shown else torch.zeros(size, size, dtype=torch.float64)
            found.append(total.view(self.count, group.size, self.count, group.size).transpose(1, 2).cpu())
        return found[0], found[1]

    def _rows(self, group: PermutationGroup, dual: bool) -> list[tuple[Tensor, Tensor]]:
        """Both sources' weights, a row for each unit in each head."""
        a, b = self.states
        members = self._members(group, dual)
        return [(member_rows(a[m.parameter], m), member_rows(b[m.parameter], m)) for m in members]

    def _members(self, group: PermutationGroup, dual: bool) -> list[Member]:
        """Where the units of all heads lie in matrices."""
        a = self.states[0]
        members = [m for m in group.members if m.dual is dual and is_matrix(a[m.parameter]) and not m.scales]
        return [m for m in members if m.blocks == self.count]

    def _alone(self, member: Member) -> bool:
        """Whether a weight of the heads shows nothing of the units inside them."""
        inside = {other.parameter for group in self.heads.inners for other in group.members}
        return member.parameter not in inside and is_matrix(self.states[0][member.parameter])

    def _between(self, group: PermutationGroup) -> Tensor:
        """Similarity of units that have an order: correlations where there are any, else of their weights."""
        if group.name in self.moments:
            return mean_correlation(self.moments[group.name])
        rows = [pair for side in (False, True) for pair in self._rows(group, side)]
        size = group.size * self.count
        found = [_normalized(*pair) * size for pair in rows]
        return torch.stack(found).sum(0) if found else torch.zeros(size, size, dtype=torch.float64)

    def _map(self, group: PermutationGroup, pairs: Sequence[int]) -> UnitMap:
        """The map of the units in all heads, or the one that serves them all."""
        plus, minus = (side[range(self.count), list(pairs)] for side in self.sides[group.name])
        if group.blocks == 1:
            plus, minus = plus.sum(0, keepdim=True), minus.sum(0, keepdim=True)
        found = procrustes(_unit(plus) + _unit(minus), min(group.symmetry, Symmetry.ORTHOGONAL))
        own = self.own[group.name]
        other = None if own is None else self._gauge(group, self.states[1])
        if own is not None and other is not None:
            other = other[list(pairs)]
            back, other_back = torch.linalg.inv(own), torch.linalg.inv(other)
            plus = own @ plus @ other.transpose(1, 2)
            minus = back.transpose(1, 2) @ minus @ other_back
            balanced = back @ procrustes(_unit(plus) + _unit(minus)) @ other
            sound = torch.linalg.cond(balanced) < LARGEST_CONDITION
            found = torch.where(sound[:, None, None], balanced, found)
        return UnitMap(torch.block_diag(*found), torch.block_diag(*torch.linalg.inv(found)))

    def _gauge(self, group: PermutationGroup, state: Mapping[str, Tensor]) -> Tensor | None:
        """What balances each head of a source, ``(heads, size, size)``; nothing where not all is free."""
        sides = [self._members(group, side) for side in (False, True)]
        if group.symmetry is not Symmetry.GENERAL_LINEAR or group.blocks < self.count or not all(sides):
            return None
        rows = [[member_rows(state[member.parameter], member) for member in members] for members in sides]
        return _balance(*(torch.stack([_gram(each, self.count) for each in side]).sum(0) for side in rows))


def _alike(plus: Tensor, minus: Tensor) -> Tensor:
    """How alike pairs of heads are whatever matrices are inside them, ``(heads, heads)``."""
    if bool(plus.any()) and bool(minus.any()):
        return (plus * minus).sum((2, 3))
    return torch.linalg.svdvals(plus + minus).sum(-1)


def _normalized(a: Tensor, b: Tensor) -> Tensor:
    """``a b'`` over both norms, in float64: what is ill-conditioned inside heads would multiply its rounding."""
    a, b = a.double(), b.double()
    return (a @ b.T) / norms_of(a, b)


def _unit(cross: Tensor) -> Tensor:
    """Each matrix over its norm."""
    return cross / cross.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _gram(rows: Tensor, count: int) -> Tensor:
    """Second moments of the units inside each head, ``(heads, size, size)``."""
    inside = rows.double().cpu().view(count, -1, rows.shape[1])
    return inside @ inside.transpose(1, 2)


def _balance(plus: Tensor, minus: Tensor) -> Tensor | None:
    """``T`` so that ``T P T' = T^-T D T^-1``, diagonal; ``None`` where a head has a side without any weight."""
    size = plus.shape[-1]
    floor = TINY * torch.eye(size, dtype=plus.dtype)
    lower, failed = torch.linalg.cholesky_ex(plus + floor * plus.diagonal(dim1=1, dim2=2).mean(1)[:, None, None])
    if bool(failed.any()):
        return None
    values, vectors = torch.linalg.eigh(lower.transpose(1, 2) @ minus @ lower)
    if bool((values[:, -1] <= 0).any()):
        return None
    scales = values.clamp_min(TINY * values[:, -1:]) ** 0.25
    return scales[:, :, None] * (vectors.transpose(1, 2) @ torch.linalg.inv(lower))

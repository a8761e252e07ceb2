"""Matching where more than orders is free: streams that may be rotated, heads whose inner units any matrix may map.

A permutation pairs units one by one. Where the network allows it (:mod:`vfsurgery.discovery.symmetries`) the best
rotation fits all of them at once: of the cross products ``M = sum of x_a x_b'`` of what is to agree, ``Q = U V'`` with
``U S V' = svd(M)`` maximises ``<Q, M>`` (Schönemann's orthogonal Procrustes problem, 1966); so that ones stay, the same
within what is orthogonal to them.

- A *stream* is a space by itself, between LayerNorms. With data it is read behind the norms, where scale and mean are
  out of the way. Without, its first rotation is found by what has a fixed other side (pixels, positions, classes); then
  rotation, heads and orders take turns until nothing improves.
- *Heads* are paired by what does not depend on the matrices inside them: with ``M+`` of queries and ``M-`` of keys,
  ``<M+, M->`` is the product of both heads' ``W_q' W_k``. Inside a pair, both heads are brought to equal second moments
  of their two sides, which leaves a rotation; the Procrustes problem of both sides together gives it.

All else is matched as before, on weights that these maps have been applied to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, UnitMap, map_tensor
from vfsurgery.groups import GroupSet, Member, PermutationGroup, Symmetry
from vfsurgery.groups.symmetries import complement_of_ones
from vfsurgery.matching.base import Gain, Matching, Problem
from vfsurgery.matching.nested import BlockAssignment, families
from vfsurgery.matching.pairwise import mean_state
from vfsurgery.matching.schemes import Scheme
from vfsurgery.matching.similarity import States, is_matrix, member_rows
from vfsurgery.stats.correlation import CrossMoments, mean_correlation
from vfsurgery.tracing.precision import as_real

TURNS, SETTLED = 30, 1e-3
"""Rounds of streams, heads and orders at most; they end when one closes less than this share of what is left."""
EQUAL = 1e-10
"""What is left of two sources that are the same."""
ROUNDS = 3
"""How often each of more than two sources is matched to the mean of all others."""
TINY = 1e-13
"""Share of a mean second moment that is added to every direction, so that none is divided by nothing."""
LARGEST_CONDITION = 1e6
"""Of the map of a head: a worse one would drown units in rounding, and a rotation has to do."""

Moments = Mapping[str, Sequence[CrossMoments]]
Orders = Mapping[str, Order]
Rest = Callable[[Problem, Orders], Matching]
"""Matches, of the states of a problem, the groups that only have orders, beginning with some if there are any."""


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


@dataclass(frozen=True)
class Parts:
    """Groups by how they are matched: streams, heads with units that are mapped inside, and all others.

    A space that any matrix may map is a single head; where it meets another such space, as between linear layers that
    follow each other, nothing tells the two matrices apart, and it is reordered.
    """

    streams: tuple[PermutationGroup, ...]
    heads: tuple[Heads, ...]
    rest: GroupSet

    @staticmethod
    def of(groups: GroupSet) -> Parts:
        """Sort the groups of an architecture."""
        plain = [group for group in groups if group.symmetry.is_continuous and not group.outer]
        plain = [
            group for group in plain if group.symmetry < Symmetry.GENERAL_LINEAR or not _beside_free(group, groups)
        ]
        streams = tuple(group for group in plain if group.symmetry is not Symmetry.GENERAL_LINEAR)
        several = [each for each in families(groups) if any(g.symmetry.is_continuous for g in each.inners)]
        heads = (
            *(Heads(each.outer, each.inners) for each in several),
            *(Heads(None, (group,)) for group in plain if group not in streams),
        )
        taken = {group.name for group in (*streams, *(group for each in heads for group in each.groups))}
        return Parts(streams, heads, GroupSet(tuple(group for group in groups if group.name not in taken)))

    def rest_alone(self) -> GroupSet:
        """The others, without weights that heads lie in, too: nothing is known of these at first."""
        inside = {m.parameter for each in self.heads for group in each.groups for m in group.members}
        return GroupSet(
            tuple(
                replace(group, members=tuple(m for m in group.members if m.parameter not in inside) or group.members)
                for group in self.rest
            )
        )

    @property
    def any(self) -> bool:
        """Whether there is anything to be mapped."""
        return bool(self.streams or self.heads)


def _beside_free(group: PermutationGroup, groups: GroupSet) -> bool:
    """Whether a weight of the group lies in another one, too, that any matrix may map."""
    return any(
        owner.symmetry is Symmetry.GENERAL_LINEAR and other.dim != member.dim
        for member in group.members
        for owner, other in groups.by_parameter[member.parameter]
    )


def turn_by_weights(problem: Problem, source: int, rest: Rest) -> Matching:
    """Match one source to the first by their weights, in canonical form.

    Args:
        problem: As for :meth:`Matcher.match`.
        source: Which of ``problem.states``.
        rest: Matches what only has orders.
    """
    groups, parts = problem.groups, Parts.of(problem.groups)
    a, b = problem.states[0], problem.states[source]
    streams: dict[str, Order] = {}
    for stream in parts.streams:  # each begins where all that it meets is known
        streams[stream.name] = _turned(stream, _evidence(stream, groups, (a, b), streams, known_only=True)).map
    gains = dict[str, Gain]()
    first = rest(replace(problem, groups=parts.rest_alone(), states=(a, mapped_state(groups, b, streams))), {})
    orders, inside, reached = dict(first.permutations), dict[str, Order](), -1.0
    for turn in range(TURNS):
        problem.advance(f"turn {turn + 1}")
        seen = mapped_state(groups, b, {**streams, **orders})
        for heads in parts.heads:
            inside |= _HeadMatching(heads, (a, seen), {}, {}).solve(gains)
        seen = mapped_state(groups, b, {**streams, **inside})
        others = rest(replace(problem, groups=parts.rest, states=(a, seen)), orders)
        orders = dict(others.permutations)
        gains |= {gain.group: gain for gain in others.gains}
        arranged = mapped_state(groups, b, {**orders, **inside})
        for stream in parts.streams:
            found = _turned(stream, _evidence(stream, groups, (a, arranged), streams))
            streams[stream.name], gains[stream.name] = found.map, found.gain
        before, reached = reached, _agreement(groups, a, mapped_state(groups, b, {**streams, **orders, **inside}))
        if reached - before <= max(SETTLED * (1 - before), EQUAL):
            break
    return Matching({**streams, **orders, **inside}, tuple(gains.values()))


def turn_all_by_weights(problem: Problem, rest: Rest, scheme: Scheme) -> list[Matching]:
    """Match every source after the first by their weights, in canonical form.

    ``"reference"`` matches each to the first, ``"sequential"`` to the aligned one before it, and ``"iterative"`` begins
    as the first of these, then matches each to the mean of all other aligned ones, for a few rounds.
    """
    groups, states = problem.groups, problem.states
    aligned, found = [states[0]], list[Matching]()
    for source in range(1, len(states)):
        goal = aligned[-1] if scheme == "sequential" else states[0]
        found.append(turn_by_weights(replace(problem, states=(goal, states[source])), 1, rest))
        aligned.append(mapped_state(groups, states[source], found[-1].permutations))
    for _ in range(ROUNDS if scheme == "iterative" and len(states) > 2 else 0):
        for source in range(1, len(states)):
            others = [state for number, state in enumerate(aligned) if number != source]
            goal = mean_state(groups, others, [{}] * len(others))
            found[source - 1] = turn_by_weights(replace(problem, states=(goal, states[source])), 1, rest)
            aligned[source] = mapped_state(groups, states[source], found[source - 1].permutations)
    return found


def turn_by_activations(
    problem: Problem, source: int, moments: Moments, duals: Mapping[str, Sequence[bool]], rest: Rest
) -> Matching:
    """Match one source to the first on cross moments of their units, and by weights where none shows them.

    Args:
        problem: As for :meth:`Matcher.match`.
        source: Which of ``problem.states``.
        moments: By group name, one for each place where its units are read.
        duals: For each of them whether the units there are mapped by the inverse transposed.
        rest: Matches what only has orders.
    """
    groups, parts = problem.groups, Parts.of(problem.groups)
    a, b = problem.states[0], problem.states[source]
    streams, gains = dict[str, Order](), dict[str, Gain]()
    for stream in parts.streams:
        shown = moments.get(stream.name)
        if shown is None:
            found = _turned(stream, _evidence(stream, groups, (a, b), streams, known_only=True))
        else:
            found = _turned(stream, _crossed(shown))
        streams[stream.name], gains[stream.name] = found.map, found.gain
    seen = mapped_state(groups, b, streams)
    others = rest(replace(problem, groups=parts.rest, states=(a, seen)), {})
    gains |= {gain.group: gain for gain in others.gains}
    seen = mapped_state(groups, seen, others.permutations)
    inside: dict[str, Order] = {}
    for heads in parts.heads:
        problem.advance(str(heads.groups[0]))
        inside |= _HeadMatching(heads, (a, seen), moments, duals).solve(gains)
    return Matching({**streams, **others.permutations, **inside}, tuple(gains.values()))


class Mapped(Mapping[str, Tensor]):
    """Weights under orders and maps, each made when it is first asked for."""

    def __init__(self, groups: GroupSet, state: Mapping[str, Tensor], orders: Orders) -> None:
        self.groups, self.state, self.orders = groups, state, orders
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = map_tensor(name, self.state[name], self.groups, self.orders)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def mapped_state(groups: GroupSet, state: Mapping[str, Tensor], orders: Orders) -> Mapping[str, Tensor]:
    """Weights under orders and maps; those that nothing moves are the same tensors."""
    return Mapped(groups, state, dict(orders)) if orders else state


def _agreement(groups: GroupSet, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Mean cosine of all matrices that lie in groups."""
    names = [name for name in groups.by_parameter if is_matrix(a[name])]
    flat = ((as_real(a[name]).flatten().double(), as_real(b[name]).flatten().double()) for name in names)
    cosines = [torch.cosine_similarity(mine, theirs, dim=0) for mine, theirs in flat]
    return float(torch.stack(cosines).mean()) if cosines else 1.0


def procrustes(cross: Tensor, symmetry: Symmetry = Symmetry.ORTHOGONAL) -> Tensor:
    """The orthogonal ``Q`` with the largest ``<Q, M>``, so that ``x_a ~ Q x_b`` for ``M = sum of x_a x_b'``.

    Args:
        cross: ``(..., d, d)`` in float64.
        symmetry: ``ORTHOGONAL_FIXING_ONES`` keeps ones where they are.

    >>> turn = Symmetry.ORTHOGONAL.random(3, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(procrustes(turn @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())), turn))
    True
    """
    if symmetry is Symmetry.ORTHOGONAL_FIXING_ONES:
        size = cross.shape[-1]
        basis = complement_of_ones(size).to(cross.device)
        return basis @ procrustes(basis.T @ cross @ basis) @ basis.T + 1 / size
    left, _, right = torch.linalg.svd(cross)
    return left @ right


@dataclass(frozen=True)
class _Found:
    map: UnitMap
    gain: Gain


def _turned(group: PermutationGroup, cross: Tensor | None) -> _Found:
    """The best rotation of one space, and what it gains; none where nothing is known of it."""
    if cross is None or not bool(cross.any()):
        return _Found(UnitMap.of(group.identity()), Gain(group.name, 0.0, 0.0, 0))
    turn = procrustes(cross, min(group.symmetry, Symmetry.ORTHOGONAL))
    before, after = float(cross.diagonal().sum()), float((turn * cross).sum())
    found = UnitMap(turn, turn.T)
    return _Found(found, Gain(group.name, before, after, found.moved))


def _evidence(
    group: PermutationGroup, groups: GroupSet, states: States, streams: Orders, known_only: bool = False
) -> Tensor | None:
    """Cross products of the weights that write or read a space, each divided by its norms.

    Args:
        group: The space.
        groups: All groups of the architecture.
        states: The weights of both, those of b without any rotation.
        streams: Rotations of spaces; that of this one does not count.
        known_only: Leave out weights that touch other groups than ``streams`` has.
    """
    a, b = states
    others = {name: order for name, order in streams.items() if name != group.name}
    total: Tensor | None = None
    for name in dict.fromkeys(member.parameter for member in group.members):
        partners = {owner.name for owner, _ in groups.by_parameter[name]} - {group.name}
        if not is_matrix(a[name]) or (known_only and not partners <= others.keys()):
            continue
        mine, theirs = a[name], map_tensor(name, b[name], groups, others)
        for member in (member for member in group.members if member.parameter == name and not member.scales):
            cross = _normalized(member_rows(mine, member), member_rows(theirs, member))
            total = cross if total is None else total.add_(cross)
    return total


def _crossed(moments: Sequence[CrossMoments]) -> Tensor:
    """Cross products about the means of all places, each divided by its norms."""
    return torch.stack([_scaled(each) for each in moments]).sum(0)


def _scaled(moments: CrossMoments) -> Tensor:
    norms = (moments.a.squares.sum() * moments.b.squares.sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return moments.products.double() / norms


def _normalized(a: Tensor, b: Tensor) -> Tensor:
    """``a b'`` over both norms, in float64: what is ill-conditioned inside heads would multiply its rounding."""
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    return (a @ b.T) / norms.clamp_min(torch.finfo(torch.float64).tiny)


class _HeadMatching:
    """Heads of both sources: what both sources' weights and activations say of pairs of them."""

    def __init__(self, heads: Heads, states: States, moments: Moments, duals: Mapping[str, Sequence[bool]]) -> None:
        self.heads, self.states, self.count = heads, states, heads.count
        self.mapped = [group for group in heads.inners if group.symmetry.is_continuous]
        self.ordered = [group for group in heads.inners if not group.symmetry.is_continuous]
        self.moments = moments
        self.sides = {group.name: self._sides(group, duals.get(group.name, ())) for group in self.mapped}

    def solve(self, gains: dict[str, Gain]) -> dict[str, Order]:
        """Pair the heads, then find the map of each pair."""
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
            shown = [_scaled(each) for each, dual in zip(readings, duals, strict=False) if dual is side]
            if not shown:
                shown = [_normalized(*rows) for rows in self._rows(group, side)]
            size = group.size * self.count
            total = torch.stack(shown).sum(0) if shown else torch.zeros(size, size, dtype=torch.float64)
            found.append(total.view(self.count, group.size, self.count, group.size).transpose(1, 2).cpu())
        return found[0], found[1]

    def _rows(self, group: PermutationGroup, dual: bool) -> list[tuple[Tensor, Tensor]]:
        """Both sources' weights, a row for each unit in each head."""
        a, b = self.states
        members = [m for m in group.members if m.dual is dual and is_matrix(a[m.parameter]) and not m.scales]
        members = [m for m in members if m.blocks == self.count]
        return [(member_rows(a[m.parameter], m), member_rows(b[m.parameter], m)) for m in members]

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
        gauges = self._gauges(group, pairs)
        if gauges is not None:
            own, other = gauges
            back, other_back = torch.linalg.inv(own), torch.linalg.inv(other)
            plus = own @ plus @ other.transpose(1, 2)
            minus = back.transpose(1, 2) @ minus @ other_back
            balanced = back @ procrustes(_unit(plus) + _unit(minus)) @ other
            sound = torch.linalg.cond(balanced) < LARGEST_CONDITION
            found = torch.where(sound[:, None, None], balanced, found)
        return UnitMap(torch.block_diag(*found), torch.block_diag(*torch.linalg.inv(found)))

    def _gauges(self, group: PermutationGroup, pairs: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """What balances each head of a and its partner of b, ``(heads, size, size)``; nothing where not all is free."""
        sides = [self._rows(group, side) for side in (False, True)]
        if group.symmetry is not Symmetry.GENERAL_LINEAR or group.blocks < self.count or not all(sides):
            return None
        own, other = (
            _balance(*(torch.stack([_gram(pair[source], self.count) for pair in rows]).sum(0) for rows in sides))
            for source in (0, 1)
        )
        return None if own is None or other is None else (own, other[list(pairs)])


def _alike(plus: Tensor, minus: Tensor) -> Tensor:
    """How alike pairs of heads are whatever matrices are inside them, ``(heads, heads)``."""
    if bool(plus.any()) and bool(minus.any()):
        return (plus * minus).sum((2, 3))
    return torch.linalg.svdvals(plus + minus).sum(-1)


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

"""Matching where more than orders is free: streams that may be rotated, heads whose inner units any matrix may map.

A permutation pairs units one by one. Where the network allows it (:mod:`vfsurgery.discovery.symmetries`) the best
rotation fits all of them at once.

- A *stream* is a space by itself, between LayerNorms (:mod:`vfsurgery.matching.streams`). With data it is read behind
  the norms, where scale and mean are out of the way. Without, its first rotation is found by what has a fixed other
  side (pixels, positions, classes); then rotation, heads and orders take turns until nothing improves.
- *Heads* are paired, and the units inside each pair mapped (:mod:`vfsurgery.matching.heads`).

All else is matched as before, on weights that these maps have been applied to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, UnitMap, map_tensor
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, Symmetry
from vfsurgery.matching.base import Gain, Matching, Problem
from vfsurgery.matching.heads import HeadMatching, Heads, Shown
from vfsurgery.matching.nested import families, whole_order
from vfsurgery.matching.pairwise import mean_state
from vfsurgery.matching.schemes import Scheme
from vfsurgery.matching.similarity import is_matrix
from vfsurgery.matching.streams import Orders, best_turn, crossed, evidence, scaled
from vfsurgery.stats.correlation import CrossMoments
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.precision import as_real

TURNS, SETTLED = 30, 1e-3
"""Rounds of streams, heads and orders at most; they end when one closes less than this share of what is left."""
EQUAL = 1e-10
"""What is left of two sources that are the same."""
ROUNDS = 3
"""How often each of more than two sources is matched to the mean of all others."""

Rest = Callable[[Problem, Orders], Matching]
"""Matches, of the states of a problem, the groups that only have orders, beginning with some if there are any."""
Fit = Callable[[int, Sequence[int], Sequence[Orders]], Matching]
"""Matches one source to the mean of others, given what all are brought to."""


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
        streams[stream.name] = best_turn(stream, evidence(stream, groups, (a, b), streams, known_only=True)).map
    gains = dict[str, Gain]()
    turned = mapped_state(groups, b, streams)
    first = rest(replace(problem, groups=parts.rest_alone(), states=(a, turned)), {})
    orders, inside, left = dict(first.permutations), dict[str, Order](), 2.0
    matchings = [HeadMatching(heads, a) for heads in parts.heads]
    for turn in range(TURNS):
        problem.advance(f"turn {turn + 1}")
        seen = mapped_state(groups, turned, orders)
        for heads in matchings:
            inside |= heads.solve(seen, gains)
        seen = mapped_state(groups, turned, inside)
        others = rest(replace(problem, groups=parts.rest, states=(a, seen)), orders)
        orders = dict(others.permutations)
        gains |= {gain.group: gain for gain in others.gains}
        for stream in parts.streams:
            found = best_turn(stream, evidence(stream, groups, (a, b), {**streams, **orders, **inside}))
            streams[stream.name], gains[stream.name] = found.map, found.gain
        turned = mapped_state(groups, b, streams)
        before, left = left, _apart(groups, a, turned, {**orders, **inside})
        if before - left <= max(SETTLED * before, EQUAL):
            break
    return Matching({**streams, **orders, **inside}, tuple(gains.values()))


def turn_all_by_weights(problem: Problem, rest: Rest, scheme: Scheme) -> list[Matching]:
    """Match every source after the first by their weights, in canonical form; see :func:`turn_all`."""

    def fit(source: int, others: Sequence[int], found: Sequence[Orders]) -> Matching:
        goal = mean_of(problem, others, found)
        return turn_by_weights(replace(problem, states=(goal, problem.states[source])), 1, rest)

    return turn_all(len(problem.states), scheme, fit)


def turn_all(sources: int, scheme: Scheme, fit: Fit) -> list[Matching]:
    """Match every source after the first.

    ``"reference"`` matches each to the first, ``"sequential"`` to the aligned one before it, and ``"iterative"`` begins
    as the first of these, then matches each to the mean of all other aligned ones, for a few rounds.
    """
    found = [Matching({})]
    for source in range(1, sources):
        others = [source - 1 if scheme == "sequential" else 0]
        found.append(fit(source, others, [matching.permutations for matching in found]))
    for _ in range(ROUNDS if scheme == "iterative" and sources > 2 else 0):
        for source in range(1, sources):
            others = [other for other in range(sources) if other != source]
            found[source] = fit(source, others, [matching.permutations for matching in found])
    return found[1:]


def mean_of(problem: Problem, sources: Sequence[int], found: Sequence[Orders]) -> Mapping[str, Tensor]:
    """The mean weights of some sources, each brought to what was found for it."""
    return mean_state(problem.groups, [problem.states[n] for n in sources], [found[n] for n in sources])


def mean_moments(
    groups: GroupSet,
    others: Sequence[tuple[Shown, Orders]],
    duals: Mapping[str, Sequence[bool]],
) -> dict[str, tuple[CrossMoments, ...]]:
    """Cross moments of a source with the mean of others, as if all were scaled alike: of each, and what brings it here.

    Args:
        groups: The groups of the architecture.
        others: For each of them its cross moments with the source, by group, and what its units are brought to.
        duals: As for :func:`turn_by_activations`.
    """
    first, _ = others[0]
    return {
        name: tuple(
            _mean_moments(groups[name], [(shown[name][place], orders) for shown, orders in others], dual)
            for place, dual in zip(range(len(first[name])), duals.get(name) or itertools.repeat(False), strict=False)
        )
        for name in first
    }


def _mean_moments(group: PermutationGroup, others: Sequence[tuple[CrossMoments, Orders]], dual: bool) -> CrossMoments:
    """The same for the units of one group at one place; what they are scaled to has unit moments."""
    total: Tensor | None = None
    is_mapped = any(isinstance(orders.get(group.name), UnitMap) for _, orders in others)
    for moments, orders in others:
        products = scaled(moments) * len(moments.products) if is_mapped else moments.correlation()
        outer, order = orders.get(group.outer), orders.get(group.name)
        every, blocks = (Permutation(tuple(range(n))) for n in (len(products), len(products) // group.size))
        if isinstance(outer, Permutation):
            products = products[list(whole_order(outer, every, group.size).order)]
        if isinstance(order, Permutation):
            products = products[list(whole_order(blocks, order, group.size).order)]
        elif isinstance(order, UnitMap):  # of all blocks, or one that serves each
            matrix = (order.unmerge.T if dual else order.merge).to(products)
            products = (matrix @ products.reshape(-1, len(matrix), products.shape[1])).view(products.shape)
        total = products if total is None else total.add_(products)
    assert total is not None
    ones = torch.ones(len(total), dtype=torch.float64, device=total.device)
    unit = Moments(1, torch.zeros_like(ones), ones)
    return CrossMoments(unit, unit, total.div_(len(others)))


def turn_by_activations(
    problem: Problem, source: int, moments: Shown, duals: Mapping[str, Sequence[bool]], rest: Rest
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
        cross = evidence(stream, groups, (a, b), streams, known_only=True) if shown is None else crossed(shown)
        found = best_turn(stream, cross)
        streams[stream.name], gains[stream.name] = found.map, found.gain
    seen = mapped_state(groups, b, streams)
    others = rest(replace(problem, groups=parts.rest, states=(a, seen)), {})
    gains |= {gain.group: gain for gain in others.gains}
    seen = mapped_state(groups, seen, others.permutations)
    inside: dict[str, Order] = {}
    for heads in parts.heads:
        problem.advance(str(heads.groups[0]))
        inside |= HeadMatching(heads, a, moments, duals).solve(seen, gains)
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


def _apart(groups: GroupSet, a: Mapping[str, Tensor], b: Mapping[str, Tensor], orders: Orders) -> float:
    """How far matrices that lie in groups are from those of b under ``orders``: the mean of one less their cosine."""
    names = [name for name in groups.by_parameter if is_matrix(a[name])]
    pairs = ((as_real(a[name]), as_real(map_tensor(name, b[name], groups, orders))) for name in names)
    return sum(_distance(*pair) for pair in pairs) / max(len(names), 1)


def _distance(a: Tensor, b: Tensor) -> float:
    """One less the cosine; of a difference, which float32 tells to the last."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    tiny = torch.finfo(dtype).tiny
    return float((a / a.norm().clamp_min(tiny)).sub_(b / b.norm().clamp_min(tiny)).norm().double().square()) / 2

"""Weight matching: reorder units so that the parameters themselves agree, without any data.

Maximise ``sum over parameters <a, P(b)>`` over the orders of all groups by coordinate descent (Ainsworth et al., "Git
Re-Basin", 2023, Alg. 1). With all other groups fixed the best order of one group is a linear assignment on

``A = sum over members  mat(a) mat(P_others(b))^T``,

where ``mat`` brings the group's units to the rows. A family of nested groups is assigned at once, from the inside out
(:mod:`vfsurgery.matching.nested`). The first sweep follows the model from its input on and looks at no parameter of a
group that has no order yet; later sweeps visit large groups before small ones, equal ones in fresh random orders. A
large group is the dearest to solve and touches the most parameters, so what others gain after it should not send it
round again: on two ResNet-50 this saves a fifth of the time against wholly random orders.

Only parameters of two and more dims count. Biases, norm parameters and running statistics have few numbers per unit
but large ones, and lead astray: they cost the trained ResNet-18 pair of docs/benchmarks/pairs.py three to five points.
Networks of a few units are matched from several starts, since few numbers decide in them.

Two things make it fast without changing the answer. ``A`` is kept, and when other groups have moved only the columns
that changed are put right: a product over the moved units instead of all of them. And a group is solved again only if
it can gain: its order ``P`` was best for the old ``A``, so when ``A`` changes by ``D`` no order can gain more than
``sum over rows of (max of D - D at P)``, and after several changes no more than the sum of these bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, permutations_of
from vfsurgery.groups import GroupSet, Permutation, Permutations, random_permutations
from vfsurgery.matching.base import MATCHERS, Gain, Matching, Problem, Symmetries, check_symmetries
from vfsurgery.matching.family_orders import PRIOR, FamilyProblem
from vfsurgery.matching.nested import families
from vfsurgery.matching.pairwise import gains_of_all, mean_state, pairwise_similarity
from vfsurgery.matching.schemes import DEFAULT, MAX_ROUNDS, Scheme, align, check_scheme, units_in_order
from vfsurgery.matching.similarity import States, columns
from vfsurgery.matching.turning import Parts, turn_all_by_weights

MAX_SWEEPS, TOLERANCE = 100, 3e-3
FEW_UNITS, STARTS = 128, 12
"""Networks of so few units are matched from so many random orders, too."""
EQUAL = 1e-6
"""Similarities (cosines) that differ by less are equal."""


@MATCHERS.register("weights")
@dataclass(frozen=True)
class WeightMatching:
    """Pair units by their parameters, by coordinate descent over the groups.

    ``tolerance`` is the smallest relative gain of a group's similarity that counts as an improvement; the descent ends
    when no group can improve by more, or after ``max_sweeps``.

    Two networks of at most 128 units are matched from as many random orders as ``starts`` says, too, and the most
    similar result counts: where a few numbers decide, a descent may end in orders that no single group can improve.

    ``scheme`` says whom each of more than two sources is matched to: ``"reference"`` the first one, ``"sequential"``
    the aligned one before it, ``"iterative"`` the mean of all other aligned ones, again and again until none moves or
    for ``max_rounds`` (:mod:`vfsurgery.matching.schemes`). The last one raises ``sum over pairs i < j of
    <P_i(i), P_j(j)>`` and never lowers it.

    With ``symmetries="all"`` spaces that allow more than orders are mapped by matrices, streams of transformers and the
    insides of heads (:mod:`vfsurgery.matching.turning`); ``"permutations"`` reorders these, too.

    Raises:
        OptionError: there is no such scheme or choice of symmetries, or no round is allowed.

    >>> WeightMatching(scheme="sequential").scheme
    'sequential'
    """

    max_sweeps: int = MAX_SWEEPS
    tolerance: float = TOLERANCE
    scheme: Scheme = DEFAULT
    max_rounds: int = MAX_ROUNDS
    starts: int = STARTS
    symmetries: Symmetries = "all"
    name: str = field(default="weights", init=False)
    needs_data: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_scheme(self.scheme, self.max_rounds)
        if check_symmetries(self.symmetries) == "permutations":
            object.__setattr__(self, "name", "weights, orders only")

    def match(self, problem: Problem) -> list[Matching]:
        """Orders of every source after the first; the order of visits comes from ``problem.seed``.

        Gains are similarities to the first source; for more than two sources, under a scheme other than
        ``"reference"``, to the mean of all others.
        """
        sources = range(len(problem.states))
        if self.symmetries == "all" and Parts.of(problem.groups).any:
            return turn_all_by_weights(problem, self._rest, self.scheme)
        if self.scheme == "reference" or len(sources) == 2:
            return [
                match_rest(problem, source, {}, self.max_sweeps, self.tolerance, self.starts) for source in sources[1:]
            ]
        known = [{} for _ in sources]
        options = (self.max_rounds, self.max_sweeps, self.tolerance, self.starts)
        return match_rest_of_all(problem, known, self.scheme, *options)[1:]

    def _rest(self, problem: Problem, orders: Mapping[str, Order]) -> Matching:
        """Match what only has orders, from those that it has."""
        names = {group.name for group in problem.groups}
        start = permutations_of({name: order for name, order in orders.items() if name in names})
        if start:
            descent = _Descent(problem.groups, _both(problem), self.tolerance, {}, start)
            return descent.run(problem, self.max_sweeps)
        return match_rest(problem, 1, {}, self.max_sweeps, self.tolerance, self.starts)


def _both(problem: Problem) -> States:
    a, b = problem.states
    return a, b


def match_rest(
    problem: Problem,
    source: int,
    known: Mapping[str, Permutation],
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
    starts: int = STARTS,
) -> Matching:
    """Match one source to the first by their weights, the orders of some groups being known and kept.

    Args:
        problem: As for :meth:`Matcher.match`.
        source: Which of ``problem.states``.
        known: Orders by group name.
        max_sweeps: As in :class:`WeightMatching`.
        tolerance: As in :class:`WeightMatching`.
        starts: As in :class:`WeightMatching`.

    Returns:
        Orders of all groups, the known ones among them; gains of those that were found.
    """
    states = (problem.states[0], problem.states[source])
    return _descend(problem, problem.groups, states, known, max_sweeps, tolerance, starts)


def match_open(
    problem: Problem, groups: GroupSet, states: States, known: Permutations, losses: Mapping[str, Tensor]
) -> Matching:
    """Match by weights what activations leave open.

    Args:
        problem: As for :meth:`Matcher.match`.
        groups: The open groups, or the open units of each.
        states: Parameters of both, all else in order.
        known: Orders of some of the groups, which are kept.
        losses: ``(units, units)`` by group name: what pairing units otherwise loses in correlation, below zero. The
            units of nested groups are those of all blocks.
    """
    return _descend(problem, groups, states, known, MAX_SWEEPS, TOLERANCE, STARTS, losses)


def _descend(
    problem: Problem,
    groups: GroupSet,
    states: States,
    known: Permutations,
    max_sweeps: int,
    tolerance: float,
    starts: int,
    losses: Mapping[str, Tensor] | None = None,
) -> Matching:
    """The most similar of what descents from several starts come to; of one where there are many units."""
    generator, losses = problem.generator(), losses or {}

    def descend(start: Permutations | None) -> tuple[float, Matching]:
        matching = _Descent(groups, states, tolerance, known, start, losses).run(problem, max_sweeps)
        found = permutations_of(matching.permutations)
        lost = sum(
            float(loss.gather(1, columns(units_in_order(groups[name], found), loss)).sum())
            for name, loss in losses.items()
        )
        return pairwise_similarity(groups, states, [{}, found]) + PRIOR * lost, matching

    if sum(group.units for group in problem.groups) > FEW_UNITS:
        return _Descent(groups, states, tolerance, known, losses=losses).run(problem, max_sweeps)
    best = descend(None)
    for _ in range(starts):
        if best[0] >= 1 - EQUAL:
            break
        other = descend({**random_permutations(groups, generator), **known})
        best = other if other[0] > best[0] + EQUAL else best
    return best[1]


def match_rest_of_all(
    problem: Problem,
    known: Sequence[Permutations],
    scheme: Scheme,
    max_rounds: int = MAX_ROUNDS,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
    starts: int = STARTS,
) -> list[Matching]:
    """Match all sources by their weights, the orders of some groups being known and kept; as :func:`match_rest`.

    Args:
        problem: As for :meth:`Matcher.match`.
        known: For every source orders by group name; those of the first are identities.
        scheme: As in :class:`WeightMatching`.
        max_rounds: As in :class:`WeightMatching`.
        max_sweeps: As in :class:`WeightMatching`.
        tolerance: As in :class:`WeightMatching`.
        starts: As in :class:`WeightMatching`, for sources that have no order yet.

    Returns:
        One for every source, the first one included, which keeps its order.
    """
    groups, states = problem.groups, problem.states

    def fit(source: int, others: Sequence[int], found: Sequence[Permutations]) -> Permutations:
        mean = mean_state(groups, [states[other] for other in others], [found[other] for other in others])
        if not found[source]:
            matching = _descend(problem, groups, (mean, states[source]), known[source], max_sweeps, tolerance, starts)
        else:
            descent = _Descent(groups, (mean, states[source]), tolerance, known[source], found[source])
            matching = descent.run(problem, max_sweeps)
        return permutations_of(matching.permutations)

    found = align(scheme, groups, len(states), fit, problem.generator(), max_rounds)
    gains = gains_of_all(groups, states, known, found)
    return [Matching(orders, reached) for orders, reached in zip(found, gains, strict=True)]


class _Descent:
    """Coordinate descent for one pair of states, the orders of ``known`` groups being kept, from ``start`` on if any.

    From a start the similarity never falls; without one the first sweep goes by what has an order already.
    """

    def __init__(
        self,
        groups: GroupSet,
        states: States,
        tolerance: float,
        known: Permutations,
        start: Permutations | None = None,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.groups, self.tolerance, self.known = groups, tolerance, known
        self.orders = {**(start or {}), **known}
        self.gains: dict[str, tuple[float, float]] = {}
        open_families = [family for family in families(groups) if any(g.name not in known for g in family.groups)]
        self.problems = [
            FamilyProblem(family, groups, states, losses) for family in open_families if family.outer.name not in known
        ]
        self.halves = [FamilyProblem(family, groups, states) for family in open_families if family.outer.name in known]

    def run(self, problem: Problem, max_sweeps: int) -> Matching:
        generator = problem.generator()
        visits = list(self.problems)
        for sweep in range(max_sweeps):
            improved = False
            for visited in visits:
                problem.advance(f"sweep {sweep + 1}, {visited.family.outer}")
                improved |= self._improve(visited)
            for half in () if sweep else self.halves:
                self.orders |= half.complete(self.orders, self.known)
            for group in self.groups:  # those that nothing could be said about start from where they are
                if group.name not in self.orders:
                    self.orders[group.name] = group.identity()
                    self.gains[group.name] = (0.0, 0.0)
            if sweep and not improved:
                break
            shuffled = torch.randperm(len(visits), generator=generator).tolist()
            visits = sorted((self.problems[index] for index in shuffled), key=lambda visited: -visited.family.units)
        gains = (Gain(name, *reached, self.orders[name].moved) for name, reached in self.gains.items())
        return Matching({group.name: self.orders[group.name] for group in self.groups}, tuple(gains))

    def _improve(self, problem: FamilyProblem) -> bool:
        """Solve one family with the others fixed; return whether that raised the similarity."""
        names = [group.name for group in problem.family.groups]
        known = names[0] in self.orders
        present = {group.name: self.orders.get(group.name, group.identity()) for group in problem.family.groups}
        if not problem.bring_up_to_date(self.orders, present if known else None):
            return False
        before = problem.total(present, self.orders)
        threshold = self.tolerance * abs(before)
        first = self.gains.get(names[0], (before, before))[0]
        self.gains |= dict.fromkeys(names, (first, before))
        if known and problem.headroom <= threshold:
            return False
        found = problem.solve(present if known else None, self.orders)
        total = problem.total(found, self.orders)
        if known and total <= before + threshold:
            return False
        self.orders |= found
        self.gains |= dict.fromkeys(names, (first, total))
        return True

"""Activation matching: pair the units whose activations correlate most over the same inputs.

For each group one linear assignment maximises the summed Pearson correlation of post-activation units (Li et al.,
"Convergent learning", 2015; Qu & Horvath, CPAL 2025, A.2). The units of a residual stream are read where it begins and
where it ends, and the correlations there are averaged. Activations do not depend on how other layers' units are
numbered, so one pass over the data serves all groups. Nested groups are assigned from the inside out
(:mod:`vfsurgery.matching.nested`). Groups that no activation shows, as the heads inside an ``nn.MultiheadAttention``,
are matched by their weights once the others are known, and so are units that activations do not tell apart
(:mod:`vfsurgery.matching.ties`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, Permutations
from vfsurgery.matching.base import MATCHERS, Gain, Matching, Problem, Symmetries, check_symmetries
from vfsurgery.matching.nested import BlockAssignment, Family, families
from vfsurgery.matching.pairwise import mean_state
from vfsurgery.matching.schemes import DEFAULT, MAX_ROUNDS, Scheme, align, check_scheme, units_in_order
from vfsurgery.matching.ties import Ties, break_ties
from vfsurgery.matching.turning import Parts, mean_moments, mean_of, turn_all, turn_by_activations
from vfsurgery.matching.weights import match_rest, match_rest_of_all
from vfsurgery.stats.correlation import CrossMoments, mean_correlation

SLACK = 1e-9
"""Gain in correlation per unit up to which the order that a source has is as good as the best one."""


@MATCHERS.register("activations")
@dataclass(frozen=True)
class ActivationMatching:
    """Pair units by the correlation of their activations on calibration data.

    ``scheme`` says whom each of more than two sources is matched to: ``"reference"`` the first one, ``"sequential"``
    the aligned one before it, ``"iterative"`` the mean of all other aligned ones, again and again until none moves or
    for ``max_rounds`` (:mod:`vfsurgery.matching.schemes`). The last one raises ``sum over pairs i < j of
    tr(P_i C_ij P_j^T)``, the correlations of corresponding units of all pairs of sources, and never lowers it. All
    pairs are correlated in the one pass over the data.

    With ``symmetries="all"`` spaces that allow more than orders are mapped by matrices, streams of transformers and the
    insides of heads (:mod:`vfsurgery.matching.turning`); ``"permutations"`` reorders these, too.

    Raises:
        OptionError: there is no such scheme or choice of symmetries, or no round is allowed.

    >>> ActivationMatching(scheme="sequential").needs_pairs
    True
    """

    scheme: Scheme = DEFAULT
    max_rounds: int = MAX_ROUNDS
    symmetries: Symmetries = "all"
    name: str = field(default="activations", init=False)
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_scheme(self.scheme, self.max_rounds)
        if check_symmetries(self.symmetries) == "permutations":
            object.__setattr__(self, "name", "activations, orders only")

    @property
    def needs_pairs(self) -> bool:
        """Whether sources other than the first must be correlated with each other, too."""
        return self.scheme != "reference"

    def match(self, problem: Problem) -> list[Matching]:
        """Orders of every source after the first.

        Gains are mean correlations of paired units; for more than two sources, under a scheme other than
        ``"reference"``, the mean of those with all other sources.
        """
        if self.symmetries == "all" and Parts.of(problem.groups).any:
            return turn_all(len(problem.states), self.scheme, partial(self._turn, problem))
        if self.scheme == "reference" or len(problem.states) == 2:
            return [match_on(problem, source, found) for source, found in enumerate(problem.correlations(), start=1)]
        return match_all(problem, problem.joint(), self.scheme, self.max_rounds)

    def _turn(
        self, problem: Problem, source: int, others: Sequence[int], found: Sequence[Mapping[str, Order]]
    ) -> Matching:
        """Match one source to the mean of others, given what all are brought to."""
        if list(others) == [0]:
            moments = problem.correlations()[source - 1]
        else:
            pairs = problem.joint()
            by_other = [(_between(pairs, other, source), found[other]) for other in others]
            moments = mean_moments(problem.groups, by_other, problem.duals)

        def rest(smaller: Problem, orders: Mapping[str, Order]) -> Matching:
            del orders  # activations need no beginning
            names = {group.name for group in smaller.groups}
            return match_on(smaller, 1, {name: shown for name, shown in moments.items() if name in names})

        states = (mean_of(problem, others, found), problem.states[source])
        return turn_by_activations(replace(problem, states=states), 1, moments, problem.duals, rest)


def _between(
    pairs: Mapping[tuple[int, int], Mapping[str, Sequence[CrossMoments]]], i: int, j: int
) -> Mapping[str, Sequence[CrossMoments]]:
    """The cross moments of source i, as rows, with source j, of those of pairs ``i < j``."""
    if i < j:
        return pairs[i, j]
    return {
        name: [CrossMoments(each.b, each.a, each.products.T) for each in moments]
        for name, moments in pairs[j, i].items()
    }


def match_on(
    problem: Problem,
    source: int,
    moments: Mapping[str, Sequence[CrossMoments]],
    done: Collection[str] = (),
) -> Matching:
    """Match one source to the first on the given cross moments; groups without any are matched by their weights.

    Args:
        problem: As for :meth:`Matcher.match`.
        source: Which of ``problem.states``.
        moments: By group name, one for each place where its units are read.
        done: Names of groups that are none of this matching's business.
    """
    permutations: dict[str, Permutation] = {}
    gains: list[Gain] = []
    ties: list[Ties] = []
    for family in families(problem.groups):
        known = [group for group in family.groups if group.name in moments]
        if not known:
            continue
        problem.advance(str(family.outer))
        correlations = {group.name: mean_correlation(moments[group.name]) for group in known}
        assignment = _assignment(family, correlations)
        found = assignment.solve()
        permutations |= {group.name: found["" if group is family.outer else group.name] for group in known}
        permutations[family.outer.name] = found[""]
        unmoved = {"" if group is family.outer else group.name: group.identity() for group in (*known, family.outer)}
        count = sum(len(moments[group.name][0].products) for group in known)
        before, after = (assignment.total(orders) / count for orders in (unmoved, found))
        gains += [
            Gain(group.name, before, after, permutations[group.name].moved)
            for group in family.groups
            if group.name in permutations
        ]
        del assignment
        if not done and (tied := Ties.of(family, correlations, permutations)):
            ties.append(tied)
    if ties:
        orders, others = break_ties(problem, (problem.states[0], problem.states[source]), permutations, ties)
        return Matching(orders, (*_moved(gains, orders), *others))
    if len(permutations) + len(done) == len(problem.groups):
        return Matching(permutations, tuple(gains))
    known = {**permutations, **{name: problem.groups[name].identity() for name in done}}
    rest = match_rest(problem, source, known)
    found = {name: order for name, order in rest.permutations.items() if name not in done}
    return Matching(found, (*gains, *rest.gains))


def match_all(
    problem: Problem,
    pairs: Mapping[tuple[int, int], Mapping[str, Sequence[CrossMoments]]],
    scheme: Scheme,
    max_rounds: int = MAX_ROUNDS,
) -> list[Matching]:
    """Match all sources on the cross moments of all pairs; groups without any are matched by their weights.

    Args:
        problem: As for :meth:`Matcher.match`.
        pairs: For sources ``i < j`` and by group name, one for each place where its units are read.
        scheme: As in :class:`ActivationMatching`.
        max_rounds: As in :class:`ActivationMatching`.
    """
    sources = range(len(problem.states))
    found: list[dict[str, Permutation]] = [{} for _ in sources]
    gains: list[list[Gain]] = [[] for _ in sources]
    ties: list[list[Ties]] = [[] for _ in sources]
    for family in families(problem.groups):
        crossed = _Crossed(family, pairs)
        if not crossed.shown:
            continue
        problem.advance(str(family.outer))
        orders = align(scheme, crossed.groups, len(sources), crossed.fit, problem.generator(), max_rounds)
        for source in sources:
            found[source] |= orders[source]
            gains[source] += crossed.gains(source, orders)
            if source and (tied := crossed.ties(source, orders, scheme)):
                ties[source].append(tied)
    if any(ties):
        found = _without_ties(problem, found, ties, scheme)
    pairs_of = zip(gains, found, strict=True)
    matchings = [Matching(orders, tuple(_moved(reached, orders))) for reached, orders in pairs_of]
    if len(found[0]) < len(problem.groups):
        rest = match_rest_of_all(problem, found, scheme, max_rounds)
        matchings = [
            Matching(of_rest.permutations, (*of_shown.gains, *of_rest.gains))
            for of_shown, of_rest in zip(matchings, rest, strict=True)
        ]
    return matchings[1:]


def _without_ties(
    problem: Problem, found: Sequence[Permutations], ties: Sequence[Sequence[Ties]], scheme: Scheme
) -> list[dict[str, Permutation]]:
    """Orders of all sources in which tied units are where the weights want them: near the mean of sources before.

    Under the sequential scheme only the last one before counts.
    """
    whole: list[Permutations] = [{group.name: group.identity() for group in problem.groups}]
    for source in range(1, len(found)):
        first = source - 1 if scheme == "sequential" else 0
        mean = mean_state(problem.groups, problem.states[first:source], whole[first:])
        whole.append(break_ties(problem, (mean, problem.states[source]), found[source], ties[source])[0])
    return [{name: orders[name] for name in own} for own, orders in zip(found, whole, strict=True)]


def _moved(gains: Sequence[Gain], orders: Permutations) -> list[Gain]:
    """The same gains, ties being without any, with what moves now."""
    return [replace(gain, moved=orders[gain.group].moved) for gain in gains]


class _Crossed:
    """One family's correlations between all pairs of sources."""

    def __init__(self, family: Family, pairs: Mapping[tuple[int, int], Mapping[str, Sequence[CrossMoments]]]) -> None:
        self.family = family
        self.shown = [group for group in family.groups if group.name in pairs[0, 1]]
        self.groups = GroupSet(tuple(dict.fromkeys((family.outer, *self.shown))))
        self._correlations = {
            pair: {group.name: mean_correlation(moments[group.name]) for group in self.shown}
            for pair, moments in pairs.items()
            if pair[0] < pair[1]
        }
        self._count = sum(len(correlation) for correlation in self._correlations[0, 1].values())

    def fit(self, source: int, others: Sequence[int], found: Sequence[Permutations]) -> Permutations:
        """The best orders of one source; those it has where no others are better."""
        assignment = self._assignment(source, others, found)
        solved = assignment.solve()
        best = {group.name: solved[self._key(group)] for group in self.groups}
        if found[source]:
            gain = self._mean(assignment, best) - self._mean(assignment, found[source])
            return best if gain > SLACK else found[source]
        return best

    def gains(self, source: int, orders: Sequence[Permutations]) -> list[Gain]:
        """What aligning all sources did for the correlation of one of them with all others."""
        others = [other for other in range(len(orders)) if other != source]
        unmoved = [{group.name: group.identity() for group in self.groups}] * len(orders)
        before, after = (self._mean(self._assignment(source, others, of), of[source]) for of in (unmoved, orders))
        return [Gain(group.name, before, after, orders[source][group.name].moved) for group in self.groups]

    def ties(self, source: int, orders: Sequence[Permutations], scheme: Scheme) -> Ties | None:
        """What the correlations of a source with all others, or the one before it, leave open."""
        others = [other for other in range(len(orders)) if other != source]
        others = [source - 1] if scheme == "sequential" else others
        return Ties.of(self.family, self._similarity(source, others, orders), orders[source])

    def _mean(self, assignment: BlockAssignment, orders: Permutations) -> float:
        """Mean correlation of paired units."""
        return assignment.total({self._key(group): orders[group.name] for group in self.groups}) / self._count

    def _key(self, group: PermutationGroup) -> str:
        return "" if group is self.family.outer else group.name

    def _assignment(self, source: int, others: Sequence[int], found: Sequence[Permutations]) -> BlockAssignment:
        """Of a source's units to the mean of others' aligned ones: the mean of their correlations, rows in order."""
        return _assignment(self.family, self._similarity(source, others, found))

    def _similarity(self, source: int, others: Sequence[int], found: Sequence[Permutations]) -> dict[str, Tensor]:
        similarity: dict[str, Tensor] = {}
        for group in self.shown:
            rows = [self._between(other, source, group.name)[self._order(group, found[other])] for other in others]
            similarity[group.name] = torch.stack(rows).mean(0)
        return similarity

    def _between(self, i: int, j: int, name: str) -> Tensor:
        """Correlations of the units of source i, as rows, with those of source j."""
        return self._correlations[i, j][name] if i < j else self._correlations[j, i][name].T

    def _order(self, group: PermutationGroup, orders: Permutations) -> Tensor:
        like = self._correlations[0, 1][group.name]
        return torch.tensor(units_in_order(group, orders).order, device=like.device)


def _assignment(family: Family, similarity: Mapping[str, Tensor]) -> BlockAssignment:
    """The assignment of one family on correlations; groups that no activation shows are left out."""
    inners = [group for group in family.inners if group.name in similarity]
    return BlockAssignment(
        family.outer.size,
        similarity.get(family.outer.name),
        {group.name: similarity[group.name] for group in inners},
        {group.name: None for group in inners if group.blocks == 1},
    )

"""Activation matching: pair the units whose activations correlate most over the same inputs.

For each group one linear assignment maximises the summed Pearson correlation of post-activation units (Li et al.,
"Convergent learning", 2015; Qu & Horvath, CPAL 2025, A.2). The units of a residual stream are read where it begins and
where it ends, and the correlations there are averaged. Activations do not depend on how other layers' units are
numbered, so one pass over the data serves all groups. Nested groups are assigned from the inside out
(:mod:`vfsurgery.matching.nested`). Groups that no activation shows, as the heads inside an ``nn.MultiheadAttention``,
are matched by their weights once the others are known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vfsurgery.groups import Permutation
from vfsurgery.matching.base import MATCHERS, Gain, Matching, Problem
from vfsurgery.matching.nested import BlockAssignment, Family, families
from vfsurgery.matching.weights import match_rest
from vfsurgery.stats.correlation import CrossMoments


@MATCHERS.register("activations")
@dataclass(frozen=True)
class ActivationMatching:
    """Pair units by the correlation of their activations on calibration data."""

    name: str = field(default="activations", init=False)
    needs_data: bool = field(default=True, init=False)

    def match(self, problem: Problem) -> list[Matching]:
        """One assignment per family and source; gains are mean correlations of paired units."""
        return [match_on(problem, source, moments) for source, moments in enumerate(problem.correlations(), start=1)]


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
    for family in families(problem.groups):
        known = [group for group in family.groups if group.name in moments]
        if not known:
            continue
        problem.advance(str(family.outer))
        assignment = _assignment(family, moments)
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
    if len(permutations) + len(done) == len(problem.groups):
        return Matching(permutations, tuple(gains))
    known = {**permutations, **{name: problem.groups[name].identity() for name in done}}
    rest = match_rest(problem, source, known)
    found = {name: order for name, order in rest.permutations.items() if name not in done}
    return Matching(found, (*gains, *rest.gains))


def _assignment(family: Family, moments: Mapping[str, Sequence[CrossMoments]]) -> BlockAssignment:
    """The assignment of one family on correlations; groups that no activation shows are left out."""
    outer = moments.get(family.outer.name)
    inners = [group for group in family.inners if group.name in moments]
    return BlockAssignment(
        family.outer.size,
        None if outer is None else mean_correlation(outer),
        {group.name: mean_correlation(moments[group.name]) for group in inners},
        {group.name: None for group in inners if group.blocks == 1},
    )


def mean_correlation(readings: Sequence[CrossMoments]) -> Tensor:
    """Pearson correlation of two sources' units, ``(units, units)``, averaged over the places they are read at."""
    total = readings[0].correlation()
    for reading in readings[1:]:
        total += reading.correlation()
    return total / len(readings) if len(readings) > 1 else total

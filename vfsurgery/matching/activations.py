"""Activation matching: pair the units whose activations correlate most over the same inputs.

For each group one linear assignment maximises the summed Pearson correlation of post-activation units (Li et al.,
"Convergent learning", 2015; Qu & Horvath, CPAL 2025, A.2). The units of a residual stream are read where it begins and
where it ends, and the correlations there are averaged. Activations do not depend on how other layers' units are
numbered, so one pass over the data serves all groups. Only groups that share an axis (whole groups of a grouped
convolution, and the channels inside them) do influence each other; they are matched one by one as if they did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vfsurgery.groups import Permutation
from vfsurgery.matching.assignment import assign
from vfsurgery.matching.base import MATCHERS, Gain, Matching, Problem
from vfsurgery.stats.correlation import CrossMoments


@MATCHERS.register("activations")
@dataclass(frozen=True)
class ActivationMatching:
    """Pair units by the correlation of their activations on calibration data."""

    name: str = field(default="activations", init=False)
    needs_data: bool = field(default=True, init=False)

    def match(self, problem: Problem) -> list[Matching]:
        """One assignment per group and source; gains are mean correlations of paired units."""
        return [_match_source(problem, moments) for moments in problem.correlations()]


def _match_source(problem: Problem, moments: Mapping[str, Sequence[CrossMoments]]) -> Matching:
    permutations: dict[str, Permutation] = {}
    gains: list[Gain] = []
    for group in problem.groups:
        if group.name not in moments:
            continue
        problem.advance(str(group))
        found = assign(_mean_correlation(moments[group.name]))
        permutations[group.name] = found.permutation
        gains.append(Gain(group.name, found.unmatched / group.size, found.total / group.size, found.permutation.moved))
    return Matching(permutations, tuple(gains))


def _mean_correlation(readings: Sequence[CrossMoments]) -> Tensor:
    total = readings[0].correlation()
    for reading in readings[1:]:
        total += reading.correlation()
    return total / len(readings) if len(readings) > 1 else total

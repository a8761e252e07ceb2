"""What matchers share that map units by matrices: which groups they may, and permutations for the others.

A general map needs more of a network than a permutation does (:mod:`vfsurgery.discovery.roles`). Groups that let only
permutations through are matched as in activation matching, so that such a matcher works on every model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.discovery.maps import UnitMap
from vfsurgery.matching.activations import match_on
from vfsurgery.matching.base import Gain, Matching, Problem
from vfsurgery.stats.correlation import CrossMoments


@dataclass(frozen=True)
class Joint:
    """Cross moments of one group's units for all pairs of sources ``i <= j``, one for each place they are read at."""

    sources: int
    pairs: Mapping[tuple[int, int], Sequence[CrossMoments]]

    def correlation(self) -> Tensor:
        """Pearson correlation of all units of all sources, ``(sources * units, sources * units)`` float64."""
        return self._assemble(CrossMoments.correlation)

    def covariance(self) -> Tensor:
        """Covariance of all units of all sources, ``(sources * units, sources * units)`` float64."""
        return self._assemble(CrossMoments.covariance)

    def _assemble(self, matrix: Callable[[CrossMoments], Tensor]) -> Tensor:
        rows: list[list[Tensor]] = [[torch.empty(0)] * self.sources for _ in range(self.sources)]
        for (i, j), readings in self.pairs.items():
            block = torch.stack([matrix(reading) for reading in readings]).mean(0)
            rows[j][i], rows[i][j] = block.T, block
        return torch.cat([torch.cat(row, 1) for row in rows])


class MapMatcher(ABC):
    """Finds a :class:`~vfsurgery.discovery.maps.UnitMap` for every source at each group that allows it."""

    needs_data: bool
    needs_joint: bool

    @abstractmethod
    def maps(self, joint: Joint) -> tuple[list[UnitMap], float, float]:
        """One map per source, and the similarity of the sources' units before and after."""

    def match(self, problem: Problem) -> list[Matching]:
        """One matching per source, the first one included."""
        sources = len(problem.states)
        found = problem.joint()
        maps: list[dict[str, UnitMap]] = [{} for _ in range(sources)]
        gains: list[Gain] = []
        for group in problem.groups:
            if not group.mappable or group.name not in found[0, 0]:
                continue
            problem.advance(str(group))
            joint = Joint(sources, {pair: moments[group.name] for pair, moments in found.items()})
            mapped, before, after = self.maps(joint)
            for source, unit_map in enumerate(mapped):
                maps[source][group.name] = unit_map
            gains.append(Gain(group.name, before, after, max(unit_map.moved for unit_map in mapped)))
        result = [Matching(maps[0])]
        for source in range(1, sources):
            rest = {name: moments for name, moments in found[0, source].items() if name not in maps[source]}
            permuted = match_on(problem, source, rest, done=maps[source])
            result.append(Matching({**permuted.permutations, **maps[source]}, (*gains, *permuted.gains)))
        return result

"""How many units each group loses, and which: the least salient ones.

A nested group must lose as many units in every block. So its units are put into *levels*: the least salient unit of
every block together, the next ones together, and so on; a level counts as its mean saliency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vfsurgery.groups import PermutationGroup


@dataclass(frozen=True)
class Quota:
    """What share of the units goes, and by which ranking.

    ``scope="group"`` takes ``round(fraction * size)`` units of each group. ``scope="global"`` ranks the units of all
    groups together, saliencies divided by their group's mean, takes that fraction of all, and leaves each group the
    share ``floor`` of its units. One unit stays in any case. What stays is rounded up to a ``multiple_of``.

    >>> from vfsurgery.groups import Member
    >>> group = PermutationGroup("g0", 4, (Member("w", 0, 4),))
    >>> Quota(0.5).masks([group], {"g0": np.array([3.0, 1.0, 2.0, 4.0])})["g0"].tolist()
    [True, False, False, True]
    """

    fraction: float
    scope: str = "group"
    floor: float = 0.1
    multiple_of: int = 1

    def masks(
        self,
        groups: Iterable[PermutationGroup],
        scores: Mapping[str, np.ndarray],
        teams: Mapping[str, tuple[str, ...]] | None = None,
    ) -> dict[str, np.ndarray]:
        """For each group that loses any: which of its units are kept, ``(units,)``.

        Args:
            groups: What may lose units.
            scores: Saliencies by name.
            teams: By name the groups that lose as many, which then have one size.
        """
        groups = list(groups)
        if self.scope == "global":
            counts = self._globally(groups, scores, teams or {})
        else:
            counts = {group.name: self._own(group) for group in groups}
        result: dict[str, np.ndarray] = {}
        for group in groups:
            kept = group.size - counts[group.name]
            kept = min(group.size, math.ceil(kept / self.multiple_of) * self.multiple_of)
            if kept < group.size:
                lost = _ranks(group, scores[group.name])[:, : group.size - kept]
                mask = np.ones((group.blocks, group.size), dtype=bool)
                np.put_along_axis(mask, lost, False, axis=1)
                result[group.name] = mask.reshape(-1)
        return result

    def _own(self, group: PermutationGroup) -> int:
        return min(int(self.fraction * group.size + 0.5), group.size - 1)

    def _globally(
        self, groups: list[PermutationGroup], scores: Mapping[str, np.ndarray], teams: Mapping[str, tuple[str, ...]]
    ) -> dict[str, int]:
        """How many levels each group loses if the least salient of all go first; those of a team count as one."""
        together: dict[tuple[str, ...], list[PermutationGroup]] = {}
        for group in groups:
            together.setdefault(teams.get(group.name, (group.name,)), []).append(group)
        levels: list[tuple[float, list[PermutationGroup]]] = []
        for team in together.values():
            means = np.mean([_levels(group, scores[group.name]) for group in team], axis=0)
            most = len(means) - max(1, math.ceil(self.floor * len(means)))
            levels += [(float(level), team) for level in means[:most]]
        levels.sort(key=lambda level: level[0])
        wanted = self.fraction * sum(group.units for group in groups)
        counts = {group.name: 0 for group in groups}
        for _, team in levels:
            lost = sum(group.blocks for group in team)
            if wanted < lost / 2:
                break
            for group in team:
                counts[group.name] += 1
            wanted -= lost
        return counts


def _levels(group: PermutationGroup, scores: np.ndarray) -> np.ndarray:
    """Mean saliency of each level over the group's own mean, ``(size,)``."""
    means = np.take_along_axis(_blocks(group, scores), _ranks(group, scores), axis=1).mean(0)
    return means / (means.mean() or 1.0)


def _blocks(group: PermutationGroup, scores: np.ndarray) -> np.ndarray:
    return scores.reshape(group.blocks, group.size)


def _ranks(group: PermutationGroup, scores: np.ndarray) -> np.ndarray:
    """For each block its units from the least salient on, ``(blocks, size)``."""
    return np.argsort(_blocks(group, scores), axis=1, kind="stable")

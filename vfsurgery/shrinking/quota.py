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

    def masks(self, groups: Iterable[PermutationGroup], scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For each group that loses any: which of its units are kept, ``(units,)``."""
        groups = list(groups)
        counts = self._globally(groups, scores) if self.scope == "global" else {g.name: self._own(g) for g in groups}
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

    def _globally(self, groups: list[PermutationGroup], scores: Mapping[str, np.ndarray]) -> dict[str, int]:
        """How many levels each group loses if the least salient of all go first."""
        levels: list[tuple[float, PermutationGroup]] = []
        for group in groups:
            each = np.take_along_axis(_blocks(group, scores[group.name]), _ranks(group, scores[group.name]), axis=1)
            means = each.mean(0)
            most = group.size - max(1, math.ceil(self.floor * group.size))
            levels += [(float(level), group) for level in means[:most] / (means.mean() or 1.0)]
        levels.sort(key=lambda level: level[0])
        wanted = self.fraction * sum(group.units for group in groups)
        counts = {group.name: 0 for group in groups}
        for _, group in levels:
            if wanted < group.blocks / 2:
                break
            counts[group.name] += 1
            wanted -= group.blocks
        return counts


def _blocks(group: PermutationGroup, scores: np.ndarray) -> np.ndarray:
    return scores.reshape(group.blocks, group.size)


def _ranks(group: PermutationGroup, scores: np.ndarray) -> np.ndarray:
    """For each block its units from the least salient on, ``(blocks, size)``."""
    return np.argsort(_blocks(group, scores), axis=1, kind="stable")

"""ZipIt! matching: pair the most correlated units, across sources or within one (Stoica et al., 2024).

The greedy pairing is :func:`vfsurgery.matching.zipping.zip_units`; every merged unit is the mean of the units paired in
it. Units that no other source has a partner for are merged with one of their own source.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vfsurgery.discovery.maps import UnitMap
from vfsurgery.matching.base import MATCHERS
from vfsurgery.matching.mapped import Joint, MapMatcher
from vfsurgery.matching.zipping import zip_units


@MATCHERS.register("zipit")
@dataclass(frozen=True)
class ZipMatching(MapMatcher):
    """Pair units greedily by the correlation of their activations on calibration data.

    ``alpha`` scales the similarity of units that are merged already (0 forbids to merge them again); ``beta`` is the
    share of a model's units that may be merged within it.
    """

    alpha: float = 0.3
    beta: float = 0.125
    name: str = field(default="zipit", init=False)
    needs_data: bool = field(default=True, init=False)
    needs_joint: bool = field(default=True, init=False)

    def maps(self, joint: Joint) -> tuple[list[UnitMap], float, float]:
        """Merge and unmerge matrices of every source, the first one included.

        Constant units correlate with nothing, but they do the same, so they are paired with each other.
        """
        correlation = joint.correlation()
        constant = correlation.diagonal() == 0
        correlation[torch.outer(constant, constant)] = 1.0
        units = len(correlation) // joint.sources
        found = zip_units(correlation, joint.sources, alpha=self.alpha, beta=self.beta)
        maps = [UnitMap(found.merge(source), found.unmerge(source)) for source in range(joint.sources)]
        straight = correlation[:units, units : 2 * units].trace() / units
        return maps, float(straight), found.total / units

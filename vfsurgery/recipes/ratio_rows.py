"""Rows of a recipe's table that hold no accuracy: what share of its sources' feature a merge keeps at some depth."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vfsurgery.scoring.diagnosis import Diagnosis

PREFIX = "ratio "
_AT = re.compile(r"(?P<merge>.+) at (?P<percent>\d{1,2}|100)%")


@dataclass(frozen=True)
class RatioRow:
    """``ratio LABEL`` or ``ratio LABEL at PERCENT%``: the bound of a merge's vanishing-feature ratio at that depth.

    It is the tight bound ``e_l = max(e_{l+1}, r_l)`` (Qu & Horvath, CPAL 2025, section 5.1), the largest ratio from
    there on, so that "below 0.1 at 50%" says that no later layer has a tenth of its sources' feature norm. At full
    depth, where no other is given, it is the ratio of the last layer, as in the paper's figure 17. The smoothed bound
    of its other figures would not do for "falls with depth": it falls by itself.

    ``label`` is the row as written, ``merge`` the label of the merge, and ``depth`` a share, 0 to 1.

    >>> RatioRow.parse("ratio direct at 50%", ["direct"])
    RatioRow(label='ratio direct at 50%', merge='direct', depth=0.5)
    >>> RatioRow.parse("ratio WM at 0.1", ["WM at 0.1"]).depth
    1.0
    >>> RatioRow.parse("direct", ["direct"]) is None
    True
    """

    label: str
    merge: str
    depth: float = 1.0

    @classmethod
    def parse(cls, label: str, merges: Collection[str]) -> RatioRow | None:
        """Read the row of one of ``merges``; ``None`` where it is none."""
        merge = label.removeprefix(PREFIX)
        if merge == label:
            return None
        if merge in merges:
            return cls(label, merge)
        found = _AT.fullmatch(merge)
        if found is None or found["merge"] not in merges:
            return None
        return cls(label, found["merge"], int(found["percent"]) / 100)

    def of(self, diagnosis: Diagnosis) -> float:
        """The bound at this row's depth, between layers interpolated; NaN where no layer has a ratio.

        Layers before the first one compared are preserved: each computes what its source does, with a ratio of 1.
        """
        pairs = zip(diagnosis.layers, diagnosis.bound, strict=True)
        points = [(layer.depth, bound) for layer, bound in pairs if not math.isnan(bound)]
        if not points:
            return math.nan
        kept = max(1.0, points[0][1])
        last = max(diagnosis.entries - 1, 1)
        points = [*((position / last, kept) for position in range(diagnosis.layers[0].position)), *points]
        depths, bounds = zip(*points, strict=True)
        return float(np.interp(self.depth, depths, bounds))

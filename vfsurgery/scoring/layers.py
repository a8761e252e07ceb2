"""One layer of a merged or pruned network beside the same layer of its sources."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vfsurgery.stats.layers import LayerStatistics


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer of the model beside the same layer of its sources.

    ``position`` counts the layers of the sources in order of execution, from 0; ``depth`` is that as a share, 0 to 1.
    ``feature`` is the mean over images of ``||f(x) - f(0)||``, ``offset`` is ``||f(0)||``, both over the root of the
    number of values; ``variance`` is the mean over units of their variance over images and positions.
    """

    name: str
    kind: str
    position: int
    depth: float
    model: LayerStatistics
    sources: tuple[LayerStatistics, ...]

    @property
    def ratio(self) -> float:
        """``feature`` of the model over the mean of the sources'; NaN where the sources have none."""
        return _ratio(self.model.feature, self.source("feature"))

    @property
    def variance_ratio(self) -> float:
        """``variance`` of the model over the mean of the sources' (Jordan et al., REPAIR, 2023)."""
        return _ratio(self.model.variance, self.source("variance"))

    def source(self, quantity: Literal["feature", "offset", "variance"]) -> float:
        """The mean of a quantity over the sources."""
        return sum(getattr(source, quantity) for source in self.sources) / len(self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the ratios included."""
        return {**asdict(self), "ratio": self.ratio, "variance_ratio": self.variance_ratio}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

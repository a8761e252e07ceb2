"""CCA matching: rotate each source's units onto the first one's, by canonical correlation analysis.

Horoi et al., "Harmony in diversity: merging neural networks with canonical correlation analysis" (2024); Qu & Horvath,
CPAL 2025, A.8.3. With the covariances ``S_xx`` of the first source's units, ``S_yy`` of another's and ``S_xy`` between
them, and the singular value decomposition ``S_xx^-1/2 S_xy S_yy^-1/2 = U C V^T``, the units ``y`` become ``T y``,

``T = S_xx^1/2 U V^T S_yy^-1/2``, ``T^-1 = S_yy^1/2 V U^T S_xx^-1/2``,

which has the first source's covariance: ``T S_yy T^T = S_xx``. ``T`` does not commute with non-linearities, so a source
mapped by it computes something else than before; where a permutation is a good answer, ``T`` is close to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vfsurgery.discovery.maps import UnitMap
from vfsurgery.matching.base import MATCHERS
from vfsurgery.matching.mapped import Joint, MapMatcher
from vfsurgery.stats.threads import threads

SMALLEST = 1e-9
"""Eigenvalues of a covariance below this share of the largest are raised to it: those of dead units are zero."""


@MATCHERS.register("cca")
@dataclass(frozen=True)
class CCAMatching(MapMatcher):
    """Map units by canonical correlation analysis of their activations on calibration data.

    ``gamma`` is added to the diagonal of both covariances; it keeps directions in which hardly anything happens from
    being blown up.
    """

    gamma: float = 0.1
    name: str = field(default="cca", init=False)
    needs_data: bool = field(default=True, init=False)
    needs_joint: bool = field(default=True, init=False)

    @threads(1)
    def maps(self, joint: Joint) -> tuple[list[UnitMap], float, float]:
        """``T`` and its inverse for every source but the first, which stays as it is."""
        covariance = joint.covariance()
        units = len(covariance) // joint.sources
        eye = torch.eye(units, dtype=covariance.dtype, device=covariance.device)
        blocks = covariance.reshape(joint.sources, units, joint.sources, units)
        root, inverse_root = matrix_roots(blocks[0, :, 0] + self.gamma * eye)
        found = [UnitMap(eye, eye)]
        correlations = [1.0]
        for source in range(1, joint.sources):
            own, own_inverse = matrix_roots(blocks[source, :, source] + self.gamma * eye)
            u, canonical, vt = torch.linalg.svd(inverse_root @ blocks[0, :, source] @ own_inverse)
            found.append(UnitMap(root @ u @ vt @ own_inverse, own @ vt.T @ u.T @ inverse_root))
            correlations.append(float(canonical.mean()))
        straight = joint.correlation()[:units, units : 2 * units].trace() / units
        return found, float(straight), min(correlations)


def matrix_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric positive matrix and its inverse; tiny eigenvalues are raised first."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(float(values[-1]) * SMALLEST).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T

"""Pearson correlation of every unit of one model with every unit of another, over the same inputs.

Per batch one product of centred activations is added (the flops of a 1 x 1 convolution); the batches' own means are
put right by the exact merge formula, so neither the batch size nor the order of batches matters.

Sums of products are kept in the precision of the activations, float32 as a rule: they are the largest thing in memory
beside the models. Each addition rounds by 6e-8 of the sum, so after a thousand batches a correlation is off by some
1e-6, where that of a thousand samples is known to 3e-2. Means and variances, a few numbers per unit, are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.stats.moments import Moments, unit_rows

CONSTANT = 1e-12
"""Variance, relative to the squared mean plus one, below which a unit counts as constant and correlates with
nothing."""


@dataclass(frozen=True)
class Centred:
    """One batch of activations minus their means: ``samples`` ``(units, samples)``, with the batch's moments."""

    samples: Tensor
    moments: Moments

    @staticmethod
    def of(activations: Tensor, places: Tensor | None, dim: int) -> Centred:
        """Read the units off an activation tensor.

        Args:
            activations: Any shape, units along ``dim``.
            places: Indices along ``dim``, ``(units, places per unit)``; ``None`` for all of them in order.
            dim: The units' dim.
        """
        rows = unit_rows(activations, places, dim)
        moments = Moments.centre(rows)
        return Centred(rows, moments)


@dataclass(frozen=True)
class CrossMoments:
    """Moments of the units of a and b and their summed cross products about the means, ``(units a, units b)``."""

    a: Moments
    b: Moments
    products: Tensor

    @staticmethod
    def of(a: Centred, b: Centred) -> CrossMoments:
        """Cross moments of one batch."""
        return CrossMoments(a.moments, b.moments, a.samples @ b.samples.T)

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Cross moments of both sets of samples together; this one's products are added to in place."""
        n, m = self.a.count, other.a.count
        between = ((new.mean - own.mean).to(self.products.dtype) for own, new in ((self.a, other.a), (self.b, other.b)))
        products = self.products.add_(other.products).addr_(*between, alpha=n * m / (n + m))
        return CrossMoments(self.a.merge(other.a), self.b.merge(other.b), products)

    def correlation(self) -> Tensor:
        """Pearson correlation, ``(units a, units b)`` float64 in [-1, 1]; 0 for units that are constant.

        Li et al., "Convergent learning" (2015); Qu & Horvath, CPAL 2025, A.2 (activation matching).
        """
        scaled = self.products.to(torch.float64, copy=True)
        return scaled.mul_(_inverse_norm(self.a)[:, None]).mul_(_inverse_norm(self.b))

    def covariance(self) -> Tensor:
        """Covariance, ``(units a, units b)`` float64."""
        return self.products.double() / self.a.count


def mean_correlation(readings: Sequence[CrossMoments]) -> Tensor:
    """Pearson correlation of two sources' units, ``(units, units)``, averaged over the places they are read at."""
    total = readings[0].correlation()
    for reading in readings[1:]:
        total += reading.correlation()
    return total.div_(len(readings))


def _inverse_norm(moments: Moments) -> Tensor:
    constant = moments.var <= CONSTANT * (moments.mean**2 + 1)
    return torch.where(constant, 0.0, moments.squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())

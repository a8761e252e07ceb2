"""Mean and variance of many units at once, accumulated batch by batch and merged exactly.

Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979): two sets of
``n`` and ``m`` samples with means ``p`` and ``q`` and sums of squared deviations ``S`` and ``T`` join into

``mean = p + (q - p) m / (n + m)``, ``S + T + (q - p)^2 n m / (n + m)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

PART = 2**20
"""Numbers that are copied at a time, so that a large map needs no second one and stays in the cache."""
RUN = 512
"""Entries whose squares are added in float32."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each unit; sums are float64 on the data's device.

    >>> x, y = torch.randn(3, 50), torch.randn(3, 20)
    >>> joined = Moments.of(x).merge(Moments.of(y))
    >>> torch.allclose(joined.var, torch.cat([x, y], 1).double().var(1, correction=0))
    True
    """

    count: int
    mean: Tensor  # (units,) float64
    squares: Tensor  # (units,) float64, sum of (x - mean)^2

    @staticmethod
    def of(samples: Tensor, places: Tensor | None = None, dim: int = 0) -> Moments:
        """Moments of the units along ``dim`` of ``samples``.

        Args:
            samples: Any shape; every dim but ``dim`` counts samples.
            places: Indices along ``dim``, ``(units, places per unit)``, where a unit is not simply one index.
            dim: The units' dim.
        """
        if samples.device.type == "cpu":  # torch.var_mean takes 2 to 12 times as long there
            few = samples.shape[0] if dim % samples.ndim == 0 else max(PART * samples.shape[0] // samples.numel(), 1)
            first, *rest = (Moments.centre(unit_rows(part, places, dim)) for part in samples.split(few))
            for moments in rest:
                first = first.merge(moments)
            return first
        samples = samples.float() if samples.dtype.itemsize < 4 else samples
        if places is not None:
            samples = samples.movedim(dim, 0).index_select(0, places.reshape(-1)).reshape(len(places), -1)
            dim = 0
        others = [other for other in range(samples.ndim) if other != dim % samples.ndim]
        var, mean = torch.var_mean(samples, dim=others, correction=0)
        count = samples.numel() // max(samples.shape[dim], 1)
        return Moments(count, mean.double(), var.double() * count)

    @staticmethod
    def centre(rows: Tensor) -> Moments:
        """Moments of ``rows``, ``(units, samples)``, from which the units' means are then taken away in place.

        What rounding of the mean leaves behind is put right: a unit that is constant has a variance of zero.
        """
        mean = rows.mean(1, keepdim=True)
        squares = row_squares(rows.sub_(mean))
        rest = rows.mean(1).double()
        count = rows.shape[1]
        return Moments(count, mean.squeeze(1).double() + rest, (squares - count * rest.square()).clamp_min(0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def update(self, samples: Tensor) -> Moments:
        """Moments with the units' ``samples``, shape ``(units, samples)``, added."""
        return self.merge(Moments.of(samples))

    @property
    def var(self) -> Tensor:
        """Variance over the samples (divided by their number), shape ``(units,)``."""
        return self.squares / max(self.count, 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation, shape ``(units,)``."""
        return self.var.sqrt()

    def take(self, order: Tensor) -> Moments:
        """Moments of the units in another order."""
        return Moments(self.count, self.mean[order], self.squares[order])


def unit_rows(activations: Tensor, places: Tensor | None, dim: int) -> Tensor:
    """Activations as a new float matrix ``(units, samples)``, units in the order of ``places``."""
    moved = activations.movedim(dim, 0)
    if places is not None:
        moved = moved.index_select(0, places.reshape(-1))
    units = moved.shape[0] if places is None else places.shape[0]
    dtype = activations.dtype if activations.dtype.itemsize >= 4 else torch.float32
    rows = torch.empty(moved.shape, dtype=dtype, device=moved.device)
    return rows.copy_(moved).reshape(units, -1)


def row_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row of ``(rows, columns)``, in float64.

    Norms of short runs are fast and lose nothing; a norm of half a million float32 is off by 1e-5.
    """
    whole = rows.shape[1] // RUN * RUN
    squares = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, RUN)), dim=2).double().square().sum(1)
    return squares + torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square()


class Mergeable(Protocol):
    """A statistic of one set of samples that joins with that of another."""

    def merge(self, other: Self) -> Self:
        """The statistic of both sets together."""
        ...


Key = TypeVar("Key")
Statistic = TypeVar("Statistic", bound=Mergeable)


def add_batch(totals: dict[Key, Statistic], key: Key, batch: Statistic) -> None:
    """Join the statistic of one more batch to what was gathered under a key, if anything was."""
    totals[key] = totals[key].merge(batch) if key in totals else batch


def weighted_goal(sources: Sequence[Moments], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Goal mean and standard deviation of merged units: the sources' weighted by ``weights``.

    Standard deviations are averaged, not variances (Jordan et al., REPAIR, 2023; Qu & Horvath, CPAL 2025, Alg. 2).
    """
    mean = torch.stack([w * source.mean for w, source in zip(weights, sources, strict=True)]).sum(0)
    std = torch.stack([w * source.std for w, source in zip(weights, sources, strict=True)]).sum(0)
    return mean, std

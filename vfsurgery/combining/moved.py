"""How far training moved weights, and how much alike: sums over one tensor, a layer, or a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """Task vectors of several sources beside their base, as sums that add up over tensors.

    Attributes:
        numbers: How many there are.
        base: Squared norm of the base.
        with_base: Inner products of task vectors with the base.
        products: Inner products of task vectors with each other.
        contested: Numbers that more than one source moves.
        conflicts: Those of them that are moved up by one and down by another.
        same: For each pair, the base being the last, whether they are equal in every number.
    """

    numbers: int
    base: float
    with_base: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]
    contested: int
    conflicts: int
    same: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, base: Tensor, tensors: Sequence[Tensor]) -> Moved:
        """Of one tensor of the base and of all sources, or of a part of it, in float64.

        >>> found = Moved.of(torch.tensor([1.0, 0.0]), [torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])])
        >>> found.norm(1), found.cosine(0, 1), found.kept(0)
        (3.0, 0.0, 1.0)
        """
        numbers = torch.stack([each.detach().reshape(-1).to("cpu", torch.float64) for each in (*tensors, base)])
        vectors, own = numbers[:-1] - numbers[-1], numbers[-1]
        up, down = (vectors > 0).sum(0), (vectors < 0).sum(0)
        return cls(
            own.numel(),
            float(own @ own),
            tuple((vectors @ own).tolist()),
            tuple(map(tuple, (vectors @ vectors.T).tolist())),
            int((up + down > 1).sum()),
            int(((up > 0) & (down > 0)).sum()),
            tuple(tuple(torch.equal(a, b) for b in numbers) for a in numbers),
        )

    def __add__(self, other: Moved) -> Moved:
        def plus(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
            return tuple(x + y for x, y in zip(a, b, strict=True))

        return Moved(
            self.numbers + other.numbers,
            self.base + other.base,
            plus(self.with_base, other.with_base),
            tuple(plus(a, b) for a, b in zip(self.products, other.products, strict=True)),
            self.contested + other.contested,
            self.conflicts + other.conflicts,
            tuple(
                tuple(x and y for x, y in zip(a, b, strict=True)) for a, b in zip(self.same, other.same, strict=True)
            ),
        )

    @property
    def sources(self) -> int:
        """How many."""
        return len(self.with_base)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Of sources."""
        return [*itertools.combinations(range(self.sources), 2)]

    def norm(self, source: int) -> float:
        """Of a task vector."""
        return math.sqrt(self.products[source][source])

    def ratio(self, source: int) -> float:
        """The norm of a task vector relative to that of the base; NaN where the base is zero."""
        return self.norm(source) / math.sqrt(self.base) if self.base else math.nan

    def cosine(self, a: int, b: int) -> float:
        """Between two task vectors; NaN where one is zero."""
        norms = self.norm(a) * self.norm(b)
        return min(max(self.products[a][b] / norms, -1.0), 1.0) if norms else math.nan

    def kept(self, source: int) -> float:
        """The cosine between a source's weights and the base's; NaN where one of them is zero."""
        inner = self.base + self.with_base[source]
        own = inner + self.with_base[source] + self.products[source][source]
        return min(inner / math.sqrt(self.base * own), 1.0) if self.base > 0 and own > 0 else math.nan

    @property
    def mean_cosine(self) -> float:
        """Over all pairs; NaN where there is none."""
        return mean([self.cosine(a, b) for a, b in self.pairs])

    @property
    def mean_ratio(self) -> float:
        """Over all sources."""
        return mean([self.ratio(source) for source in range(self.sources)])

    @property
    def conflict(self) -> float:
        """The share of the contested numbers that are in conflict; NaN where there are none."""
        return self.conflicts / self.contested if self.contested else math.nan


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan

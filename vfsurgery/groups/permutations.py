"""Orders of a group's units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Permutation:
    """An order for the units of one group: unit ``r`` of the result is unit ``order[r]`` of the input.

    Validated when made: ``order`` must name every unit exactly once.

    >>> Permutation((2, 0, 1)).inverse().order
    (1, 2, 0)
    """

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"not a permutation of {len(self.order)} units: {self.order[:8]}…")

    @staticmethod
    def identity(size: int) -> Permutation:
        """The order that changes nothing."""
        return Permutation(tuple(range(size)))

    @staticmethod
    def random(size: int, generator: torch.Generator) -> Permutation:
        """A uniformly random order, drawn from ``generator`` alone."""
        return Permutation(tuple(torch.randperm(size, generator=generator).tolist()))

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.order)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.order == tuple(range(self.size))

    @property
    def moved(self) -> int:
        """How many units change their place."""
        return sum(old != new for new, old in enumerate(self.order))

    def inverse(self) -> Permutation:
        """The order that undoes this one."""
        inverse = [0] * self.size
        for new, old in enumerate(self.order):
            inverse[old] = new
        return Permutation(tuple(inverse))


Permutations = Mapping[str, Permutation]
"""For each group's name the order of its units; a group left out keeps its order."""

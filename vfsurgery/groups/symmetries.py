"""The symmetries that a space of units may have: by which matrices its units can be mapped without a trace.

Each contains the one before it, so what several ops leave of a space is the smallest of what each leaves.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

CONDITION = 1000.0
"""Random members of the general linear group have a condition number up to this one."""


class Symmetry(IntEnum):
    """Matrices ``T`` that units may be mapped by, ``y = T x``, from the fewest to the most.

    >>> min(Symmetry.GENERAL_LINEAR, Symmetry.ORTHOGONAL)
    <Symmetry.ORTHOGONAL: 2>
    >>> print(Symmetry.ORTHOGONAL_FIXING_ONES)
    orthogonal fixing ones
    """

    PERMUTATION = 0
    ORTHOGONAL_FIXING_ONES = 1
    """``T T' = 1`` and ``T 1 = 1``: the mean over the units stays, as a LayerNorm needs it."""
    ORTHOGONAL = 2
    GENERAL_LINEAR = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")

    @property
    def is_continuous(self) -> bool:
        """Whether it has more than permutations."""
        return self is not Symmetry.PERMUTATION

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        """A random member, ``(size, size)`` in float64.

        Orthogonal ones are uniform; those of the general linear group have a condition number drawn from 1 to 1,000,
        the same on average on a logarithmic scale.

        >>> q = Symmetry.ORTHOGONAL_FIXING_ONES.random(4, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(q @ q.T, torch.eye(4).double())), bool(torch.allclose(q.sum(1), torch.ones(4).double()))
        (True, True)
        """
        if self is Symmetry.PERMUTATION:
            return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
        if self is Symmetry.ORTHOGONAL_FIXING_ONES:
            basis = complement_of_ones(size)
            inside = Symmetry.ORTHOGONAL.random(size - 1, generator) if size > 1 else basis.new_zeros(0, 0)
            return basis @ inside @ basis.T + 1 / size
        turn = _uniform(size, generator)
        if self is Symmetry.ORTHOGONAL:
            return turn
        most = CONDITION ** float(torch.rand((), generator=generator, dtype=torch.float64))
        scales = torch.logspace(0, 1, size, base=most, dtype=torch.float64) / most**0.5
        return turn @ torch.diag(scales) @ _uniform(size, generator)


def complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis of what is orthogonal to ones, as columns: ``(size, size - 1)`` in float64.

    >>> basis = complement_of_ones(3)
    >>> bool(torch.allclose(basis.sum(0), torch.zeros(2).double())), basis.shape
    (True, torch.Size([3, 2]))
    """
    # Householder's reflection that brings ones to the first axis; its other columns are orthogonal to them
    direction = torch.full((size,), size**-0.5, dtype=torch.float64)
    direction[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - direction.outer(direction) * (2 / direction.square().sum())
    return reflection[:, 1:]


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix by Haar's measure (Mezzadri, "How to generate random matrices", 2007)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()

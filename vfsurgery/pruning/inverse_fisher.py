"""The inverse of the Fisher matrix of blocks of weights, from their gradients, without inverting anything big.

For a block of B weights with N gradients, the rows of G (N x B), the Fisher matrix is ``F = G^T G / N + lambda I``
(Singh & Alistarh, "WoodFisher", 2020, Eq. 4-6). Their recursion starts at ``I / lambda`` and takes one gradient after
the other, ``F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)``: N B^2 operations of rank one on a B x B matrix. Both
closed forms of the same inverse are matrix products throughout:

- B <= N: the Cholesky factor of the B x B matrix F itself;
- N < B: ``F^-1 = (I - G^T (lambda N I + G G^T)^-1 G) / lambda``, which only ever factors an N x N matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.errors import OptionError, explain


@dataclass(frozen=True, eq=False)
class InverseFisher:
    """``F^-1`` of many blocks of one size; make one with :meth:`of`.

    Products run in the precision of the gradients, the small matrix is factored in float64: gradients of a trained
    network are small beside ``lambda``, and what is left of 1 after the projection must still have digits.

    >>> rows = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])  # two blocks of two weights, one gradient each
    >>> inverse = InverseFisher.of(rows, damp=1.0)
    >>> inverse.diagonal()
    tensor([[0.6667, 0.6667],
            [0.2000, 1.0000]])
    >>> inverse.times(torch.ones(2, 2))
    tensor([[0.3333, 0.3333],
            [0.2000, 1.0000]])
    """

    rows: Tensor
    damp: float
    factor: Tensor

    @staticmethod
    def of(rows: Tensor, damp: float) -> InverseFisher:
        """Factor the smaller of the two matrices.

        Args:
            rows: Gradients, (..., N, B).
            damp: ``lambda``, what is added to the diagonal, in units of a squared gradient.

        Raises:
            OptionError: ``damp`` is not above zero, or so small that the matrix is singular to working precision.
        """
        if not damp > 0:
            raise OptionError(
                explain(f"damp={damp} leaves the Fisher matrix singular", remedy="take a number above 0, such as 1e-5")
            )
        count, size = rows.shape[-2:]
        # (..., B, B) or (..., N, N)
        matrix = (rows.mT @ rows).double() / count if size <= count else (rows @ rows.mT).double()
        matrix.diagonal(dim1=-2, dim2=-1).add_(damp if size <= count else damp * count)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed.any():
            raise OptionError(
                explain(
                    f"the Fisher matrix of a block of {size} weights is not positive definite to working precision",
                    gradients=f"{count}, of mean square {rows.double().square().mean():.3g}",
                    remedy=f"raise damp, now {damp:g}",
                )
            )
        return InverseFisher(rows, damp, factor)

    @property
    def is_dense(self) -> bool:
        """Whether the factor is that of F itself, and not of the gradients' N x N products."""
        return self.rows.shape[-1] <= self.rows.shape[-2]

    def diagonal(self) -> Tensor:
        """``[F^-1]_qq`` of all weights, (..., B); never below ``1 / F_qq``, which no inverse can be."""
        lower = 1 / (self.rows.square().mean(-2) + self.damp)
        if self.is_dense:
            eye = torch.eye(self.factor.shape[-1], dtype=self.factor.dtype, device=self.factor.device)
            inverse = torch.linalg.solve_triangular(self.factor, eye.expand_as(self.factor), upper=False)
            return torch.maximum(inverse.square().sum(-2).to(self.rows.dtype), lower)
        whitened = torch.linalg.solve_triangular(self.factor.to(self.rows.dtype), self.rows, upper=False)  # (..., N, B)
        return torch.maximum((1 - whitened.square_().sum(-2)) / self.damp, lower)

    def times(self, vector: Tensor) -> Tensor:
        """``F^-1 v`` block by block, (..., B)."""
        if self.is_dense:
            return self._solve(vector)
        return (vector - self.combine(self.gradients_times(vector))) / self.damp

    def gradients_times(self, vector: Tensor) -> Tensor:
        """``G v``, (..., N): what the gradients say of a step ``v``."""
        return (self.rows @ vector.to(self.rows.dtype).unsqueeze(-1)).squeeze(-1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``F^-1 G^T s / N``, (..., B), for coefficients s of the gradients, (..., N).

        ``F^-1 G^T / N = G^T (lambda N I + G G^T)^-1``, so that nothing cancels.
        """
        if self.is_dense:
            return self._solve(self._transposed_times(coefficients) / self.rows.shape[-2])
        return self._transposed_times(self._solve(coefficients))

    def _transposed_times(self, coefficients: Tensor) -> Tensor:
        return (coefficients.to(self.rows.dtype).unsqueeze(-2) @ self.rows).squeeze(-2)

    def _solve(self, vector: Tensor) -> Tensor:
        """The factored matrix's inverse times a vector."""
        return torch.cholesky_solve(vector.double().unsqueeze(-1), self.factor).squeeze(-1).to(self.rows.dtype)

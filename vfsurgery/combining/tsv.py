"""TSV-M: the first singular directions of every task, made orthogonal to those of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.base import Entry, register_combiner
from vfsurgery.combining.matrices import ForMatrices, Remark, deltas, sizes
from vfsurgery.combining.packing import Packed
from vfsurgery.errors import OptionError, explain

NULL = 1e-12
"""Singular values below this share of the largest are zero, their directions arbitrary."""
PARALLEL, MANY = 0.05, 0.1
"""Stacked directions are nearly parallel where singular values lie below this share of the largest. Some always do
where the stack is square; a tenth of all only if tasks share directions."""


@register_combiner
@dataclass(frozen=True)
class TsvM(ForMatrices):
    """TSV-M (Gargiulo et al., CVPR 2025): ``theta_0 + scale * U S V^T`` of the first directions of all tasks.

    Of each task's matrix ``w_i tau_i = U_i S_i V_i^T`` the first ``min(m, n) // T`` singular directions are kept. All
    of them side by side, ``U`` and ``V`` are replaced by the nearest matrices with orthonormal columns (polar
    factors), singular values stay. Matrices only, convolutions as ``(outputs, inputs * kernel)``; other tensors, and
    matrices with a side shorter than ``T``, get the mean of their task vectors. ``scale`` is 1, or chosen up to 3.
    With ``packed="split"`` queries, keys and values that lie in one matrix are three matrices.

    For *different* tasks: where two share a direction the polar factor is arbitrary. Singular values of the stacks
    below ``tolerance`` of the largest are dropped, so equal tasks give their truncation, and the report says where
    directions were nearly parallel. The authors' code takes tensors of two dims alone, whatever they are: 4 % of a
    ResNet-18; and computes ranks in floating point, which loses one for some sizes.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"weight": torch.zeros(2, 2)}
    >>> states = [{"weight": torch.diag(row)} for row in torch.tensor([[3.0, 0.0], [0.0, 2.0]])]
    >>> combine_states(states, TsvM(), base=base)["weight"].abs()
    tensor([[3., 0.],
            [0., 2.]])
    """

    tolerance: float = 1e-6
    scale: float = 1.0
    packed: Packed = "whole"
    name: ClassVar[str] = "tsv-m"
    doubt = (
        "{count} matrices have nearly parallel directions of several sources (first: {first}), where tsv-m is not well "
        "defined: it is for different tasks, not for runs of one"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise OptionError(
                explain(f"tolerance is a share of the largest singular value, not {self.tolerance}", remedy="1e-6")
            )

    def takes(self, entry: Entry) -> bool:
        """See :class:`ForMatrices`."""
        return super().takes(entry) and min(sizes(entry)) >= len(entry.weights)

    def of_matrix(self, entry: Entry, remark: Remark) -> Tensor:
        """See :class:`ForMatrices`."""
        rank = min(sizes(entry)) // len(entry.weights)
        kept = [directions(delta, NULL, rank) for delta in deltas(entry)]
        left, values, right = (torch.cat(each, dim=-1) for each in zip(*kept, strict=True))
        (left, parallel), (right, also) = (polar(stack, self.tolerance) for stack in (left, right))
        if max(parallel, also) > MANY:
            remark.add(entry.name)
        return (left * values) @ right.T


def directions(
    matrix: Tensor, tolerance: float, most: int, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular directions: ``U (m, r)``, ``S (r,)``, ``V (n, r)``.

    Those below ``tolerance`` times the largest singular value do not count, nor what rounding leaves of a matrix that
    was of a ``size`` before something was taken out of it. A zero matrix has none.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    least = tolerance * values[0] if size is None else torch.maximum(tolerance * values[0], NULL * size)
    count = min(int((values > least).sum()), most)
    return left[:, :count], values[:count], right[:count].T


def polar(stack: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The nearest matrix with orthonormal columns, and the share of its directions that were nearly parallel.

    Where columns are dependent the factor is zero in what they lack, not arbitrary.
    """
    if not stack.shape[1]:
        return stack, 0.0
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    kept = values > tolerance * values[0]
    return left[:, kept] @ right[kept], float((values < PARALLEL * values[0]).double().mean())

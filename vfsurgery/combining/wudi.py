"""WUDI: the task vector that differs from each task's least where that task's own directions are strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.base import Entry, register_combiner
from vfsurgery.combining.matrices import ForMatrices, Remark, deltas, sizes
from vfsurgery.combining.packing import Packed

NULL = 1e-12
"""Eigenvalues below this share of the largest are zero."""


@register_combiner
@dataclass(frozen=True)
class Wudi(ForMatrices):
    """WUDI-Merging (Cheng et al., ICML 2025) in closed form: minimizes ``sum_i |(D - D_i) D_i^T|^2 / |D_i|^2``.

    With ``D_i = w_i tau_i`` as matrices and ``G_i = D_i^T D_i / |D_i|^2`` that is ``D = (sum_i D_i G_i)
    (sum_i G_i)^+``: RegMean, the inputs' Gram matrices replaced by those of task vectors. Directions that no task has
    stay the base's. Matrices only, convolutions as ``(outputs, inputs * kernel)``; other tensors get the mean of their
    task vectors. With ``packed="split"`` queries, keys and values that lie in one matrix are three matrices.

    The authors take 300 steps of Adam from ``sum_i D_i``, an early stop on the way there, so results differ.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"weight": torch.zeros(2, 2)}
    >>> states = [{"weight": torch.diag(row)} for row in torch.tensor([[3.0, 0.0], [0.0, 2.0]])]
    >>> combine_states(states, Wudi(), base=base)["weight"].round(decimals=4)
    tensor([[3., 0.],
            [0., 2.]])
    """

    scale: float = 1.0
    packed: Packed = "whole"
    name: ClassVar[str] = "wudi"

    def of_matrix(self, entry: Entry, remark: Remark) -> Tensor:
        """See :class:`ForMatrices`."""
        rows, columns = sizes(entry)
        units = [(delta / size, size) for delta in deltas(entry) if (size := delta.norm())]
        if not units:
            return torch.zeros(rows, columns, dtype=torch.float64)
        if columns <= rows * len(units):
            grams = [unit.T @ unit for unit, _ in units]
            aims = [unit @ gram * size for (unit, size), gram in zip(units, grams, strict=True)]
            return torch.stack(aims).sum(0) @ inverse(torch.stack(grams).sum(0))
        # wide matrices: the same, by way of the smaller Gram matrix of all rows
        stacked = torch.cat([unit for unit, _ in units])
        aims = torch.cat([unit @ unit.T * size for unit, size in units], dim=1)
        return aims @ inverse(stacked @ stacked.T) @ stacked


def inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > NULL * values[-1]
    return vectors[:, kept] / values[kept] @ vectors[:, kept].T

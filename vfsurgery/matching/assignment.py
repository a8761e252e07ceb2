"""The linear assignment behind every matching: the only place where scipy is used and data leaves the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.errors import InvalidWeightsError, explain
from vfsurgery.groups import Permutation


@dataclass(frozen=True)
class Assignment:
    """The best one-to-one pairing of units, with its total similarity and that of leaving all where they are."""

    permutation: Permutation
    total: float
    unmatched: float


def assign(similarity: Tensor) -> Assignment:
    """Pair unit ``r`` of a with unit ``order[r]`` of b so that the summed similarity is largest.

    Solved exactly on the host (Crouse, "On implementing 2D rectangular assignment algorithms", 2016).

    Args:
        similarity: ``(units a, units b)``, square, any float dtype and device.

    Raises:
        InvalidWeightsError: the matrix holds NaN or infinite values.

    >>> assign(torch.tensor([[0.0, 2.0], [1.0, 0.5]])).permutation.order
    (1, 0)
    """
    from scipy.optimize import linear_sum_assignment  # a fifth of what importing torch takes

    matrix = similarity.detach().to("cpu", torch.float64, copy=True).neg_().numpy()  # scipy copies it to maximize
    try:
        _, columns = linear_sum_assignment(matrix)
    except ValueError as error:
        raise InvalidWeightsError(
            explain(
                f"no assignment exists for a similarity matrix of {tuple(matrix.shape)}: {error}",
                remedy="look for NaN or infinite weights, images or activations",
            )
        ) from error
    rows = range(len(columns))
    return Assignment(Permutation(tuple(columns.tolist())), -float(matrix[rows, columns].sum()), -float(matrix.trace()))

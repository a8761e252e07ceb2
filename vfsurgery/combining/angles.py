"""Methods for which the angles between task vectors of one tensor are all that counts.

All of them give ``sum_i c_i tau_i``, with factors that follow from the inner products of the task vectors. So one pass
over the tensors finds the factors, in float64, and tensors need never be whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vfsurgery.combining.arithmetic import weighted_sum
from vfsurgery.combining.base import Combined, Combiner, Entry, Problem
from vfsurgery.errors import OptionError, explain


class FromAngles(Combiner):
    """Gives a sum of task vectors; subclasses find the factors of each tensor in :meth:`factors`."""

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        factors = {entry.name: self.factors(entry, inner_products(entry)) for entry in problem.entries()}
        return lambda entry: weighted_sum(replace(entry, weights=tuple(factors[entry.name].tolist())))

    def factors(self, entry: Entry, products: Tensor) -> Tensor:
        """One for each source.

        Args:
            entry: The tensor, whole.
            products: ``(sources, sources)``, float64: inner products of the task vectors.
        """
        raise NotImplementedError


def inner_products(entry: Entry) -> Tensor:
    """``<tau_i, tau_j>`` of one tensor: ``(sources, sources)``, float64, on the CPU."""
    sources = len(entry.weights)
    found = torch.zeros(sources, sources, dtype=torch.float64)
    for part in entry.parts():
        own = part.task_vectors().reshape(sources, -1).double()
        found += (own @ own.T).cpu()
    return found


def shares(combiner: Combiner, weights: tuple[float, ...]) -> Tensor:
    """Weights that sum to one, float64.

    Raises:
        OptionError: one is negative, or all are zero.
    """
    if min(weights) < 0 or not any(weights):
        raise OptionError(
            explain(f"{combiner.name} lies between its sources, which takes weights from zero up",
                    weights=list(weights), remedy="combine='task-arithmetic' takes a task away by a negative weight")
        )  # fmt: skip
    found = torch.tensor(weights, dtype=torch.float64)
    return found / found.sum()

"""Model Stock: how far from the base to the mean of its fine-tuned copies, told by the angle between these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.angles import inner_products
from vfsurgery.combining.arithmetic import weighted_sum
from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, register_combiner
from vfsurgery.errors import OptionError, explain


@register_combiner
@dataclass(frozen=True)
class ModelStock(Combiner):
    """``theta_0 + t mean(w_i tau_i)``, ``t = T c / (1 + (T - 1) c)`` (Jang et al., ECCV 2024).

    ``c`` is the mean cosine of all pairs of task vectors of a tensor, of 0 to 1: below, the derivation does not hold
    and ``t`` runs off to minus infinity, so the base is kept there. Task vectors of zero have cosine 0 to others. For
    runs of *one* task, two at least. All tensors.

    FusionBench takes the mean of the angles instead, mergekit that of cosines without bounds.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    >>> states = [{"a": torch.eye(2)[0], "b": torch.ones(2)}, {"a": torch.eye(2)[1], "b": torch.ones(2)}]
    >>> combine_states(states, ModelStock(), base=base)
    {'a': tensor([0., 0.]), 'b': tensor([1., 1.])}
    """

    scale: float = 1.0
    name: ClassVar[str] = "model-stock"
    elementwise: ClassVar[bool] = True

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        if problem.sources < 2:
            raise OptionError(
                explain("model-stock needs the angle between two models at least, and there is one",
                        remedy="combine='wise-ft' lies between one model and its base")
            )  # fmt: skip
        cosines = {entry.name: mean_cosine(inner_products(entry)) for entry in problem.entries()}
        away = [name for name, cosine in cosines.items() if cosine < 0]
        if away:
            problem.notes.append(
                f"model-stock keeps {len(away)} of {len(cosines)} tensors of the base, where task vectors point away "
                f"from each other (first: {away[0]}, mean cosine {cosines[away[0]]:.2f})"
            )

        def combined(entry: Entry) -> Tensor:
            count, cosine = len(entry.weights), max(cosines[entry.name], 0.0)
            return weighted_sum(entry).mul_(cosine / (1 + (count - 1) * cosine))

        return combined


def mean_cosine(products: Tensor) -> float:
    """Of all pairs of vectors, from their inner products ``(n, n)``; 0 for pairs with a zero vector."""
    norms = products.diagonal().sqrt()
    cosines = torch.nan_to_num(products / (norms * norms[:, None]))
    return min(float(cosines[~torch.eye(len(norms), dtype=torch.bool)].mean()), 1.0)

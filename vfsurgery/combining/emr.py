"""EMR: one task vector that stands for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.base import Combiner, Entry, register_combiner


@register_combiner
@dataclass(frozen=True)
class Emr(Combiner):
    """The unified task vector of EMR-Merging (Huang et al., NeurIPS 2024): elected sign times largest magnitude.

    At every place the sign of ``sum_i w_i tau_i`` is elected, and the largest ``|w_i tau_i|`` that has it is taken;
    nothing where all cancel. All tensors. The paper then cuts a model for each task out of it by masks of one bit per
    number, and needs to know the task; this is the one model before that, whose numbers are larger than those of any
    mean, so a ``scale`` below 1 is worth trying.

    FusionBench elects minus where the sum is zero.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"w": torch.zeros(3)}
    >>> states = [{"w": torch.tensor([1.0, 3.0, 1.0])}, {"w": torch.tensor([2.0, -1.0, -1.0])}]
    >>> combine_states(states, Emr(), base=base)["w"]
    tensor([2., 3., 0.])
    """

    scale: float = 1.0
    name: ClassVar[str] = "emr"
    elementwise: ClassVar[bool] = True

    def combine(self, entry: Entry) -> Tensor:
        """See :class:`Combiner`."""
        vectors = entry.weighted()
        elected = torch.sign(vectors.sum(0))
        return (vectors * elected).amax(0).clamp_min_(0).mul_(elected)

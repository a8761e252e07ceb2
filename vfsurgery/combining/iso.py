"""Iso-C and Iso-CTS: the same strength in all directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.base import Entry, check_choice, check_share, register_combiner
from vfsurgery.combining.magnitudes import count_of
from vfsurgery.combining.matrices import ForMatrices, Remark, deltas, sizes
from vfsurgery.combining.packing import Packed
from vfsurgery.combining.tsv import NULL, directions, polar

Rank: TypeAlias = Literal["full", "numerical"]
LOW = 1e-3
"""Singular values below this share of the largest are beyond the numerical rank."""


@register_combiner
@dataclass(frozen=True)
class IsoC(ForMatrices):
    """Iso-C (Marczak et al., ICML 2025): ``theta_0 + scale * mean(S) U V^T`` of ``sum_i w_i tau_i = U S V^T``.

    Over all ``min(m, n)`` singular values, those of zero too, so one source does not come back as it is, and a matrix
    of low rank, as of LoRA, gets strength in directions that mean nothing. ``rank="numerical"`` leaves out what lies
    below a thousandth of the largest; the report says where that is most. Matrices only, convolutions as
    ``(outputs, inputs * kernel)``; other tensors get the mean of their task vectors. ``scale`` 1.5 is FusionBench's for
    eight tasks; it is chosen up to 3. With ``packed="split"`` queries, keys and values that lie in one matrix are three
    matrices. The authors' code takes tensors of two dims alone, whatever they are.

    >>> from vfsurgery.combining import combine_states
    >>> base, tuned = {"weight": torch.zeros(2, 2)}, {"weight": torch.diag(torch.tensor([3.0, 1.0]))}
    >>> combine_states([tuned], IsoC(scale=1.0), base=base)["weight"].abs()
    tensor([[2., 0.],
            [0., 2.]])
    """

    rank: Rank = "full"
    scale: float = 1.5
    packed: Packed = "whole"
    name: ClassVar[str] = "iso-c"
    doubt = (
        "{count} matrices have less than half of their full rank (first: {first}); rank='numerical' leaves out "
        "directions without strength"
    )

    def __post_init__(self) -> None:
        check_choice("rank", self.rank, get_args(Rank))

    def of_matrix(self, entry: Entry, remark: Remark) -> Tensor:
        """See :class:`ForMatrices`."""
        left, values, right = self._common(entry, remark)
        return left @ right.T * (values.mean() if len(values) else 0.0)

    def _common(self, entry: Entry, remark: Remark) -> tuple[Tensor, Tensor, Tensor]:
        """Singular directions of the sum."""
        total = sum(deltas(entry))
        assert isinstance(total, Tensor)
        full = min(sizes(entry))
        left, values, right = directions(total, LOW if self.rank == "numerical" else -1.0, full)
        if 0 < int((values > LOW * values[:1]).sum()) < full / 2 and self.rank == "full":
            remark.add(entry.name)
        return left, values, right


@register_combiner
@dataclass(frozen=True)
class IsoCTS(IsoC):
    """Iso-CTS (Marczak et al., ICML 2025): the first directions of the sum, the others from the tasks.

    Of ``min(m, n)`` directions the share ``common`` is that of ``sum_i w_i tau_i``; the others are shared out to tasks,
    the first ones of ``(I - U U^T) w_i tau_i`` each, ``U`` being the common ones. Both stacks are made orthonormal
    (polar factors) and all singular values replaced by their mean. ``common=1`` is :class:`IsoC`; all else as there.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"weight": torch.zeros(2, 2)}
    >>> states = [{"weight": torch.diag(row)} for row in torch.tensor([[3.0, 0.0], [0.0, 1.0]])]
    >>> combine_states(states, IsoCTS(scale=1.0), base=base)["weight"].abs()
    tensor([[2., 0.],
            [0., 2.]])
    """

    common: float = 0.8
    name: ClassVar[str] = "iso-cts"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("common", self.common)

    def of_matrix(self, entry: Entry, remark: Remark) -> Tensor:
        """See :class:`ForMatrices`."""
        full, sources = min(sizes(entry)), len(entry.weights)
        left, values, right = self._common(entry, remark)
        each = min((2 * (full - count_of(self.common, full)) + sources) // (2 * sources), full // sources)
        count = full - each * sources
        if count < full:  # what the sum lacks is no direction of it
            count = min(count, int((values > NULL * values[:1]).sum()))
        left, values, right = left[:, :count], values[:count], right[:, :count]
        null = LOW if self.rank == "numerical" else NULL
        own = [directions(delta - left @ (left.T @ delta), null, each, delta.norm()) for delta in deltas(entry)]
        stacks = [torch.cat(those, dim=-1) for those in zip(*own, (left, values, right), strict=True)]
        if not len(stacks[1]):
            return left.new_zeros(sizes(entry))
        return polar(stacks[0], NULL)[0] @ polar(stacks[2], NULL)[0].T * stacks[1].mean()

"""KnOTS: task vectors of LoRA adapters in one common basis, and TIES there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.arithmetic import mean_of_rest
from vfsurgery.combining.base import (
    Combined,
    Combiner,
    Entry,
    Problem,
    as_matrix,
    check_choice,
    check_share,
    from_matrix,
    register_combiner,
)
from vfsurgery.combining.magnitudes import Threshold, count_of, largest_of_each
from vfsurgery.combining.matrices import is_matrix
from vfsurgery.combining.packing import Packed, check_packed, pieces, together, told_split
from vfsurgery.combining.ties import Aggregate, agreeing

NEGLIGIBLE = 1e-5
"""Directions of smaller singular values, relative to the largest, are those of rounding."""

Merge: TypeAlias = Literal["ties", "sum"]
KEPT = 2**25
"""Numbers of bases and coordinates that are kept from one pass for the next; those of further tensors are computed
anew."""

SPARSE = 16
"""Every so many coordinates are looked at first, for about where the thresholds lie."""


@register_combiner
@dataclass(frozen=True)
class Knots(Combiner):
    """KnOTS (Stoica et al., ICLR 2025): task vectors are merged in the basis of all columns of all of them.

    Of each matrix ``[D_1 | ... | D_T] = U S [V_1 | ... | V_T]`` without negligible directions, and ``S V_i`` are what
    a task has of every one of them. TIES merges these: of each task the ``density`` of largest magnitude over all
    matrices is kept, the others as in :class:`~vfsurgery.combining.ties.Ties`; what comes out is multiplied by ``U``.
    With ``merge="sum"`` it is task arithmetic: a linear method does not see the basis.

    For adapters of low rank, whose products seldom have signs in common. Matrices and convolutions (as matrices of
    outputs by all else); the mean of the rest. With ``packed="split"`` queries, keys and values that lie in one matrix
    are three matrices.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"fc.weight": torch.zeros(2, 2)}
    >>> states = [{"fc.weight": torch.eye(2)}, {"fc.weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}]
    >>> combine_states(states, Knots(merge="sum", scale=1.0), base=base)["fc.weight"].round(decimals=4)
    tensor([[3., 0.],
            [0., 1.]])
    """

    density: float = 0.2
    aggregate: Aggregate = "mean"
    merge: Merge = "ties"
    scale: float = 0.6
    packed: Packed = "whole"
    name: ClassVar[str] = "knots"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_choice("merge", self.merge, get_args(Merge))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_packed(self.packed)

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        entries, rest = list[Entry](), list[Entry]()
        for entry in problem.entries():
            if is_matrix(entry):
                entries += [piece.entry for piece in pieces(entry, self.packed)]
            else:
                rest.append(entry)
        problem.notes.extend(told_split(problem.entries(), self.packed))
        if rest:
            numbers = sum(entry.count for entry in rest)
            share = numbers / max(numbers + sum(entry.count for entry in entries), 1)
            problem.notes.append(
                f"knots is for matrices: of {len(rest)} other tensors, {share:.1%} of the numbers, the mean was taken"
            )
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def coordinates(entry: Entry) -> tuple[Tensor, Tensor]:
            found = kept.get(entry.name) or in_common(entry)
            if sum(each.numel() for pair in (found, *kept.values()) for each in pair) <= KEPT:
                kept[entry.name] = found
            return found

        trims = None
        if self.merge == "ties" and self.density < 1:
            total = sum(coordinates(entry)[1][0].numel() for entry in entries)
            trims = largest_of_each(
                lambda: (((entry.name, 0), coordinates(entry)[1].flatten(1)) for entry in entries),
                max(count_of(self.density, total), 1),
                total,
                problem.sources,
                (coordinates(entry)[1].flatten(1)[:, ::SPARSE] for entry in entries),
            )

        def single_one(entry: Entry) -> Tensor:
            if not is_matrix(entry):
                return mean_of_rest(entry)
            basis, own = coordinates(entry)
            kept.pop(entry.name, None)
            return from_matrix(basis @ self._merged(own, entry, trims), entry.shape, entry.trait).to(entry.dtype)

        return lambda entry: together(entry, pieces(entry, self.packed), single_one)

    def _merged(self, coordinates: Tensor, entry: Entry, trims: list[Threshold] | None) -> Tensor:
        weights = entry.coefficients(coordinates)
        if self.merge == "sum":
            return (coordinates * weights).sum(0)
        if trims is not None:
            masks = [trim.keep((entry.name, 0), own) for trim, own in zip(trims, coordinates, strict=True)]
            coordinates = coordinates * torch.stack(masks)
        return agreeing(coordinates * weights, entry, 1.0, self.aggregate)


def in_common(entry: Entry) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of all columns of all task vectors, ``(rows, r)``, and their coordinates in it,
    ``(sources, r, columns)``: ``U`` and ``S V_i``, in float64.

    No more than ``U`` has to be found, from the smaller of two Gram matrices: ``S V_i`` is ``U^T D_i``.
    """
    matrices = torch.stack([as_matrix(own, entry.trait) for own in entry.task_vectors()]).double()
    beside = matrices.permute(1, 0, 2).reshape(matrices.shape[1], -1)
    if not beside.any():
        return beside.new_zeros(len(beside), 0), matrices[:, :0]
    wide = beside.shape[0] <= beside.shape[1]
    squares, vectors = torch.linalg.eigh(beside @ beside.T if wide else beside.T @ beside)
    found = squares > NEGLIGIBLE**2 * squares[-1]
    basis = vectors[:, found] if wide else torch.linalg.qr(beside @ vectors[:, found])[0]
    return basis, basis.T @ matrices

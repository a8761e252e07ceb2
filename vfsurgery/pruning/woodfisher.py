"""WoodFisher: prune by the inverse of the empirical Fisher matrix, and move the other weights to make up for it.

Singh & Alistarh, "WoodFisher: Efficient second-order approximation for neural network compression", 2020. Near a
minimum the loss rises by ``d^T F d / 2`` for a step d, with the Fisher matrix F for the Hessian. Removing weight q at
the least cost means the step ``-w_q F^-1 e_q / [F^-1]_qq`` (Eq. 8) and costs ``w_q^2 / (2 [F^-1]_qq)``, which ranks the
weights. F is block-diagonal: a block is at most ``block`` consecutive entries of a row of one weight, which belong to
one output unit; see :mod:`vfsurgery.pruning.inverse_fisher` for its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vfsurgery.data.progress import progress
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.pruning.base import PRUNERS, Pruning, Scope
from vfsurgery.pruning.fisher import GIB, GradientPruner, check_counts
from vfsurgery.pruning.gradients import Part, slabs
from vfsurgery.pruning.inverse_fisher import InverseFisher
from vfsurgery.pruning.masks import Masks

Compensation: TypeAlias = Literal["sum", "joint", "none"]
COMPENSATIONS: tuple[Compensation, ...] = ("sum", "joint", "none")

ROWS_SHARE = 0.75
"""Share of the memory that gradients may fill; the rest is for the products of some blocks at a time."""
BLOCKS_BYTES = 64 * 2**20
"""What the matrices of the blocks that are factored together may fill."""

Place: TypeAlias = tuple[str, slice, slice]
"""Blocks that are solved together: the same columns of some rows of a weight."""
Solve: TypeAlias = Callable[[Place, Tensor], Tensor]
"""From the gradients of some blocks, (blocks, samples, entries), to what takes their place, (blocks, entries)."""


@PRUNERS.register("woodfisher")
@dataclass(frozen=True, kw_only=True)
class WoodFisher(GradientPruner):
    """Keep the weights whose loss cannot be made up for: saliency ``w_q^2 / [F^-1]_qq``, and a step of the others.

    All layers compete unless said otherwise. With N gradients, two sweeps of ``slabs * N`` forward passes and about
    ``6 N^2`` operations per weight for the saliencies, as many again for the step. ``work.memory`` bounds what
    gradients fill.

    Attributes:
        block: Entries per block at most; rows are cut evenly. The publication takes 1000 to 10000.
        damp: ``lambda``, what is added to the diagonal of F.
        compensate: ``"sum"``, the publication's: the sum of the steps that every removed weight would need by itself.
            ``"joint"``: the step that is best for all of them together, ``F_KK^-1 F_KQ w_Q`` with K the kept weights of
            a block and Q the others, at no more cost; the two agree for one removed weight per block, and the more go,
            the more it matters. ``"none"``: no step.

    Raises:
        OptionError: an option is out of its range.

    >>> WoodFisher(samples=80, batch=100)
    WoodFisher(samples=80, batch=100, labels='auto', block=1000, damp=1e-05, compensate='sum')
    """

    name: ClassVar[str] = "woodfisher"
    scope: ClassVar[Scope] = "global"
    block: int = 1000
    damp: float = 1e-5
    compensate: Compensation = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(block=self.block)
        if not self.damp > 0:
            raise OptionError(
                explain(f"damp={self.damp} leaves the Fisher matrix singular", remedy="take a number above 0: 1e-5")
            )
        if self.compensate not in COMPENSATIONS:
            raise OptionError(
                explain(f"unknown compensate={self.compensate!r}", remedy=did_you_mean(self.compensate, COMPENSATIONS))
            )

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """``w_q^2 / [F^-1]_qq`` of every weight.

        Raises:
            DataError, InvalidWeightsError, OptionError: see :meth:`~vfsurgery.pruning.gradients.Gradients.each`.
        """

        def solve(place: Place, rows: Tensor) -> Tensor:
            return InverseFisher.of(rows, self.damp).diagonal()

        diagonals: dict[str, Tensor] = work.cache.setdefault("inverse diagonal", {})
        for name, diagonal in self._sweep(work, list(work.weights), solve, "WoodFisher, saliencies"):
            if self.compensate == "sum":
                diagonals[name] = diagonal  # a third of the work of the step, for as much memory as the weights take
            yield name, work.weights[name].detach().to(diagonal.dtype).square() / diagonal

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        """The weights after the step, zero where the masks are false.

        Raises:
            DataError, InvalidWeightsError, OptionError: see :meth:`~vfsurgery.pruning.gradients.Gradients.each`.
        """
        if self.compensate == "none":
            return

        def solve(place: Place, rows: Tensor) -> Tensor:
            weight, kept = (_block(tensor, place) for tensor in (work.weights[place[0]].detach(), masks[place[0]]))
            weight, kept = weight.to(rows.dtype), kept.to(rows.device)
            if self.compensate == "joint":
                return best_weights(weight, kept, rows, self.damp)
            return summed_steps(weight, kept, rows, self.damp, _block(diagonals[place[0]], place))

        diagonals: dict[str, Tensor] = work.cache.get("inverse diagonal", {})
        names = [name for name in work.weights if name in masks]
        # all of them before the first is handed out: it would be written, and the gradients are those of the old ones
        yield from list(self._sweep(work, names, solve, "WoodFisher, step of the kept weights"))

    def _sweep(self, work: Pruning, names: list[str], solve: Solve, label: str) -> Iterator[tuple[str, Tensor]]:
        """Weight by weight what ``solve`` finds for its blocks, in slabs whose gradients fit the memory."""
        weights = {name: work.weights[name].detach() for name in names}
        wide = max((max(weight.itemsize, 4) for weight in weights.values()), default=4)
        entries = int(work.memory * ROWS_SHARE * GIB / (wide * self.samples))
        cut = list(slabs(weights, entries))
        found: dict[str, Tensor] = {}
        for slab in progress(cut, label, len(cut), work.progress):
            self._solve_slab(work, slab, solve, found)
            for part in slab:
                if part.stop == len(weights[part.name]):
                    yield part.name, found.pop(part.name)

    def _solve_slab(self, work: Pruning, slab: list[Part], solve: Solve, found: dict[str, Tensor]) -> None:
        """Fill the rows of ``found`` that a slab has; its gradients are gone when this returns."""
        for part, rows in zip(slab, self.gradients(work).rows(slab), strict=True):
            weight = work.weights[part.name].detach()
            alive = weight[part.start : part.stop].flatten(1) != 0
            if not bool(alive.all()):
                rows.mul_(alive.unsqueeze(1))  # what is zero already is no part of the network
            matrix = found.setdefault(part.name, torch.empty(weight.shape, dtype=rows.dtype, device=rows.device))
            for columns in even_blocks(rows.shape[-1], self.block):
                step = _blocks_together(self.samples, columns.stop - columns.start, rows.itemsize)
                for start in range(part.start, part.stop, step):
                    stop = min(start + step, part.stop)
                    some = rows[start - part.start : stop - part.start, :, columns]
                    matrix.flatten(1)[start:stop, columns] = solve((part.name, slice(start, stop), columns), some)


def summed_steps(weight: Tensor, kept: Tensor, rows: Tensor, damp: float, diagonal: Tensor | None = None) -> Tensor:
    """The kept weights after the sum of all steps: ``w - sum over removed q of w_q F^-1 e_q / [F^-1]_qq`` (Eq. 8).

    Args:
        weight: Blocks of weights, (blocks, entries).
        kept: Their mask.
        rows: Their gradients, (blocks, samples, entries).
        damp: ``lambda``.
        diagonal: ``[F^-1]_qq`` if known, (blocks, entries).
    """
    inverse = InverseFisher.of(rows, damp)
    diagonal = inverse.diagonal() if diagonal is None else diagonal
    return (weight - inverse.times((weight / diagonal).masked_fill(kept, 0))).masked_fill(~kept, 0)


def best_weights(weight: Tensor, kept: Tensor, rows: Tensor, damp: float) -> Tensor:
    """The kept weights that minimize ``d^T F d`` with the removed ones at zero: ``w_K + F_KK^-1 F_KQ w_Q``.

    ``F_KQ w_Q = G_K^T (G_Q w_Q) / N``; masked gradients have the matrix ``F_KK`` where both are kept, and ``lambda I``
    for the others, whose entries stay out of it. Arguments as in :func:`summed_steps`.
    """
    moved = (rows @ weight.masked_fill(kept, 0).unsqueeze(-1)).squeeze(-1)  # (blocks, samples)
    inverse = InverseFisher.of(rows * kept.unsqueeze(-2), damp)
    return weight.masked_fill(~kept, 0) + inverse.combine(moved)


def even_blocks(entries: int, most: int) -> list[slice]:
    """Cut a row into as few blocks of at most ``most`` entries as there can be, of nearly one size.

    >>> [(block.start, block.stop) for block in even_blocks(10, 4)]
    [(0, 4), (4, 7), (7, 10)]
    """
    count = max(-(-entries // most), 1)
    size, longer = divmod(entries, count)
    edges = [index * size + min(index, longer) for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _block(tensor: Tensor, place: Place) -> Tensor:
    return tensor.flatten(1)[place[1], place[2]]


def _blocks_together(samples: int, entries: int, itemsize: int) -> int:
    """How many blocks to factor at once: two float64 matrices, and one product of the size of the gradients."""
    side = min(samples, entries)
    return max(BLOCKS_BYTES // (16 * side * side + 2 * itemsize * samples * entries), 1)

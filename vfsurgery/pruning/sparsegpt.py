"""Optimal brain surgery column by column, as SparseGPT does it (Frantar & Alistarh, 2023).

Each layer is to compute what it did: minimize ``||W X - W' X||^2`` over the weights that are kept. With ``H = X X^T +
damping`` and ``U`` upper triangular, ``H^-1 = U^T U``, the columns of ``W`` are gone through from left to right. Where
``w_q`` is dropped, ``e = w_q / U_qq`` and all later columns ``j`` of that unit make up for it: ``w_j -= e U_qj``. Of
all units at once, what a block of columns does to the columns after it is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vfsurgery.errors import OptionError, explain
from vfsurgery.pruning.base import PRUNERS, Pattern, Pruner, Pruning, Scope
from vfsurgery.pruning.inputs import in_parts, second_moments
from vfsurgery.pruning.masks import Masks
from vfsurgery.pruning.selection import largest
from vfsurgery.stats.threads import threads

GIB = 1 << 30
WORKSPACE = 3
"""Matrices of a layer's size that factorizing it takes, its second moments included."""


@PRUNERS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Keep what the layer's outputs need, and let the kept weights make up for the others.

    While columns are gone through, each block of them chooses which entries it keeps by ``w_q^2 / U_qq^2``, how much
    the error grows without ``w_q``, for the weights as they are by then; as many as the masks keep in it (of each unit
    with scope ``"row"``, of each M inputs with a pattern). The masks are those of the largest weights of all layers:
    unlike in the paper, layers and their blocks differ in sparsity, which suits convolutional networks far better than
    the paper's equal ones (scope ``"layer"``).

    Attributes:
        images: How many images to take second moments on. More only help once every layer has seen several times more
            output pixels than a unit has inputs.
        damping: Added to the diagonal of ``H``, as a share of its mean.
        block: Columns that choose together.
        counts: How many entries a block keeps: as many of the largest weights (``"magnitude"``), or of those with the
            largest ``w_q^2 / [H^-1]_qq`` (``"obs"``), which errors of different layers make a poor ``"global"`` scope.
        rechoose: Whether blocks choose; else the masks hold as they are.

    >>> import torch, vfsurgery as surgery
    >>> _ = torch.manual_seed(0)
    >>> x, net = torch.randn(64, 6) @ torch.randn(6, 6), torch.nn.Linear(6, 4)
    >>> error = {m: (surgery.prune(net, 0.5, method=m, data=x)(x) - net(x)).norm() for m in ("sparsegpt", "random")}
    >>> bool(error["sparsegpt"] < error["random"])
    True
    """

    name: ClassVar[str] = "sparsegpt"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "global"
    rechooses: ClassVar[bool] = True
    images: int | None = 1024
    damping: float = 0.01
    block: int = 128
    counts: Literal["magnitude", "obs"] = "magnitude"
    rechoose: bool = True

    def __post_init__(self) -> None:
        too_few = self.images is not None and self.images < 1
        if not self.damping > 0 or self.block < 1 or too_few or self.counts not in ("magnitude", "obs"):
            accepted = "damping > 0, block >= 1, images >= 1 or None for all, counts 'magnitude' or 'obs'"
            raise OptionError(explain(f"{self} cannot work", accepted=accepted))

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """By ``counts``, of layers that are seen; one pass over the data, or more where ``work.memory`` is short."""
        for name, factor in self._factors(work, list(work.weights), "second moments of inputs"):
            weight, layout = work.weights[name].detach(), work.layouts[name]
            if self.counts == "magnitude":
                yield name, weight.abs()
                continue
            inverse_diagonal = factor.square().sum(1, keepdim=True)  # [U^T U]_qq, (groups, 1, columns)
            rows = layout.rows(weight).to(factor.dtype)
            yield name, layout.weight(rows.square() / inverse_diagonal, weight.shape)

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        """The weights that make up for those dropped; the same passes again unless all fitted in one."""
        for name, factor in self._factors(work, list(masks), "second moments once more"):
            weight, layout = work.weights[name].detach(), work.layouts[name]
            rows, alive, kept = (layout.rows(x) for x in (weight, weight != 0, masks[name]))
            elimination = Elimination(rows.to(factor.dtype).clone(), factor, alive, kept, work.scope == "row")
            found = elimination.run(self.block, work.pattern, self.rechoose)
            yield name, layout.weight(found, weight.shape)

    def _factors(self, work: Pruning, names: Sequence[str], label: str) -> Iterator[tuple[str, Tensor]]:
        """``U`` of each weight, ``(groups, columns, columns)``; kept for next time if there is room for all."""
        cached = work.cache.get(self.name, {})
        sizes = {name: _matrix_bytes(work, name) for name in names if name not in work.dense and name not in cached}
        parts = list(in_parts(sizes, _budget(sizes, work.memory)))
        for name in names:
            if name in cached:
                yield name, cached[name]
        for part in parts:
            moments = second_moments(work, label, part, self.images)
            for name in list(moments):
                factor, damping = inverse_factor(moments.pop(name), self.damping)
                if damping != self.damping:
                    work.notes.append(f"{name}: damping {damping:g}, with less its inputs' second moments are singular")
                if len(parts) == 1:
                    work.cache.setdefault(self.name, {})[name] = factor
                yield name, factor


def _matrix_bytes(work: Pruning, name: str) -> int:
    weight, layout = work.weights[name], work.layouts[name]
    groups, _, columns = layout.rows(weight.detach().to("meta")).shape
    return groups * columns**2 * max(weight.dtype.itemsize, 4)


def _budget(sizes: dict[str, int], memory: float) -> int:
    """Bytes left for second moments beside the workspace of the largest layer.

    Raises:
        OptionError: the workspace alone is more than ``memory``.
    """
    if not sizes:
        return 0
    largest_name = max(sizes, key=lambda name: sizes[name])
    needed = WORKSPACE * sizes[largest_name]
    if needed > memory * GIB:
        raise OptionError(
            explain(
                f"{largest_name} takes {needed / GIB:.1f} GiB for the second moments of its inputs",
                allowed=f"memory={memory:g} GiB",
                remedy=f"a larger memory=, or exclude={largest_name.rpartition('.')[0]!r}",
            )
        )
    return int(memory * GIB) - needed + sizes[largest_name]


@threads(1)
def inverse_factor(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """``U`` with ``(moments + d I)^-1 = U^T U``, upper triangular, and the damping that it took.

    With rows and columns in reverse order, ``H = L L^T`` becomes ``H = R R^T`` with ``R`` upper triangular; then
    ``U = R^-1``: one factorization, and no inverse of ``H``.

    Args:
        moments: ``(groups, n, n)``, overwritten.
        damping: Share of the mean of each diagonal; ten times more until the factorization succeeds.

    >>> u, _ = inverse_factor(4 * torch.eye(2).unsqueeze(0), 0.01)
    >>> torch.allclose(u[0].T @ u[0], torch.eye(2) / 4.04)
    True
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    level = torch.where(level > 0, level, 1)  # of inputs that are always zero: then every weight is free
    added = damping
    diagonal += damping * level
    while True:
        lower, failures = torch.linalg.cholesky_ex(moments.flip(1, 2))
        if not bool(failures.any()):
            break
        if added > 1e3:
            raise OptionError(
                explain("second moments of inputs are NaN or infinite", remedy="check the data, or use float32")
            )
        diagonal += 9 * added * level
        added *= 10
    upper = lower.flip(1, 2)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True), added


@dataclass
class Elimination:
    """The weights of one layer while columns are dropped: all tensors ``(groups, units, columns)`` but the factor."""

    rows: Tensor
    factor: Tensor  # U, (groups, columns, columns)
    alive: Tensor  # entries that were not zero before
    kept: Tensor  # the mask; what counts is how many it keeps where
    by_unit: bool

    def run(self, block: int, pattern: Pattern | None, rechoose: bool) -> Tensor:
        """Go through all columns and return the new rows, zero where an entry is dropped."""
        width = pattern[1] if pattern else 0
        block = -(-block // width) * width if width else block
        chosen = self.kept.clone()
        for start in range(0, self.rows.shape[2], block):
            stop = min(start + block, self.rows.shape[2])
            if rechoose and not width:
                chosen[..., start:stop] = self._choose(start, stop, self.by_unit)
            errors = torch.zeros_like(self.rows[..., start:stop])
            for column in range(start, stop):
                if rechoose and width and column % width == 0:
                    chosen[..., column : column + width] = self._choose(column, column + width, True)
                dropped = self.rows[..., column].masked_fill(chosen[..., column], 0)  # (groups, units)
                error = dropped / self.factor[:, column, column].unsqueeze(1)
                followers = self.factor[:, column, column:stop].unsqueeze(1)
                self.rows[..., column:stop] -= error.unsqueeze(2) * followers
                errors[..., column - start] = error
            self.rows[..., stop:].baddbmm_(errors, self.factor[:, start:stop, stop:], alpha=-1)
        return self.rows.masked_fill_(~chosen, 0)

    def _choose(self, start: int, stop: int, by_unit: bool) -> Tensor:
        """Which entries of some columns to keep: as many as the mask does, by their saliency now."""
        diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, None, start:stop]
        saliency = (self.rows[..., start:stop] / diagonal).square_()
        saliency = saliency.masked_fill_(~self.alive[..., start:stop], -torch.inf)
        kept = self.kept[..., start:stop]
        if by_unit:
            return largest(saliency, kept.sum(2))
        return largest(saliency.flatten(), kept.sum()).view_as(saliency)

"""Pruners that judge weights by gradients of the loss, and the diagonal Fisher matrix as the simplest of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.data.progress import progress
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.pruning.base import PRUNERS, Pruner, Pruning, Scope
from vfsurgery.pruning.gradients import LABELS, Gradients, Labelled, Labels

GIB = 2**30
KEPT = 8
"""Images are kept for the passes to come where they fill less than one part in so many of the memory."""


@dataclass(frozen=True, kw_only=True)
class GradientPruner(Pruner):
    """What all of them are told about their gradients.

    Attributes:
        samples: How many gradients.
        batch: Images per gradient; each gradient is that of their mean loss.
        labels: ``"given"``, ``"drawn"`` from the model's own softmax, or ``"auto"``: given where the data has them.

    Raises:
        OptionError: an option is out of its range.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 400
    batch: int = 1
    labels: Labels = "auto"

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)
        if self.labels not in LABELS:
            raise OptionError(explain(f"unknown labels={self.labels!r}", remedy=did_you_mean(self.labels, LABELS)))

    def gradients(self, work: Pruning) -> Gradients:
        """The gradients of the model of ``work``, the same at each call.

        Raises:
            DataError: there is no data.
        """
        if "gradients" not in work.cache:
            images, labelled = _read_once(work, self.samples * self.batch)
            labels = self.labels if self.labels != "auto" else ("given" if labelled else "drawn")
            seed = int(torch.randint(2**31, (), generator=work.generator))
            work.cache["gradients"] = Gradients(work.model, images, self.samples, self.batch, labels, seed)
            work.notes.append(f"{self.name}: {self.samples} gradients of {self.batch} images, labels {labels}")
        return work.cache["gradients"]


@PRUNERS.register("diagonal-fisher")
@dataclass(frozen=True, kw_only=True)
class DiagonalFisher(GradientPruner):
    """Keep the weights whose loss raises the loss most, were they independent: saliency ``w^2 F_ii``.

    ``F_ii = sum_n g_n,i^2 / (2 N)`` is the diagonal of the Fisher matrix over two, from N gradients; a weight's removal
    then costs ``w^2 F_ii`` (LeCun et al., "Optimal brain damage", 1990, with the Fisher matrix as the Hessian;
    Theis et al., 2018). Layer by layer unless said otherwise. One forward and backward pass over the images; memory
    for two copies of the weights.

    >>> from vfsurgery.stats.inputs import Layout
    >>> net = torch.nn.Linear(2, 2)
    >>> from vfsurgery.data.batches import Batches
    >>> data = Batches((torch.eye(2), torch.tensor([0, 1])))
    >>> work = Pruning(net, {"weight": net.weight}, {"weight": Layout()}, data)
    >>> [(name, saliency.shape) for name, saliency in DiagonalFisher(samples=2).score(work)]
    [('weight', torch.Size([2, 2]))]
    """

    name: ClassVar[str] = "diagonal-fisher"
    scope: ClassVar[Scope] = "layer"

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """``w^2 sum g^2 / (2 N)`` of every weight.

        Raises:
            DataError, InvalidWeightsError, OptionError: see :meth:`~vfsurgery.pruning.gradients.Gradients.each`.
        """
        names = list(work.weights)
        squares: dict[str, Tensor] = {}
        steps = progress(self.gradients(work).each(names), "gradients", self.samples, work.progress)
        for found in steps:
            for name, gradient in zip(names, found, strict=True):
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                squares[name] = squares[name].addcmul_(wide, wide) if name in squares else wide.square()
        for name, weight in work.weights.items():
            yield name, squares.pop(name).div_(2 * self.samples).mul_(weight.detach()).mul_(weight.detach())


def check_counts(**options: int) -> None:
    """Refuse what is not a count.

    Raises:
        OptionError: names the option.
    """
    for option, value in options.items():
        if value < 1:
            raise OptionError(explain(f"{option}={value} is not a count", remedy="take 1 or more"))


def _read_once(work: Pruning, wanted: int) -> tuple[Labelled, bool]:
    """The images for all passes, read now if they fit; and whether they have labels."""
    length = work.data.length() if work.data is not None else None
    # a share of each batch is read, and the last batch may be too small to give its own
    most = -(-wanted * length // (length - 1)) if length is not None and length > 1 else wanted
    kept: list[tuple[Tensor, Tensor | None]] = []
    size, labelled = 0, True
    for images, labels in work.labelled("images for the gradients", most):
        size, labelled = size + images.nbytes, labelled and labels is not None
        if size > work.memory * GIB / KEPT:
            return _Rereading(work, most), labelled
        kept.append((images.clone(), labels))  # a view would keep the whole batch alive
    return kept, labelled


@dataclass(frozen=True)
class _Rereading:
    """The images of a run, read from the data at each pass."""

    work: Pruning
    most: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return self.work.labelled("images for the gradients", self.most)

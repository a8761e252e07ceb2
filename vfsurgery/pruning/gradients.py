"""Gradients of the loss by the weights that are to be pruned: one row per gradient, in slabs that fit into memory.

A row is the gradient of the mean cross entropy over ``batch`` images; 400 rows of 400 images, 80 of 100 or 1000 of
one are what WoodFisher's publications use. 400 rows of a ResNet-18 would fill 18 GB, so only a slab of its weights
has its rows in memory at a time, and each slab runs the images again. Only a slab's weights require a gradient, so the
backward pass stops at the first of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from vfsurgery.data.batches import check_labels, row_major
from vfsurgery.data.labels import check_logits, draw_labels
from vfsurgery.errors import DataError, InvalidWeightsError, explain
from vfsurgery.pruning.layers import stored_weight

Labels: TypeAlias = Literal["auto", "given", "drawn"]
LABELS: tuple[Labels, ...] = ("auto", "given", "drawn")
Labelled: TypeAlias = Iterable[tuple[Tensor, Tensor | None]]
"""Batches of images, each with its labels, shape (N,), or ``None``."""


@dataclass(frozen=True)
class Part:
    """Some rows of one weight, seen as a matrix: what belongs to one unit of its first axis is a row."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Gradients:
    """The gradients of a model's loss, which are computed anew each time they are asked for.

    Args:
        model: In evaluation mode, with logits of shape (batch, classes) as its output.
        data: Labelled images, which can be iterated over again and again, in the same order.
        samples: How many gradients.
        batch: Images per gradient.
        labels: ``"given"`` by the data, ``"drawn"`` from the model's own softmax, which makes F the true Fisher matrix
            and not the empirical one, or ``"auto"``: given where there are any.
        seed: Of the labels that are drawn: the same ones at each pass.

    >>> model = nn.Linear(3, 2)
    >>> images, labels = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    >>> gradients = Gradients(model, [(images, labels)], samples=4, batch=2)
    >>> gradients.rows([Part("weight", 0, 2)])[0].shape  # rows of the weight, gradients, columns
    torch.Size([2, 4, 3])
    """

    model: nn.Module
    data: Labelled
    samples: int = 400
    batch: int = 1
    labels: Labels = "auto"
    seed: int = 0

    def each(self, names: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """One gradient after the other, each as one tensor per weight, of that weight's shape.

        Raises:
            DataError: too few images, no labels where given ones are asked for, labels that are no class indices, or
                an output that is not logits.
            InvalidWeightsError: a gradient is not finite.
            OptionError: a weight is computed by hooks and not stored.
        """
        weights = [stored_weight(self.model, name) for name in names]
        generator = torch.Generator().manual_seed(self.seed)
        with _only(self.model, weights):
            for images, labels in self._groups():
                with torch.enable_grad():
                    loss = self._loss(images, labels, generator)
                    found = torch.autograd.grad(loss, weights, materialize_grads=True)
                _check_finite(names, found)
                yield found

    def rows(self, parts: Sequence[Part]) -> list[Tensor]:
        """The gradients of some rows of some weights; each weight at most once.

        Returns:
            For each part a tensor (rows of the part, samples, columns), float32 or wider.

        Raises:
            DataError, InvalidWeightsError, OptionError: see :meth:`each`.
        """
        filled: list[Tensor] = []
        for index, found in enumerate(self.each([part.name for part in parts])):
            if not filled:
                filled = [_room(part, gradient, self.samples) for part, gradient in zip(parts, found, strict=True)]
            for part, gradient, rows in zip(parts, found, filled, strict=True):
                rows[:, index] = gradient[part.start : part.stop].flatten(1)
        return filled

    def _loss(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        logits = self.model(images)
        _check_logits(logits, len(images))
        if labels is None:
            labels = draw_labels(logits.detach(), generator)
        check_labels(labels, logits)
        return functional.cross_entropy(logits.float() if logits.itemsize < 4 else logits, labels.long())

    def _groups(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The first ``samples`` groups of ``batch`` images, whatever sizes the data comes in."""
        left: list[tuple[Tensor, Tensor | None]] = []
        seen = made = 0
        for images, given in self.data:
            seen += len(images)
            left.append((images, None if self.labels == "drawn" else given))
            if sum(len(kept) for kept, _ in left) < self.batch:
                continue
            images, labels = _joined(left)
            if labels is None and self.labels == "given":
                raise DataError(
                    explain(
                        "the gradients need labels, and the data has none",
                        remedy="pass (images, labels), or labels='drawn' to draw them from the model's own softmax",
                    )
                )
            whole = len(images) // self.batch * self.batch
            for start in range(0, whole, self.batch):
                chosen = slice(start, start + self.batch)
                yield row_major(images[chosen]), None if labels is None else labels[chosen]
                made += 1
                if made == self.samples:
                    return
            left = [(images[whole:], None if labels is None else labels[whole:])]
        raise DataError(
            explain(
                f"too few images: {seen}",
                expected=f"{self.samples * self.batch}: {self.samples} gradients of {self.batch}",
                remedy=f"pass more images, or samples={seen // self.batch}"
                if seen >= self.batch
                else "pass more images",
            )
        )


def slabs(weights: Mapping[str, Tensor], entries: int) -> Iterator[list[Part]]:
    """Cut weights into slabs of at most ``entries`` entries, in their order, whole rows at a time.

    >>> weights = {"a": torch.zeros(4, 10), "b": torch.zeros(2, 10)}
    >>> [[(part.name, part.start, part.stop) for part in slab] for slab in slabs(weights, 30)]
    [[('a', 0, 3)], [('a', 3, 4), ('b', 0, 2)]]
    """
    slab: list[Part] = []
    room = entries
    for name, weight in weights.items():
        columns, start = max(weight[0].numel(), 1), 0
        while start < len(weight):
            if room < columns and slab:
                yield slab
                slab, room = [], entries
            stop = min(start + max(room // columns, 1), len(weight))
            slab.append(Part(name, start, stop))
            room -= (stop - start) * columns
            start = stop
    if slab:
        yield slab


def _joined(batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Batches as one; without labels if any of them has none."""
    if len(batches) == 1:
        return batches[0]
    given = [labels for _, labels in batches if labels is not None]
    images = torch.cat([images for images, _ in batches])
    return images, torch.cat(given) if len(given) == len(batches) else None


def _room(part: Part, gradient: Tensor, samples: int) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_empty(part.stop - part.start, samples, gradient[0].numel(), dtype=dtype)


@contextmanager
def _only(model: nn.Module, weights: Sequence[nn.Parameter]) -> Generator[None]:
    """Only these parameters require a gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(weight) for weight in weights}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _check_logits(logits: Tensor, count: int) -> None:
    check_logits(logits, count, "prune by magnitude")
    if not logits.requires_grad:
        raise DataError(
            explain(
                "the model's output has no gradient by the weights",
                remedy="remove torch.no_grad() or detach() from its forward",
            )
        )


def _check_finite(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    for name, gradient in zip(names, gradients, strict=True):
        total = gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32))
        if not total.isfinite():  # entry by entry it would take as long as the backward pass
            raise InvalidWeightsError(
                explain(
                    f"the gradient of the loss by {name} is NaN or infinite",
                    remedy="check the model's loss on these images, in float32",
                )
            )

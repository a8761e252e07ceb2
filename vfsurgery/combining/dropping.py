"""DARE, DELLA and Breadcrumbs: drop numbers of each task vector, by chance or by size, then add or vote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.base import (
    Combined,
    Combiner,
    Entry,
    Kind,
    Problem,
    as_matrix,
    check_choice,
    check_share,
    from_matrix,
    register_combiner,
)
from vfsurgery.combining.magnitudes import count_of, largest
from vfsurgery.combining.ties import Aggregate, summed, vote
from vfsurgery.errors import OptionError, explain

Then: TypeAlias = Literal["task-arithmetic", "ties"]


@dataclass(frozen=True)
class Dropping(Combiner):
    """What the three have in common: ``then`` says how that which is left is combined.

    ``"task-arithmetic"`` adds up; ``"ties"`` elects a sign for every number and averages what agrees with it, or adds
    it up with ``aggregate="sum"``. A mean wants a ``scale`` of about 1, sums one of 0.2 to 0.4.
    """

    density: float = 0.5
    then: Then = "task-arithmetic"
    aggregate: Aggregate = "mean"
    scale: float = 0.3

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_choice("then", self.then, get_args(Then))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""

        def each(entry: Entry) -> Iterator[Tensor]:
            for source, weight in enumerate(entry.weights):
                yield self.dropped(entry, source, problem.seed).mul_(weight)

        def together(entry: Entry) -> Tensor:
            vectors = each(entry)
            first = next(vectors)
            found = first.new_empty((len(entry.weights), *first.shape))
            for place, own in zip(found, chain((first,), vectors), strict=True):
                place.copy_(own)
            return found

        if self.then == "ties":
            return vote(problem.parts() if self.elementwise else problem.entries(), together, self.aggregate)
        return lambda entry: summed(each(entry))

    def dropped(self, entry: Entry, source: int, seed: int) -> Tensor:
        """One task vector, a tensor of its own, what is dropped set to zero."""
        raise NotImplementedError


@register_combiner
@dataclass(frozen=True)
class Dare(Dropping):
    """DARE (Yu et al., ICML 2024): ``tau_i * mask_i / density``, each number kept with probability ``density``.

    All tensors. The paper's drop rate p is ``1 - density``; 0.5 is common for vision models, 0.1 for language models.
    ``then="ties"`` is DARE-TIES, without trimming.

    Draws belong to seed, number of the source and name of the tensor: neither the order of tensors nor the number of
    threads changes them. In mergekit they follow the order of a set and differ between runs with one seed, and it
    rescales every tensor to its L1 norm before, which for small tensors is far from ``1 / density``.

    >>> from vfsurgery.combining import combine_states
    >>> base, tuned = {"w": torch.zeros(6)}, {"w": torch.ones(6)}
    >>> combine_states([tuned], Dare(scale=1.0), base=base)["w"]
    tensor([0., 0., 0., 2., 2., 0.])
    """

    name: ClassVar[str] = "dare"
    elementwise: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def dropped(self, entry: Entry, source: int, seed: int) -> Tensor:
        """See :class:`Dropping`."""
        own = entry.task_vector(source)
        return own.mul_((uniform(entry, seed, source) < self.density).to(own.device)).div_(self.density)


@register_combiner
@dataclass(frozen=True)
class Della(Dropping):
    """DELLA (Deep et al., 2024): as DARE, but of each row large numbers are kept with greater probability.

    The number of rank ``r`` by magnitude among the ``n`` of a row, 1 the smallest, is kept with probability
    ``p = density - epsilon + 2 epsilon (r - 1) / (n - 1)`` and divided by its own ``p``, so the mean over draws is the
    task vector; ``epsilon=0`` is DARE, to the bit. Rows are those of matrices ``(outputs, inputs * kernel)``; other
    tensors have their first dim as rows, those of one dim are one row, and rows of one number have ``p = density``.
    All tensors.

    mergekit ranks convolutions along their input channels alone, fails on rows of one number as depthwise
    convolutions have them, and rescales by L1 norms; its ``epsilon`` is 0.15, too.

    >>> from vfsurgery.combining import combine_states
    >>> base, tuned = {"w": torch.zeros(6)}, {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}
    >>> combine_states([tuned], Della(epsilon=0.3, scale=1.0), base=base)["w"]
    tensor([0.0000, 0.0000, 0.0000, 7.1429, 7.3529, 0.0000])
    """

    epsilon: float = 0.15
    name: ClassVar[str] = "della"
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.epsilon >= 0 and self.density - self.epsilon > 0 and self.density + self.epsilon <= 1):
            raise OptionError(
                explain(f"probabilities from {self.density} - {self.epsilon} to {self.density} + {self.epsilon} do not "
                        "lie in (0, 1]", remedy="a smaller epsilon; 0 keeps all numbers with the same probability")
            )  # fmt: skip

    def dropped(self, entry: Entry, source: int, seed: int) -> Tensor:
        """See :class:`Dropping`."""
        own = entry.task_vector(source)
        matrix = entry.trait.kind is Kind.MATRIX
        rows = as_matrix(own, entry.trait) if matrix else (own.flatten(1) if own.ndim > 1 else own.reshape(1, -1))
        kept = self.probabilities(rows)
        kept = from_matrix(kept, entry.shape, entry.trait) if matrix else kept.reshape(entry.shape)
        return own.mul_(uniform(entry, seed, source).to(own.device) < kept).div_(kept)

    def probabilities(self, rows: Tensor) -> Tensor:
        """With which each number of ``(rows, n)`` is kept."""
        length = rows.shape[-1]
        if length < 2 or not self.epsilon:
            return torch.full_like(rows, self.density)
        ranks = torch.empty_like(rows)
        places = torch.arange(length, dtype=rows.dtype, device=rows.device).expand_as(rows)
        ranks.scatter_(1, rows.abs().argsort(dim=1, stable=True), places)
        return ranks.mul_(2 * self.epsilon / (length - 1)).add_(self.density - self.epsilon)


@register_combiner
@dataclass(frozen=True)
class Breadcrumbs(Dropping):
    """Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): neither the largest numbers nor the smallest.

    In each tensor the share ``outliers`` of largest magnitude is dropped, and of the smallest ones as many as leave
    ``density`` of all: ``floor(outliers N)`` and ``floor(density N)`` of ``N`` numbers, but never none at all. With
    ``outliers=0`` this is trimming by magnitude, tensor by tensor. All tensors.

    mergekit 0.1.4 sets every tensor of fewer than ``1 / outliers`` numbers to zero, 0.1.5 those of one number.

    >>> from vfsurgery.combining import combine_states
    >>> base, tuned = {"w": torch.zeros(5)}, {"w": torch.tensor([9.0, -1.0, 2.0, -3.0, 0.5])}
    >>> combine_states([tuned], Breadcrumbs(density=0.6, outliers=0.2, scale=1.0), base=base)["w"]
    tensor([ 0., -1.,  2., -3.,  0.])
    """

    density: float = 0.9
    outliers: float = 0.01
    name: ClassVar[str] = "breadcrumbs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers <= 1 - self.density:
            raise OptionError(
                explain(f"outliers {self.outliers} and density {self.density} are shares of all numbers, 1 together "
                        "at most", remedy="outliers=0 drops the smallest alone")
            )  # fmt: skip

    def dropped(self, entry: Entry, source: int, seed: int) -> Tensor:
        """See :class:`Dropping`."""
        own = entry.task_vector(source)
        place, count = (entry.name, 0), own.numel()
        outliers = count_of(self.outliers, count)
        kept = max(count_of(self.density, count), 1)
        reached = largest(lambda: [(place, own)], outliers + kept).keep(place, own)
        if outliers:
            reached &= ~largest(lambda: [(place, own)], outliers).keep(place, own)
        return own.mul_(reached.to(own.device))


def uniform(entry: Entry, seed: int, source: int) -> Tensor:
    """A draw from [0, 1) for each number of a tensor, the same whether it comes whole or in parts."""
    parts = [torch.rand(part.count, generator=part.generator(seed, source)) for part in entry.parts()]
    return torch.cat(parts).reshape(entry.laid_out)

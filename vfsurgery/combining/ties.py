"""TIES: trim what is small, elect a sign for every number, and merge what agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.base import (
    PART,
    Combined,
    Combiner,
    Entry,
    Problem,
    check_choice,
    check_share,
    register_combiner,
)
from vfsurgery.combining.magnitudes import Place, Threshold, count_of, largest_of_each

Aggregate: TypeAlias = Literal["mean", "sum"]
Scope: TypeAlias = Literal["model", "tensor"]

SPREAD, RUN = 2**16, 2**9
"""Of how many numbers, and how many at a time, a threshold is estimated by before it is counted."""


@register_combiner
@dataclass(frozen=True)
class Ties(Combiner):
    """TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect sign, disjoint merge. All tensors.

    Of each task vector the ``density`` of largest magnitude is kept, over the whole model: exactly
    ``floor(density * N)`` of ``N`` numbers. The sign of ``sum_i w_i tau_i`` is elected at every place; where that is
    zero, the sign that the others have in the majority. Then those that agree with it are averaged,
    ``sum w_i tau_i / sum |w_i|``, or with ``aggregate="sum"`` added up, which needs a smaller ``scale`` (0.2 to 0.4).

    Published codes differ: the authors' keeps one number more and all ties and fails at density 1; mergekit and peft
    trim tensor by tensor (``scope="tensor"`` here), mergekit divides by the *signed* sum of weights, so that a weight
    of -1 adds the task; peft elects before it weights.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"w": torch.zeros(3)}
    >>> states = [{"w": torch.tensor([3.0, 1.0, 2.0])}, {"w": torch.tensor([1.0, -2.0, 0.0])}]
    >>> combine_states(states, Ties(density=1.0), base=base)["w"]
    tensor([ 2., -2.,  2.])
    """

    density: float = 0.2
    aggregate: Aggregate = "mean"
    scope: Scope = "model"
    scale: float = 1.0
    name: ClassVar[str] = "ties"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_choice("scope", self.scope, get_args(Scope))

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        trims = None if self.density == 1 else thresholds(problem, self.density, self.scope)
        return vote(problem.parts(), lambda entry: trimmed(entry, trims), self.aggregate)


def vote(entries: Iterable[Entry], vectors: Callable[[Entry], Tensor], aggregate: str) -> Combined:
    """What TIES does after trimming: elect a sign for every number, merge what agrees with it.

    Args:
        entries: All tensors, whole or in parts, for the majority of signs.
        vectors: Gives the weighted task vectors of one along the first dim.
        aggregate: ``"mean"`` or ``"sum"``.
    """
    majority = 0.0
    for entry in entries:
        majority += float(torch.sign(summed(vectors(entry))).sum(dtype=torch.float64))
    fallback = -1.0 if majority < 0 else 1.0

    def combined(entry: Entry) -> Tensor:
        # in parts even where tensors come whole: what is made on the way would be as large as all sources
        parts = vectors(entry).reshape(len(entry.weights), -1).split(PART, dim=1)
        return torch.cat([agreeing(part, entry, fallback, aggregate) for part in parts]).reshape(entry.laid_out)

    return combined


def thresholds(problem: Problem, density: float, scope: str) -> list[dict[str, Threshold]]:
    """For each source, by tensor, what of its task vector is kept."""
    entries = [[*problem.entries()]] if scope == "model" else [[entry] for entry in problem.entries()]
    found: list[dict[str, Threshold]] = [{} for _ in range(problem.sources)]
    for those in entries:

        def parts(those: list[Entry] = those) -> Iterator[tuple[Place, Tensor]]:
            for entry in those:
                for part in entry.parts():
                    yield (part.name, part.start), part.task_vectors()

        total = sum(entry.count for entry in those)
        keep = count_of(density, total)
        sample = (part.task_vectors() for part in samples(those, total))
        limits = largest_of_each(parts, max(keep, 1) if scope == "tensor" else keep, total, problem.sources, sample)
        for kept, threshold in zip(found, limits, strict=True):
            kept |= dict.fromkeys((entry.name for entry in those), threshold)
    return found


def samples(entries: Iterable[Entry], total: int) -> Iterator[Entry]:
    """Short runs of numbers, evenly spread over large models; none of small ones."""
    if total >= SPREAD * RUN:
        for entry in entries:
            for start in range(entry.start, entry.stop, SPREAD):
                yield replace(entry, start=start, stop=min(start + RUN, entry.stop))


def trimmed(entry: Entry, trims: list[dict[str, Threshold]] | None) -> Tensor:
    """Weighted task vectors of all sources, what is small set to zero."""
    found = entry.task_vectors()
    if trims is not None:
        for source, own in enumerate(found):
            trims[source][entry.name].trim_((entry.name, entry.start), own)
    return entry.weighed(found)


def agreeing(vectors: Tensor, entry: Entry, fallback: float, aggregate: str) -> Tensor:
    """The mean, or the sum, of what has the elected sign at each place.

    Only sums and products are taken, which processors do many times faster than comparisons and choices.

    Args:
        vectors: Weighted task vectors along the first dim; zeros have no sign.
        entry: Of which they are.
        fallback: The sign where all cancel.
        aggregate: ``"mean"`` or ``"sum"``.
    """
    elected = torch.sign(summed(vectors))
    elected.add_(elected.abs().sub_(1), alpha=-fallback)
    total, shares = torch.zeros_like(elected), torch.zeros_like(elected)
    for own, weight in zip(vectors, entry.weights, strict=True):
        agrees = (own * elected).clamp_min_(0)
        total += agrees
        if aggregate == "mean":
            shares.add_(agrees.sign_(), alpha=abs(weight))
    if aggregate == "mean":
        total /= shares.clamp_min_(torch.finfo(shares.dtype).tiny)
    return total.mul_(elected)


def summed(vectors: Iterable[Tensor]) -> Tensor:
    """The sum over sources, one after the other: the same bits however many numbers there are."""
    each = iter(vectors)
    total = next(each).clone()
    for own in each:
        total += own
    return total

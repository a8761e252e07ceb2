"""TIES: trim what is small, elect a sign for every number, and merge what agrees with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, check_share, register_combiner
from vfsurgery.combining.magnitudes import Place, Threshold, count_of, largest


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
    aggregate: Literal["mean", "sum"] = "mean"
    scope: Literal["model", "tensor"] = "model"
    scale: float = 1.0
    name: ClassVar[str] = "ties"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        trims = None if self.density == 1 else thresholds(problem, self.density, self.scope)
        majority = 0.0
        for entry in problem.parts():
            majority += float(torch.sign(_trimmed(entry, trims).sum(0)).sum())
        fallback = -1.0 if majority < 0 else 1.0
        return lambda entry: agreeing(_trimmed(entry, trims), entry, fallback, self.aggregate)


def thresholds(problem: Problem, density: float, scope: str) -> list[dict[str, Threshold]]:
    """For each source, by tensor, what of its task vector is kept."""
    entries = [[*problem.entries()]] if scope == "model" else [[entry] for entry in problem.entries()]
    found: list[dict[str, Threshold]] = [{} for _ in range(problem.sources)]
    for source, kept in enumerate(found):
        for those in entries:

            def parts(those: list[Entry] = those, source: int = source) -> Iterator[tuple[Place, Tensor]]:
                for entry in those:
                    for part in entry.parts():
                        yield (part.name, part.start), part.task_vector(source)

            keep = count_of(density, sum(entry.count for entry in those))
            threshold = largest(parts, max(keep, 1) if scope == "tensor" else keep)
            kept |= dict.fromkeys((entry.name for entry in those), threshold)
    return found


def _trimmed(entry: Entry, trims: list[dict[str, Threshold]] | None) -> Tensor:
    """Weighted task vectors of all sources, what is small set to zero."""
    found = entry.task_vectors()
    if trims is not None:
        for source, own in enumerate(found):
            own.mul_(trims[source][entry.name].keep((entry.name, entry.start), own).to(own.device))
    return found.mul_(entry.coefficients(found)) if any(weight != 1 for weight in entry.weights) else found


def agreeing(vectors: Tensor, entry: Entry, fallback: float, aggregate: str) -> Tensor:
    """The mean, or the sum, of what has the elected sign at each place.

    Args:
        vectors: Weighted task vectors along the first dim; zeros have no sign.
        entry: Of which they are.
        fallback: The sign where all cancel.
        aggregate: ``"mean"`` or ``"sum"``.
    """
    elected = torch.sign(vectors.sum(0))
    elected = torch.where(elected == 0, torch.full_like(elected, fallback), elected)
    agrees = vectors * elected > 0
    total = torch.where(agrees, vectors, torch.zeros_like(vectors)).sum(0)
    if aggregate == "sum":
        return total
    shares = agrees.to(vectors.dtype).mul_(entry.coefficients(vectors).abs()).sum(0)
    return torch.where(shares > 0, total / shares.clamp_min(torch.finfo(shares.dtype).tiny), torch.zeros_like(total))

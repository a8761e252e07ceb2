"""SCE: select what varies between sources, weigh sources by their energy, erase minorities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, check_share, register_combiner
from vfsurgery.combining.magnitudes import Place, Threshold, count_of, largest


@register_combiner
@dataclass(frozen=True)
class Sce(Combiner):
    """SCE (FuseChat, Wan et al., 2024): ``sum e_i w_i tau_i / sum e_i |w_i|`` over those that have the elected sign.

    Tensor by tensor: the share ``density`` of places with the largest variance over sources is kept (all by default);
    a source weighs by its energy, ``e_i = mean(tau_i^2)``, there; the sign of ``sum_i w_i tau_i`` is elected at every
    place, plus where that is zero. All tensors.

    mergekit's calls ``density`` ``select_topk``, and bounds the sum of weights from below by 1e-6.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"w": torch.zeros(2)}
    >>> states = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, -2.0])}]
    >>> combine_states(states, Sce(), base=base)["w"]
    tensor([ 1.8000, -2.0000])
    """

    density: float = 1.0
    scale: float = 1.0
    name: ClassVar[str] = "sce"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        selected = {entry.name: self._varying(entry) for entry in problem.entries()}

        def vectors(entry: Entry) -> Tensor:
            found, threshold = entry.task_vectors(), selected[entry.name]
            if threshold is not None:
                found *= threshold.keep((entry.name, entry.start), spread(found)).to(found.device)
            return found

        energies = {entry.name: self._energies(entry, vectors) for entry in problem.entries()}

        def combined(entry: Entry) -> Tensor:
            found = vectors(entry)
            weighted = found * entry.coefficients(found)
            agrees = weighted * torch.where(weighted.sum(0) < 0, -1.0, 1.0).to(found.dtype) > 0
            factors = entry.coefficients(found) * energies[entry.name].to(found).reshape(-1, *[1] * (found.ndim - 1))
            total, weight = (torch.where(agrees, each, 0).sum(0) for each in (found * factors, factors.abs()))
            return torch.where(weight > 0, total / weight, 0)

        return combined

    def _energies(self, entry: Entry, vectors: Callable[[Entry], Tensor]) -> Tensor:
        """Sums of squares, the largest being 1."""
        found = torch.zeros(len(entry.weights), dtype=torch.float64)
        for part in entry.parts():
            found += vectors(part).reshape(len(found), -1).double().square().sum(1).cpu()
        return found / found.max().clamp_min(torch.finfo(found.dtype).tiny)

    def _varying(self, entry: Entry) -> Threshold | None:
        if self.density == 1:
            return None

        def variances() -> Iterator[tuple[Place, Tensor]]:
            for part in entry.parts():
                yield (part.name, part.start), spread(part.task_vectors())

        return largest(variances, max(count_of(self.density, entry.count), 1))


def spread(vectors: Tensor) -> Tensor:
    """The variance over sources at each place."""
    return (vectors - vectors.mean(0)).square().mean(0)

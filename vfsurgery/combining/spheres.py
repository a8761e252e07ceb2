"""SLERP, NuSLERP, multi-SLERP and Karcher means: between models along a sphere, so that norms are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.angles import FromAngles, shares
from vfsurgery.combining.base import Combined, Entry, Kind, Problem, as_matrix, from_matrix, register_combiner
from vfsurgery.errors import OptionError, explain

PARALLEL = 0.9995
"""From this cosine on a great circle and a straight line are the same."""
OPPOSITE = 1e-10
"""So near to -1 no great circle is shorter than others."""
CANCELLED = 1e-6
"""A mean of unit vectors that is shorter has no direction."""


@register_combiner
@dataclass(frozen=True)
class Slerp(FromAngles):
    """``(sin((1 - t) w) tau_1 + sin(t w) tau_2) / sin w``, ``w`` their angle, tensor by tensor (Shoemake, 1985).

    Of two sources; ``t`` is the second one's share of their weights. With a base, of task vectors; without one, of
    whole weights, where it is a straight line for models that are near to each other: their cosine lies above 0.9995.
    From there on, and where one is zero or a single number, lines are straight. All tensors.

    mergekit's ``slerp`` takes whole weights always.

    >>> from vfsurgery.combining import combine_states
    >>> states = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    >>> combine_states(states, Slerp())["w"]
    tensor([0.7071, 0.7071])
    """

    scale: float = 1.0
    name: ClassVar[str] = "slerp"
    elementwise: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        if problem.sources != 2:
            raise OptionError(
                explain(f"{self.name} lies between two models, and there are {problem.sources}",
                        remedy="combine='multislerp' or 'karcher' for others")
            )  # fmt: skip
        return super().plan(problem)

    def factors(self, entry: Entry, products: Tensor) -> Tensor:
        """See :class:`FromAngles`."""
        return self.along(entry, products, entry.count)

    def along(self, entry: Entry, products: Tensor, length: int) -> Tensor:
        """Factors ``(..., 2)`` from inner products ``(..., 2, 2)`` of vectors of some length."""
        share = shares(self, entry.weights)
        norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
        cosine = (products[..., 0, 1] / norms.prod(-1)).clamp(-1, 1)  # NaN where one is zero
        straight = ~(cosine <= PARALLEL) if length > 1 else torch.ones_like(cosine, dtype=torch.bool)
        if bool((~straight & (cosine < -1 + OPPOSITE)).any()):
            raise opposite(self.name, entry)
        angle = torch.acos(cosine)[..., None]
        curved = torch.sin(share * angle) / torch.sin(angle)
        return torch.where(straight[..., None], share, curved)


@register_combiner
@dataclass(frozen=True)
class NuSlerp(Slerp):
    """:class:`Slerp` of task vectors, so there has to be a base; ``by_row`` turns each row of a matrix on its own.

    Rows are those of ``(outputs, inputs * kernel)``; tensors that are no matrices are turned as one. mergekit's
    ``nuslerp_row_wise`` takes rows of any tensor as its last dim.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"w": torch.ones(2)}
    >>> states = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 2.0])}]
    >>> combine_states(states, NuSlerp(), base=base)["w"]
    tensor([1.7071, 1.7071])
    """

    by_row: bool = False
    name: ClassVar[str] = "nuslerp"
    elementwise: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        as_one = super().plan(problem)
        return lambda entry: self._rows(entry) if self.by_row and entry.trait.kind is Kind.MATRIX else as_one(entry)

    def _rows(self, entry: Entry) -> Tensor:
        a, b = (as_matrix(entry.task_vector(source), entry.trait) for source in range(2))
        products = [[(x.double() * y).sum(1) for x in (a, b)] for y in (a, b)]
        gram = torch.stack([torch.stack(row, -1) for row in products], -1).cpu()  # (rows, 2, 2)
        factors = self.along(entry, gram, a.shape[1]).to(a)
        return from_matrix(a.mul_(factors[:, :1]).add_(b.mul_(factors[:, 1:])), entry.shape, entry.trait)


@register_combiner
@dataclass(frozen=True)
class MultiSlerp(FromAngles):
    """Unit vectors ``u_i``, their mean direction ``m``, and from there along ``sum_i w_i (u_i - <u_i, m> m)``.

    On the sphere by its exponential map, then times the mean norm ``sum_i w_i |tau_i|``, tensor by tensor; weights are
    divided by their sum. Two sources of one norm: :class:`Slerp`. With a base, of task vectors; else of whole weights.
    Zero vectors have no direction, single numbers are averaged. All tensors. As mergekit has it, which does not say
    where unit vectors cancel.

    >>> from vfsurgery.combining import combine_states
    >>> states = [{"w": row} for row in torch.eye(3)]
    >>> combine_states(states, MultiSlerp())["w"]
    tensor([0.5774, 0.5774, 0.5774])
    """

    scale: float = 1.0
    name: ClassVar[str] = "multislerp"
    elementwise: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    steps: ClassVar[int] = 1
    curved: ClassVar[bool] = False

    def factors(self, entry: Entry, products: Tensor) -> Tensor:
        """See :class:`FromAngles`."""
        share = shares(self, entry.weights)
        norms = products.diagonal().sqrt()
        if entry.count < 2 or not norms.any():
            return share
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        cosines = products * inverse * inverse[:, None]
        return self._mean(entry, cosines, share) * inverse * (share @ norms)

    def _mean(self, entry: Entry, cosines: Tensor, share: Tensor) -> Tensor:
        """A unit vector, as factors of the unit vectors that have these cosines."""
        mean = _unit(self, entry, cosines, share)
        return _moved(cosines, mean, share)


@register_combiner
@dataclass(frozen=True)
class Karcher(MultiSlerp):
    """The point of the sphere with the least mean of squared angles to all unit vectors (Karcher, 1977).

    Found by at most ``iterations`` steps, until one is shorter than ``tolerance``; else as :class:`MultiSlerp`.

    >>> from vfsurgery.combining import combine_states
    >>> states = [{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}]
    >>> combine_states(states, Karcher())["w"]
    tensor([2.1213, 2.1213])
    """

    iterations: int = 10
    tolerance: float = 1e-5
    name: ClassVar[str] = "karcher"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise OptionError(explain(f"karcher takes one iteration at least, not {self.iterations}"))

    def _mean(self, entry: Entry, cosines: Tensor, share: Tensor) -> Tensor:
        mean = _unit(self, entry, cosines, share)
        for _ in range(self.iterations):
            to_mean = (cosines @ mean).clamp(-1, 1)
            if bool((to_mean[share > 0] < -1 + OPPOSITE).any()):
                raise opposite(self.name, entry)
            angles = torch.acos(to_mean)
            before, mean = mean, _moved(cosines, mean, share / torch.sinc(angles / torch.pi))
            if _length(cosines, mean - before) < self.tolerance:
                break
        return mean


def _unit(method: MultiSlerp, entry: Entry, cosines: Tensor, factors: Tensor) -> Tensor:
    length = _length(cosines, factors)
    if length < CANCELLED:
        raise opposite(method.name, entry)
    return factors / length


def _length(cosines: Tensor, factors: Tensor) -> float:
    return float((factors @ cosines @ factors).clamp_min(0).sqrt())


def _moved(cosines: Tensor, place: Tensor, pulls: Tensor) -> Tensor:
    """From a place on the sphere along what pulls towards each unit vector, as factors of these."""
    along = pulls - (pulls @ (cosines @ place)) * place
    length = torch.tensor(_length(cosines, along))
    return torch.cos(length) * place + torch.sinc(length / torch.pi) * along


def opposite(name: str, entry: Entry) -> OptionError:
    """What is raised where no direction lies between."""
    return OptionError(
        explain(f"{name} finds no way between opposite directions", tensor=f"{entry.name} {entry.shape}",
                remedy="combine='mean', or other weights")
    )  # fmt: skip

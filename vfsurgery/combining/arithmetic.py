"""Sums of task vectors: the mean of models, WiSE-FT and task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, register_combiner
from vfsurgery.errors import OptionError, explain


@register_combiner
@dataclass(frozen=True)
class Mean(Combiner):
    """``sum_i w_i theta_i / sum_i w_i``: the mean of models, a *soup* (Wortsman et al., ICML 2022). All tensors.

    Needs no base. With one, it is task arithmetic of scale ``1 / T``.

    >>> import torch
    >>> from vfsurgery.combining import combine_states
    >>> states = [{"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}]
    >>> combine_states(states, Mean())["w"]
    tensor([2., 2.])
    """

    scale: float = 1.0
    name: ClassVar[str] = "mean"
    elementwise: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    def combine(self, entry: Entry) -> Tensor:
        """See :class:`Combiner`."""
        total = sum(entry.weights)
        if abs(total) < 1e-12:
            raise OptionError(
                explain("a mean needs weights with a sum other than zero", weights=list(entry.weights),
                        remedy="combine='task-arithmetic' adds weighted task vectors and divides by nothing")
            )  # fmt: skip
        return weighted_sum(entry).div_(total)


@register_combiner
@dataclass(frozen=True)
class WiseFT(Combiner):
    """``theta_0 + scale * (theta_1 - theta_0)``: between a model and its base (Wortsman et al., CVPR 2022).

    All tensors. For one source; head included where base and source have it. ``scale`` is the paper's alpha, 0.5 unless
    there is something to choose it by.
    """

    scale: float = 0.5
    name: ClassVar[str] = "wise-ft"
    elementwise: ClassVar[bool] = True

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        if problem.sources != 1:
            raise OptionError(
                explain(f"wise-ft lies between one model and its base, and {problem.sources} models were given",
                        remedy="combine='task-arithmetic' for several")
            )  # fmt: skip
        return self.combine

    def combine(self, entry: Entry) -> Tensor:
        """See :class:`Combiner`."""
        return weighted_sum(entry)


@register_combiner
@dataclass(frozen=True)
class TaskArithmetic(Combiner):
    """``theta_0 + scale * sum_i w_i tau_i`` (Ilharco et al., ICLR 2023). All tensors.

    A negative weight takes a task away. ``scale`` 0.3 is what was found for eight tasks; ``1 / T`` gives the mean.
    The authors' code skips integer tensors and loads what it can: here both are told.

    >>> import torch
    >>> from vfsurgery.combining import combine_states
    >>> base, tuned = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 1.0])}
    >>> combine_states([tuned], TaskArithmetic(scale=-1.0), base=base)["w"]
    tensor([0., 1.])
    """

    scale: float = 0.3
    name: ClassVar[str] = "task-arithmetic"
    elementwise: ClassVar[bool] = True

    def combine(self, entry: Entry) -> Tensor:
        """See :class:`Combiner`."""
        return weighted_sum(entry)


def weighted_sum(entry: Entry) -> Tensor:
    """``sum_i w_i tau_i``, one source after the other."""
    total: Tensor | None = None
    for source, weight in enumerate(entry.weights):
        own = entry.task_vector(source)
        total = own.mul_(weight) if total is None else total.add_(own, alpha=weight)
    assert total is not None
    return total


def mean_of_rest(entry: Entry) -> Tensor:
    """What methods for matrices do to the rest: the weighted sum, divided by the number of sources."""
    return weighted_sum(entry).div_(len(entry.weights))

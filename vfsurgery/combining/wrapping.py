"""LiNeS and consensus: what becomes of a task vector that another method combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.arithmetic import TaskArithmetic, weighted_sum
from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, check_choice, register_combiner
from vfsurgery.combining.ties import Aggregate, Ties
from vfsurgery.errors import OptionError, explain

Of: TypeAlias = Literal["task-arithmetic", "ties"]


@dataclass(frozen=True)
class Wrapping(Combiner):
    """What both have in common: ``of`` names the method that combines; ``density`` and ``aggregate`` are TIES'."""

    of: Of = "task-arithmetic"
    density: float = 0.2
    aggregate: Aggregate = "mean"
    scale: float = 1.0
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("of", self.of, get_args(Of))
        Ties(self.density, self.aggregate)  # checks both

    def inner(self, problem: Problem) -> Combined:
        """The method that combines, planned."""
        method = TaskArithmetic() if self.of == "task-arithmetic" else Ties(self.density, self.aggregate)
        return method.plan(problem)


@register_combiner
@dataclass(frozen=True)
class Lines(Wrapping):
    """LiNeS (Wang et al., ICLR 2025): ``theta_0 + scale * (alpha + beta * depth) * combined``.

    ``depth`` grows from 0 to 1 along the longest path through the network, so first layers stay near to the base, and
    last norms count as last layers. ``alpha`` is by default ``|sum_i w_i tau_i|_1 / |combined|_1 / T``, which is
    ``1 / T`` for task arithmetic; ``beta`` is chosen on validation data from 0.1 to 1. All tensors.

    The authors' code tells depth by the first number in a name, which for networks of stages is the stage's, and takes
    what is outside of blocks for shallow, final norms too.

    >>> from vfsurgery.combining import Kind, Trait, combine_states
    >>> base, tuned = ({name: torch.full((1,), value) for name in "ab"} for value in (0.0, 1.0))
    >>> traits = {"a": Trait(Kind.REST, depth=0.0), "b": Trait(Kind.REST, depth=1.0)}
    >>> combine_states([tuned, tuned], Lines(beta=0.25), base=base, traits=traits)
    {'a': tensor([1.]), 'b': tensor([1.5000])}
    """

    alpha: float | None = None
    beta: float = 0.3
    name: ClassVar[str] = "lines"

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        depths = {entry.name: entry.trait.depth for entry in problem.entries()}
        unknown = [name for name, depth in depths.items() if depth is None]
        if len(unknown) == len(depths) > 0:
            raise OptionError(
                explain("lines scales by depth, and there is no graph that tells how deep each tensor is read",
                        tensor=unknown[0], remedy="give models rather than state dicts; on the command line, --model")
            )  # fmt: skip
        if unknown:
            problem.notes.append(
                f"lines takes {len(unknown)} tensors that no op reads for shallow (first: {unknown[0]})"
            )
        inner = self.inner(problem)
        alpha = self._alpha(problem, inner) if self.alpha is None else self.alpha
        return lambda entry: inner(entry).mul_(alpha + self.beta * (entry.trait.depth or 0.0))

    def _alpha(self, problem: Problem, inner: Combined) -> float:
        if self.of == "task-arithmetic":
            return 1 / problem.sources
        ours, plain = (_l1(problem, method) for method in (inner, weighted_sum))
        return plain / ours / problem.sources if ours else 0.0


def _l1(problem: Problem, method: Callable[[Entry], Tensor]) -> float:
    return sum(float(method(part).abs().sum(dtype=torch.float64)) for part in problem.parts())


@register_combiner
@dataclass(frozen=True)
class Consensus(Wrapping):
    """Consensus of TALL masks (Wang et al., ICML 2024): only numbers that ``agree`` tasks need at least.

    Task ``t`` needs a number if ``|w_t tau_t| >= threshold * |sum of the others' w_i tau_i|``. Of none needed: the
    base; ``agree=0`` keeps all. Then task arithmetic or TIES, with ``scale``. All tensors. ``threshold`` (the paper's
    lambda) is chosen for each task from 0.2 to 0.6 with labelled data there; one of 0.4 needs none.

    The authors' code compares weights that were put together again, and strictly.

    >>> from vfsurgery.combining import combine_states
    >>> base = {"w": torch.zeros(3)}
    >>> states = [{"w": torch.tensor([1.0, 1.0, 0.1])}, {"w": torch.tensor([1.0, 0.1, 1.0])}]
    >>> combine_states(states, Consensus(scale=1.0), base=base)["w"]
    tensor([2., 0., 0.])
    """

    threshold: float = 0.4
    agree: int = 2
    aggregate: Aggregate = "sum"
    scale: float = 0.3
    name: ClassVar[str] = "consensus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0 or self.agree < 0:
            raise OptionError(
                explain(f"threshold {self.threshold} and agree {self.agree} count from zero up",
                        remedy="threshold=0.4, agree=2")
            )  # fmt: skip

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        if self.agree > problem.sources:
            problem.notes.append(f"consensus of {self.agree} is more than {problem.sources} tasks can reach: the base")
        inner = self.inner(problem)
        return lambda entry: inner(entry).mul_(self._needed(entry))

    def _needed(self, entry: Entry) -> Tensor:
        vectors = entry.weighted()
        others = vectors.sum(0) - vectors
        return (vectors.abs() >= self.threshold * others.abs()).sum(0) >= self.agree

"""Zero patterns: give an average one, and hold it through whatever follows.

The average of models with one zero pattern has that pattern. Of models with different ones it has the union, so the
density of ``m`` models pruned apart adds up to ``m`` times theirs (Zimmer et al., "Sparse Model Soups", ICLR 2024,
section 2). What is to become of it is a choice: the intersection, the union, or the largest entries of the average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

from vfsurgery.discovery.maps import map_tensor
from vfsurgery.errors import SurgeryError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.contract import check_order
from vfsurgery.passes.pipeline import Pipeline
from vfsurgery.tracing.sources import canonical_state

Choice: TypeAlias = Literal["keep", "intersect", "union", "reprune"]
CHOICES: tuple[str, ...] = get_args(Choice)
SPARSE = 0.05
"""Share of exact zeros from which on weights count as pruned without being called so, and zeros are not filled."""


@dataclass(frozen=True)
class Support:
    """Where the members of an average are not zero, gathered one member at a time.

    ``common`` is true where no member is zero; ``kept`` is the mean number of entries that are not, weighted by the
    members' shares, which sum to ``share``.

    >>> support = Support.of(torch.tensor([1.0, 2.0, 0.0, 0.0]), 0.5).joined(torch.tensor([0.0, 1.0, 0.0, 0.0]), 0.5)
    >>> support.common.tolist(), support.kept
    ([False, True, False, False], 1.5)
    >>> support.apply(torch.tensor([0.5, 1.5, 0.0, 0.0]), "reprune")
    tensor([0.5000, 1.5000, 0.0000, 0.0000])
    """

    common: Tensor
    kept: float
    share: float

    @staticmethod
    def of(member: Tensor, share: float) -> Support:
        """That of a single member."""
        return Support(member != 0, float(torch.count_nonzero(member)), share)

    def joined(self, member: Tensor, share: float) -> Support:
        """That of one member more."""
        total = self.share + share
        kept = self.kept + (float(torch.count_nonzero(member)) - self.kept) * share / total
        return Support(self.common & (member != 0), kept, total)

    def apply(self, mean: Tensor, choice: Choice) -> Tensor:
        """Set to zero, in place, what the choice does not keep of the members' mean; it is returned."""
        if choice == "union":
            return mean
        if choice == "reprune":
            return mean.masked_fill_(~largest(mean, round(self.kept)), 0)
        return mean.masked_fill_(~self.common, 0)


def largest(tensor: Tensor, count: int) -> Tensor:
    """True at the ``count`` entries of the largest magnitudes."""
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    kept[tensor.abs().flatten().topk(count, sorted=False).indices] = True
    return kept.view(tensor.shape)


@dataclass(frozen=True, kw_only=True)
class Mask(Pass):
    """Give the average of the sources the zero pattern that ``choice`` makes of theirs, weight by weight.

    ``weights`` are canonical ``state_dict`` keys. A source without a share has no say. ``"keep"`` takes what all keep,
    like ``"intersect"``: whoever asks for it has made sure that all patterns are equal.
    """

    name: ClassVar[str] = "mask"
    choice: Choice
    weights: tuple[str, ...]

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Mask the average that ``graph_module`` holds."""
        averages = canonical_state(graph_module)
        for name in self.weights:
            support_of(aligned_members(name, context)).apply(averages[name], self.choice)
        return graph_module


def support_of(members: Iterable[tuple[Tensor, float]]) -> Support:
    """Where members, each with its share, are not zero; there is at least one."""
    (first, share), *others = members
    support = Support.of(first, share)
    for member, share in others:
        support = support.joined(member, share)
    return support


def aligned_members(name: str, context: Context) -> Iterator[tuple[Tensor, float]]:
    """One weight of every source that has a share, in the reference's order of units, and that share."""
    shares = context.weights_of(name)
    for source, orders, share in zip(context.sources, context.permutations, shares, strict=True):
        if share:
            yield map_tensor(name, source.state[name], context.groups, orders), share


@dataclass(frozen=True, kw_only=True)
class KeepZeros(Pass):
    """Run ``steps`` and prove that none of them gave a value to a weight that was zero: not one bit of it.

    Every tensor of two dims or more is watched, and with preserved prefixes those of all sources. Biases and what norms
    multiply with are free to change.
    """

    name: ClassVar[str] = "keep zeros"
    steps: tuple[Pass, ...]

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Run the steps.

        Raises:
            SurgeryError: a step revived a weight; it and the first such weight are named.
        """
        check_order(self.steps)  # each runs in a pipeline of its own, which sees no other
        zeros = {name: tensor == 0 for name, tensor in _weights(graph_module).items()}
        for step in self.steps:
            graph_module = Pipeline((step,)).run(graph_module, context)
            check_zeros(_weights(graph_module), zeros, step.name)
        return graph_module


def check_zeros(weights: dict[str, Tensor], zeros: dict[str, Tensor], step: str) -> None:
    """Refuse weights that are missing, of another shape, or not zero where they have to be.

    Raises:
        SurgeryError: names the step to blame and the first such weight.
    """
    for name, places in zeros.items():
        found = weights.get(name)
        fits = found is not None and found.shape == places.shape
        revived = int(torch.count_nonzero(found[places])) if found is not None and fits else 0
        if not fits or revived:
            raise SurgeryError(
                explain(
                    f"{step} does not keep the zeros of pruned weights",
                    weight=name,
                    revived=revived if fits else "it is gone, or of another shape",
                    remedy="use a normalization that scales units, such as 'reset', 'repair' or 'rescale'",
                )
            )


def _weights(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    state = canonical_state(graph_module)
    return {name: tensor for name, tensor in state.items() if tensor.ndim > 1 and tensor.is_floating_point()}

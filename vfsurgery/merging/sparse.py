"""Merging sparse models: what their zero patterns (masks) are, and what a merge makes of them.

Models of one pruned ancestor share a mask, and their average has it, too. Where masks differ, somebody has to say what
is wanted; see :mod:`vfsurgery.passes.mask`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.passes import Mask, Pass
from vfsurgery.passes.mask import CHOICES, SPARSE, Choice, support_of
from vfsurgery.pruning.layers import prunable
from vfsurgery.records.report import MergedMasks
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.sources import canonical_state

Members: TypeAlias = Callable[[str], Iterable[tuple[Tensor, float]]]


@dataclass(frozen=True)
class MaskPlan:
    """What a merge does about zeros.

    ``weights`` are the prunable ones by canonical ``state_dict`` key; ``sparsity`` is that of every source over them;
    ``equal`` says whether the masks of the sources that have a share are equal in the order in which they come.
    """

    choice: Choice
    weights: tuple[str, ...]
    sparsity: tuple[float, ...]
    equal: bool
    option: str = "masks"
    """The name of the argument that chooses, for messages."""

    def refuse(self, passes: Sequence[Pass]) -> None:
        """Refuse normalizations that fill zeros.

        Raises:
            OptionError: names the first one.
        """
        for step in passes:
            if step.fills_zeros:
                raise OptionError(
                    explain(
                        f"renormalize={step.name!r} gives values to pruned weights",
                        sparsity=f"{_percent(self.sparsity)} of the sources",
                        remedy="use one that scales units, such as 'reset', 'repair', 'rescale', or 'auto'",
                    )
                )

    def check(self, members: Members) -> None:
        """Refuse to keep masks that are not equal in the reference's order of units.

        Args:
            members: For each weight by name those of the aligned sources that have a share, and their shares.

        Raises:
            OptionError: has the densities, and what can be chosen.
        """
        if self.choice != "keep":
            return
        for name in self.weights:
            support = support_of(members(name))
            if support.kept != int(torch.count_nonzero(support.common)):
                raise self._differ(name, members)

    def mask(self) -> Mask:
        """The pass that follows on the average."""
        return Mask(choice=self.choice, weights=self.weights)

    def record(self, merged: nn.Module) -> MergedMasks:
        """For the report."""
        return MergedMasks(self.choice, self.sparsity, sparsity_of(prunable(merged).values()))

    def _differ(self, name: str, members: Members) -> OptionError:
        """The error, with densities that count the zeros of all weights once more."""
        total = common = union = 0
        for weight in self.weights:
            kept = [member != 0 for member, _ in members(weight)]
            total += kept[0].numel()
            common += int(torch.count_nonzero(functools.reduce(torch.logical_and, kept)))
            union += int(torch.count_nonzero(functools.reduce(torch.logical_or, kept)))
        identity = "matching='identity', since the masks are equal as the sources come; or " if self.equal else ""
        densities = ", ".join(f"source {number} {1 - share:.2%}" for number, share in enumerate(self.sparsity))
        return OptionError(
            explain(
                "the sources have different masks" if not self.equal else "matching makes the sources' masks different",
                weight=f"{name}, for one",
                densities=f"{densities}; intersection {common / total:.2%}, union {union / total:.2%}",
                choices="'intersect' keeps what all sources keep, 'union' what any of them keeps, "
                "'reprune' the largest of the average, as many as a source keeps",
                remedy=f"{identity}{self.option}='intersect', 'union' or 'reprune'",
            )
        )


def is_sparse(models: Sequence[nn.Module], choice: str | None) -> bool:
    """Whether zeros of the sources mean something; arguments as for :func:`plan_masks`."""
    weights = weight_names(models[0])
    return _means_something(
        [sparsity_of([state[name] for name in weights]) for state in map(canonical_state, models)], choice
    )


def _means_something(sparsity: Sequence[float], choice: str | None) -> bool:
    """Whether one of the sources counts as sparse."""
    return max(sparsity) >= SPARSE if choice is None else any(sparsity)


def plan_masks(models: Sequence[nn.Module], choice: str | None, shares: Sequence[float]) -> MaskPlan | None:
    """What a merge has to do about zeros; nothing where the sources are dense.

    Without a choice, the sources count as sparse if :data:`SPARSE` of one's prunable weights are zero; equal masks are
    then kept, and different ones refused. With one, a single zero is enough.

    Raises:
        OptionError: there is no such choice.
    """
    if choice is not None and choice not in CHOICES:
        raise OptionError(explain(f"masks={choice!r} is unknown", remedy=did_you_mean(str(choice), CHOICES)))
    weights, states = weight_names(models[0]), [canonical_state(model) for model in models]
    sparsity = tuple(sparsity_of([state[name] for name in weights]) for state in states)
    if not _means_something(sparsity, choice):
        return None
    first, *others = [state for state, share in zip(states, shares, strict=True) if share]
    equal = all(torch.equal(state[name] != 0, first[name] != 0) for state in others for name in weights)
    return MaskPlan(cast(Choice, choice or "keep"), weights, sparsity, equal)


def weight_names(model: nn.Module) -> tuple[str, ...]:
    """The weights that can be pruned, by canonical ``state_dict`` key; computed ones (parametrized) are left out."""
    keys = canonical_parameters(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return tuple(dict.fromkeys(keys[id(parameters[name])] for name in prunable(model) if name in parameters))


def sparsity_of(weights: Iterable[Tensor]) -> float:
    """Share of exact zeros in some tensors, 0 to 1; 0 where there is no entry.

    >>> sparsity_of([torch.tensor([0.0, 1.0]), torch.zeros(2)])
    0.75
    """
    tensors = list(weights)
    total = sum(tensor.numel() for tensor in tensors)
    kept = sum(int(torch.count_nonzero(tensor)) for tensor in tensors)
    return 1 - kept / total if total else 0.0


def refuse_hooks(models: Sequence[nn.Module]) -> None:
    """Refuse models whose weights are still computed by hooks of ``torch.nn.utils.prune``.

    Raises:
        OptionError: names the source and the weight.
    """
    for number, model in enumerate(models):
        for path, module in model.named_modules():
            for stored in module._parameters:
                name = stored.removesuffix("_orig")
                if name != stored and f"{name}_mask" in module._buffers:
                    place = f"model.{path}" if path else "model"
                    raise OptionError(
                        explain(
                            f"source {number} has pruning hooks on",
                            weight=f"{path}.{name}".removeprefix("."),
                            remedy=f"make its masks permanent first: torch.nn.utils.prune.remove({place}, {name!r})",
                        )
                    )


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.2%}" for share in shares)

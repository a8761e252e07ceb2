"""Folding of scales into other weights, in place: what multiplies single units becomes ones.

A norm with scale ``g`` and shift ``e`` in front of readers ``W x + b``: ``b <- b + W e``, ``W <- W diag(g)``, then
``g <- 1`` and ``e <- 0``. Where a reader has no bias that could take it, the shift stays in the norm as ``e / g``. A
factor ``s`` behind a layer ``W x + b`` (LayerScale): ``W <- diag(s) W``, ``b <- s b``, ``s <- 1``. What can be folded is
found by discovery (:mod:`vfsurgery.discovery.foldings`); the network computes the same in eval mode and in training,
where no dropout lies between a shift and its readers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.groups import Folding, GroupSet, Member, PermutationGroup
from vfsurgery.passes.base import Context, Pass
from vfsurgery.tracing.sources import canonical_state

LARGEST_SHIFT = 100.0
"""How large a shift over its scale may be where it stays in the norm: units there are about one."""
State = Mapping[str, Tensor]
"""Parameters and buffers by canonical ``state_dict`` key; what is written goes into the model."""


@dataclass(frozen=True, kw_only=True)
class FoldNormScales(Pass):
    """Fold the scales of norms into all weights that read what they give out, and shifts into the biases there.

    Norms become ``(x - mean) / std`` with ones and zeros. Where a reader has no bias the shift stays, divided by the
    scale; a norm whose scale is near zero where that is needed is left as it is, and the report says so.

    >>> import torch, vfsurgery as surgery
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)).eval()
    >>> _ = model[1].weight.data.uniform_(1, 2), model[1].bias.data.uniform_(1, 2)
    >>> folded = surgery.run_passes(model, ["fold-norm-scales"], example_inputs=torch.randn(2, 4))
    >>> folded[1].weight.tolist() == [1.0] * 8, folded[1].bias.tolist() == [0.0] * 8
    (True, True)
    """

    name: ClassVar[str] = "fold-norm-scales"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all of them, in place."""
        foldings = [folding for folding in context.groups.foldings if folding.readers]
        context.notes.extend(_folded(self.name, "norm scales", canonical_state(graph_module), foldings))
        return graph_module


@dataclass(frozen=True, kw_only=True)
class FoldLayerScales(Pass):
    """Fold weights that multiply the outputs of a layer (LayerScale) into that layer's rows and bias.

    >>> FoldLayerScales()
    FoldLayerScales()
    """

    name: ClassVar[str] = "fold-layer-scales"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all of them, in place."""
        foldings = [folding for folding in context.groups.foldings if folding.writers]
        context.notes.extend(_folded(self.name, "layer scales", canonical_state(graph_module), foldings))
        return graph_module


@torch.no_grad()
def canonicalize(graph_module: fx.GraphModule, groups: GroupSet, masked: Collection[str] = ()) -> dict[str, str]:
    """Fold all scales of a traced model, in place: what maps of units beyond permutations suppose.

    Tensors keep their storage, dtype and ``requires_grad``; numbers are computed in float64.

    Args:
        graph_module: What :func:`~vfsurgery.trace` returns; its tensors are written into.
        groups: Its groups.
        masked: State-dict keys of weights whose zeros are to stay.

    Returns:
        For each group whose units can only be reordered in these weights, though its symmetry is more than
        permutations, the reason: a scale that could not be folded, whole numbers, zeros that are to stay.

    >>> import torch, vfsurgery as surgery
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2, bias=False))
    >>> _ = model[1].bias.data.fill_(1.0), model[1].weight.data[0].fill_(1e-9)
    >>> graph_module = surgery.trace(model, torch.randn(2, 4))
    >>> canonicalize(graph_module, surgery.find_groups(graph_module))["g0"]
    '1.weight is near zero, and 1.bias over it would be 1e+09: 2.weight has no bias that could take it'
    """
    state = canonical_state(graph_module)
    left = {
        group.name: reason
        for group in groups
        if group.symmetry.is_continuous and (reason := _unmappable(group, state, masked))
    }
    refused = fold(state, groups.foldings)
    for group in groups:
        scales = [member.parameter for member in group.members if member.scales]
        if group.symmetry.is_continuous:
            left.update({group.name: refused[name] for name in scales if name in refused})
    return left


@torch.no_grad()
def fold(state: State, foldings: Iterable[Folding]) -> dict[str, str]:
    """Fold weights into others, in place.

    Returns:
        By the name of each weight that is left as it is, the reason.
    """
    chosen = list(foldings)
    refused = {each.scale.parameter: reason for each in chosen if (reason := _refusal(state, each))}
    for folding in chosen:
        if folding.scale.parameter not in refused:  # of one weight all parts are folded or none
            _fold(state, folding)
    return refused


def _folded(name: str, what: str, state: State, foldings: list[Folding]) -> Iterator[str]:
    """Fold, and say for the report what was done and what was not."""
    refused = fold(state, foldings)
    scales = {folding.scale.parameter for folding in foldings} - refused.keys()
    kept = {each.shift.parameter for each in foldings if each.shift and each.scale.parameter in scales and not _goes(each)}
    yield f"{name}: {len(scales)} {what} folded" + (f", {len(kept)} shifts stay in their norms" if kept else "")
    yield from (f"{name}: left as it is, {reason}" for reason in refused.values())


def _unmappable(group: PermutationGroup, state: State, masked: Collection[str]) -> str:
    """Why the units of a group cannot be mapped in these weights, whatever is folded."""
    for name in dict.fromkeys(member.parameter for member in group.members):
        if not state[name].is_floating_point():
            return f"{name} holds no real numbers"
        if name in masked:
            return f"{name} is sparse, and its zeros would be filled"
    return ""


def _refusal(state: State, folding: Folding) -> str:
    """Why a weight cannot be folded."""
    members = [folding.scale, *folding.writers, *(reader.weight for reader in folding.readers)]
    whole = next((member.parameter for member in members if not state[member.parameter].is_floating_point()), None)
    if whole is not None:
        return f"{whole} holds no real numbers"
    if folding.shift is None or _goes(folding):
        return ""
    largest = float(_over(_numbers(state, folding.shift), _numbers(state, folding.scale)).abs().max())
    if largest <= LARGEST_SHIFT:
        return ""
    scale, shift = folding.scale.parameter, folding.shift.parameter
    reader = next(reader.weight.parameter for reader in folding.readers if reader.bias is None)
    return f"{scale} is near zero, and {shift} over it would be {largest:.0e}: {reader} has no bias that could take it"


def _goes(folding: Folding) -> bool:
    """Whether all readers have a bias that takes the shift."""
    return all(reader.bias is not None for reader in folding.readers)


def _fold(state: State, folding: Folding) -> None:
    scale = _numbers(state, folding.scale)
    readers = {reader.weight: reader.bias for reader in folding.readers}  # a layer that runs twice is changed once
    if folding.shift is not None:
        shift = _numbers(state, folding.shift)
        if _goes(folding):
            for weight, bias in readers.items():
                _add(state[str(bias)], _read(state, weight, shift))
            shift = torch.zeros_like(shift)
        else:
            shift = _over(shift, scale)
        _put(state, folding.shift, shift)
    for member in (*readers, *dict.fromkeys(folding.writers)):
        _multiply(state, member, scale)
    _put(state, folding.scale, torch.ones_like(scale))


def _over(shift: Tensor, scale: Tensor) -> Tensor:
    """A shift over a scale; where there is no shift, none stays."""
    return torch.where(shift == 0, shift, shift / scale)


def _numbers(state: State, member: Member) -> Tensor:
    """What lies at a member of a vector: ``(units, places per unit)``, float64."""
    values = state[member.parameter].flatten().to(torch.float64)
    return values[_places(member, values)]


def _put(state: State, member: Member, numbers: Tensor) -> None:
    """Write what lies at a member of a vector."""
    flat = state[member.parameter].view(-1)
    flat[_places(member, flat)] = numbers.to(flat)


def _multiply(state: State, member: Member, scale: Tensor) -> None:
    """Multiply units along a member's dim, each by its number."""
    tensor = state[member.parameter]
    factors = torch.ones(tensor.shape[member.dim], dtype=scale.dtype, device=scale.device)
    factors[_places(member, factors)] = scale
    shape = [-1 if dim == member.dim else 1 for dim in range(tensor.ndim)]
    tensor.copy_(tensor.to(scale.dtype) * factors.view(shape))


def _read(state: State, weight: Member, shift: Tensor) -> Tensor:
    """What a layer makes of a shift of the units that it reads, alike at all places of a kernel: a number per row."""
    columns = state[weight.parameter].to(shift.dtype).movedim(weight.dim, 0)  # (columns, rows, kernel...)
    shifts = shift.new_zeros(len(columns))
    shifts[_places(weight, shifts)] = shift
    return shifts @ columns.flatten(2).sum(2) if columns.ndim > 2 else shifts @ columns


def _add(tensor: Tensor, other: Tensor) -> None:
    tensor.copy_(tensor.to(other.dtype) + other)


def _places(member: Member, like: Tensor) -> Tensor:
    return torch.from_numpy(member.positions()).to(like.device)

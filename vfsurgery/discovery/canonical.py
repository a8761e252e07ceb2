"""The canonical form of weights: what multiplies single units is folded into others, so that units can be mapped.

Behind a norm with scale ``g`` and shift ``e``, a reader ``W x + b`` becomes ``(W diag(g)) x + (b + W e)``, and the norm
has ones and zeros. Where a reader has no bias for it, the shift stays in the norm as ``e / g`` and is mapped with the
units. A factor behind a linear layer goes into its rows. What the network computes stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vfsurgery.discovery.maps import UnitMap
from vfsurgery.groups import Folding, GroupSet, Member, PermutationGroup

LARGEST_SHIFT = 100.0
"""A shift that stays in a norm, over its scale, may be so large: mapped, it would drown the units in rounding."""
SMALLEST_SCALE = 1e-3
"""Share of the largest scale below which one is near zero: weights divided by it would be anything."""
State: TypeAlias = Mapping[str, Tensor]
"""Parameters and buffers by canonical state-dict key, detached."""


@dataclass(frozen=True)
class Canonical:
    """Weights in canonical form, by state-dict key, and why the units of some groups can only be reordered, by name."""

    state: State
    left: Mapping[str, str]

    def maps(self, group: PermutationGroup) -> bool:
        """Whether the units of a group may be mapped by all that its symmetry has."""
        return group.symmetry.is_continuous and group.name not in self.left


def canonical(state: State, groups: GroupSet) -> Canonical:
    """Fold whatever stands in the way of mapping the units of some group.

    Args:
        state: What a network holds. It stays as it is.
        groups: The groups of its architecture.

    Returns:
        The same tensors but for those that change.
    """
    left = obstacles(state, groups)
    foldings = needed(groups.only_ordered(left))
    changed = {name for folding in foldings for name in written(folding)}
    found = {**state, **{name: state[name].detach().clone() for name in changed}}
    for folding in foldings:
        fold(found, folding)
    return Canonical(found, left)


def obstacles(state: State, groups: GroupSet) -> dict[str, str]:
    """Why the units of groups whose symmetry is more than orders can only be reordered in these weights, by name."""
    found: dict[str, str] = {}
    for group in groups:
        if group.symmetry.is_continuous:
            foldings = [folding for folding in groups.foldings if _belongs(folding, group)]
            reason = unmappable(state, group) or next((why for each in foldings if (why := refusal(state, each))), "")
            found |= {group.name: reason} if reason else {}
    return found


def needed(groups: GroupSet) -> list[Folding]:
    """The foldings that stand in the way of mapping the units of some group."""
    mapped = [group for group in groups if group.symmetry.is_continuous]
    return [folding for folding in groups.foldings if any(_belongs(folding, group) for group in mapped)]


def drawn_map(group: PermutationGroup, generator: torch.Generator) -> UnitMap:
    """A random member of a group's symmetry, one for each block."""
    drawn = [group.symmetry.random(group.size, generator) for _ in range(group.blocks)]
    return UnitMap(torch.block_diag(*drawn), torch.block_diag(*(torch.linalg.inv(each) for each in drawn)))


def unmappable(state: State, group: PermutationGroup) -> str:
    """Why the units of a group cannot be mapped in these weights, whatever is folded; empty if they can."""
    names = dict.fromkeys(member.parameter for member in group.members)
    odd = next((name for name in names if not state[name].is_floating_point()), None)
    if odd is not None:
        return f"{odd} holds no real numbers"
    coarse = next((name for name in names if state[name].dtype.itemsize < 4), None)
    return "" if coarse is None else f"{coarse} is in half precision, which would round what is mapped"


def refusal(state: State, folding: Folding) -> str:
    """Why a weight cannot be folded in these weights: the shift that stays would be too large; empty if it can."""
    odd = next((name for name in written(folding) if not state[name].is_floating_point()), None)
    if odd is not None:
        return f"{odd} holds no real numbers"
    if folding.shift is None or takes_shift(folding):
        return ""
    largest = float(_over(_numbers(state, folding.shift), _numbers(state, folding.scale)).abs().max())
    if largest <= LARGEST_SHIFT:
        return ""
    scale, shift = folding.scale.parameter, folding.shift.parameter
    reader = next(reader.weight.parameter for reader in folding.readers if reader.bias is None)
    return f"{scale} is near zero, and {shift} over it would be {largest:.0e}: {reader} has no bias that could take it"


def takes_shift(folding: Folding) -> bool:
    """Whether all readers have a bias that a shift can go into."""
    return all(reader.bias is not None for reader in folding.readers)


def written(folding: Folding) -> tuple[str, ...]:
    """The keys of all tensors that a folding may change, each once."""
    weights = [folding.scale, *folding.writers, *(reader.weight for reader in folding.readers)]
    names = [member.parameter for member in (*weights, *([] if folding.shift is None else [folding.shift]))]
    return tuple(dict.fromkeys([*names, *(reader.bias for reader in folding.readers if reader.bias is not None)]))


@torch.no_grad()
def fold(state: State, folding: Folding) -> None:
    """Fold a weight into others, in place; numbers are computed in float64."""
    scale = _numbers(state, folding.scale)
    readers = {reader.weight: reader.bias for reader in folding.readers}  # a layer that runs twice is changed once
    if folding.shift is not None:
        shift = _numbers(state, folding.shift)
        if takes_shift(folding):
            for weight, bias in readers.items():
                _add(state[str(bias)], _read(state, weight, shift))
            shift = torch.zeros_like(shift)
        else:
            shift = _over(shift, scale)
        _put(state, folding.shift, shift)
    for member in (*readers, *dict.fromkeys(folding.writers)):
        _multiply(state, member, scale)
    _put(state, folding.scale, torch.ones_like(scale))


@torch.no_grad()
def unfold(state: State, folding: Folding, like: State) -> None:
    """Undo a folding, in place: give a network in canonical form the scale and shift that another one has.

    Units whose scale is near zero there keep what they have.

    Args:
        state: The weights of the network.
        folding: What was folded.
        like: The weights of the other one, before anything was folded.
    """
    scale = _numbers(like, folding.scale)
    usable = scale.abs() > SMALLEST_SCALE * scale.abs().max()
    scale = torch.where(usable, scale, torch.ones_like(scale))
    readers = {reader.weight: reader.bias for reader in folding.readers}
    for member in (*readers, *dict.fromkeys(folding.writers)):
        _multiply(state, member, 1 / scale)
    _put(state, folding.scale, _numbers(state, folding.scale) * scale)
    if folding.shift is not None:
        shift = _numbers(state, folding.shift) * scale
        if takes_shift(folding):
            added = torch.where(usable, _numbers(like, folding.shift), torch.zeros_like(shift))
            for weight, bias in readers.items():
                _add(state[str(bias)], -_read(state, weight, added))
            shift = shift + added
        _put(state, folding.shift, shift)


def _belongs(folding: Folding, group: PermutationGroup) -> bool:
    """Whether the units that a folding is of are those of a group."""
    return any(member.scales and member.overlaps(folding.scale) for member in group.members)


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

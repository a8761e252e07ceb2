"""The canonical form of weights: what multiplies single units is folded into others, so that units can be mapped.

Behind a norm with scale ``g`` and shift ``e``, a reader ``W x + b`` becomes ``(W diag(g)) x + (b + W e)``, and the norm
has ones and zeros. Where a reader has no bias for it, the shift stays in the norm as ``e / g`` and is mapped with the
units. A factor behind a linear layer goes into its rows. What the network computes stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.discovery.maps import UnitMap
from vfsurgery.groups import Folding, GroupSet, Member, PermutationGroup
from vfsurgery.tracing.precision import is_inexact, real

LARGEST_SHIFT = 100.0
"""A shift that stays in a norm, over its scale, may be so large: mapped, it would drown the units in rounding."""


@dataclass(frozen=True)
class Canonical:
    """Weights in canonical form, by state-dict key, and why the units of some groups can only be reordered.

    ``changed`` are the keys of the weights that are others than before, ``left`` reasons by the names of groups.
    """

    state: Mapping[str, Tensor]
    changed: tuple[str, ...]
    left: Mapping[str, str]

    def maps(self, group: PermutationGroup) -> bool:
        """Whether the units of a group may be mapped by all that its symmetry has."""
        return group.symmetry.is_continuous and group.name not in self.left


def canonical(state: Mapping[str, Tensor], groups: GroupSet) -> Canonical:
    """Fold whatever stands in the way of mapping the units of some group.

    Args:
        state: Parameters and buffers by canonical state-dict key. They stay as they are.
        groups: The groups of their architecture.

    Returns:
        The same tensors but for those that change.
    """
    found, changed, left = dict(state), dict[str, None](), dict[str, str]()
    for group in groups:
        if not group.symmetry.is_continuous:
            continue
        foldings = [folding for folding in groups.foldings if _belongs(folding, group)]
        reason = _refusal(state, group) or next((why for each in foldings if (why := _unstable(state, each))), "")
        if reason:
            left[group.name] = reason
    for folding in groups.foldings:
        owners = [group for group in groups if _belongs(folding, group)]
        if any(group.symmetry.is_continuous for group in owners) and not any(group.name in left for group in owners):
            for name, tensor in _folded(found, folding):
                found[name] = tensor
                changed[name] = None
    return Canonical(found, (*changed,), left)


def drawn_map(group: PermutationGroup, generator: torch.Generator) -> UnitMap:
    """A random member of a group's symmetry, one for each block."""
    drawn = [group.symmetry.random(group.size, generator) for _ in range(group.blocks)]
    return UnitMap(torch.block_diag(*drawn), torch.block_diag(*(torch.linalg.inv(each) for each in drawn)))


def _belongs(folding: Folding, group: PermutationGroup) -> bool:
    """Whether the units that a folding is of are those of a group."""
    return any(member.scales and member.overlaps(folding.scale) for member in group.members)


def _refusal(state: Mapping[str, Tensor], group: PermutationGroup) -> str:
    """Why the units of a group cannot be mapped in these weights."""
    for member in group.members:
        tensor = state[member.parameter]
        if not is_inexact(tensor):
            return f"{member.parameter} holds whole numbers"
        if real(tensor.dtype).itemsize < 4:
            return f"{member.parameter} is held in {str(tensor.dtype).removeprefix('torch.')}, which a map would round"
    return ""


def _unstable(state: Mapping[str, Tensor], folding: Folding) -> str:
    """Why a scale cannot be folded: the shift that stays behind would be too large."""
    if folding.shift is None or _takes_shift(folding):
        return ""
    scale, shift = _numbers(state, folding.scale), _numbers(state, folding.shift)
    if not bool(shift.any()) or float((shift / scale).abs().nan_to_num(nan=torch.inf).max()) <= LARGEST_SHIFT:
        return ""
    name = folding.scale.parameter
    return f"{name} is near zero where {folding.shift.parameter} is not, and a layer that reads them has no bias"


def _takes_shift(folding: Folding) -> bool:
    return all(reader.bias is not None for reader in folding.readers)


def _folded(state: Mapping[str, Tensor], folding: Folding) -> Iterator[tuple[str, Tensor]]:
    """The weights that a folding changes, one after the other."""
    scale = _numbers(state, folding.scale)
    if folding.shift is not None and bool((shift := _numbers(state, folding.shift)).any()):
        if _takes_shift(folding):
            for reader in folding.readers:
                yield _shifted(state, reader.weight, str(reader.bias), shift)
            yield _with_numbers(state, folding.shift, torch.zeros_like(shift))
        else:
            yield _with_numbers(state, folding.shift, shift / scale)
    for member in (*(reader.weight for reader in folding.readers), *folding.writers):
        yield _scaled(state, member, scale)
    yield _with_numbers(state, folding.scale, torch.ones_like(scale))


def _numbers(state: Mapping[str, Tensor], member: Member) -> Tensor:
    """What lies at a member of a vector, unit by unit, in float64."""
    values = state[member.parameter].detach().to(torch.float64).flatten()
    return values[torch.from_numpy(member.positions()[:, 0]).to(values.device)]


def _with_numbers(state: Mapping[str, Tensor], member: Member, numbers: Tensor) -> tuple[str, Tensor]:
    tensor = state[member.parameter].detach().clone()
    places = torch.from_numpy(member.positions()[:, 0]).to(tensor.device)
    tensor.view(-1)[places] = numbers.to(tensor)
    return member.parameter, tensor


def _scaled(state: Mapping[str, Tensor], member: Member, scale: Tensor) -> tuple[str, Tensor]:
    """A weight with its units multiplied along the member's dim."""
    tensor = state[member.parameter].detach()
    factors = torch.ones(tensor.shape[member.dim], dtype=scale.dtype, device=scale.device)
    factors[torch.from_numpy(member.positions()).to(scale.device)] = scale[:, None]
    shape = [-1 if dim == member.dim else 1 for dim in range(tensor.ndim)]
    return member.parameter, (tensor.to(scale.dtype) * factors.view(shape)).to(tensor.dtype)


def _shifted(state: Mapping[str, Tensor], weight: Member, bias: str, shift: Tensor) -> tuple[str, Tensor]:
    """A bias with what its layer makes of a shift of the units that it reads: the same at all offsets of a kernel."""
    columns = state[weight.parameter].detach().to(shift.dtype).movedim(weight.dim, 0)
    columns = columns.flatten(2).sum(2) if columns.ndim > 2 else columns
    read = columns[torch.from_numpy(weight.positions()).to(columns.device)].sum(1)
    old = state[bias].detach()
    return bias, (old.to(shift.dtype) + shift @ read).to(old.dtype)

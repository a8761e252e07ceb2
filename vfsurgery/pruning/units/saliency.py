"""How much each unit of a group matters: by the weights that write it, by its activations, or as the user says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from vfsurgery.discovery.roles import READS, WRITES
from vfsurgery.errors import OptionError, explain
from vfsurgery.groups import GroupSet, Member, PermutationGroup
from vfsurgery.stats.collect import Site, group_sites, survey
from vfsurgery.stats.moments import row_squares
from vfsurgery.tracing.precision import as_real

Saliency: TypeAlias = Callable[[PermutationGroup, Mapping[str, Tensor]], Tensor]
"""From a group and all parameters and buffers by name to a number per unit, ``(group.units,)``; small ones go first."""


def magnitudes(groups: GroupSet, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The L2 norm of all weights that write a unit, ``(units,)`` float64 by group.

    Rows count as they are, even where a BatchNorm follows: times what that multiplies them by, they choose worse on a
    trained ResNet-18 (docs/prune_units.md).
    """
    return {group.name: _written(group, groups, state).sqrt().numpy() for group in groups}


def activities(graph_module: fx.GraphModule, groups: GroupSet, images: Iterator[Tensor]) -> dict[str, np.ndarray]:
    """The mean square of each unit's activations, ``(units,)`` float64 by group, where matching would read them.

    That is after a group's first and its last non-linearity (:func:`vfsurgery.stats.collect.group_sites`). A group
    that is read nowhere, since others lie inside its units, has the sums over those; what then is left is not in the
    result.
    """
    device = next(graph_module.parameters()).device
    found = group_sites(graph_module, groups, device)
    units: dict[str, Site] = {f"{name} {n}": site for name, sites in found.items() for n, site in enumerate(sites)}
    moments = survey([graph_module], images, {}, units).moments[0]
    by_group: dict[str, np.ndarray] = {}
    for name, sites in found.items():
        each = [moments[f"{name} {n}"] for n in range(len(sites))]
        square = torch.stack([m.mean.square() + m.var for m in each]).mean(0).cpu().numpy()
        by_group[name] = _fold_blocks(square, groups[name])
    for group in groups:
        inside = [other for other in groups if other.outer == group.name and other.name in by_group]
        if group.name not in by_group and inside and all(other.blocks == group.units for other in inside):
            by_group[group.name] = np.sum([by_group[o.name].reshape(o.blocks, o.size).sum(1) for o in inside], axis=0)
    return by_group


def by_user(saliency: Saliency, groups: GroupSet, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What a user's own saliency says of every group.

    Raises:
        OptionError: it does not return one finite number per unit.
    """
    found: dict[str, np.ndarray] = {}
    for group in groups:
        scores = torch.as_tensor(saliency(group, state)).detach().double().cpu()
        if tuple(scores.shape) != (group.units,) or not bool(scores.isfinite().all()):
            raise OptionError(
                explain(
                    f"saliency of {group} is not one finite number per unit",
                    found=f"shape {tuple(scores.shape)}, {int((~scores.isfinite()).sum())} not finite",
                    remedy=f"return a tensor of shape ({group.units},)",
                )
            )
        found[group.name] = scores.numpy()
    return found


def _written(group: PermutationGroup, groups: GroupSet, state: Mapping[str, Tensor]) -> Tensor:
    """The sum of squares of all weights that write each unit, ``(units,)`` float64."""
    total = torch.zeros(group.units, dtype=torch.float64)
    matrices = [m for m in group.members if m.role != READS and state[m.parameter].ndim > 1]
    writers = [m for m in matrices if m.role == WRITES]  # grouped convolutions read and write
    for member in writers or matrices or group.members:
        total += torch.from_numpy(_per_unit(state[member.parameter], member, group, groups))
    return total


def _per_unit(weight: Tensor, member: Member, group: PermutationGroup, groups: GroupSet) -> np.ndarray:
    """Sums of squares of what lies at a member's places, ``(units,)``."""
    places, weight = member.positions(), as_real(weight)
    if member.block_dim < 0:
        squares = row_squares(weight.float().movedim(member.dim, 0).unsqueeze(-1).flatten(1))
        return _fold_blocks(squares.cpu().numpy()[places].sum(1), group)
    plane = weight.double().square().movedim((member.block_dim, member.dim), (0, 1))
    plane = plane.unsqueeze(-1).flatten(2).sum(2).cpu().numpy()  # (blocks and their places, units and theirs)
    blocks = groups.blocks_of(member.parameter, member, group)
    return np.concatenate([plane[rows].sum(0)[places].sum(1) for rows in blocks])


def _fold_blocks(scores: np.ndarray, group: PermutationGroup) -> np.ndarray:
    """Scores of units that lie in several blocks but share one order, added up."""
    return scores if len(scores) == group.units else scores.reshape(-1, group.units).sum(0)

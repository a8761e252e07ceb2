"""What an order does to a tensor: which indices are gathered along which dims."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vfsurgery.groups.groupset import GroupSet, Member, PermutationGroup
from vfsurgery.groups.permutations import Permutation, Permutations

Entries = tuple[tuple[PermutationGroup, Member], ...]


def gather_index(entries: Entries, dim: int, size: int, orders: Permutations) -> np.ndarray | None:
    """Positions to gather along ``dim`` (of length ``size``) so that all given orders are applied; ``None`` for none.

    Groups that share an axis (the product ``groups x channels`` of a grouped convolution) act on different
    coordinates of it, so their orders commute; only a nested one waits until the outer one has moved its blocks.
    Members whose blocks lie along another dim are left to :func:`permute_tensor`.
    """
    index: np.ndarray | None = None
    for group, member in sorted(entries, key=lambda entry: entry[0].outer != ""):
        order = orders.get(group.name)
        if member.dim != dim or member.block_dim >= 0 or order is None or order.is_identity:
            continue
        places = member.positions()
        step = np.arange(size)
        step[places] = places[member.order(order)]
        index = step if index is None else index[step]
    return index


def permute_tensor(name: str, tensor: Tensor, groups: GroupSet, orders: Permutations) -> Tensor:
    """Reorder the units of one state-dict entry; the input is returned itself where nothing moves.

    Args:
        name: The entry's state-dict key.
        tensor: The entry, any shape and dtype.
        groups: The groups of its architecture.
        orders: One order per group name; ``new[r] = old[order[r]]``.
    """
    entries = groups.by_parameter.get(name, ())
    found = {
        dim: gather_index(entries, dim, tensor.shape[dim], orders) for dim in {member.dim for _, member in entries}
    }
    indices = {dim: torch.from_numpy(index).to(tensor.device) for dim, index in found.items() if index is not None}
    if len(indices) == 1:
        tensor = tensor.index_select(*indices.popitem())
    elif indices:
        tensor = _gather(tensor, indices)
    for group, member in entries:
        order = orders.get(group.name)
        if member.block_dim >= 0 and order is not None and not order.is_identity:
            tensor = _permute_blocks(tensor, member, order, groups.blocks_of(name, member, group))
    return tensor


def _gather(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """Reorder several dims at once: one by one would need memory for another tensor of this size."""
    first, last = min(indices), max(indices)
    grid = [indices.get(dim, torch.arange(tensor.shape[dim], device=tensor.device)) for dim in range(first, last + 1)]
    shaped = [index.view(-1, *[1] * (last - first - place)) for place, index in enumerate(grid)]
    return tensor[(*[slice(None)] * first, *shaped)]


def _permute_blocks(tensor: Tensor, member: Member, order: Permutation, blocks: np.ndarray) -> Tensor:
    """Reorder units along ``member.dim`` by another order for each block of indices along ``member.block_dim``."""
    places = member.positions()
    index = np.tile(np.arange(tensor.shape[member.dim]), (tensor.shape[member.block_dim], 1))
    for block, rows in enumerate(blocks):
        own = np.asarray(order.order[block * member.size : (block + 1) * member.size]) - block * member.size
        index[np.ix_(rows, places.reshape(-1))] = places[own].reshape(-1)
    shape = [1] * tensor.ndim
    shape[member.block_dim], shape[member.dim] = index.shape
    gather = torch.from_numpy(index if member.block_dim < member.dim else index.T.copy()).reshape(shape)
    return torch.take_along_dim(tensor, gather.to(tensor.device), member.dim)

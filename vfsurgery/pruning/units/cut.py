"""What is left of tensors and of activations when units are removed from permutation groups.

Removing units takes the same indices away along every axis of a group. Kept units stay in their order, so an axis is
read at the ascending list of what is kept. A nested group loses the same number of units in every block, though not
the same ones: where its blocks lie along another dim of a tensor, each block is read at a list of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.groups import Entries, GroupSet, Member, PermutationGroup


@dataclass(frozen=True, eq=False)
class Cut:
    """Which units of which groups are kept: by group name a mask of ``group.units`` entries, true where one is kept.

    Groups without a mask are left whole.

    >>> from torch import nn
    >>> import vfsurgery as surgery
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> groups = surgery.find_groups(net, torch.randn(2, 4))
    >>> cut = Cut(groups, {"g0": np.array([True, False, True])})
    >>> [tuple(cut.tensor(name, tensor).shape) for name, tensor in net.state_dict().items()]
    [(2, 4), (2,), (2, 2), (2,)]
    """

    groups: GroupSet
    kept: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for name, mask in self.kept.items():
            group = self.groups[name]
            assert mask.shape == (group.units,), f"{group} has {group.units} units, its mask {mask.shape}"
            per_block = set(mask.reshape(group.blocks, group.size).sum(1).tolist())
            assert len(per_block) == 1 and 0 not in per_block, f"{group} keeps {per_block} units a block"

    @cached_property
    def nodes(self) -> Mapping[str, Entries]:
        """For every node of the graph the groups that lie on its value, with the member that says where."""
        found: dict[str, list[tuple[PermutationGroup, Member]]] = {}
        for group in self.groups:
            for member in group.activations:
                found.setdefault(member.parameter, []).append((group, member))
        return {name: tuple(entries) for name, entries in found.items()}

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of one state-dict entry, a new tensor; the entry itself where nothing is removed."""
        entries = self.groups.by_parameter.get(name, ())
        for group, member in entries:
            if member.block_dim >= 0 and group.name in self.kept:
                tensor = self._each_block(tensor, member, group, self.groups.blocks_of(name, member, group))
        for dim in sorted({member.dim for _, member in entries}):
            index = self.index(name, dim, tensor.shape[dim])
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor

    def index(self, name: str, dim: int, size: int) -> np.ndarray | None:
        """What is kept along a dim of a state-dict entry, ascending; ``None`` for all of it."""
        return self._index(self.groups.by_parameter.get(name, ()), dim, size)

    def node_index(self, node: str, dim: int, size: int) -> np.ndarray | None:
        """What is kept along a dim of a node's value, ascending; ``None`` for all of it."""
        return self._index(self.nodes.get(node, ()), dim, size)

    def masks(
        self, name: str, shape: tuple[int, ...], chosen: Callable[[Member], bool] = lambda member: True
    ) -> Iterator[Tensor]:
        """Masks that broadcast against an entry, or a node's value, of this shape: true where a unit is kept.

        One for each member that is ``chosen``.
        """
        entries = self.groups.by_parameter.get(name) or self.nodes.get(name, ())
        for group, member in entries:
            if group.name not in self.kept or not chosen(member):
                continue
            places, kept = member.positions(), self._rows(group, member)
            view = [1] * len(shape)
            view[member.dim] = shape[member.dim]
            if member.block_dim < 0:
                mask = np.ones(shape[member.dim], dtype=bool)
                mask[places[~kept].reshape(-1)] = False
            else:
                view[member.block_dim] = shape[member.block_dim]
                mask = np.ones((shape[member.block_dim], shape[member.dim]), dtype=bool)
                for rows, own in zip(_blocks(entries, group, member), kept, strict=True):
                    mask[np.ix_(rows, places[~own].reshape(-1))] = False
                mask = mask if member.block_dim < member.dim else mask.T.copy()
            yield torch.from_numpy(mask).reshape(view)

    def _index(self, entries: Entries, dim: int, size: int) -> np.ndarray | None:
        keep = np.ones(size, dtype=bool)
        for group, member in entries:
            if group.name in self.kept and member.dim == dim and member.block_dim < 0:
                keep[member.positions()[~self._rows(group, member)].reshape(-1)] = False
        return None if keep.all() else np.flatnonzero(keep)

    def _rows(self, group: PermutationGroup, member: Member) -> np.ndarray:
        """The mask of a member's rows of positions; ``(blocks, size)`` where blocks lie along another dim."""
        kept = self.kept[group.name]
        if member.block_dim >= 0:
            return kept.reshape(group.blocks, group.size)
        return np.tile(kept, member.blocks) if len(kept) != member.blocks * member.size else kept

    def _each_block(self, tensor: Tensor, member: Member, group: PermutationGroup, blocks: np.ndarray) -> Tensor:
        """Read every block of indices along ``member.block_dim`` at what it keeps along ``member.dim``."""
        places, kept = member.positions(), self._rows(group, member)
        lost = int((~kept[0]).sum()) * places.shape[1]
        rows, length = tensor.shape[member.block_dim], tensor.shape[member.dim]
        index = np.full((rows, length - lost), -1)
        for block, own in zip(blocks, kept, strict=True):
            mask = np.ones(length, dtype=bool)
            mask[places[~own].reshape(-1)] = False
            index[block] = np.flatnonzero(mask)
        if (index < 0).any():
            raise SurgeryError(explain("units of a nested group lie outside its blocks", group=group, member=member))
        view = [1] * tensor.ndim
        view[member.block_dim], view[member.dim] = index.shape
        gather = torch.from_numpy(index if member.block_dim < member.dim else index.T.copy()).reshape(view)
        return torch.take_along_dim(tensor, gather.to(tensor.device), member.dim)


def _blocks(entries: Entries, group: PermutationGroup, member: Member) -> np.ndarray:
    """Where a nested group's blocks lie along ``member.block_dim``: ``(blocks, places)``."""
    outer = [m.positions() for owner, m in entries if owner.name == group.outer and m.dim == member.block_dim]
    return np.concatenate(outer, axis=1)

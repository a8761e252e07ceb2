"""Permutation groups as values: which (parameter, dim) positions move together, and which may not move.

A *unit* is one index along a permutable axis. A :class:`Member` says where the units of a group lie in one dim of one
parameter or buffer; a :class:`PermutationGroup` collects all members whose units must be reordered alike; a
:class:`GroupSet` is what :func:`vfsurgery.find_groups` returns. A :class:`Permutation` reorders one group's units.
All of them are frozen, hashable, sorted and printable; none of them knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Member:
    """The places of a group's units in dim ``dim`` of ``parameter``.

    Unit ``u`` of ``size`` owns the indices ``start + o * size * inner + u * inner + i`` for every ``o < outer`` and
    ``i < inner``: ``inner`` consecutive indices move as one block (a flattened map), and the whole run of units is
    repeated ``outer`` times (the channels inside each group of a grouped convolution). An irregular layout, as channel
    shuffles leave behind, lists every index in ``indices`` instead, unit by unit.

    >>> Member("fc.weight", 1, size=2, inner=3).positions().tolist()
    [[0, 1, 2], [3, 4, 5]]
    """

    parameter: str
    dim: int
    size: int
    start: int = 0
    inner: int = 1
    outer: int = 1
    indices: tuple[int, ...] = ()

    def positions(self) -> np.ndarray:
        """Indices along ``dim``, one row per unit: int64, shape ``(size, places per unit)``."""
        if self.indices:
            return np.asarray(self.indices, dtype=np.int64).reshape(self.size, -1)
        unit = np.arange(self.size)[:, None, None] * self.inner
        outer = np.arange(self.outer)[None, :, None] * (self.size * self.inner)
        inner = np.arange(self.inner)[None, None, :]
        return (self.start + unit + outer + inner).reshape(self.size, -1)

    @property
    def end(self) -> int:
        """One past the last index of a regular layout."""
        return self.start + self.outer * self.size * self.inner

    def __str__(self) -> str:
        place = f"{self.parameter}[{self.dim}]"
        if self.indices:
            shown = ",".join(map(str, self.indices[:6])) + ("…" if len(self.indices) > 6 else "")
            return f"{place} at {shown}"
        shape = f"{self.outer}x" * (self.outer > 1) + str(self.size) + f"x{self.inner}" * (self.inner > 1)
        return f"{place} from {self.start}: {shape}" if (self.start or shape != str(self.size)) else place


@dataclass(frozen=True, order=True)
class PermutationGroup:
    """All axes that must move together: reordering the ``size`` units in every member leaves the function unchanged.

    ``name`` is ``g0``, ``g1``, … in the order of the model's parameters; ``label`` is the first parameter that
    produces the units, for people. ``activations`` are the places of the units in the values of graph nodes, by node
    name and in graph order; statistics are read there.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    activations: tuple[Member, ...] = field(default=(), compare=False, repr=False)

    @property
    def label(self) -> str:
        """The module that first produces these units, as in ``layer1.0.conv1``."""
        return self.members[0].parameter.rpartition(".")[0] or self.members[0].parameter

    def __str__(self) -> str:
        return f"{self.name} ({self.label}, {self.size} units)"


@dataclass(frozen=True, order=True)
class PinnedAxis:
    """``count`` indices of dim ``dim`` of ``parameter`` may not move, because of ``reason``."""

    parameter: str
    dim: int
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}] x{self.count}: {self.reason}"


@dataclass(frozen=True)
class GroupSet:
    """The permutation groups of one architecture, the axes that may not move, and the ops that had no rule.

    Iterate over it for its groups, index it by a group's name, print it for a readable table.
    """

    groups: tuple[PermutationGroup, ...]
    pinned: tuple[PinnedAxis, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    parameter_count: int = field(default=0, compare=False)
    grouped_count: int = field(default=0, compare=False)

    def __iter__(self) -> Iterator[PermutationGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> PermutationGroup:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PermutationGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def by_parameter(self) -> Mapping[str, tuple[tuple[PermutationGroup, Member], ...]]:
        """For every grouped parameter or buffer: the groups that move it, with the member that says where."""
        found: dict[str, list[tuple[PermutationGroup, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(member.parameter, []).append((group, member))
        return {name: tuple(entries) for name, entries in found.items()}

    @property
    def coverage(self) -> float:
        """Share of the model's parameters (not buffers) that lie in some group, 0 to 1."""
        return self.grouped_count / self.parameter_count if self.parameter_count else 0.0

    def __str__(self) -> str:
        lines = [
            f"{len(self.groups)} permutation groups, {sum(g.size for g in self.groups)} units; "
            f"{self.coverage:.1%} of {self.parameter_count:,} parameters lie in a group"
        ]
        for group in self.groups:
            lines.append(str(group))
            lines.extend(f"    {member}" for member in group.members)
        if self.pinned:
            lines.append(f"pinned: {len(self.pinned)} axes")
            lines.extend(f"    {pin}" for pin in self.pinned)
        if self.unknown_ops:
            lines.append("ops without a coupling rule (all that they touch is pinned):")
            lines.extend(f"    {op}" for op in self.unknown_ops)
        return "\n".join(lines)


@dataclass(frozen=True)
class Permutation:
    """An order for the units of one group: unit ``r`` of the result is unit ``order[r]`` of the input.

    Validated when made: ``order`` must name every unit exactly once.

    >>> Permutation((2, 0, 1)).inverse().order
    (1, 2, 0)
    """

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"not a permutation of {len(self.order)} units: {self.order[:8]}…")

    @staticmethod
    def identity(size: int) -> Permutation:
        """The order that changes nothing."""
        return Permutation(tuple(range(size)))

    @staticmethod
    def random(size: int, generator: torch.Generator) -> Permutation:
        """A uniformly random order, drawn from ``generator`` alone."""
        return Permutation(tuple(torch.randperm(size, generator=generator).tolist()))

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.order)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.order == tuple(range(self.size))

    @property
    def moved(self) -> int:
        """How many units change their place."""
        return sum(old != new for new, old in enumerate(self.order))

    def inverse(self) -> Permutation:
        """The order that undoes this one."""
        inverse = [0] * self.size
        for new, old in enumerate(self.order):
            inverse[old] = new
        return Permutation(tuple(inverse))


Permutations = Mapping[str, Permutation]
"""For each group's name the order of its units; a group left out keeps its order."""


def random_permutations(groups: GroupSet, generator: torch.Generator) -> dict[str, Permutation]:
    """Draw one random order per group.

    >>> random_permutations(GroupSet(()), torch.Generator().manual_seed(0))
    {}
    """
    return {group.name: Permutation.random(group.size, generator) for group in groups}


def gather_index(entries: tuple[tuple[PermutationGroup, Member], ...], dim: int, size: int, orders: Permutations):
    """Positions to gather along ``dim`` (of length ``size``) so that all given orders are applied; ``None`` for none.

    Groups that share an axis (the product ``groups x channels`` of a grouped convolution) act on different
    coordinates of it, so their orders commute and can be composed one after the other.
    """
    index: np.ndarray | None = None
    for group, member in entries:
        order = orders.get(group.name)
        if member.dim != dim or order is None or order.is_identity:
            continue
        places = member.positions()
        step = np.arange(size)
        step[places] = places[np.asarray(order.order)]
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
    if not indices:
        return tensor
    if len(indices) == 1:
        return tensor.index_select(*indices.popitem())
    return _gather(tensor, indices)


def _gather(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """Reorder several dims at once: one by one would need memory for another tensor of this size."""
    first, last = min(indices), max(indices)
    grid = [indices.get(dim, torch.arange(tensor.shape[dim], device=tensor.device)) for dim in range(first, last + 1)]
    shaped = [index.view(-1, *[1] * (last - first - place)) for place, index in enumerate(grid)]
    return tensor[(*[slice(None)] * first, *shaped)]

"""Permutation groups as values: which (parameter, dim) positions move together, and which may not move.

A *unit* is one index along a permutable axis. A :class:`Member` says where the units of a group lie in one dim of one
parameter or buffer; a :class:`PermutationGroup` collects all members whose units must be reordered alike; a
:class:`GroupSet` is what :func:`vfsurgery.find_groups` returns. A :class:`Permutation` reorders one group's units.
All of them are frozen, hashable, sorted and printable; none of them knows a model.

Groups can be *nested*: each unit of an outer group (an attention head, a group of channels) is a block of units of
inner groups (the dims inside the head). Where the function allows it every block has an order of its own: an inner
order then lists ``blocks x size`` units and leaves each within its block. Otherwise one order of ``size`` units serves
all blocks. The outer order moves whole blocks and is applied first: ``new[h, i] = old[outer[h], inner_h[i]]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from vfsurgery.groups.permutations import Permutation
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.shown import Shown

UNKNOWN_OP_REMEDY = "register a rule with @surgery.rule, see docs/write_a_rule.md; leaf= and pins= are other ways out"
"""What to do about an op without a coupling rule."""

SCREEN, SHOWN = 40, 8
"""A printed group set of more lines than the first is cut short: this many groups, pinned axes, ops and notes."""


@dataclass(frozen=True, order=True)
class Member:
    """The places of a group's units in dim ``dim`` of ``parameter``.

    Unit ``u`` of ``size`` owns the indices ``start + o * size * inner + u * inner + i`` for every ``o < outer`` and
    ``i < inner``: ``inner`` consecutive indices move as one block (a flattened map), and the whole run of units is
    repeated ``outer`` times. An irregular layout, as channel shuffles leave behind, lists every index in ``indices``
    instead, unit by unit.

    ``role`` says what a weight does with the units: see :mod:`vfsurgery.discovery.roles`; empty for activations. Where
    the group has more symmetry than permutations, ``dual`` says that units are mapped by the inverse transposed here,
    and ``scales`` that these numbers multiply single units, and have to be folded away first.

    Units of a nested group lie ``blocks`` times on the axis, once in each unit of the outer group, with ``between``
    repetitions inside a block; or, with ``block_dim``, the blocks lie along another dim of the same parameter.

    >>> Member("fc.weight", 1, size=2, inner=3).positions().tolist()
    [[0, 1, 2], [3, 4, 5]]
    >>> Member("qkv.weight", 0, size=2, blocks=2).positions().tolist()
    [[0], [1], [2], [3]]
    """

    parameter: str
    dim: int
    size: int
    start: int = 0
    inner: int = 1
    outer: int = 1
    indices: tuple[int, ...] = ()
    blocks: int = 1
    between: int = 1
    block_dim: int = -1
    role: str = field(default="", compare=False, repr=False)
    dual: bool = field(default=False, compare=False, repr=False)
    scales: bool = field(default=False, compare=False, repr=False)

    def positions(self) -> np.ndarray:
        """Indices along ``dim``, one row per unit, block by block: int64, ``(blocks * size, places per unit)``."""
        if self.indices:
            return np.asarray(self.indices, dtype=np.int64).reshape(self.blocks * self.size, -1)
        grid = (self.outer, self.blocks, self.between, self.size, self.inner)
        by_unit = np.arange(self.start, self.end).reshape(grid).transpose(1, 3, 0, 2, 4)
        return by_unit.reshape(self.blocks * self.size, -1)

    @property
    def end(self) -> int:
        """One past the last index of a regular layout."""
        return self.start + self.outer * self.blocks * self.between * self.size * self.inner

    def overlaps(self, other: Member) -> bool:
        """Whether two members share indices of one dim of one tensor."""
        same = (self.parameter, self.dim) == (other.parameter, other.dim)
        return same and not set(self.positions().flat).isdisjoint(other.positions().flat)

    def order(self, permutation: Permutation) -> np.ndarray:
        """The order of this member's rows of :meth:`positions`: one that serves all blocks is repeated in each."""
        order = np.asarray(permutation.order)
        if self.blocks == 1 or len(order) != self.size:
            return order
        return (np.arange(self.blocks)[:, None] * self.size + order).reshape(-1)

    def __str__(self) -> str:
        place = f"{self.parameter}[{self.dim}]"
        if self.block_dim >= 0:
            place += f" along [{self.block_dim}]"
        if self.indices:
            shown = ",".join(map(str, self.indices[:6])) + ("…" if len(self.indices) > 6 else "")
            return f"{place} at {shown}"
        factors = [factor for factor in (self.outer, self.blocks, self.between) if factor > 1]
        shape = "x".join(map(str, [*factors, self.size, *[self.inner] * (self.inner > 1)]))
        return f"{place} from {self.start}: {shape}" if (self.start or shape != str(self.size)) else place


@dataclass(frozen=True, order=True)
class PermutationGroup:
    """All axes that must move together: reordering the units in every member leaves the function unchanged.

    ``name`` is ``g0``, ``g1``, … in the order of the model's parameters; ``label`` is the first parameter that
    produces the units, for people. ``activations`` are the places of the units in the values of graph nodes, by node
    name and in graph order; statistics are read there.

    A nested group names its ``outer`` group. ``blocks`` is the number of units of that group if each may order the
    ``size`` units inside it by itself, and 1 if one order serves all.

    ``symmetry`` says by which matrices the units can be mapped with nothing changed in what the network computes, once
    the set's ``foldings`` are done. ``mappable`` says whether matchers of maps may map them, which needs less: there it
    holds nearly.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    activations: tuple[Member, ...] = field(default=(), compare=False, repr=False)
    outer: str = ""
    blocks: int = 1
    mappable: bool = field(default=False, compare=False, repr=False)
    symmetry: Symmetry = field(default=Symmetry.PERMUTATION, compare=False, repr=False)

    @property
    def units(self) -> int:
        """Length of an order: the units of all blocks."""
        return self.blocks * self.size

    @property
    def label(self) -> str:
        """The module that first produces these units, as in ``layer1.0.conv1``."""
        return self.members[0].parameter.rpartition(".")[0] or self.members[0].parameter

    def accepts(self, order: Permutation) -> bool:
        """Whether an order has the right length and leaves every unit within its block."""
        if order.size != self.units:
            return False
        return self.blocks == 1 or all(new // self.size == old // self.size for new, old in enumerate(order.order))

    def identity(self) -> Permutation:
        """The order that changes nothing."""
        return Permutation.identity(self.units)

    def random(self, generator: torch.Generator) -> Permutation:
        """A uniformly random order, each block's drawn by itself from ``generator`` alone."""
        drawn = (Permutation.random(self.size, generator).order for _ in range(self.blocks))
        return Permutation(tuple(block * self.size + unit for block, order in enumerate(drawn) for unit in order))

    def __str__(self) -> str:
        size = f"{self.blocks} x {self.size}" if self.blocks > 1 else str(self.size)
        inside = f" in {self.outer}" if self.outer else ""
        symmetry = f", {self.symmetry}" if self.symmetry.is_continuous else ""
        return f"{self.name} ({self.label}, {size} units{inside}{symmetry})"


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
class Reader:
    """A weight that reads units, at a node: ``weight`` says where, ``bias`` what takes a shift of the units.

    It is ``None`` where the op has none of its own, or units are padded with zeros on the way there.
    """

    node: str
    weight: Member
    bias: str | None


@dataclass(frozen=True)
class Folding:
    """A weight that multiplies units, at ``nodes``, and can be folded into others.

    ``scale`` says where its numbers lie, unit by unit; ``shift`` those that a norm adds behind it. They go into all
    ``readers``; or the scale into ``writers``, the rows of the layer before and its bias.
    """

    nodes: tuple[str, ...]
    scale: Member
    shift: Member | None = None
    readers: tuple[Reader, ...] = ()
    writers: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Centring:
    """Weights that write the units of ``group``, where none but LayerNorms over just these units look at them.

    A LayerNorm subtracts the mean over its units, so what ``writers`` add to all units alike is never seen. It holds as
    long as all ``scales``, which multiply single units on the way, are one. With a ``reason`` it does not hold: the
    group is orthogonal fixing ones, and something sees the mean.
    """

    group: str
    writers: tuple[Member, ...] = ()
    scales: tuple[Member, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class GroupSet(Shown):
    """The permutation groups of one architecture, the axes that may not move, and the ops that had no rule.

    Iterate over it for its groups, index it by a group's name, print it for a table that fits on a screen;
    :meth:`listing` has every member. ``in_training`` says whether training computes another graph than eval mode, for
    which the groups hold too; ``None`` if nobody has looked. ``notes`` are for people. ``foldings`` are weights that
    multiply single units and can be folded into others: what symmetries beyond permutations suppose. ``centrings`` say
    for each group that is orthogonal fixing ones whether its mean over the units is seen.
    """

    groups: tuple[PermutationGroup, ...]
    pinned: tuple[PinnedAxis, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    parameter_count: int = field(default=0, compare=False)
    grouped_count: int = field(default=0, compare=False)
    in_training: bool | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    foldings: tuple[Folding, ...] = field(default=(), compare=False, repr=False)
    centrings: tuple[Centring, ...] = field(default=(), compare=False, repr=False)

    def __iter__(self) -> Iterator[PermutationGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> PermutationGroup:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PermutationGroup]:
        return {group.name: group for group in self.groups}

    def only_ordered(self, names: Collection[str] | None = None) -> GroupSet:
        """The same with nothing but orders for the units of some groups; of all without ``names``."""
        groups = (
            replace(group, symmetry=Symmetry.PERMUTATION) if names is None or group.name in names else group
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @cached_property
    def by_parameter(self) -> Mapping[str, tuple[tuple[PermutationGroup, Member], ...]]:
        """For every grouped parameter or buffer: the groups that move it, with the member that says where."""
        found: dict[str, list[tuple[PermutationGroup, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(member.parameter, []).append((group, member))
        return {name: tuple(entries) for name, entries in found.items()}

    def blocks_of(self, name: str, member: Member, group: PermutationGroup) -> np.ndarray:
        """Where the blocks of a nested group lie along ``member.block_dim`` of an entry: ``(blocks, places)``."""
        outer = [
            other.positions()
            for owner, other in self.by_parameter[name]
            if owner.name == group.outer and other.dim == member.block_dim
        ]
        return np.concatenate(outer, axis=1)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters (not buffers) that lie in some group, 0 to 1."""
        return self.grouped_count / self.parameter_count if self.parameter_count else 0.0

    def __str__(self) -> str:
        whole = self.listing()
        if whole.count("\n") < SCREEN:
            return whole
        groups = [f"{group}, {len(group.members)} members" for group in self.groups]
        return "\n".join([*self._lines(groups, SHOWN), "all of it: .listing()"])

    __repr__ = __str__

    def _lines(self, groups: Sequence[str], most: int | None = None) -> Iterator[str]:
        """The table, whose groups are given as lines; ``most`` lines of each part, if not all."""
        yield (
            f"{len(self.groups)} permutation groups, {sum(g.units for g in self.groups)} units; "
            f"{self.coverage:.1%} of {self.parameter_count:,} parameters lie in a group"
        )
        yield from _first(groups, "groups", most)
        if self.pinned:
            yield f"pinned: {len(self.pinned)} axes"
            yield from _first([f"    {pin}" for pin in self.pinned], "axes", most)
        if self.unknown_ops:
            yield "ops without a coupling rule (all that they touch is pinned):"
            yield from _first([f"    {op}" for op in self.unknown_ops], "ops", most)
            yield f"    {UNKNOWN_OP_REMEDY}"
        yield from _first(self.notes, "notes", most)

    def listing(self) -> str:
        """The whole table as text, however long: every group with its members, every pinned axis, every op and note.

        >>> groups = GroupSet((PermutationGroup("g0", 2, (Member("fc.weight", 0, 2), Member("fc.bias", 0, 2))),))
        >>> print(groups.listing())
        1 permutation groups, 2 units; 0.0% of 0 parameters lie in a group
        g0 (fc, 2 units)
            fc.weight[0]
            fc.bias[0]
        """
        groups = [line for group in self.groups for line in (str(group), *(f"    {m}" for m in group.members))]
        return "\n".join(self._lines(groups))


def _first(lines: Sequence[str], what: str, most: int | None) -> list[str]:
    """The first ``most`` lines, and how many more there are; all without a number."""
    if most is None or len(lines) <= most:
        return [*lines]
    return [*lines[:most], f"    ... and {len(lines) - most} more {what}"]


def random_permutations(groups: GroupSet, generator: torch.Generator) -> dict[str, Permutation]:
    """Draw one random order per group.

    >>> random_permutations(GroupSet(()), torch.Generator().manual_seed(0))
    {}
    """
    return {group.name: group.random(generator) for group in groups}

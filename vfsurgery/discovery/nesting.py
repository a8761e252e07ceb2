"""Which groups lie inside the units of another one, and whether each of those units may order them by itself.

The dims inside an attention head are one atom ``d`` of axes ``head x d``. One order of ``d`` for all heads always
preserves the function; an order for each head does so only if no head's units ever meet another head's position by
position. That holds for an atom ``d`` inside the units of an atom ``o`` (its *outer* one) when

1. every tensor that ``d`` lies on has ``o`` too, in the same run of an axis or filling another axis;
2. every op pairs those tensors unit by unit of ``o``: its ties connect all their places of ``o``, so that a product of
   one head's queries with another head's keys does not count;
3. no op mixes along ``o`` at fixed ``d``, as a softmax over heads would.

Depthwise convolutions with several outputs a channel, the channels inside the groups of grouped convolutions and of
GroupNorm, and the dims inside attention heads are the cases met in practice.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from vfsurgery.groups.axes import AxisRef, TensorRef
from vfsurgery.groups.layouts import Atom, Layout, Run


@dataclass(frozen=True, slots=True)
class Outer:
    """The outer atom of another one, by serial; ``separate`` if each of its units may have an order of its own."""

    serial: int
    separate: bool


class Nesting:
    """Finds outer atoms, given resolved layouts, each op's ties and what it mixes along.

    Args:
        layouts: The resolved layout of every axis, of tensors or local to an op.
        ties: For each op its ties, each as the axes that it mentions.
        mixes: For each op sets of axes along which it mixes.
    """

    def __init__(
        self,
        layouts: Mapping[Any, Layout],
        ties: Sequence[tuple[str, tuple[Hashable, ...]]],
        mixes: Sequence[tuple[str, tuple[Hashable, ...]]],
    ) -> None:
        self.layouts = layouts
        self._serials = {ref: {atom.serial for atom in _atoms(layout)} for ref, layout in layouts.items()}
        self._ties: dict[str, list[tuple[Hashable, ...]]] = defaultdict(list)
        self._ops: dict[TensorRef, set[str]] = defaultdict(set)
        self._axes: dict[int, list[AxisRef]] = defaultdict(list)
        self._mixed: dict[str, list[set[int]]] = defaultdict(list)
        for op, refs in ties:
            self._ties[op].append(refs)
            for ref in refs:
                if isinstance(ref, AxisRef):
                    self._ops[ref.tensor].add(op)
        for op, refs in mixes:
            self._mixed[op].append(set().union(*(self._serials[ref] for ref in refs)))
        self._slower: dict[tuple[int, int], bool] = {}
        for ref, serials in self._serials.items():
            if isinstance(ref, AxisRef):
                for serial in serials:
                    self._axes[serial].append(ref)
                if ref.tensor.kind == "parameter":
                    self._compare_factors(layouts[ref])

    def find(self, sizes: Mapping[int, int]) -> dict[int, Outer]:
        """The outer atom of each of the given atoms that has one.

        Args:
            sizes: Serial and size of the atoms that form groups. An atom that is the outer one of another has none
                itself; of several candidates the largest is taken, which leaves most freedom.
        """
        found: dict[int, Outer] = {}
        taken: set[int] = set()
        for inner in sorted(sizes, key=lambda serial: (sizes[serial], serial)):
            if inner in taken:
                continue
            candidates = sorted(self._beside(inner, sizes), key=lambda serial: (-sizes[serial], serial))
            free = [serial for serial in candidates if serial not in found]
            outer = next((Outer(o, True) for o in free if self._separate(inner, o)), None)
            outer = outer or next((Outer(o, False) for o in free if self._shares_runs(inner, o)), None)
            if outer is not None:
                found[inner] = outer
                taken.add(outer.serial)
        return found

    def axes_of(self, serial: int) -> Sequence[AxisRef]:
        """The axes of tensors that an atom lies on."""
        return self._axes[serial]

    def _beside(self, inner: int, sizes: Collection[int]) -> set[int]:
        """Atoms with groups that lie on some tensor that the inner one lies on."""
        tensors = {axis.tensor for axis in self._axes[inner]}
        beside = (self._serials.get(axis, set()) for tensor in tensors for axis in tensor.axes())
        return set().union(*beside) & set(sizes) - {inner}

    def _compare_factors(self, layout: Layout) -> None:
        """Note for each pair of atoms in a run whether the second is the slower; the first run with both decides."""
        for run in layout:
            factors = dict.fromkeys(atom.serial for atom in run.atoms)
            for outer, inner in itertools.combinations(factors, 2):
                self._slower.setdefault((inner, outer), True)
                self._slower.setdefault((outer, inner), False)

    def _shares_runs(self, inner: int, outer: int) -> bool:
        """Whether a parameter has runs of both in which the outer one is the slower."""
        return self._slower.get((inner, outer), False)

    def _separate(self, inner: int, outer: int) -> bool:
        if not all(self._accompanies(axis, inner, outer) for axis in self._axes[inner]):
            return False
        tensors = {axis.tensor for axis in self._axes[inner]}
        for op in set().union(*(self._ops[tensor] for tensor in tensors)):
            if any(outer in mixed and inner not in mixed for mixed in self._mixed[op]):
                return False
            if not self._pairs_by_unit(op, tensors, outer):
                return False
        return True

    def _accompanies(self, axis: AxisRef, inner: int, outer: int) -> bool:
        """Condition 1: the outer atom shares each run of the inner one, or fills another axis of the tensor."""
        runs = [run for run in self.layouts[axis] if inner in _serials(run)]
        if all(outer in _serials(run) for run in runs):
            return True
        return self.block_axis(axis, outer) is not None

    def block_axis(self, axis: AxisRef, outer: int) -> AxisRef | None:
        """The one other axis of the same tensor that the units of the outer atom fill."""
        others = [
            other
            for other in axis.tensor.axes()
            if other != axis and all(outer in _serials(run) for run in self.layouts.get(other, ())) and other.size > 1
        ]
        return others[0] if len(others) == 1 and others[0] in self.layouts else None

    def _pairs_by_unit(self, op: str, tensors: Collection[TensorRef], outer: int) -> bool:
        """Condition 2: the op's ties connect all places of the outer atom on the tensors that have the inner one."""
        graph: nx.Graph[Hashable] = nx.Graph()
        for refs in self._ties[op]:
            holders = [ref for ref in refs if outer in self._serials[ref]]
            nx.add_path(graph, holders)
        places = [ref for ref in graph if isinstance(ref, AxisRef) and ref.tensor in tensors]
        return not places or set(places) <= nx.node_connected_component(graph, places[0])


def _atoms(layout: Layout) -> set[Atom]:
    return {atom for run in layout for atom in run.atoms if atom.size > 1}


def _serials(run: Run) -> set[int]:
    return {atom.serial for atom in run.atoms}

"""From solved constraints to permutation groups: components of the coupling graph, and where their units lie.

The *coupling graph* (networkx) has a node for each atom on each axis and an edge for each tie, labelled with its op.
Its connected components that reach no pin and hold parameters are the permutation groups.
:mod:`vfsurgery.discovery.nesting` says which of them lie inside the units of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import networkx as nx
from torch import fx

from vfsurgery.discovery.centrings import Centrings
from vfsurgery.discovery.foldings import Foldings
from vfsurgery.discovery.members import member_of
from vfsurgery.discovery.nesting import Nesting, Outer
from vfsurgery.discovery.symmetries import Symmetries
from vfsurgery.discovery.unification import ONLY_IN_TRAINING, LocalAxis, Unification
from vfsurgery.groups import GroupSet, Member, PermutationGroup, Symmetry
from vfsurgery.groups.axes import AxisRef, TensorRef
from vfsurgery.tracing.modes import not_followed
from vfsurgery.tracing.selection import chosen_pins


def discover(
    graph_module: fx.GraphModule, *, strict: bool = False, pins: str | Sequence[str] = (), training: bool = False
) -> GroupSet:
    """Find the permutation groups of a traced model.

    Args:
        graph_module: What :func:`vfsurgery.trace` returns.
        strict: Raise at the first op without a coupling rule instead of pinning what it touches.
        pins: Module paths, parameter names or patterns of them whose axes must not move.
        training: List activations of the graph of training, too, if there is another one.

    Raises:
        UnknownOpError: under ``strict``; names the op, its node and module, and the remedy.
        OptionError: an entry of ``pins`` matches nothing.
    """
    unification = Unification(graph_module, strict=strict, pins=chosen_pins(graph_module, pins))
    return Components(unification, training).group_set()


class Components:
    """The groups of one traced model, whose constraints are ``solved``; :meth:`group_set` is the result."""

    def __init__(self, solved: Unification, training: bool = False) -> None:
        self.solved = solved
        self._nodes = self._places(solved.graphs if training else solved.graphs[:1])
        self._symmetries = Symmetries(solved)
        self._foldings = Foldings(self._symmetries)
        self._scaled = frozenset().union(*self._foldings.places.values())

    def coupling_graph(self) -> nx.Graph[Any]:
        """Nodes ``(axis, atom)``, edges the ties with the node that made them as ``op``, pins as node attribute."""
        graph: nx.Graph[Any] = nx.Graph()
        for axis in self.solved.axes:
            for atom in self.solved.atoms(axis):
                graph.add_node((axis, atom.serial), size=atom.size, pin=atom.pin)
        for op, axes in self.solved.ties:
            last_with: dict[int, AxisRef | LocalAxis] = {}
            for axis in axes:
                for atom in self.solved.atoms(axis):
                    if atom.serial in last_with:
                        graph.add_edge((last_with[atom.serial], atom.serial), (axis, atom.serial), op=op)
                    last_with[atom.serial] = axis
        return graph

    def group_set(self) -> GroupSet:
        """The components of the coupling graph that hold parameters and reach no pin.

        Activations are those of eval mode's graph; under ``training`` those of training's graph are listed after them.
        """
        graph = self.coupling_graph()
        nesting = Nesting(self.solved.axes, self.solved.ties, self.solved.mixes)
        components: dict[int, list[AxisRef]] = {}
        for component in nx.connected_components(graph):
            axes = [axis for axis, _ in component if isinstance(axis, AxisRef) and self._names(axis.tensor)]
            free = all(graph.nodes[node]["pin"] is None for node in component)
            if free and any(axis.tensor.kind == "parameter" for axis in axes):
                components[next(iter(component))[1]] = axes
        outers = nesting.find({serial: self._size(axes[0], serial) for serial, axes in components.items()})
        nested = {serial for inner, outer in outers.items() for serial in (inner, outer.serial)}
        found = [self._group(serial, axes, outers.get(serial), nesting) for serial, axes in components.items()]
        found.sort(key=lambda group: _place(group[1].members[0], self._entries))
        names = {serial: f"g{number}" for number, (serial, _) in enumerate(found)}
        symmetries = self._symmetries.of_atoms(self._foldings.places)
        around = {outer.serial for outer in outers.values()}
        groups = tuple(
            replace(
                group,
                name=names[serial],
                outer=names[outers[serial].serial] if serial in outers else "",
                symmetry=_of_group(group, symmetries[serial], has_others_inside=serial in around),
                mappable=serial not in nested and self.solved.roles.closed.isdisjoint(components[serial]),
            )
            for serial, group in found
        )
        centrings = Centrings(self._symmetries, self._foldings)
        return GroupSet(
            groups,
            tuple(self.solved.pinned_axes()),
            tuple(self.solved.unknown_ops),
            *self._coverage(groups),
            in_training=len(self.solved.graphs) > 1,
            notes=tuple(self._notes()),
            foldings=tuple(self._foldings.each),
            centrings=tuple(
                centrings.of(serial, group.name)
                for group, (serial, _) in zip(groups, found, strict=True)
                if group.symmetry is Symmetry.ORTHOGONAL_FIXING_ONES
            ),
        )

    @cached_property
    def _entries(self) -> dict[str, int]:
        """The place of every parameter and buffer in the state dict."""
        return {name: number for number, name in enumerate(self.solved.graph_module.state_dict())}

    @staticmethod
    def _places(graphs: Sequence[fx.GraphModule]) -> dict[str, int]:
        """The place of every node of some graphs, one graph after the other."""
        nodes = (node for graph_module in graphs for node in graph_module.graph.nodes)
        return {node.name: number for number, node in enumerate(nodes)}

    def _notes(self) -> Iterator[str]:
        """What groups do not say: that training is not followed, and what only training may use."""
        reason = not_followed(self.solved.graph_module)
        if reason:
            unused = ", ".join(pin.parameter for pin in self.solved.pinned_axes() if pin.reason == ONLY_IN_TRAINING)
            yield f"the groups hold in eval mode: training is not followed ({reason})"
            if unused:
                yield f"used only in training, if at all, and not followed: {unused}"

    def _size(self, axis: AxisRef, serial: int) -> int:
        return next(atom.size for atom in self.solved.atoms(axis) if atom.serial == serial)

    def _group(
        self, serial: int, axes: list[AxisRef], outer: Outer | None, nesting: Nesting
    ) -> tuple[int, PermutationGroup]:
        """The group of one atom, yet without its name and that of its outer group."""
        members = [member for axis in axes for member in self._members(axis, serial, outer, nesting)]
        kinds = {name: axis.tensor.kind for axis in axes for name in self._names(axis.tensor)}
        own = sorted((m for m in members if kinds[m.parameter] == "parameter"), key=lambda m: _place(m, self._entries))
        shown = (m for m in members if kinds[m.parameter] == "node" and m.parameter in self._nodes)
        values = sorted(shown, key=lambda m: _place(m, self._nodes))
        size = own[0].size
        if own[0].dual:  # which of two duals is which is a matter of taste: what writes first counts
            own, values = ([replace(member, dual=not member.dual) for member in each] for each in (own, values))
        blocks = self._size(next(iter(nesting.axes_of(outer.serial))), outer.serial) if outer and outer.separate else 1
        return serial, PermutationGroup("", size, tuple(own), tuple(values), blocks=blocks)

    def _members(self, axis: AxisRef, serial: int, outer: Outer | None, nesting: Nesting) -> Iterator[Member]:
        """The places of an atom on an axis of a parameter or node."""
        role = self.solved.roles.of.get(axis, "")
        for number, run in enumerate(self.solved.axes[axis]):
            serials = [atom.serial for atom in run.atoms]
            for place in (place for place, found in enumerate(serials) if found == serial):
                inside = outer is not None and outer.serial in serials
                member = member_of(axis, run, place, serials.index(outer.serial) if outer and inside else None)
                block_axis = nesting.block_axis(axis, outer.serial) if outer and outer.separate and not inside else None
                block_dim = member.block_dim if block_axis is None else block_axis.dim
                at = (axis, number, place)
                known = {"role": role, "dual": self._symmetries.is_dual(at), "scales": at in self._scaled}
                for name in self._names(axis.tensor):
                    yield replace(member, parameter=name, block_dim=block_dim, **known)

    def _names(self, tensor: TensorRef) -> Sequence[str]:
        """What members call a tensor: one of several that a node computes goes by the nodes that pick it."""
        return (tensor.name,) if tensor.item < 0 else self.solved.picked.get(tensor, ())

    def _coverage(self, groups: tuple[PermutationGroup, ...]) -> tuple[int, int]:
        grouped = {member.parameter for group in groups for member in group.members}
        sizes = {name: parameter.numel() for name, parameter in self.solved.graph_module.named_parameters()}
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name in grouped)


def _of_group(group: PermutationGroup, symmetry: Symmetry, has_others_inside: bool) -> Symmetry:
    """What of a symmetry can be used: blocks that hold units of other groups, or lie on another dim, are reordered."""
    apart = any(member.block_dim >= 0 for member in group.members)
    return Symmetry.PERMUTATION if has_others_inside or apart else symmetry


def _place(member: Member, order: Mapping[str, int]) -> tuple[object, ...]:
    return (order[member.parameter], member.dim, member.start, member.indices)

"""From a traced model to its permutation groups: rules give ties and pins, their solution gives the groups.

1. Every op's coupling rule states constraints on axes (:mod:`vfsurgery.groups.axes`); an op without a rule pins all it
   touches.
2. :class:`~vfsurgery.groups.layouts.Layouts` solves them: each axis becomes a concatenation of products of atoms.
3. The *coupling graph* (networkx) has a node for each atom on each axis and an edge for each tie, labelled with its op.
   Its connected components that reach no pin and hold parameters are the permutation groups.
4. :mod:`vfsurgery.discovery.nesting` says which of them lie inside the units of others.

Where training computes another graph than eval mode, the ops of both are read: a group holds in both modes.

Dims that hold no units, such as a kernel's height and width, are not listed among the pinned axes.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from vfsurgery.discovery.nesting import Nesting, Outer
from vfsurgery.discovery.roles import Roles
from vfsurgery.discovery.rules import rule_for
from vfsurgery.errors import SurgeryError, UnknownOpError, explain
from vfsurgery.groups import GroupSet, Member, PermutationGroup, PinnedAxis
from vfsurgery.groups.axes import (
    AxisRef,
    Concat,
    Constraint,
    Expression,
    Fixed,
    Fresh,
    Indifferent,
    Mixes,
    Pin,
    Product,
    Reads,
    Take,
    TensorRef,
    Tie,
    mentioned,
    references,
)
from vfsurgery.groups.layouts import Atom, Layout, Layouts, Run, concat, product
from vfsurgery.tracing.dataflow import reached_by_input
from vfsurgery.tracing.modes import in_training, not_followed
from vfsurgery.tracing.ops import Op, OpReader
from vfsurgery.tracing.precision import is_inexact
from vfsurgery.tracing.selection import NO_PINS, Pinned, chosen_pins
from vfsurgery.tracing.values import VALUE, TensorValue

NO_UNITS = "holds no units"
INPUT, OUTPUT, UNUSED = "network input", "network output", "not used in the forward"
ONLY_IN_TRAINING = "not used in eval mode, and training is not followed"
CONSTANT = "constant tensor"
WHOLE = "integers or truth values, which cannot be averaged"
UNSPOKEN = "held by a module, and not spoken of by the rule for"
UNREAD = "made in a way that is not understood"
BY_USER = "pinned by the user ({})"


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
    return Discovery(graph_module, strict=strict, pins=chosen_pins(graph_module, pins)).group_set(training)


@dataclass(frozen=True, slots=True)
class LocalAxis:
    """A :class:`Fresh` axis of the op at node ``op``."""

    op: str
    axis: Fresh

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.axis.size


@dataclass
class Discovery:
    """The constraints of one traced model and their solution; :meth:`group_set` is the result."""

    graph_module: fx.GraphModule
    strict: bool = False
    pins: Pinned = NO_PINS
    layouts: Layouts = field(default_factory=Layouts)
    roles: Roles = field(default_factory=Roles)
    unknown_ops: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._axes: dict[AxisRef | LocalAxis, Layout] = {}
        self._ties: list[tuple[str, tuple[AxisRef | LocalAxis, ...]]] = []
        self._mixes: list[tuple[str, tuple[AxisRef | LocalAxis, ...]]] = []
        self._unknown_at: dict[tuple[str, str], fx.Graph] = {}
        self._picked: dict[TensorRef, list[str]] = defaultdict(list)
        other = in_training(self.graph_module)
        self._graphs = [self.graph_module] if other is None else [self.graph_module, other]
        for graph_module in self._graphs:
            self.roles.reached |= reached_by_input(graph_module.graph)
            self._read(graph_module)
        self._pin_chosen_parameters()

    def _read(self, graph_module: fx.GraphModule) -> None:
        """Take in what the ops of one graph say, and pin what goes in and comes out."""
        reader = OpReader(graph_module)
        known = {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
        for op in reader:
            for tensor in op.inputs:
                if tensor.kind == "node" and tensor.name not in known:  # no op that was read has made it
                    self._pin_all(tensor, f"{UNREAD} ({tensor.name})")
            known.update(tensor.name for tensor in op.outputs)
            self._apply(op)
            self._pin_inside(op)
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and isinstance(node.meta.get(VALUE), TensorValue):
                for tensor in reader.tensors_of(node):
                    self._picked[tensor].append(node.name)
            if node.op in ("placeholder", "output"):
                reason = INPUT if node.op == "placeholder" else OUTPUT
                for tensor in reader.tensors_of(node):
                    self._pin_all(tensor, reason)

    def _apply(self, op: Op) -> None:
        rule = rule_for(op)
        if rule is None and not op.inputs and not op.parameters:
            for tensor in op.outputs:
                self._pin_all(tensor, CONSTANT)
            return
        if rule is None or not (op.outputs or op.key == "setitem"):  # which writes into its first operand
            self._unknown(op)
            return
        seen: set[AxisRef | Fresh] = set()
        try:
            constraints = list(rule(op))
            for constraint in constraints:
                seen.update(mentioned(constraint))
                self._constrain(constraint, op.node.name)
            self.roles.see(op, constraints, rule.__module__)
        except (SurgeryError, AssertionError, IndexError, TypeError, ValueError) as error:
            raise SurgeryError(explain(f"coupling rule of {op.name} failed: {error}", op=op)) from error
        for tensor in (*op.inputs, *op.outputs):
            self._pin_rest(tensor, seen, f"positions differ in {op.name} ({op.path or op.node.name})")
        kind = op.name if op.module is None else type(op.module).__name__
        for tensor in op.parameters.values():
            spoken_of = any(axis in seen for axis in tensor.axes())
            self._pin_rest(tensor, seen, NO_UNITS if spoken_of else f"{UNSPOKEN} {kind} ({op.path})")

    def _unknown(self, op: Op) -> None:
        if self.pins.pattern_of(op.path) is not None:  # the user has said what to do about it
            return
        if self.strict:
            raise UnknownOpError(_unknown_op(op))
        self._unknown_at.setdefault((op.name, op.path), op.node.graph)
        if self._unknown_at[op.name, op.path] is op.node.graph:  # in training it is the same op
            self.unknown_ops.append(str(op))
        for tensor in (*op.inputs, *op.outputs, *op.parameters.values()):
            self._pin_all(tensor, f"no coupling rule for {op.name} ({op.path or op.node.name})")

    def _pin_inside(self, op: Op) -> None:
        """Pin all that an op inside a module of ``pins=`` touches."""
        pattern = self.pins.pattern_of(op.path)
        if pattern is not None:
            for tensor in (*op.inputs, *op.outputs, *op.parameters.values()):
                self._pin_all(tensor, BY_USER.format(pattern))

    def _pin_chosen_parameters(self) -> None:
        for axis in list(self._axes):
            if (
                isinstance(axis, AxisRef)
                and axis.tensor.kind == "parameter"
                and axis.tensor.name in self.pins.parameters
            ):
                self.layouts.pin(self._axis(axis), BY_USER.format(self.pins.parameters[axis.tensor.name]))

    def _constrain(self, constraint: Constraint, op: str) -> None:
        if isinstance(constraint, Tie):
            self.layouts.unify(self._layout(constraint.left, op), self._layout(constraint.right, op))
            self._ties.append((op, _located(mentioned(constraint), op)))
        elif isinstance(constraint, Mixes):
            axes = _located((ref for axis in constraint.axes for ref in references(axis)), op)
            self._mixes.append((op, tuple(axis for axis in axes if self._axis(axis))))
        elif isinstance(constraint, Pin):
            self.layouts.pin(self._layout(constraint.axis, op), constraint.reason)
        else:
            assert isinstance(constraint, Indifferent | Reads)

    def _layout(self, expression: Expression, op: str) -> Layout:
        match expression:
            case AxisRef():
                return self._axis(expression)
            case Fresh():
                return self._axis(LocalAxis(op, expression))
            case Fixed():
                return self.layouts.axis(expression.size, expression.reason)
            case Concat():
                return concat([self.layouts.resolve(self._layout(part, op)) for part in expression.parts])
            case Product():
                return product([self.layouts.resolve(self._layout(factor, op)) for factor in expression.factors])
            case Take():
                return self.layouts.take(
                    self._layout(expression.axis, op), np.asarray(expression.positions, dtype=np.int64)
                )

    def _axis(self, axis: AxisRef | LocalAxis) -> Layout:
        layout = self._axes.get(axis)
        if layout is None:
            pinned = self._fixed(axis) if isinstance(axis, AxisRef) else None
            layout = self._axes[axis] = self.layouts.axis(axis.size, pinned)
        return layout

    def _fixed(self, axis: AxisRef) -> str | None:
        """Why an axis may not move whose values are no weights; equal ones (a blur filter's) may be reordered."""
        if axis.tensor.kind == "constant":
            tensor, reason = next(self._constants(axis.tensor.name)), CONSTANT
        elif axis.tensor.kind == "parameter" and axis.tensor.name in self._whole:
            tensor, reason = self._whole[axis.tensor.name], WHOLE
        else:
            return None
        if tensor.is_meta or not tensor.numel():
            return reason
        return None if bool((tensor == tensor.narrow(axis.dim, 0, 1)).all()) else reason

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """Saved tensors of integers and truth values (masks), of which there is no mean."""
        return {name: tensor for name, tensor in self.graph_module.state_dict().items() if not is_inexact(tensor)}

    def _constants(self, name: str) -> Iterator[Tensor]:
        """The constant of that name, in each graph that has it."""
        for graph_module in self._graphs:
            with contextlib.suppress(AttributeError):
                yield operator.attrgetter(name)(graph_module)

    def _pin_rest(self, tensor: TensorRef, seen: set[AxisRef | Fresh], reason: str) -> None:
        for axis in tensor.axes():
            if axis not in seen:
                self.layouts.pin(self._axis(axis), reason)

    def _pin_all(self, tensor: TensorRef, reason: str) -> None:
        self._pin_rest(tensor, set(), reason)

    def coupling_graph(self) -> nx.Graph[Any]:
        """Nodes ``(axis, atom)``, edges the ties with the node that made them as ``op``, pins as node attribute."""
        graph: nx.Graph[Any] = nx.Graph()
        for axis in self._axes:
            for atom in self._atoms(axis):
                graph.add_node((axis, atom.serial), size=atom.size, pin=atom.pin)
        for op, axes in self._ties:
            last_with: dict[int, AxisRef | LocalAxis] = {}
            for axis in axes:
                for atom in self._atoms(axis):
                    if atom.serial in last_with:
                        graph.add_edge((last_with[atom.serial], atom.serial), (axis, atom.serial), op=op)
                    last_with[atom.serial] = axis
        return graph

    def _atoms(self, axis: AxisRef | LocalAxis) -> list[Atom]:
        layout = self._axes[axis] = self.layouts.resolve(self._axes[axis])
        return list(dict.fromkeys(atom for run in layout for atom in run.atoms if atom.size > 1))

    def group_set(self, training: bool = False) -> GroupSet:
        """The components of the coupling graph that hold parameters and reach no pin.

        Activations are those of eval mode's graph; under ``training`` those of training's graph are listed after them.
        """
        self._nodes = self._places(self._graphs if training else self._graphs[:1])
        graph = self.coupling_graph()
        nesting = Nesting(self._axes, self._ties, self._mixes)
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
        groups = tuple(
            replace(
                group,
                name=names[serial],
                outer=names[outers[serial].serial] if serial in outers else "",
                mappable=serial not in nested and self.roles.closed.isdisjoint(components[serial]),
            )
            for serial, group in found
        )
        return GroupSet(
            groups,
            tuple(self._pinned()),
            tuple(self.unknown_ops),
            *self._coverage(groups),
            in_training=len(self._graphs) > 1,
            notes=tuple(self._notes()),
        )

    @cached_property
    def _entries(self) -> dict[str, int]:
        """The place of every parameter and buffer in the state dict."""
        return {name: number for number, name in enumerate(self.graph_module.state_dict())}

    @staticmethod
    def _places(graphs: Sequence[fx.GraphModule]) -> dict[str, int]:
        """The place of every node of some graphs, one graph after the other."""
        nodes = (node for graph_module in graphs for node in graph_module.graph.nodes)
        return {node.name: number for number, node in enumerate(nodes)}

    def _notes(self) -> Iterator[str]:
        """What groups do not say: that training is not followed, and what only training may use."""
        reason = not_followed(self.graph_module)
        if reason:
            unused = ", ".join(pin.parameter for pin in self._pinned() if pin.reason == ONLY_IN_TRAINING)
            yield f"the groups hold in eval mode: training is not followed ({reason})"
            if unused:
                yield f"used only in training, if at all, and not followed: {unused}"

    def _size(self, axis: AxisRef, serial: int) -> int:
        return next(atom.size for atom in self._atoms(axis) if atom.serial == serial)

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
        blocks = self._size(next(iter(nesting.axes_of(outer.serial))), outer.serial) if outer and outer.separate else 1
        return serial, PermutationGroup("", size, tuple(own), tuple(values), blocks=blocks)

    def _members(self, axis: AxisRef, serial: int, outer: Outer | None, nesting: Nesting) -> Iterator[Member]:
        """The places of an atom on an axis of a parameter or node."""
        role = self.roles.of.get(axis, "")
        for run in self._axes[axis]:
            serials = [atom.serial for atom in run.atoms]
            for place in (place for place, found in enumerate(serials) if found == serial):
                inside = outer is not None and outer.serial in serials
                member = _member(axis, run, place, serials.index(outer.serial) if outer and inside else None)
                block_axis = nesting.block_axis(axis, outer.serial) if outer and outer.separate and not inside else None
                block_dim = member.block_dim if block_axis is None else block_axis.dim
                for name in self._names(axis.tensor):
                    yield replace(member, parameter=name, role=role, block_dim=block_dim)

    def _names(self, tensor: TensorRef) -> Sequence[str]:
        """What members call a tensor: one of several that a node computes goes by the nodes that pick it."""
        return (tensor.name,) if tensor.item < 0 else self._picked.get(tensor, ())

    def _pinned(self) -> Iterator[PinnedAxis]:
        tensors = (axis.tensor for axis in self._axes if isinstance(axis, AxisRef))
        used = {tensor.name: tensor for tensor in tensors if tensor.kind == "parameter"}
        aliases = OpReader(self.graph_module).parameter_names
        for name, tensor in self.graph_module.state_dict(keep_vars=True).items():
            if name in used:
                for axis in used[name].axes():
                    yield from self._pins_of(axis)
            elif tensor.ndim and aliases[id(tensor)] == name:
                reason = ONLY_IN_TRAINING if not_followed(self.graph_module) else UNUSED
                yield PinnedAxis(name, 0, tensor.shape[0], reason)

    def _pins_of(self, axis: AxisRef) -> Iterator[PinnedAxis]:
        counts: dict[str, int] = {}
        for run in self.layouts.resolve(self._axis(axis)):
            reasons = [atom.pin for atom in run.atoms if atom.size > 1]
            if reasons and all(reason is not None for reason in reasons) and NO_UNITS not in reasons:
                counts[str(reasons[0])] = counts.get(str(reasons[0]), 0) + len(run.at)
        for reason, count in sorted(counts.items()):
            yield PinnedAxis(axis.tensor.name, axis.dim, count, reason)

    def _coverage(self, groups: tuple[PermutationGroup, ...]) -> tuple[int, int]:
        grouped = {member.parameter for group in groups for member in group.members}
        sizes = {name: parameter.numel() for name, parameter in self.graph_module.named_parameters()}
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name in grouped)


def _unknown_op(op: Op) -> str:
    """What to say of an op without a rule: where it is, and the three ways out."""
    target = f"torch.{op.name}" if isinstance(op.key, str) and hasattr(torch, op.key) else repr(op.name)
    if isinstance(op.key, str) and "::" in op.key:
        target = "torch.ops." + op.key.replace("::", ".")
    elif not isinstance(op.key, str):
        target = str(getattr(op.key, "__qualname__", op.key))
    return explain(
        f"no coupling rule for {op.name}",
        node=f"{op.node.name} in {op.path or 'the top module'}",
        inputs=", ".join(str(tensor.shape) for tensor in op.inputs),
        remedy=f"register one with @surgery.rule({target}), see docs/write_a_rule.md; or name the module around it in "
        f"leaf= and write its rule; or pins={op.path or '...'!r}; or drop strict=True to pin what it touches",
    )


def _located(refs: Iterable[AxisRef | Fresh], op: str) -> tuple[AxisRef | LocalAxis, ...]:
    """References as they are known beyond the op that makes them, each once."""
    return tuple(ref if isinstance(ref, AxisRef) else LocalAxis(op, ref) for ref in dict.fromkeys(refs))


def _place(member: Member, order: Mapping[str, int]) -> tuple[object, ...]:
    return (order[member.parameter], member.dim, member.start, member.indices)


def _member(axis: AxisRef, run: Run, place: int, outer: int | None) -> Member:
    """Where the units of factor ``place`` of a run lie on the axis, inside those of factor ``outer`` if there is one.

    Listed index by index where the run is irregular, or where the outer factor is the faster one.
    """
    grid = run.grid
    first = place if outer is None else outer
    size, blocks = grid[place], 1 if outer is None else grid[outer]
    before, between = math.prod(grid[:first]), 1 if outer is None else math.prod(grid[first + 1 : place])
    name, start, inner = axis.tensor.name, int(run.at[0]), math.prod(grid[place + 1 :])
    regular = np.array_equal(run.at, np.arange(start, start + len(run.at)))
    if regular and (outer is None or outer < place):
        return Member(name, axis.dim, size, start, inner, before, (), blocks, between)
    factors = [place] if outer is None else [outer, place]
    by_unit = np.moveaxis(run.at.reshape(grid), factors, range(len(factors))).reshape(-1)
    return Member(name, axis.dim, size, start, indices=tuple(by_unit.tolist()), blocks=blocks)

"""Ties and pins of all axes of a traced model, by the rules of its ops, and their solution.

Every op's coupling rule states constraints on axes (:mod:`vfsurgery.groups.axes`); an op without a rule pins all it
touches. :class:`~vfsurgery.groups.layouts.Layouts` solves them: each axis becomes a concatenation of products of atoms.
:mod:`vfsurgery.discovery.components` makes groups of that.

Where training computes another graph than eval mode, the ops of both are read: a group holds in both modes.

Dims that hold no units, such as a kernel's height and width, are not listed among the pinned axes.
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from vfsurgery.discovery.roles import Roles
from vfsurgery.discovery.rules import rule_for
from vfsurgery.errors import SurgeryError, UnknownOpError, explain
from vfsurgery.groups import PinnedAxis
from vfsurgery.groups.axes import (
    Allows,
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
    Scales,
    Take,
    TensorRef,
    Tie,
    mentioned,
    references,
)
from vfsurgery.groups.layouts import Atom, Layout, Layouts, concat, product
from vfsurgery.tracing.dataflow import reached_by_input
from vfsurgery.tracing.modes import in_training, not_followed
from vfsurgery.tracing.ops import Op, OpReader
from vfsurgery.tracing.precision import is_inexact
from vfsurgery.tracing.selection import NO_PINS, Pinned
from vfsurgery.tracing.values import VALUE, TensorValue

NO_UNITS = "holds no units"
INPUT, OUTPUT, UNUSED = "network input", "network output", "not used in the forward"
ONLY_IN_TRAINING = "not used in eval mode, and training is not followed"
CONSTANT = "constant tensor"
WHOLE = "integers or truth values, which cannot be averaged"
UNSPOKEN = "held by a module, and not spoken of by the rule for"
UNREAD = "made in a way that is not understood"
BY_USER = "pinned by the user ({})"


@dataclass(frozen=True, slots=True)
class Said:
    """What the rule of one op says."""

    op: Op
    constraints: tuple[Constraint, ...]


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
class Unification:
    """The constraints of one traced model, and their solution.

    ``axes`` has the layout of every axis that an op speaks of, ``ties`` what each op, by its node's name, ties,
    ``mixes`` what it mixes along, and ``said`` all that rules say; ``graphs`` are what was read, ``returned`` what
    comes out. ``picked`` are the nodes that pick a tensor out of several.
    """

    graph_module: fx.GraphModule
    strict: bool = False
    pins: Pinned = NO_PINS
    layouts: Layouts = field(default_factory=Layouts)
    roles: Roles = field(default_factory=Roles)
    unknown_ops: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.axes: dict[AxisRef | LocalAxis, Layout] = {}
        self.ties: list[tuple[str, tuple[AxisRef | LocalAxis, ...]]] = []
        self.mixes: list[tuple[str, tuple[AxisRef | LocalAxis, ...]]] = []
        self._unknown_at: dict[tuple[str, str], fx.Graph] = {}
        self.said: list[Said] = []
        self.returned: set[TensorRef] = set()
        self.picked: dict[TensorRef, list[str]] = defaultdict(list)
        other = in_training(self.graph_module)
        self.graphs = [self.graph_module] if other is None else [self.graph_module, other]
        for graph_module in self.graphs:
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
                    self.picked[tensor].append(node.name)
            if node.op in ("placeholder", "output"):
                reason = INPUT if node.op == "placeholder" else OUTPUT
                self.returned.update(reader.tensors_of(node) if node.op == "output" else ())
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
            constraints = tuple(rule(op))
            self.said.append(Said(op, constraints))
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
        for axis in list(self.axes):
            if (
                isinstance(axis, AxisRef)
                and axis.tensor.kind == "parameter"
                and axis.tensor.name in self.pins.parameters
            ):
                self.layouts.pin(self.layout_of(axis), BY_USER.format(self.pins.parameters[axis.tensor.name]))

    def _constrain(self, constraint: Constraint, op: str) -> None:
        if isinstance(constraint, Tie):
            self.layouts.unify(self._layout(constraint.left, op), self._layout(constraint.right, op))
            self.ties.append((op, _located(mentioned(constraint), op)))
        elif isinstance(constraint, Mixes):
            axes = _located((ref for axis in constraint.axes for ref in references(axis)), op)
            self.mixes.append((op, tuple(axis for axis in axes if self.layout_of(axis))))
        elif isinstance(constraint, Pin):
            self.layouts.pin(self._layout(constraint.axis, op), constraint.reason)
        else:
            assert isinstance(constraint, Indifferent | Reads | Allows | Scales)

    def _layout(self, expression: Expression, op: str) -> Layout:
        match expression:
            case AxisRef():
                return self.layout_of(expression)
            case Fresh():
                return self.layout_of(LocalAxis(op, expression))
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

    def layout_of(self, axis: AxisRef | LocalAxis) -> Layout:
        layout = self.axes.get(axis)
        if layout is None:
            pinned = self._fixed(axis) if isinstance(axis, AxisRef) else None
            layout = self.axes[axis] = self.layouts.axis(axis.size, pinned)
        return layout

    def _fixed(self, axis: AxisRef) -> str | None:
        """Why an axis may not move whose values are no weights; equal ones (a blur filter's) may be reordered."""
        if axis.tensor.kind == "constant":
            tensor, reason = next(self._constants(axis.tensor.name)), CONSTANT
        elif axis.tensor.kind == "parameter" and axis.tensor.name in self._whole:
            tensor, reason = self._whole[axis.tensor.name], WHOLE
        else:
            return None
        if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel():  # no numbers to look at
            return reason
        return None if bool((tensor == tensor.narrow(axis.dim, 0, 1)).all()) else reason

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """Saved tensors of integers and truth values (masks), of which there is no mean."""
        return {name: tensor for name, tensor in self.graph_module.state_dict().items() if not is_inexact(tensor)}

    def _constants(self, name: str) -> Iterator[Tensor]:
        """The constant of that name, in each graph that has it."""
        for graph_module in self.graphs:
            with contextlib.suppress(AttributeError):
                yield operator.attrgetter(name)(graph_module)

    def _pin_rest(self, tensor: TensorRef, seen: set[AxisRef | Fresh], reason: str) -> None:
        for axis in tensor.axes():
            if axis not in seen:
                self.layouts.pin(self.layout_of(axis), reason)

    def _pin_all(self, tensor: TensorRef, reason: str) -> None:
        self._pin_rest(tensor, set(), reason)

    def atoms(self, axis: AxisRef | LocalAxis) -> list[Atom]:
        """What an axis consists of, each once; single units aside."""
        layout = self.axes[axis] = self.layouts.resolve(self.axes[axis])
        return list(dict.fromkeys(atom for run in layout for atom in run.atoms if atom.size > 1))

    def pinned_axes(self) -> Iterator[PinnedAxis]:
        """The axes of parameters that may not move, and parameters that no op reads."""
        tensors = (axis.tensor for axis in self.axes if isinstance(axis, AxisRef))
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
        for run in self.layouts.resolve(self.layout_of(axis)):
            reasons = [atom.pin for atom in run.atoms if atom.size > 1]
            if reasons and all(reason is not None for reason in reasons) and NO_UNITS not in reasons:
                counts[str(reasons[0])] = counts.get(str(reasons[0]), 0) + len(run.at)
        for reason, count in sorted(counts.items()):
            yield PinnedAxis(axis.tensor.name, axis.dim, count, reason)


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

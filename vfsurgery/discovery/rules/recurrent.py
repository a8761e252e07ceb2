"""Recurrent networks: hidden units may be reordered in all gates, states and outputs of a layer alike.

With the gates of unit ``j`` computed as ``a[g, j] = sum_i W[g, j, i] x[i] + sum_k U[g, j, k] h[k] + b[g, j]`` and the
new state of unit ``j`` from its own gates and its old state, rows of ``W``, ``U`` and ``b`` are ``gates x units``,
columns of ``U`` are units, and columns of ``W`` follow what is read: the input, or all directions of the layer before.
Time stays in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import (
    Concat,
    Constraint,
    Expression,
    Fixed,
    Fresh,
    Product,
    TensorRef,
    indifferent,
    mixes,
    reads,
    tie,
)
from vfsurgery.tracing.ops import SHAPE_QUERIES, Op, canonical_key

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
CELL_GATES = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
FILLED = ["zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]
KEPT = ["to", "requires_grad", "detach", "clone", "contiguous", "float", "double", "half", "type", "type_as", "alias"]
"""What a first state that is the same number everywhere is made by, and what leaves it so."""


@rule(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(op: Op) -> Iterator[Constraint]:
    """Layer by layer, each direction with hidden units of its own; with ``proj_size`` the state is a projection.

    Where first states are given or last states are used, which hold all layers and directions in one tensor, all of
    them share one order; but not for first states that are the same number everywhere.
    """
    module = op.module
    assert isinstance(module, nn.RNNBase)
    if op.input.ndim != 3:
        return
    given = _states(op)
    filled = all(_is_filled(node) for node in _state_nodes(op))
    one_order = _uses_last_states(op) or not filled
    read: Expression = op.input.axis(-1)
    for layer in range(module.num_layers):
        states: list[Expression] = []
        for direction in range(1 + module.bidirectional):
            suffix = f"l{layer}" + "_reverse" * direction
            name = "" if one_order else f" {suffix}"
            cell = Fresh(f"unit{name}", module.hidden_size)
            state = Fresh(f"projection{name}", module.proj_size) if module.proj_size else cell
            yield from _direction(op, suffix, read, cell, state)
            states.append(state)
        read = Concat(tuple(states)) if len(states) > 1 else states[0]
    output, *last = op.outputs
    yield tie(output.axis(-1), read)
    batch = 0 if module.batch_first else 1
    yield tie(op.input.axis(batch), output.axis(batch))
    for place, tensor in (*enumerate(given), *enumerate(last)):  # the state, and of an LSTM the cells too
        if not one_order:
            yield from map(indifferent, tensor.axes())
            continue
        yield tie(tensor.axis(1), op.input.axis(batch))
        projected = bool(module.proj_size) and place == 0
        size = module.proj_size if projected else module.hidden_size
        yield tie(tensor.axis(-1), Fresh("projection" if projected else "unit", size))


@rule(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def recurrent_cell(op: Op) -> Iterator[Constraint]:
    """One step of one layer: ``(batch, units)`` states go in, or none for zeros, and come out."""
    units = op.outputs[0].axis(-1)
    gates = CELL_GATES[type(op.module)]  # type: ignore[index]
    rows = Product((Fixed(gates, "gates"), units)) if gates > 1 else units
    for name, read in (("weight_ih", op.input.axis(-1)), ("weight_hh", units)):
        weight = op.parameters[name]
        yield tie(weight.axis(0), rows)
        yield tie(weight.axis(1), read)
        yield reads(weight.axis(1))
        yield mixes(read)
    for name in ("bias_ih", "bias_hh"):
        if name in op.parameters:
            yield tie(op.parameters[name].axis(0), rows)
    for state in (*_states(op), *op.outputs[1:]):
        yield tie(state.axis(-1), units)
    for tensor in (op.input, *_states(op), *op.outputs[1:]):
        if tensor.ndim == 2:
            yield tie(tensor.axis(0), op.output.axis(0))


def _direction(op: Op, suffix: str, read: Expression, cell: Fresh, state: Fresh) -> Iterator[Constraint]:
    module = op.module
    assert isinstance(module, nn.RNNBase)
    gates = GATES[module.mode]
    rows = Product((Fixed(gates, "gates"), cell)) if gates > 1 else cell
    for name, columns in (("ih", read), ("hh", state)):
        weight = op.parameters[f"weight_{name}_{suffix}"]
        yield tie(weight.axis(0), rows)
        yield tie(weight.axis(1), columns)
        yield reads(weight.axis(1))
        yield mixes(columns)  # each unit of the cell sums over them
    if module.bias:
        yield tie(op.parameters[f"bias_ih_{suffix}"].axis(0), rows)
        yield tie(op.parameters[f"bias_hh_{suffix}"].axis(0), rows)
    if module.proj_size:
        weight = op.parameters[f"weight_hr_{suffix}"]
        yield tie(weight.axis(0), state)
        yield tie(weight.axis(1), cell)
        yield reads(weight.axis(1))
        yield mixes(cell)


def _states(op: Op) -> tuple[TensorRef, ...]:
    """The first states that are given: the state, and of an LSTM the cells too."""
    given: Any = op.args[1] if len(op.args) > 1 else op.kwargs.get("hx")
    return tuple(x for x in (given if isinstance(given, tuple | list) else (given,)) if isinstance(x, TensorRef))


def _state_nodes(op: Op) -> tuple[fx.Node, ...]:
    given: Any = op.node.args[1] if len(op.node.args) > 1 else op.node.kwargs.get("hx")
    return tuple(x for x in (given if isinstance(given, tuple | list) else (given,)) if isinstance(x, fx.Node))


def _is_filled(node: fx.Node) -> bool:
    """Whether a value is one number everywhere: made so, and seen by nobody who could write into it."""
    key = _key(node)
    harmless = all(user.op == "call_module" or _key(user) in (*KEPT, *SHAPE_QUERIES) for user in node.users)
    if key in KEPT and isinstance(node.args[0], fx.Node):
        return harmless and _is_filled(node.args[0])
    return harmless and key in FILLED


def _key(node: fx.Node) -> Any:
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.args[1] if node.target is getattr else canonical_key(node.target)


def _uses_last_states(op: Op) -> bool:
    """Whether anything but the sequence of outputs is read."""
    for user in op.node.users:
        first = user.target is operator.getitem and user.args[1] == 0
        if not first and (user.users or user.target is not operator.getitem):
            return True
    return False

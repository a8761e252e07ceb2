"""Recurrent networks: hidden units may be reordered in all gates, states and outputs of a layer alike.

With the gates of unit ``j`` computed as ``a[g, j] = sum_i W[g, j, i] x[i] + sum_k U[g, j, k] h[k] + b[g, j]`` and the
new state of unit ``j`` from its own gates and its old state, rows of ``W``, ``U`` and ``b`` are ``gates x units``,
columns of ``U`` are units, and columns of ``W`` follow what is read: the input, or all directions of the layer before.
Time stays in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import nn

from vfsurgery.groups.axes import Concat, Constraint, Expression, Fixed, Fresh, Product, indifferent, mixes, reads, tie
from vfsurgery.rules.registry import rule
from vfsurgery.tracing.ops import Op

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


@rule(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(op: Op) -> Iterator[Constraint]:
    """Layer by layer, each direction with hidden units of its own; with ``proj_size`` the state is a projection.

    Where the last states are used, which hold all layers and directions in one tensor, all of them share one order.
    Given first states are not described: their dims are pinned, and nothing may move.
    """
    module = op.module
    assert isinstance(module, nn.RNNBase)
    if len(op.inputs) > 1 or op.input.ndim != 3:
        return
    one_order = _uses_last_states(op)
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
    for place, tensor in enumerate(last):  # the state, and of an LSTM the cells too
        if not one_order:
            yield from map(indifferent, tensor.axes())
            continue
        yield tie(tensor.axis(1), op.input.axis(batch))
        size = module.proj_size if module.proj_size and place == 0 else module.hidden_size
        yield tie(tensor.axis(-1), Fresh("unit" if size == module.hidden_size else "projection", size))


def _direction(op: Op, suffix: str, read: Expression, cell: Fresh, state: Fresh) -> Iterator[Constraint]:
    module = op.module
    assert isinstance(module, nn.RNNBase)
    gates = GATES[module.mode]
    rows = Product((Fixed(gates, "gates"), cell)) if gates > 1 else cell
    yield tie(op.parameters[f"weight_ih_{suffix}"].axis(0), rows)
    yield tie(op.parameters[f"weight_ih_{suffix}"].axis(1), read)
    yield tie(op.parameters[f"weight_hh_{suffix}"].axis(0), rows)
    yield tie(op.parameters[f"weight_hh_{suffix}"].axis(1), state)
    for name in ("ih", "hh"):
        yield reads(op.parameters[f"weight_{name}_{suffix}"].axis(1))
    yield from (mixes(units) for units in (read, state))  # sums over them, at each unit of the cell
    if module.bias:
        yield tie(op.parameters[f"bias_ih_{suffix}"].axis(0), rows)
        yield tie(op.parameters[f"bias_hh_{suffix}"].axis(0), rows)
    if module.proj_size:
        yield tie(op.parameters[f"weight_hr_{suffix}"].axis(0), state)
        yield tie(op.parameters[f"weight_hr_{suffix}"].axis(1), cell)
        yield reads(op.parameters[f"weight_hr_{suffix}"].axis(1))


def _uses_last_states(op: Op) -> bool:
    """Whether anything but the sequence of outputs is read."""
    for user in op.node.users:
        first = user.target is operator.getitem and user.args[1] == 0
        if not first and (user.users or user.target is not operator.getitem):
            return True
    return False

"""Shapes beside the nodes of a graph after it was edited: one run without data."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.values import VALUE, TensorValue, abstract

UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What a run without data raises where a value decides."""


class _Shapes(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        if n.op != "output":
            n.meta[VALUE] = abstract(value)
        return value


def renew_values(graph_module: fx.GraphModule) -> fx.Node | None:
    """Compute the abstract value of every node from those of the inputs; nothing is run on data, no state changes.

    Where that cannot be done (the inputs have no values, or an op looks at numbers), nodes keep what they have.

    Returns:
        The node at which the graph cannot run, because shapes do not fit or a target is not there; ``None`` if it can.
    """
    given = [node.meta.get(VALUE) for node in graph_module.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(value, TensorValue) for value in given):
        return None
    device = next((tensor.device for tensor in graph_module.parameters()), torch.device("cpu"))
    runner = _Shapes(graph_module)
    with _evaluating(graph_module), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(value.shape, dtype=value.dtype, device=device) for value in given]
        try:
            runner.run(*inputs)
        except UNKNOWABLE:
            return None
        except Exception:
            return runner.current
    return None


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    modes = [(each, each.training) for each in module.modules()]
    try:
        set_mode(module, False)
        yield
    finally:
        for each, training in modes:
            each.training = training

"""How a model becomes the graph that its groups are found in: which modules stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from vfsurgery.rules import ruled_modules
from vfsurgery.tracing.selection import Leaf, leaf_paths
from vfsurgery.tracing.tracer import trace_module


def record(model: nn.Module, inputs: tuple[Tensor, ...], leaf: Leaf | Sequence[Leaf] = ()) -> fx.GraphModule:
    """Trace a model; the modules that ``leaf`` chooses, and those whose class has a coupling rule, stay single nodes.

    Raises:
        TraceError: the forward cannot be recorded.
        OptionError: an entry of ``leaf`` matches nothing.
    """
    return trace_module(model, inputs, leaf_paths(model, leaf) | ruled_modules(model))

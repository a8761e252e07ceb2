"""How a model becomes the graph that its groups are found in: by which tracer, and which modules stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from vfsurgery.discovery.rules import ruled_modules
from vfsurgery.errors import TraceError
from vfsurgery.tracing.exported import export_module, first_line, is_exported
from vfsurgery.tracing.hooks import has_hooks
from vfsurgery.tracing.modes import trace_module
from vfsurgery.tracing.ops import OpReader
from vfsurgery.tracing.selection import Leaf, leaf_paths, listed


def record(model: nn.Module, inputs: tuple[Tensor, ...], leaf: Leaf | Sequence[Leaf] = ()) -> fx.GraphModule:
    """Trace a model; the modules that ``leaf`` chooses, and those whose class has a coupling rule, stay single nodes.

    Raises:
        TraceError: the forward cannot be recorded.
        OptionError: an entry of ``leaf`` matches nothing.
    """
    return trace_module(model, inputs, leaf_paths(model, leaf) | ruled_modules(model))


def record_or_export(model: nn.Module, inputs: tuple[Tensor, ...], leaf: Leaf | Sequence[Leaf] = ()) -> fx.GraphModule:
    """Trace a model, or export it where tracing fails; with ``leaf`` or hooks, which an export cannot heed, only trace.

    Raises:
        TraceError: the forward can be recorded by neither.
        OptionError: an entry of ``leaf`` matches nothing.
    """
    try:
        return record(model, inputs, leaf)
    except TraceError as error:
        if listed(leaf) or has_hooks(model):
            raise
        try:
            return export_module(model, inputs, first_line(error))
        except TraceError as other:
            raise TraceError(f"{error}\n{other}") from error


def hidden_norms(graph_module: fx.GraphModule) -> list[str]:
    """Paths of modules in an exported graph that normalize over the batch but are no BatchNorm node of it."""
    if not is_exported(graph_module):
        return []
    return sorted({op.path or op.node.name for op in OpReader(graph_module) if op.key == "batch_norm"})

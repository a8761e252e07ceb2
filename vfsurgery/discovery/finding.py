"""What users ask of one model: its graph and its permutation groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from vfsurgery.discovery import discover
from vfsurgery.discovery.partial import find_partly
from vfsurgery.discovery.recording import record, record_or_export
from vfsurgery.errors import OptionError, TraceError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of
from vfsurgery.tracing.selection import Leaf, listed
from vfsurgery.tracing.wrappers import network


def trace(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, leaf: Leaf | Sequence[Leaf] = ()
) -> fx.GraphModule:
    """Record a model's forward as a graph that shares the model's modules and parameters.

    Args:
        model: Any torchvision or timm model, or your own. It is not run and not changed.
        example_inputs: One tensor per positional argument of the forward; by default images of the size that timm's or
            torchvision's configuration names. Only shapes and dtypes matter.
        leaf: Modules to keep as one node each: classes, module paths, or patterns of paths as in ``"blocks.*.attn"``.
            torch's own modules, and those of a class that has a coupling rule, are kept so anyway.

    Returns:
        A graph module with the model's ``state_dict`` keys, that works in training and in eval mode and for any batch
        size. What the example's shape decided is listed in ``graph_module.meta["guards"]``, and what training computes
        otherwise than eval mode, if that is more than arguments of calls: then the graph is that of eval mode.

    Raises:
        ExampleInputError: no example input is given and the model says nothing.
        TraceError: the forward cannot be recorded; names the module and the line.
        HookError: a forward hook cannot be followed; names it, its module, and the way out.
        OptionError: an entry of ``leaf`` matches nothing.

    >>> import torch
    >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    >>> [node.name for node in graph.graph.nodes]
    ['input_1', '_0', '_1', '_2', 'output']
    """
    model = network(model)
    return record(model, example_inputs_of(model, example_inputs), leaf)


def find_groups(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    leaf: Leaf | Sequence[Leaf] = (),
    pins: str | Sequence[str] = (),
    strict: bool = False,
) -> GroupSet:
    """Find all sets of weight axes that must be permuted together.

    Args:
        model: As for :func:`trace`; a graph module from :func:`trace` is taken as it is. What ``trace`` cannot
            record is analysed through ``torch.export``, and what that cannot record either (detection models) in parts:
            what crosses the border of a part is pinned, and so are weights outside of all parts.
        example_inputs: As for :func:`trace`.
        leaf: As for :func:`trace`. A module kept whole needs a coupling rule for its class, or it is an unknown op.
        pins: What must not move: module paths, names of parameters or buffers, or patterns of either. For a module, all
            its parameters and all activations inside it are pinned; an unknown op there counts as settled.
        strict: Raise at an op without a coupling rule; otherwise all that it touches is pinned, and it is named in the
            result's ``unknown_ops``.

    Raises:
        UnknownOpError: under ``strict``.
        TraceError: no part of the model can be recorded; under ``strict``, or with ``leaf``, not all of it.
        OptionError: an entry of ``leaf`` or ``pins`` matches nothing.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(find_groups(net, torch.randn(2, 4)).groups[0])
    g0 (0, 8 units)
    >>> print(find_groups(net, torch.randn(2, 4), pins="2").pinned[0])
    0.weight[0] x8: pinned by the user (2)
    """
    if isinstance(model, fx.GraphModule) and "guards" in model.meta:
        if leaf:
            raise OptionError(
                explain("leaf= came too late: the model is traced", remedy="surgery.trace(..., leaf=...)")
            )
        return discover(model, strict=strict, pins=pins)
    model = network(model)
    inputs = example_inputs_of(model, example_inputs)
    try:
        graph_module = record_or_export(model, inputs, leaf)
    except TraceError as error:
        if strict or listed(leaf):
            raise
        return find_partly(model, inputs, error, pins)
    return discover(graph_module, strict=strict, pins=pins)

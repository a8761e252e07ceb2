"""Whether a model's own forward still computes what its graph does after passes have edited the graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from vfsurgery.tracing.unhooked import is_twin


def fits(model: nn.Module, graph_module: fx.GraphModule, recorded: fx.GraphModule) -> bool:
    """Whether all that passes did to ``graph_module`` is in ``model`` too: they changed tensors, and no structure.

    Args:
        model: A copy of the model, with which ``graph_module`` shares modules and tensors.
        graph_module: Its graph, after passes.
        recorded: The trace of the model, as it was.

    >>> import torch
    >>> from vfsurgery import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> graph_module, recorded = trace(model, torch.randn(2, 4)), trace(model, torch.randn(2, 4))
    >>> fits(model, graph_module, recorded)
    True
    >>> graph_module.add_module("0", nn.Linear(4, 8))
    >>> fits(model, graph_module, recorded)
    False
    """
    before, after = list(recorded.graph.nodes), list(graph_module.graph.nodes)
    if len(before) != len(after):
        return False
    partner: dict[fx.Node, fx.Node] = {}
    for mine, theirs in zip(after, before, strict=True):
        arguments = map_arg((mine.args, dict(mine.kwargs)), lambda node: partner.get(node, node))
        same = mine.op == theirs.op and mine.target == theirs.target
        if not same or arguments != (theirs.args, dict(theirs.kwargs)):
            return False
        if mine.op in ("call_module", "get_attr"):
            found = _member(graph_module, str(mine.target))
            if not is_twin(found, _member(model, str(mine.target), _member(recorded, str(mine.target)))):
                return False
        partner[mine] = theirs
    return True


def _member(root: nn.Module, path: str, otherwise: Any = None) -> Any:
    """A module or tensor by its path; what only the trace has (constants of the forward) is no part of the model."""
    try:
        return operator.attrgetter(path)(root)
    except AttributeError:
        return otherwise

"""A recorded graph over a model's own modules, parameters and buffers."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from vfsurgery.tracing.unhooked import is_twin, without_hooks


def put_over(model: nn.Module, graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over another model of the same structure, sharing that model's modules and tensors."""
    graph = fx.Graph(tracer_cls=fx.Tracer)
    graph.output(graph.graph_copy(graph_module.graph, val_map={}))
    copied = put_over_model(model, graph_module, graph)
    for mine, theirs in zip(copied.graph.nodes, graph_module.graph.nodes, strict=True):
        mine.meta = dict(theirs.meta)
    copied.meta = dict(graph_module.meta)
    return copied


def put_over_model(model: nn.Module, fallback: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Put the graph over the model's own modules, parameters and buffers, and keep those that it does not use.

    What only the trace has (tensor constants, modules that follow the mode) comes from ``fallback``. Where a module has
    hooks, which are nodes of the graph, a twin without them takes its place.
    """
    members: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            try:
                member = operator.attrgetter(node.target)(model)
            except AttributeError:
                member = operator.attrgetter(node.target)(fallback)
            members[node.target] = without_hooks(member) if isinstance(member, nn.Module) else member
    graph_module = fx.GraphModule(members, graph, type(model).__name__)
    known = model.state_dict(keep_vars=True)
    for path, module in graph_module.named_modules():
        for name in module._buffers:  # constants of the forward are no state
            if (f"{path}.{name}" if path else name) not in known:
                module._non_persistent_buffers_set.add(name)
    _mirror(graph_module, model)
    graph_module.training = model.training
    return graph_module


def _mirror(module: nn.Module, model: nn.Module) -> None:
    """Give ``module`` all children, parameters and buffers of ``model`` in its order; what it has more stays behind."""
    for name, tensor in model._parameters.items():
        module.register_parameter(name, tensor)
    for name, tensor in model._buffers.items():
        module.register_buffer(name, tensor, persistent=name not in model._non_persistent_buffers_set)
    extra = {name: child for name, child in module._modules.items() if name not in model._modules}
    present = dict(module._modules)
    module._modules.clear()
    for name, child in model._modules.items():
        mine = present.get(name)
        if child is not None and type(mine) is nn.Module:  # a container that fx made for the children it needs
            _mirror(mine, child)
            mine.training = child.training
        module._modules[name] = mine if type(mine) is nn.Module or is_twin(mine, child) else child
    module._modules.update(extra)

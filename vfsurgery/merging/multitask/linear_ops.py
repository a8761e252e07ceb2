"""All linear ops of a graph whose weights come from parameters alone, and which parameters other ops read.

A weight need not be a parameter itself: packed projections are cut, biases put together, kernels standardized. So
everything that is computed of parameters alone is computed once for each model, and an op's weight is what comes out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.stats.inputs import PRODUCTS, SIGNATURES
from vfsurgery.tracing.ops import canonical_key, canonical_parameters

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SETTINGS = ("stride", "padding", "dilation", "groups")
DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class LinearOp:
    """One op ``y = W x + b``, a convolution where it has a kernel.

    ``input``, ``weight`` and ``bias`` are nodes; of a module, ``weight`` and ``bias`` are names instead. ``turned`` is
    set where the weight is stored as ``(inputs, units)``. ``settings`` are those of a convolution.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node | str
    bias: fx.Node | str | None
    turned: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def is_convolution(self) -> bool:
        """Whether it slides over pixels."""
        return bool(self.settings)


class Computed:
    """What nodes compute of parameters and buffers alone, for any of several models."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.names = {**{id(b): name for name, b in graph_module.named_buffers()}, **canonical_parameters(graph_module)}
        self.behind: dict[fx.Node, frozenset[str]] = {}
        for node in graph_module.graph.nodes:
            names = self._behind(node)
            if names is not None:
                self.behind[node] = names

    def _behind(self, node: fx.Node) -> frozenset[str] | None:
        """Names of the tensors that a node is computed of; ``None`` if the input has a part in it."""
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.graph_module)
            return frozenset({self.names.get(id(value), str(node.target))}) if isinstance(value, Tensor) else None
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not inputs:
            return None
        return frozenset().union(*(self.behind[x] for x in inputs)) if all(x in self.behind for x in inputs) else None

    @torch.no_grad()
    def values(self, state: Mapping[str, Tensor]) -> dict[fx.Node | str, Tensor]:
        """By node, and by name, what a model with these tensors computes; what ``state`` lacks is the graph's own."""
        own = self.graph_module.state_dict(keep_vars=True)
        found: dict[Any, Any] = {name: state.get(self.names.get(id(t), name), t).detach() for name, t in own.items()}
        for node in self.behind:  # all, in order: some write into others
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.graph_module)
                found[node] = state.get(self.names.get(id(value), ""), value).detach()
                continue
            args, kwargs = map_arg((node.args, dict(node.kwargs)), found.__getitem__)
            if node.op == "call_function":
                found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                found[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return found


def linear_ops(graph_module: fx.GraphModule, computed: Computed) -> Iterator[LinearOp]:
    """All of them, in order: linear layers and convolutions, as modules or functions, and products with a matrix."""
    for node in graph_module.graph.nodes:
        found = _of_module(node, graph_module, computed) if node.op == "call_module" else _of_call(node, computed)
        if found is not None:
            yield found


def _of_module(node: fx.Node, graph_module: fx.GraphModule, computed: Computed) -> LinearOp | None:
    module = graph_module.get_submodule(str(node.target))
    kinds = (nn.Linear, *CONVOLUTIONS)
    kind = next((kind for kind in kinds if isinstance(module, kind) and type(module).forward is kind.forward), None)
    if kind is None or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if id(weight) not in computed.names:  # computed by a hook or a parametrization
        return None
    settings: dict[str, Any] = {}
    if kind in CONVOLUTIONS:
        settings = {name: getattr(module, name) for name in SETTINGS}
        if module.padding_mode != "zeros":
            settings |= {
                "pad": tuple(cast("list[int]", module._reversed_padding_repeated_twice)),
                "mode": module.padding_mode,
                "padding": 0,
            }
    return LinearOp(
        node,
        node.args[0],  # type: ignore[arg-type]
        computed.names[id(weight)],
        None if bias is None else computed.names[id(bias)],
        settings=settings,
    )


def _of_call(node: fx.Node, computed: Computed) -> LinearOp | None:
    key = canonical_key(node.target) if node.op in ("call_function", "call_method") else None
    key = {"__matmul__": "matmul"}.get(key, key) if isinstance(key, str) else None
    signature = SIGNATURES.get(key or "")
    if signature is None or "transpose" in str(key):
        return None
    given = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
    given |= {"weight": given.get("weight", given.get("other", given.get("mat2")))}
    data, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if node in computed.behind or not isinstance(data, fx.Node) or data in computed.behind:
        return None
    if not isinstance(weight, fx.Node) or weight not in computed.behind or "alpha" in given or "beta" in given:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias not in computed.behind):
        return None
    convolves = str(key).startswith("conv")
    settings = {name: given.get(name, DEFAULTS[name]) for name in SETTINGS} if convolves else {}
    return LinearOp(node, data, weight, bias, key in PRODUCTS, settings)


def read_elsewhere(graph_module: fx.GraphModule, computed: Computed, ops: Mapping[fx.Node, LinearOp]) -> dict[str, str]:
    """Names of parameters and buffers that something else reads than linear ops as weight or bias, and what does."""
    found: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node in computed.behind:
            continue
        op = ops.get(node)
        if node.op == "call_module" and op is None:
            module = graph_module.get_submodule(str(node.target))
            for tensor in (*module.parameters(), *module.buffers()):
                found.setdefault(computed.names.get(id(tensor), ""), f"{node.target} ({type(module).__name__})")
        for value in node.all_input_nodes:
            if value in computed.behind and (op is None or value not in (op.weight, op.bias)):
                kind = canonical_key(node.target) if node.op != "output" else "output"
                for name in computed.behind[value]:
                    found.setdefault(name, f"{node.name} ({getattr(kind, '__name__', kind)})")
    return found

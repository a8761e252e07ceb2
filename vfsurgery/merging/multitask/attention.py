"""``nn.MultiheadAttention`` taken apart into the linear layers that it is made of.

It computes with the weights of its projections and never calls the layer that holds the last one, so nothing can be
put behind these. The parts are nodes of their own here, over the very same parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from vfsurgery.tracing.values import VALUE, TensorValue

SIGNATURE = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
NAMES = ("q", "k", "v")


def take_apart(graph_module: fx.GraphModule) -> dict[str, str]:
    """Replace calls of ``nn.MultiheadAttention`` by projections and ``F.scaled_dot_product_attention``, in place.

    Dropout of attention weights, which acts in training alone, is left out.

    Returns:
        By path of the modules that stay whole, why: masks, weights of attention that are read, biases of keys.
    """
    whole: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, nn.MultiheadAttention):
            continue
        given = {**dict(zip(SIGNATURE, node.args, strict=False)), **node.kwargs}
        reason = _stays_whole(node, module, given)
        if reason is not None:
            whole[str(node.target)] = reason
            continue
        with graph_module.graph.inserting_before(node):
            result = _parts(graph_module.graph, str(node.target), module, [given[name] for name in SIGNATURE[:3]])
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(result)
            graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)
    return whole


def _stays_whole(node: fx.Node, module: nn.MultiheadAttention, given: dict[str, Any]) -> str | None:
    query = given["query"].meta.get(VALUE) if isinstance(given.get("query"), fx.Node) else None
    if not isinstance(query, TensorValue) or len(query.shape) != 3:
        return "attention over inputs without a batch"
    if given.get("key_padding_mask") is not None or given.get("attn_mask") is not None or given.get("is_causal"):
        return "attention with a mask"
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with keys of its own"
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] not in (0, 1) or (user.args[1] == 1 and user.users):
            return "attention whose weights are read"
    return None


def _parts(graph: fx.Graph, path: str, module: nn.MultiheadAttention, inputs: Sequence[fx.Node]) -> fx.Node:
    """Nodes for a call: ``inputs`` are query, key and value, ``(batch, tokens, units)`` or the first two swapped."""

    def call(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(function, args, kwargs)

    def chunks(node: fx.Node, dim: int) -> list[fx.Node]:
        parts = call(torch.chunk, node, 3, dim)
        return [call(operator.getitem, parts, place) for place in range(3)]

    packed = getattr(module, "in_proj_bias", None) is not None
    if module._qkv_same_embed_dim and all(each is inputs[0] for each in inputs):
        bias = graph.get_attr(f"{path}.in_proj_bias") if packed else None
        together = call(functional.linear, inputs[0], graph.get_attr(f"{path}.in_proj_weight"), bias)
        projected = chunks(together, -1)
    else:
        if module._qkv_same_embed_dim:
            weights = chunks(graph.get_attr(f"{path}.in_proj_weight"), 0)
        else:
            weights = [graph.get_attr(f"{path}.{name}_proj_weight") for name in NAMES]
        biases = chunks(graph.get_attr(f"{path}.in_proj_bias"), 0) if packed else [None] * 3
        projected = [call(functional.linear, *each) for each in zip(inputs, weights, biases, strict=True)]
    apart, together_again = ((0, 2, 1, 3), (0, 2, 1, 3)) if module.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    heads = [call(torch.permute, call(torch.unflatten, x, -1, (module.num_heads, -1)), apart) for x in projected]
    attended = call(functional.scaled_dot_product_attention, *heads)
    joined = call(torch.flatten, call(torch.permute, attended, together_again), 2)
    joined.meta = dict(inputs[0].meta)  # of the same shape
    last = graph.get_attr(f"{path}.out_proj.weight")
    bias = graph.get_attr(f"{path}.out_proj.bias") if getattr(module.out_proj, "bias", None) is not None else None
    return call(functional.linear, joined, last, bias)

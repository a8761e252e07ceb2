"""Attention: the units inside a head (``d_qk`` of queries and keys, ``d_v`` of values) form groups of their own.

Whole heads are another one, and positions are the tokens of the operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vfsurgery.discovery.rules.contraction import align
from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import (
    AxisRef,
    Concat,
    Constraint,
    Expression,
    Fixed,
    Fresh,
    Product,
    TensorRef,
    allows,
    contract,
    mixes,
    pin,
    reads,
    tie,
)
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Iterator[Constraint]:
    """``softmax(q k^T + mask) v``; with fewer heads of k and v each of them serves a run of query heads (GQA)."""
    names = ("query", "key", "value")
    q, k, v = (op.param(name, place) for place, name in enumerate(names))
    assert q is not None and k is not None and v is not None
    y, mask = op.output, op.param("attn_mask", 3)
    yield contract(q.axis(-1), k.axis(-1))
    yield tie(v.axis(-1), y.axis(-1))
    yield allows(Symmetry.GENERAL_LINEAR, v.axis(-1))
    yield tie(k.axis(-2), v.axis(-2))
    yield tie(q.axis(-2), y.axis(-2))
    yield from align(q.axes()[:-2], y.axes()[:-2])
    for operand in (k, v):
        mine, theirs = operand.axes()[:-2], y.axes()[:-2]
        if op.argument("enable_gqa", 99, False) and mine[-1].size != theirs[-1].size:
            copies = Fresh("query heads per key head", theirs[-1].size // mine[-1].size)
            yield tie(theirs[-1], Product((mine[-1], copies)))
            mine, theirs = mine[:-1], theirs[:-1]
        yield from align(mine, theirs)
    if op.argument("is_causal", 5, False):
        yield from (pin(x.axis(-2), "a causal mask") for x in (q, k))
    if mask is not None:
        yield from align(mask.axes(), (*y.axes()[:-2], q.axis(-2), k.axis(-2)))


@rule(nn.MultiheadAttention)
def multihead_attention(op: Op) -> Iterator[Constraint]:
    """Packed or separate projections; rows of q, k and v are ``heads x d``, columns of the output projection follow v.

    ``bias_k`` and ``bias_v`` are a token of k and v units. A mask for each head holds the heads where they are, and so
    do weights for each head that are returned and used.
    """
    module = op.module
    assert isinstance(module, nn.MultiheadAttention)
    arguments = dict(zip(_FORWARD, op.args, strict=False)) | op.kwargs
    yield from _Attention(op, module.num_heads, module.batch_first, module.add_zero_attn, op.parameters, arguments)()


@rule("multi_head_attention_forward")
def functional_multihead_attention(op: Op) -> Iterator[Constraint]:
    """As the module, weights given as arguments; tokens come first."""
    arguments = dict(zip(_FUNCTION.split(), op.args, strict=False)) | op.kwargs
    weights = {name.replace("out_proj_", "out_proj."): x for name, x in arguments.items() if isinstance(x, TensorRef)}
    zero, heads = bool(arguments["add_zero_attn"]), int(arguments["num_heads"])
    if not any(name.startswith("static") for name in weights):
        yield from _Attention(op, heads, False, zero, weights, arguments)()


_QKV = ("query", "key", "value")
_FORWARD = (*_QKV, "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_FUNCTION = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
)
"""The arguments of ``F.multi_head_attention_forward``, in order."""


@dataclass(frozen=True)
class _Attention:
    """One call: projections to ``heads x d`` units, attention inside each head, a projection of all heads' values."""

    op: Op
    heads: int
    batch_first: bool
    zero_token: bool
    weights: Mapping[str, TensorRef]
    arguments: Mapping[str, Any]

    def __call__(self) -> Iterator[Constraint]:
        q, k, v = (self.arguments[name] for name in _QKV)
        y = self.op.output
        rows = self.weights["out_proj.weight"].shape[1]
        heads = Fresh("head", self.heads)
        queried, keyed, valued = (Fresh(name, rows // self.heads) for name in ("query", "key", "value"))
        yield contract(queried, keyed)
        yield allows(Symmetry.GENERAL_LINEAR, valued, y.axis(-1))
        query, key, value = (Product((heads, inner)) for inner in (queried, keyed, valued))
        yield from self._projections((q, k, v), (query, key, value))
        for name, axis in (("bias_k", key), ("bias_v", value)):
            if name in self.weights:
                yield tie(self.weights[name].axis(-1), axis)
        output = self.weights["out_proj.weight"]
        yield contract(output.axis(1), value)
        yield reads(output.axis(1))
        yield tie(output.axis(0), y.axis(-1))
        if "out_proj.bias" in self.weights:
            yield tie(self.weights["out_proj.bias"].axis(0), y.axis(-1))
        batched = y.ndim == 3
        tokens, batch = (1, 0) if self.batch_first and batched else (0, 1)
        if batched:
            yield from (tie(x.axis(batch), y.axis(batch)) for x in (q, k, v))
        yield tie(q.axis(tokens), y.axis(tokens))
        yield tie(k.axis(tokens), v.axis(tokens))
        yield from self._between_tokens(q.axis(tokens), k.axis(tokens), y.axis(batch) if batched else None, heads)

    def _projections(self, given: Sequence[TensorRef], rows: Sequence[Expression]) -> Iterator[Constraint]:
        """Each of them sums over all units of its input, which no value shows that has units of heads, too."""
        packed, bias = self.weights.get("in_proj_weight"), self.weights.get("in_proj_bias")
        if packed is not None:
            yield tie(packed.axis(0), Concat(tuple(rows)))
        for name, x, row in zip(_QKV, given, rows, strict=True):
            weight = packed
            if weight is None:
                weight = self.weights[f"{name[0]}_proj_weight"]
                yield tie(weight.axis(0), row)
            yield contract(weight.axis(1), x.axis(-1))
            yield mixes(x.axis(-1))
        if bias is not None:
            yield tie(bias.axis(0), Concat(tuple(rows)))

    def _between_tokens(
        self, queries: AxisRef, keys: AxisRef, batch: AxisRef | None, heads: Expression
    ) -> Iterator[Constraint]:
        """Masks, and the weights that are returned: ``(queries, keys)`` for each image, or for each of its heads."""
        if self.arguments.get("is_causal"):
            yield pin(queries, "a causal mask")
            yield pin(keys, "a causal mask")
        added = ("bias_k" in self.weights) + self.zero_token
        columns = Concat((keys, Fixed(added, "added tokens"))) if added else keys
        mask, padding = self.arguments.get("attn_mask"), self.arguments.get("key_padding_mask")
        if isinstance(mask, TensorRef):
            yield tie(mask.axis(-1), keys)
            yield tie(mask.axis(-2), queries)
            if mask.ndim == 3:
                yield tie(mask.axis(0), heads if batch is None else Product((batch, heads)))
        if isinstance(padding, TensorRef):
            yield tie(padding.axis(-1), keys)
            if batch is not None:
                yield tie(padding.axis(0), batch)
        for weights in self.op.outputs[1:]:
            if not weights.shape or 0 in weights.shape:  # the fused kernel has none to give
                continue
            expected: list[Expression] = [columns, queries]
            if not self.arguments.get("average_attn_weights", True):
                expected.append(heads)
            if batch is not None:
                expected.append(batch)
            for axis, expression in zip(reversed(weights.axes()), expected, strict=True):
                yield tie(axis, expression)

"""Contractions of two activations, and attention, which is built from them.

Of ``y[..., m, n] = sum_k a[..., m, k] b[..., k, n]`` the contracted index may be reordered when both operands follow,
the others pass through. Attention follows from that: the units inside a head (``d_qk`` of queries and keys, ``d_v`` of
values) form groups of their own, whole heads another one, and positions are the tokens of the operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from torch import nn

from vfsurgery.groups.axes import AxisRef, Concat, Constraint, Expression, Fresh, Product, TensorRef, tie
from vfsurgery.rules.registry import rule
from vfsurgery.tracing.ops import Op


@rule("matmul", "bmm", "mm", "mv", "dot")
def matrix_product(op: Op) -> Iterator[Constraint]:
    """``y[..., m, n] = sum_k a[..., m, k] b[..., k, n]``; a vector on either side has only the contracted dim."""
    yield from _matrix_product(op.inputs[-2], op.inputs[-1], op.output)


@rule("baddbmm", "addmm", "addbmm")
def added_matrix_product(op: Op) -> Iterator[Constraint]:
    """A matrix product and a summand that broadcasts against it."""
    yield from _broadcast(op.input, op.output)
    if op.key != "addbmm":  # which sums over the batch too: what is not said here is pinned
        yield from _matrix_product(op.inputs[1], op.inputs[2], op.output)


def _matrix_product(a: TensorRef, b: TensorRef, y: TensorRef) -> Iterator[Constraint]:
    yield tie(a.axis(-1), b.axis(-2 if b.ndim > 1 else -1))
    rows, columns = a.ndim > 1, b.ndim > 1
    if rows:
        yield tie(a.axis(-2), y.axis(-2 if columns else -1))
    if columns:
        yield tie(b.axis(-1), y.axis(-1))
    kept = y.axes()[: y.ndim - rows - columns]
    for operand in (a, b):
        yield from _align(operand.axes()[:-2], kept)


@rule("einsum")
def einsum(op: Op) -> Iterator[Constraint]:
    """Dims with the same letter are the same units; dims under an ellipsis broadcast against each other.

    A letter that one operand has twice picks a diagonal: both dims are the same units too.
    """
    equation = str(op.args[0]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    tensors = [*op.inputs, op.output]
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    seen: dict[str, AxisRef] = {}
    for term, tensor in zip([*left.split(","), right], tensors, strict=True):
        before, _, after = term.partition("...")
        named = [*zip(before, tensor.axes(), strict=False)]
        named += [*zip(reversed(after), reversed(tensor.axes()), strict=False)]
        covered = tensor.axes()[len(before) : tensor.ndim - len(after)] if "..." in term else ()
        named += [(f"...{place}", axis) for place, axis in enumerate(reversed(covered))]
        for letter, axis in named:
            if axis.size > 1:
                yield tie(seen.setdefault(letter, axis), axis)


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Iterator[Constraint]:
    """``softmax(q k^T + mask) v``; with fewer heads of k and v each of them serves a run of query heads (GQA)."""
    names = ("query", "key", "value")
    q, k, v = (op.param(name, place) for place, name in enumerate(names))
    assert q is not None and k is not None and v is not None
    y, mask = op.output, op.param("attn_mask", 3)
    yield tie(q.axis(-1), k.axis(-1))
    yield tie(v.axis(-1), y.axis(-1))
    yield tie(k.axis(-2), v.axis(-2))
    yield tie(q.axis(-2), y.axis(-2))
    yield from _align(q.axes()[:-2], y.axes()[:-2])
    for operand in (k, v):
        mine, theirs = operand.axes()[:-2], y.axes()[:-2]
        if op.argument("enable_gqa", 99, False) and mine[-1].size != theirs[-1].size:
            copies = Fresh("query heads per key head", theirs[-1].size // mine[-1].size)
            yield tie(theirs[-1], Product((mine[-1], copies)))
            mine, theirs = mine[:-1], theirs[:-1]
        yield from _align(mine, theirs)
    if mask is not None:
        yield from _align(mask.axes(), (*y.axes()[:-2], q.axis(-2), k.axis(-2)))


@rule(nn.MultiheadAttention)
def multihead_attention(op: Op) -> Iterator[Constraint]:
    """Packed or separate projections; rows of q, k and v are ``heads x d``, columns of the output projection follow v.

    ``bias_k`` and ``bias_v``, which add a token, and masks are not described: their dims are pinned.
    """
    module = op.module
    assert isinstance(module, nn.MultiheadAttention)
    q, k, v = (op.args[place] if len(op.args) > place else op.kwargs[name] for place, name in enumerate(_QKV))
    heads, width = Fresh("head", module.num_heads), module.head_dim
    inner = Product((heads, Fresh("query and key", width)))
    value = Product((heads, Fresh("value", width)))
    tokens, batch = (1, 0) if module.batch_first else (0, 1)
    y = op.output
    if y.ndim == 3:
        yield from (tie(x.axis(batch), y.axis(batch)) for x in (q, k, v))
    else:  # without a batch dim
        tokens = 0
    yield tie(q.axis(tokens), y.axis(tokens))
    yield tie(k.axis(tokens), v.axis(tokens))
    rows: tuple[Expression, ...] = (inner, inner, value)
    packed, bias = op.parameters.get("in_proj_weight"), op.parameters.get("in_proj_bias")
    if packed is not None:
        yield tie(packed.axis(0), Concat(rows))
        for x in (q, k, v):
            yield tie(packed.axis(1), x.axis(-1))
    else:
        for name, x, row in zip(_QKV, (q, k, v), rows, strict=True):
            weight = op.parameters[f"{name[0]}_proj_weight"]
            yield tie(weight.axis(0), row)
            yield tie(weight.axis(1), x.axis(-1))
    if bias is not None:
        yield tie(bias.axis(0), Concat(rows))
    yield tie(op.parameters["out_proj.weight"].axis(1), value)
    yield tie(op.parameters["out_proj.weight"].axis(0), y.axis(-1))
    if "out_proj.bias" in op.parameters:
        yield tie(op.parameters["out_proj.bias"].axis(0), y.axis(-1))


_QKV = ("query", "key", "value")


def _broadcast(operand: TensorRef, result: TensorRef) -> Iterator[Constraint]:
    yield from _align(operand.axes(), result.axes())


def _align(mine: tuple[AxisRef, ...], theirs: tuple[AxisRef, ...]) -> Iterator[Constraint]:
    """Tie dims from the last one backwards, as broadcasting pairs them."""
    for left, right in zip_longest(reversed(mine), reversed(theirs)):
        if left is not None and right is not None and left.size == right.size:
            yield tie(left, right)

"""Contractions of two activations: products of matrices, scalar products, distances.

Of ``y[..., m, n] = sum_k a[..., m, k] b[..., k, n]`` the contracted index may be reordered when both operands follow,
the others pass through. It is the same for any sum over ``k`` of something that looks at ``a[k]`` and ``b[k]`` alone: a
distance, a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, zip_longest

from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import AxisRef, Constraint, TensorRef, allows, contract, indifferent, tie
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op


@rule("matmul", "bmm", "mm", "mv", "dot")
def matrix_product(op: Op) -> Iterator[Constraint]:
    """``y[..., m, n] = sum_k a[..., m, k] b[..., k, n]``; a vector on either side has only the contracted dim."""
    yield from _matrix_product(op.inputs[-2], op.inputs[-1], op.output)
    for operand, dim in ((op.inputs[-2], -2), (op.inputs[-1], -1)):
        if operand.ndim > 1:
            yield allows(Symmetry.GENERAL_LINEAR, operand.axis(dim))


@rule("baddbmm", "addmm", "addbmm")
def added_matrix_product(op: Op) -> Iterator[Constraint]:
    """A matrix product and a summand that broadcasts against it."""
    yield from _broadcast(op.input, op.output)
    if op.key != "addbmm":  # which sums over the batch too: what is not said here is pinned
        yield from _matrix_product(op.inputs[1], op.inputs[2], op.output)


def _matrix_product(a: TensorRef, b: TensorRef, y: TensorRef) -> Iterator[Constraint]:
    yield contract(a.axis(-1), b.axis(-2 if b.ndim > 1 else -1))
    rows, columns = a.ndim > 1, b.ndim > 1
    if rows:
        yield tie(a.axis(-2), y.axis(-2 if columns else -1))
    if columns:
        yield tie(b.axis(-1), y.axis(-1))
    kept = y.axes()[: y.ndim - rows - columns]
    for operand in (a, b):
        yield from align(operand.axes()[:-2], kept)


@rule("einsum")
def einsum(op: Op) -> Iterator[Constraint]:
    """Dims with the same letter are the same units; dims under an ellipsis broadcast against each other.

    A letter that one operand has twice picks a diagonal: both dims are the same units too.
    """
    if not isinstance(op.args[0], str):  # dims given as lists of numbers
        return
    left, arrow, right = op.args[0].replace(" ", "").partition("->")
    tensors = [*op.inputs, op.output]
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    seen: dict[str, tuple[int, AxisRef]] = {}
    summed = {letter for letter in left if left.count(letter) == 2 and letter not in right}
    kept = {letter for letter in left if left.count(letter) == 1 and letter in right}
    for number, (term, tensor) in enumerate(zip([*left.split(","), right], tensors, strict=True)):
        before, _, after = term.partition("...")
        named = [*zip(before, tensor.axes(), strict=False)]
        named += [*zip(reversed(after), reversed(tensor.axes()), strict=False)]
        covered = tensor.axes()[len(before) : tensor.ndim - len(after)] if "..." in term else ()
        named += [(f"...{place}", axis) for place, axis in enumerate(reversed(covered))]
        for letter, axis in named:
            if axis.size > 1:
                first, other = seen.setdefault(letter, (number, axis))
                yield contract(other, axis) if letter in summed and first != number else tie(other, axis)
                if letter in kept:
                    yield allows(Symmetry.GENERAL_LINEAR, axis)


@rule("outer", "ger", "inner", "tensordot")
def outer_and_inner(op: Op) -> Iterator[Constraint]:
    """``y[i..., j...] = sum_k a[i..., k...] b[k..., j...]``: over no dims, over the last ones, or over those given."""
    a, b = op.inputs
    given = op.argument("dims", 2, 2) if op.key == "tensordot" else 0
    if op.key == "inner":
        dims = ([a.ndim - 1], [b.ndim - 1])
    elif isinstance(given, int):
        dims = (list(range(a.ndim - given, a.ndim)), list(range(given)))
    else:
        dims = tuple([place % x.ndim for place in own] for x, own in zip((a, b), given, strict=True))
    yield from (tie(a.axis(mine), b.axis(other)) for mine, other in zip(*dims, strict=True))
    kept = [axis for x, own in zip((a, b), dims, strict=True) for axis in x.axes() if axis.dim not in own]
    yield from (tie(axis, result) for axis, result in zip(kept, op.output.axes(), strict=True))


@rule("linalg_multi_dot")
def multi_dot(op: Op) -> Iterator[Constraint]:
    """Each matrix reads the columns of the one before; the first and the last may be vectors."""
    for left, right in pairwise(op.inputs):
        yield tie(left.axis(-1), right.axis(0))
    outer = [x.axis(place) for x, place in ((op.inputs[0], 0), (op.inputs[-1], -1)) if x.ndim == 2]
    yield from (tie(axis, result) for axis, result in zip(outer, op.output.axes(), strict=True))


@rule("cosine_similarity", nn.CosineSimilarity, "linalg_vecdot", "vecdot", "pairwise_distance", nn.PairwiseDistance)
def compared_along_a_dim(op: Op) -> Iterator[Constraint]:
    """``y = f(sum_k a[k] b[k], sum_k a[k]^2, sum_k b[k]^2)`` or ``y = (sum_k |a[k] - b[k]|^p)^(1/p)``.

    Operands broadcast against each other before; the dims that are not summed over pass through.
    """
    a, b = op.inputs
    ndim = max(a.ndim, b.ndim)
    cosine = op.key in ("cosine_similarity", nn.CosineSimilarity)
    distance = op.key in ("pairwise_distance", nn.PairwiseDistance)
    summed = (-1 if distance else op.argument("dim", 2, 1 if cosine else -1)) % ndim
    keepdim = distance and bool(op.argument("keepdim", 4, False))
    for place in range(ndim):
        axes = [x.axis(place - ndim) for x in (a, b) if x.ndim >= ndim - place]
        if place == summed:
            wide = [axis for axis in axes if axis.size > 1]
            yield from (indifferent(axis) for axis in axes)
            yield from (tie(*pair) for pair in pairwise(wide))
        else:
            result = op.output.axis(place if keepdim else place - (place > summed))
            yield from (tie(axis, result) for axis in axes if axis.size == result.size)


@rule("cdist")
def cdist(op: Op) -> Iterator[Constraint]:
    """``y[..., m, n] = (sum_k |a[..., m, k] - b[..., n, k]|^p)^(1/p)``: rows of both, units of neither are left."""
    a, b, y = *op.inputs, op.output
    yield tie(a.axis(-1), b.axis(-1))
    yield tie(a.axis(-2), y.axis(-2))
    yield tie(b.axis(-2), y.axis(-1))
    for operand in (a, b):
        yield from align(operand.axes()[:-2], y.axes()[:-2])


@rule(nn.Bilinear, "bilinear")
def bilinear(op: Op) -> Iterator[Constraint]:
    """``y[..., o] = sum_ij a[..., i] W[o, i, j] b[..., j] + c[o]``."""
    a, b, y = op.inputs[0], op.inputs[1], op.output
    weight, bias = op.param("weight", 2), op.param("bias", 3)
    assert weight is not None
    for axis, place in zip(weight.axes(), (y, a, b), strict=True):
        yield tie(axis, place.axis(-1))
    if bias is not None:
        yield tie(bias.axis(0), y.axis(-1))
    for operand in (a, b):
        yield from align(operand.axes()[:-1], y.axes()[:-1])


def _broadcast(operand: TensorRef, result: TensorRef) -> Iterator[Constraint]:
    yield from align(operand.axes(), result.axes())


def align(mine: tuple[AxisRef, ...], theirs: tuple[AxisRef, ...]) -> Iterator[Constraint]:
    """Tie dims from the last one backwards, as broadcasting pairs them."""
    for left, right in zip_longest(reversed(mine), reversed(theirs)):
        if left is not None and right is not None and left.size == right.size:
            yield tie(left, right)

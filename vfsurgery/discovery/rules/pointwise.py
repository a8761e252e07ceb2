"""Ops that act on every element alike: activations, arithmetic with broadcasting, dropout.

``y[i] = f(x[i], z[i], ...)``: all dims of all operands follow the result, aligned from the last one as broadcasting
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import (
    Constraint,
    Fixed,
    Product,
    TensorRef,
    allows,
    indifferent,
    mixes,
    scales,
    tie,
    tie_all,
)
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanhshrink, nn.LogSigmoid, nn.Threshold,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
UNARY = (
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish sigmoid tanh hardsigmoid hardswish hardtanh "
    "hardshrink softplus softshrink softsign tanhshrink logsigmoid threshold abs neg exp expm1 log log1p "
    "sqrt rsqrt square reciprocal sin cos erf sign round floor ceil clamp clamp_min clamp_max dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout nan_to_num logical_not tan atan "
    "asin acos sinh cosh log2 log10 exp2 erfc positive isnan isinf isfinite invert not bitwise_not bernoulli "
    "long int short bool bfloat16 sinc special_expit expit logit erfinv frac trunc sgn signbit asinh acosh atanh "
    "lgamma digamma absolute negative clip _threshold fix isneginf isposinf isreal"
)
BINARY = (
    "add sub mul div pow rsub rmul radd maximum minimum where lerp addcmul addcdiv eq ne lt le gt ge "
    "logical_and logical_or logical_xor masked_fill fmod remainder mod floordiv true_divide floor_divide atan2 "
    "copysign and or xor bitwise_and bitwise_or bitwise_xor max min logaddexp logaddexp2 hypot xlogy special_xlogy "
    "heaviside float_power multiply subtract divide isclose less less_equal greater greater_equal not_equal fmax fmin "
    "__and__ __or__ __xor__"
)

SUMS = ("add", "sub", "rsub", "radd", "subtract")
PRODUCTS, QUOTIENTS = ("mul", "multiply", "rmul"), ("div", "divide", "true_divide")
UNCHANGED = (*DROPOUTS, "dropout", "dropout1d", "dropout2d", "dropout3d", "neg", "negative", "positive", "bfloat16")
"""Ops that are linear in units; dropout is, in eval mode."""


@rule(*ACTIVATIONS, *DROPOUTS, *UNARY.split(), *BINARY.split())
def pointwise(op: Op) -> Iterator[Constraint]:
    """``y = f(x, z, ...)`` element by element: every operand's dims are the result's.

    ``max`` and ``min`` of a single tensor reduce it.
    """
    if op.key in ("max", "min") and len(op.inputs) == 1:
        yield from selection(op)
        return
    for operand in op.inputs:
        yield from tie_all(operand, op.output)
    yield from _linear(op)


def _linear(op: Op) -> Iterator[Constraint]:
    """Along which dims the op is linear: a sum where all summands have the units, a product where one has them.

    Where the other factor has units along one dim alone, it scales those of the first: what is stored, if both have.
    """
    numbers = any(isinstance(arg, int | float) and arg != 0 for arg in op.args)
    for axis in op.output.axes() if op.outputs else ():
        place = axis.dim - op.output.ndim
        owners = [x for x in op.inputs if x.ndim >= -place and x.shape[place] == axis.size > 1]
        if (
            op.key in UNCHANGED
            or (op.key in SUMS and not numbers and len(owners) == len(op.inputs))
            or (len(owners) == 1 and _multiplies(op, owners[0]))
        ):
            yield allows(Symmetry.GENERAL_LINEAR, axis)
        elif op.key in PRODUCTS and len(owners) == 2:
            vectors = [x for x in owners if math.prod(x.shape) == axis.size]
            weights = [x for x in vectors if x.kind == "parameter"] or vectors
            if len(weights) == 1:
                yield allows(Symmetry.GENERAL_LINEAR, axis)
                yield scales(weights[0].axis(place))


def _multiplies(op: Op, operand: TensorRef) -> bool:
    """Whether the result is a multiple of that operand."""
    return op.key in PRODUCTS or (op.key in QUOTIENTS and bool(op.args) and op.args[0] == operand)


@rule("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue")
def selection(op: Op) -> Iterator[Constraint]:
    """One value along a dim, which does not depend on the order, and its place, which does.

    So where a place is used the dim is pinned. Other dims pass through.
    """
    places = op.key in ("argmax", "argmin") or op.is_read(1)
    reduced = op.argument("dim", 2 if op.key == "kthvalue" else 1, -1 if op.key in ("mode", "kthvalue") else None)
    if not places:
        gone = op.input.axes() if reduced is None else (op.input.axis(reduced),)
        yield from map(indifferent, gone)
    if not isinstance(reduced, int):
        return
    kept = [axis for axis in op.input.axes() if axis.dim != reduced % op.input.ndim]
    for result in op.outputs:
        axes = [axis for axis in result.axes() if result.ndim < op.input.ndim or axis.dim != reduced % op.input.ndim]
        for mine, theirs in zip(kept, axes, strict=True):
            yield tie(mine, theirs)


@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, "softmax", "log_softmax", "normalize")
@rule("gumbel_softmax")
def equivariant(op: Op) -> Iterator[Constraint]:
    """Softmax and vector normalization divide by a sum over one dim: reordering that dim reorders the result.

    What is given as ``out=`` is the result.
    """
    for operand in op.inputs:
        yield from tie_all(operand, op.output)
    place, default = {"normalize": (2, 1), "gumbel_softmax": (4, -1)}.get(str(op.key), (1, None))
    dim = op.argument("dim", place, default)
    if op.key == "normalize" and isinstance(dim, int) and op.argument("p", 1, 2) == 2:  # lengths stay under rotations
        yield allows(Symmetry.ORTHOGONAL, op.input.axis(dim))
    if dim is None:  # it depends on the number of dims which one that is: any of them
        yield from map(mixes, op.input.axes())
    else:
        yield mixes(*(op.input.axis(own) for own in (dim if isinstance(dim, tuple | list) else (dim,))))


@rule(nn.PReLU, "prelu")
def prelu(op: Op) -> Iterator[Constraint]:
    """``y = max(0, x) + w[c] min(0, x)``, with one slope per channel or one for all."""
    yield from tie_all(op.input, op.output)
    slope = op.param("weight", 1)
    if slope is not None and slope.shape and slope.shape[0] > 1:
        yield tie(slope.axis(0), op.input.axis(1))


@rule(nn.GLU, "glu")
def glu(op: Op) -> Iterator[Constraint]:
    """``y = x[:n] * sigmoid(x[n:])``: the input axis is two halves in the same order."""
    dim = op.argument("dim", 1, -1) % op.input.ndim
    yield from tie_all(op.input, op.output, skip=(dim,))
    yield tie(op.input.axis(dim), Product((Fixed(2, "halves of a gate"), op.output.axis(dim))))

"""Ops that act on every element alike: activations, arithmetic with broadcasting, dropout.

``y[i] = f(x[i], z[i], ...)``: all dims of all operands follow the result, aligned from the last one as broadcasting
does.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vfsurgery.groups.axes import Constraint, Fixed, Product, mixes, tie, tie_all
from vfsurgery.rules.registry import rule
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
    "long int short bool bfloat16"
)
BINARY = (
    "add sub mul div pow rsub rmul radd maximum minimum where lerp addcmul addcdiv eq ne lt le gt ge "
    "logical_and logical_or logical_xor masked_fill fmod remainder mod floordiv true_divide floor_divide atan2 "
    "copysign and or xor bitwise_and bitwise_or bitwise_xor max min"
)


@rule(*ACTIVATIONS, *DROPOUTS, *UNARY.split(), *BINARY.split())
def pointwise(op: Op) -> Iterator[Constraint]:
    """``y = f(x, z, ...)`` element by element: every operand's dims are the result's.

    ``max`` and ``min`` of a single tensor reduce it: where the result has no dims, nothing is tied and all is pinned,
    and along a dim the places come too, which depend on the order: that dim is pinned.
    """
    if op.key in ("max", "min") and len(op.inputs) == 1:
        yield from _extremum(op)
        return
    for operand in op.inputs:
        yield from tie_all(operand, op.output)


def _extremum(op: Op) -> Iterator[Constraint]:
    reduced = op.argument("dim", 1)
    if not isinstance(reduced, int):
        return
    kept = [axis for axis in op.input.axes() if axis.dim != reduced % op.input.ndim]
    for result in op.outputs:
        axes = [axis for axis in result.axes() if result.ndim < op.input.ndim or axis.dim != reduced % op.input.ndim]
        for mine, theirs in zip(kept, axes, strict=True):
            yield tie(mine, theirs)


@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, "softmax", "log_softmax", "normalize")
def equivariant(op: Op) -> Iterator[Constraint]:
    """Softmax and vector normalization divide by a sum over one dim: reordering that dim reorders the result."""
    yield from tie_all(op.input, op.output)
    place, default = (2, 1) if op.key == "normalize" else (1, None)
    dim = op.argument("dim", place, default)
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

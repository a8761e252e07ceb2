"""Convolutions of 1 to 3 spatial dims: plain, grouped, depthwise and transposed.

With ``G`` groups the channels are ``G x c/G`` on both sides: group ``g`` of the output sees only group ``g`` of the
input,

``y[g, o] = b[g, o] + sum_i W[g, o, i] * x[g, i]``,

so whole groups may be reordered, and channels inside a group alike in all groups. A depthwise convolution is the case
of one channel a group, where output channels follow input channels. Kernel offsets stay where they are, and so do
positions, except along a dim with a kernel of one and a stride of one: there ``y[p]`` is computed from ``x[p]`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import Concat, Constraint, Fresh, Product, TensorRef, allows, contract, pin, tie
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, "conv1d", "conv2d", "conv3d")
def convolution(op: Op) -> Iterator[Constraint]:
    """Weight ``(G * o, i, kernel...)``: its rows follow the output channels, its columns the inputs of one group."""
    yield from _convolution(op, groups=op.argument("groups", 6, 1), rows=0)


@rule(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
def transposed_convolution(op: Op) -> Iterator[Constraint]:
    """Weight ``(G * i, o, kernel...)``: the roles of its first two dims are exchanged."""
    yield from _convolution(op, groups=op.argument("groups", 6, 1), rows=1)


@rule("torchvision::deform_conv2d")
def deformable_convolution(op: Op) -> Iterator[Constraint]:
    """Each kernel offset reads somewhere else, the same for all channels of an offset group.

    The channels of offsets and of the mask are offset groups times places of the kernel, and stay where they are; so do
    offset groups, inside which input channels are free. For the rest see convolutions.
    """
    offset, mask, bias, groups, parts = op.args[2], op.args[3], op.args[4], op.args[11], op.args[12]
    weight = op.args[1]
    x, y = op.input.axis(1), op.output.axis(1)
    for tensor in (op.input, offset, mask):
        yield tie(tensor.axis(0), op.output.axis(0))
    if groups > 1 and parts > 1:  # both cut the channels, each in its own way
        yield pin(x, "groups of channels with offsets of their own")
    elif parts > 1:
        yield tie(x, Concat(tuple(Fresh(f"offset group {part}", x.size // parts) for part in range(parts))))
    if groups == 1:
        yield tie(weight.axis(0), y)
        yield tie(weight.axis(1), x)
    else:
        yield from _grouped(op, weight, groups, rows=0)
    yield tie(bias.axis(0), y)


def _convolution(op: Op, groups: int, rows: int) -> Iterator[Constraint]:
    weight, bias = op.param("weight", 1), op.param("bias", 2)
    assert weight is not None
    channel = op.input.ndim - (weight.ndim - 1)  # 0 for unbatched input
    if channel:
        yield tie(op.input.axis(0), op.output.axis(0))
    x, y = op.input.axis(channel), op.output.axis(channel)
    if groups == 1:
        yield tie(weight.axis(rows), y)
        yield contract(weight.axis(1 - rows), x)
        yield allows(Symmetry.GENERAL_LINEAR, y)
    else:
        yield from _grouped(op, weight, groups, rows)
    if bias is not None:
        yield tie(bias.axis(0), y)
    yield from _positions(op, weight)


def _positions(op: Op, weight: TensorRef) -> Iterator[Constraint]:
    given = op.argument("stride", 3, 1)
    kernel = weight.shape[2:]
    strides = given if isinstance(given, tuple | list) else (given,) * len(kernel)
    for place, (size, stride) in enumerate(zip(kernel, strides, strict=True)):
        x, y = op.input.axis(place - len(kernel)), op.output.axis(place - len(kernel))
        if size == stride == 1 and x.size == y.size:  # hence no padding either
            yield tie(x, y)


def _grouped(op: Op, weight: TensorRef, groups: int, rows: int) -> Iterator[Constraint]:
    channel = op.input.ndim - (weight.ndim - 1)
    x, y = op.input.axis(channel), op.output.axis(channel)
    group = Fresh("group", groups)
    ins, outs = Fresh("in", x.size // groups), Fresh("out", y.size // groups)
    yield tie(x, Product((group, ins)))
    yield tie(y, Product((group, outs)))
    across, within = (y, ins) if rows == 0 else (x, outs)
    yield tie(weight.axis(0), across)
    yield tie(weight.axis(1), within)

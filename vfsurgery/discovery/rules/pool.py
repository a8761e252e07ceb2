"""Pooling, resizing and padding of maps: channels pass through, positions are mixed and stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import Concat, Constraint, Fixed, allows, indifferent, tie
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op

MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d,
    nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d,
    nn.CircularPad2d, nn.CircularPad3d, nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d,
)  # fmt: skip
FUNCTIONS = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "lp_pool1d", "lp_pool2d", "upsample",
    "max_unpool1d", "max_unpool2d", "max_unpool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d_with_indices",
)  # fmt: skip


LINEAR = ("avg_pool", "avgpool", "interpolate", "upsampl", "zeropad", "reflectionpad", "replicationpad", "circularpad")
"""Words in names of what takes sums over positions: any map of the channels passes."""


@rule(*MODULES, *FUNCTIONS)
def pooling(op: Op) -> Iterator[Constraint]:
    """``(batch, channel, positions...)`` or ``(channel, positions...)``: the positions are mixed, the rest passes."""
    digits = [int(letter) for letter in op.name if letter in "123" and f"{letter}d" in op.name.lower()]
    positions = digits[-1] if digits else op.input.ndim - 2
    for dim in range(op.input.ndim - positions):
        for tensor in (*op.inputs[1:], *op.outputs):  # the places of maxima, too
            if tensor.ndim == op.input.ndim:
                yield tie(op.input.axis(dim), tensor.axis(dim))
    if any(word in op.name.lower() for word in LINEAR):
        yield allows(Symmetry.GENERAL_LINEAR, op.input.axis(op.input.ndim - positions - 1))


@rule("pad")
def pad(op: Op) -> Iterator[Constraint]:
    """Each dim grows by indices that do not move; ``amounts`` lists (before, after) from the last dim backwards."""
    amounts = list(op.argument("pad", 1))
    constant = op.argument("mode", 2, "constant") == "constant"
    for dim in range(op.input.ndim):
        back = 2 * (op.input.ndim - 1 - dim)
        before, after = amounts[back : back + 2] if back < len(amounts) else (0, 0)
        if before == after == 0:
            yield tie(op.input.axis(dim), op.output.axis(dim))
            if not constant or not op.argument("value", 3, None):
                yield allows(Symmetry.GENERAL_LINEAR, op.input.axis(dim))
        elif constant and before >= 0 and after >= 0:
            parts = (Fixed(before, "padding"), op.input.axis(dim), Fixed(after, "padding"))
            yield tie(op.output.axis(dim), Concat(tuple(part for part in parts if part.size)))


@rule("affine_grid")
def affine_grid(op: Op) -> Iterator[Constraint]:
    """A grid of positions for each image."""
    yield tie(op.input.axis(0), op.output.axis(0))


@rule("mean", "sum", "amax", "amin", "std", "var", "logsumexp", "prod", "norm", "all", "any", "nanmean", "nansum")
@rule("linalg_norm", "linalg_vector_norm", "vector_norm", "std_mean", "var_mean", "count_nonzero")
def reduction(op: Op) -> Iterator[Constraint]:
    """Sums, means and extrema do not depend on the order of what they run over; other dims pass through.

    A result of another shape than these arguments lead to was called in a way not understood here: all is pinned.
    """
    dims = op.argument("dim", 2 if "norm" in str(op.key) else 1)
    given = range(op.input.ndim) if dims is None else dims if isinstance(dims, tuple | list) else (dims,)
    reduced = {dim % op.input.ndim for dim in given}
    kept = [dim for dim in range(op.input.ndim) if dim not in reduced]
    for keepdim in (False, True):
        shape = [1 if dim in reduced else op.input.shape[dim] for dim in range(op.input.ndim) if keepdim or dim in kept]
        if op.output.shape == tuple(shape):
            yield from (indifferent(op.input.axis(dim)) for dim in reduced)
            for result in op.outputs:
                for place, dim in enumerate(kept):
                    yield tie(op.input.axis(dim), result.axis(dim if keepdim else place))
                    if op.key in ("mean", "sum"):
                        yield allows(Symmetry.GENERAL_LINEAR, op.input.axis(dim))
            return


@rule("grid_sample")
def grid_sample(op: Op) -> Iterator[Constraint]:
    """Values are read between the positions of a map; images and channels pass through."""
    image, grid = op.inputs[0], op.inputs[1]
    yield tie(image.axis(0), op.output.axis(0))
    yield tie(image.axis(1), op.output.axis(1))
    yield tie(grid.axis(0), op.output.axis(0))


@rule(nn.LocalResponseNorm, "local_response_norm", nn.CrossMapLRN2d)
def local_response_norm(op: Op) -> Iterator[Constraint]:
    """Each channel is divided by its neighbours in the order of channels, which is pinned; other dims pass through."""
    for axis in op.input.axes():
        if axis.dim != 1:
            yield tie(axis, op.output.axis(axis.dim))

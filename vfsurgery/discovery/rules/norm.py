"""Normalization layers. Scale, shift and running statistics are indexed like the channels that they act on.

BatchNorm acts channel by channel; LayerNorm and RMSNorm compute a mean and a variance over their axes, which do not
depend on the order; GroupNorm does so within ``G`` runs of channels, ``G x c/G``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import Constraint, Fresh, Product, allows, mixes, scales, tie, tie_all
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def channel_norm(op: Op) -> Iterator[Constraint]:
    """``y[:, c] = w[c] (x[:, c] - m[c]) / sqrt(v[c] + eps) + b[c]``: everything is indexed by the channel."""
    yield from tie_all(op.input, op.output)
    for parameter in op.parameters.values():
        if parameter.ndim == 1:
            yield tie(parameter.axis(0), op.input.axis(1))
    yield mixes(op.input.axis(0), *op.input.axes()[2:])


@rule("batch_norm", "instance_norm")
def functional_channel_norm(op: Op) -> Iterator[Constraint]:
    """As the modules; running statistics, scale and shift are given as arguments."""
    x = op.input
    yield from tie_all(x, op.output)
    for parameter in op.inputs[1:]:
        yield tie(parameter.axis(0), x.axis(1))
    yield mixes(x.axis(0), *x.axes()[2:])


@rule(nn.LayerNorm, nn.RMSNorm, "layer_norm", "rms_norm")
def layer_norm(op: Op) -> Iterator[Constraint]:
    """Mean and variance over the last dims do not depend on their order; scale and shift follow them.

    The length of what is normalized stays under rotations, and its mean under those that fix ones. RMSNorm has no mean.
    """
    yield from tie_all(op.input, op.output)
    normalized = op.input.axes()[-len(op.argument("normalized_shape", 1)) :]
    yield mixes(*normalized)
    if len(normalized) == 1:
        without_mean = op.key in (nn.RMSNorm, "rms_norm")
        yield allows(Symmetry.ORTHOGONAL if without_mean else Symmetry.ORTHOGONAL_FIXING_ONES, *normalized)
    for name, position in (("weight", 2), ("bias", 3)):
        parameter = op.param(name, position)
        if parameter is not None:
            yield from tie_all(parameter, op.input)
            if name == "weight":
                yield from map(scales, parameter.axes())


@rule(nn.GroupNorm, "group_norm")
def group_norm(op: Op) -> Iterator[Constraint]:
    """Whole groups may change places, and channels inside the groups alike in all of them."""
    groups = op.argument("num_groups", 1)
    channels = op.input.axis(1)
    inside = Fresh("channel", channels.size // groups)
    yield from tie_all(op.input, op.output)
    yield tie(channels, Product((Fresh("group", groups), inside)))
    yield mixes(inside, *op.input.axes()[2:])
    for name, position in (("weight", 2), ("bias", 3)):
        parameter = op.param(name, position)
        if parameter is not None:
            yield tie(parameter.axis(0), channels)

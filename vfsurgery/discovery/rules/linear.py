"""``y[..., o] = sum_i W[o, i] x[..., i] + b[o]``: rows of W follow the output, columns follow the input."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import Constraint, allows, contract, tie, tie_all
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op


@rule(nn.Linear, "linear")
def linear(op: Op) -> Iterator[Constraint]:
    """Leading dims pass through; the last one is contracted with the columns of the weight."""
    weight, bias = op.param("weight", 1), op.param("bias", 2)
    assert weight is not None
    yield from tie_all(op.input, op.output, skip=(op.input.ndim - 1,))
    yield tie(weight.axis(0), op.output.axis(-1))
    yield contract(weight.axis(1), op.input.axis(-1))
    yield allows(Symmetry.GENERAL_LINEAR, op.output.axis(-1))
    if bias is not None:
        yield tie(bias.axis(0), op.output.axis(-1))

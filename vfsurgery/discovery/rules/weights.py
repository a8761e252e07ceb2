"""Weights that are computed of what is stored: torch's parametrizations, and its weight and spectral norm of old.

In a trace such a weight is the value of a node, so layers speak of it as of any other tensor, and these rules say how
what is stored follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch.nn.utils import parametrizations

from vfsurgery.discovery.rules.contraction import matrix_product
from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import Constraint, Product, TensorRef, mixes, tie, tie_all
from vfsurgery.tracing.ops import Op

rule("vdot")(matrix_product)


@rule("_weight_norm")
def weight_norm(op: Op) -> Iterator[Constraint]:
    """``W[o] = g[o] v[o] / |v[o]|`` along ``dim``: lengths and directions follow the weight."""
    directions, lengths = op.inputs[:2]
    yield from _scaled(directions, lengths, op.output, cast(int, op.argument("dim", 2, 0)))


@rule(parametrizations._WeightNorm)
def weight_norm_module(op: Op) -> Iterator[Constraint]:
    """As the function, with the lengths first."""
    lengths, directions = op.inputs[:2]
    yield from _scaled(directions, lengths, op.output, cast(int, op.argument("dim", 2)))


def _scaled(directions: TensorRef, lengths: TensorRef, weight: TensorRef, dim: int) -> Iterator[Constraint]:
    yield from tie_all(directions, weight)
    yield from tie_all(lengths, weight)
    own = -1 if dim == -1 else dim % weight.ndim  # -1 is torch's way to say: one length for all
    yield mixes(*(axis for axis in directions.axes() if axis.dim != own))


@rule(parametrizations._SpectralNorm)
def spectral_norm(op: Op) -> Iterator[Constraint]:
    """``W / u^T W v``: the singular vectors follow rows and (flattened) columns; a vector is divided by its length."""
    weight = op.input
    yield from tie_all(weight, op.output)
    yield mixes(*weight.axes())
    rows, columns = op.parameters.get("_u"), op.parameters.get("_v")
    if rows is not None and columns is not None:
        dim = cast(int, op.argument("dim", 1))
        yield tie(rows.axis(0), weight.axis(dim))
        yield tie(columns.axis(0), Product(tuple(axis for axis in weight.axes() if axis.dim != dim)))


@rule(parametrizations._Orthogonal)
def orthogonal(op: Op) -> Iterator[Constraint]:
    """``W = base Q(X)``: rows follow the rows of ``base``; of a wide matrix, which is computed transposed, the columns.

    Nothing stored follows the other dim alone: it is pinned, and all is without a base.
    """
    base, weight = op.parameters.get("base"), op.output
    yield from tie_all(op.input, weight, skip=(weight.ndim - 2, weight.ndim - 1))
    if base is not None:
        yield tie(base.axis(-2), weight.axis(-2 if weight.shape[-2] >= weight.shape[-1] else -1))
        yield from tie_all(base, weight, skip=(base.ndim - 2, base.ndim - 1))

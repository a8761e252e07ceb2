"""Producers: the layers whose output units can be scaled and shifted by changing their own weight and bias.

A convolution or linear layer absorbs ``s * y + t`` as ``W' = s W``, ``b' = s b + t`` (per output unit); a normalization
layer with an affine part as ``w' = s w``, ``b' = s b + t``. A layer whose weight or bias serves several nodes is no
producer, nor is one whose bias the forward computes, nor one whose output goes into a BatchNorm and nowhere else: that
norm undoes any scale and shift. Layers of preserved prefixes are none: they keep the scale and shift of their source.
Neither are layers that only parameters go through, to make a weight or a table of positions: they have no activations.

A norm whose module goes on after it, with an activation as timm's do, is one too: its units are read and corrected
inside the module, in front of what follows. It is none where its weight and bias do more than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vfsurgery.discovery.maps import Order, UnitMap, map_units, permutations_of
from vfsurgery.groups import GroupSet, gather_index
from vfsurgery.stats.batch_norms import calls_batch_norm, is_batch_norm
from vfsurgery.stats.collect import Site
from vfsurgery.stats.own_outputs import Extent, own_extent
from vfsurgery.tracing.dataflow import reached_by_input
from vfsurgery.tracing.ops import Op, OpReader
from vfsurgery.tracing.values import PRESERVED, VALUE

LINEAR = (nn.Linear, "linear")
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, "conv1d", "conv2d", "conv3d")
TRANSPOSED = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
NORM = (nn.LayerNorm, nn.GroupNorm)
FUNCTIONAL_NORM = ("layer_norm", "group_norm")
"""As subclasses of the modules call them: timm's norm layers are traced through."""
EXTENT = "vfsurgery_own_extent"
"""Key of a node's ``meta``."""


@dataclass(frozen=True)
class Producer:
    """A node with the names of the parameters that set the scale and shift of its output units.

    ``rows`` is the dim of ``weight`` that its output units lie on, ``dim`` that of the node's value. ``depth`` counts
    the weight layers on the longest path from the input up to and including this one. ``inside`` if its units are read
    inside its module, before what follows there. It ``takes_shift`` unless it is a call in the forward without a bias:
    one that is created is not in that call.
    """

    node: str
    path: str
    weight: str
    bias: str | None
    rows: int
    dim: int
    units: int
    depth: int
    is_norm: bool
    feeds_norm: bool
    is_output: bool
    inside: bool = False
    takes_shift: bool = True

    @property
    def site(self) -> Site:
        """Where its units are read."""
        return Site(self.node, self.dim, inside=self.inside)

    def order(self, groups: GroupSet, orders: Mapping[str, Order]) -> Tensor | None:
        """The order that a source's output units are brought into by permutations; ``None`` if they stay."""
        entries = groups.by_parameter.get(self.weight, ())
        index = gather_index(entries, self.rows, self.units, permutations_of(orders))
        return None if index is None else torch.from_numpy(index)

    def is_mapped(self, groups: GroupSet, orders: Mapping[str, Order]) -> bool:
        """Whether a matrix maps a source's output units, so that their moments are not known beforehand."""
        entries = groups.by_parameter.get(self.weight, ())
        orders_here = (orders.get(group.name) for group, member in entries if member.dim == self.rows)
        return any(isinstance(order, UnitMap) and not order.is_identity for order in orders_here)

    def aligned(self, value: Tensor, groups: GroupSet, orders: Mapping[str, Order]) -> Tensor:
        """A source's output with its units brought to those of the merged model; the shape stays."""
        units = value.movedim(self.dim, 0)
        mapped = map_units(units, self.weight, self.rows, groups, orders)
        return value if mapped is units else mapped.movedim(0, self.dim)


def find_producers(graph_module: fx.GraphModule, groups: GroupSet, *, shared: bool = False) -> list[Producer]:
    """All producers of a traced model in graph order; with ``shared`` also uses of weights that serve several."""
    ops = list(OpReader(graph_module))
    uses = Counter(name for op in ops for name in (_weight(op), _bias(op)) if name is not None)
    depths = weight_depths(graph_module)
    reached = reached_by_input(graph_module.graph)
    found: list[Producer] = []
    for op in ops:
        weight = _weight(op)
        if (
            weight is None
            or (uses[weight] > 1 and not shared)
            or not (is_layer(op) or is_norm(op))
            or PRESERVED in op.node.meta
        ):
            continue
        if op.input.kind != "node" or op.input.name not in reached:
            continue
        given, bias = op.param("bias", 2 if is_layer(op) else 3), _bias(op)
        if given is not None and (bias is None or (uses[bias] > 1 and not shared)):
            continue
        tensor = op.param("weight", 1 if is_layer(op) else 2)
        assert tensor is not None
        rows = 1 if op.key in TRANSPOSED else 0
        grouped = any(member.dim == rows for _, member in groups.by_parameter.get(weight, ()))
        dim = _unit_dim(op, tensor.ndim)
        if op.output.shape[dim] != tensor.shape[rows]:  # transposed and grouped: rows are not the output units
            continue
        if op.node.meta[VALUE].dtype.is_complex:  # its units have no one standard deviation
            continue
        extent = _extent(op)
        if extent is None:
            continue
        found.append(
            Producer(
                node=op.node.name,
                path=op.path,
                weight=weight,
                bias=bias,
                rows=rows,
                dim=dim,
                units=tensor.shape[rows],
                depth=depths[op.node.name],
                is_norm=is_norm(op),
                feeds_norm=_feeds_batch_norm(op.node, graph_module),
                is_output=not grouped,
                inside=extent == "inside",
                takes_shift=bias is not None or op.node.op == "call_module",
            )
        )
    return found


def has_prefixes(graph_module: fx.GraphModule) -> bool:
    """Whether prefixes of the sources were preserved; if all layers were, nothing is left to correct."""
    return any(PRESERVED in node.meta for node in graph_module.graph.nodes)


def is_norm(op: Op) -> bool:
    """Whether an op is a normalization layer with a scale and a shift per unit."""
    if op.key in FUNCTIONAL_NORM:
        scale, shift = op.param("weight", 2), op.param("bias", 3)
        return all(tensor is not None and tensor.kind == "parameter" for tensor in (scale, shift))
    return (isinstance(op.module, NORM) or is_batch_norm(op.module)) and "weight" in op.parameters


def weight_depths(graph_module: fx.GraphModule) -> dict[str, int]:
    """For each node the number of weight layers (convolutions, linear layers) on the longest path from the input."""
    layers = {op.node.name for op in OpReader(graph_module) if is_layer(op)}
    reached = reached_by_input(graph_module.graph)
    depths: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        before = max((depths[source.name] for source in node.all_input_nodes), default=0)
        depths[node.name] = before + (node.name in layers) if node.name in reached else 0
    return depths


def in_stages(graph_module: fx.GraphModule, producers: Sequence[Producer]) -> list[list[Producer]]:
    """The producers, those that reach each other by no path together, first those that depend on no other."""
    by_node = {producer.node: producer for producer in producers}
    stages: dict[int, list[Producer]] = {}
    depths: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        depth = max((depths[source.name] for source in node.all_input_nodes), default=0)
        producer = by_node.get(node.name)
        if producer is not None:
            stages.setdefault(depth, []).append(producer)
        depths[node.name] = depth + (producer is not None)
    return [stages[depth] for depth in sorted(stages)]


def is_layer(op: Op) -> bool:
    """Whether an op is a convolution or a linear layer."""
    return op.key in (*LINEAR, *CONV, *TRANSPOSED)


def _extent(op: Op) -> Extent | None:
    """See :func:`own_extent`; kept with the node, since copies of a trace ask again and again."""
    if op.module is None:
        return "whole"
    if EXTENT not in op.node.meta:
        op.node.meta[EXTENT] = own_extent(op.module, op.input.shape)
    return op.node.meta[EXTENT]


def _weight(op: Op) -> str | None:
    if not (is_layer(op) or op.module is not None or op.key in FUNCTIONAL_NORM):
        return None
    tensor = op.param("weight", 1 if is_layer(op) else 2)
    return tensor.name if tensor is not None and tensor.kind == "parameter" else None


def _bias(op: Op) -> str | None:
    """Its own, as a parameter; none where the forward computes it, as of parts for queries, keys and values."""
    if _weight(op) is None:
        return None
    tensor = op.param("bias", 2 if is_layer(op) else 3)
    return tensor.name if tensor is not None and tensor.kind == "parameter" else None


def _unit_dim(op: Op, weight_dims: int) -> int:
    if op.key in (*LINEAR, "layer_norm") or isinstance(op.module, nn.LayerNorm):
        return op.output.ndim - 1
    if is_norm(op):
        return 1
    return op.output.ndim - (weight_dims - 1)


def _feeds_batch_norm(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    users = list(node.users)
    return len(users) == 1 and calls_batch_norm(users[0], graph_module)

"""Folding: a removed unit is not dropped but merged into the survivor that it resembles most.

At each layer that reads the units, with ``x_r`` a removed unit as that layer sees it and ``x_s`` the survivor it is
most correlated with over the data, least squares gives ``x_r ~ c x_s + d``, ``c = cov(r, s) / var(s)``,
``d = mean(r) - c mean(s)``. So the columns of ``s`` gain ``c`` times those of ``r``, and the bias gains ``d`` times
their sum over the kernel. This is the many-to-one map of ZipIt! (Stoica et al. 2024) with one source, but for the
scale, and with a survivor chosen for each reader. A unit that is constant has ``c = 0``: its mean goes into the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from vfsurgery.discovery.roles import READS
from vfsurgery.groups import GroupSet, Member, PermutationGroup
from vfsurgery.passes.producers import TRANSPOSED, is_layer
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.stats.collect import Site, survey
from vfsurgery.stats.correlation import CrossMoments
from vfsurgery.tracing.ops import Op, OpReader


@dataclass(frozen=True)
class Reader:
    """A layer's columns that read the units of one group, and where those units are seen."""

    weight: str
    bias: str | None
    columns: int
    group: PermutationGroup
    member: Member
    node: str
    dim: int

    @property
    def key(self) -> str:
        """A name of the place where the units are seen: readers of one value share its statistics."""
        return f"{self.node} {self.dim} {self.member.start} {hash(self.member.positions().tobytes())}"


def readers_of(graph_module: fx.GraphModule, groups: GroupSet) -> list[Reader]:
    """All convolutions (of one group of channels) and linear layers that read units, each weight used once."""
    found: list[Reader] = []
    ops = [op for op in OpReader(graph_module) if is_layer(op) and op.input.kind == "node"]
    weights = [tensor.name for op in ops if (tensor := op.param("weight", 1)) is not None]
    for op in ops:
        weight, bias = op.param("weight", 1), op.param("bias", 2)
        if weight is None or weights.count(weight.name) > 1 or op.argument("groups", 6, 1) != 1:
            continue
        columns = 0 if op.key in TRANSPOSED else 1
        for group, member in groups.by_parameter.get(weight.name, ()):
            if member.dim == columns and member.role == READS and member.block_dim < 0:
                name = None if bias is None else bias.name
                found.append(
                    Reader(weight.name, name, columns, group, member, op.input_name, _channel(op, weight.ndim))
                )
    return found


def unfolded(groups: Sequence[PermutationGroup], readers: Sequence[Reader]) -> list[PermutationGroup]:
    """Groups whose units are read by something that nothing can be folded into, such as a grouped convolution."""
    found: list[PermutationGroup] = []
    for group in groups:
        covered = {reader.weight for reader in readers if reader.group == group}
        reads = {member.parameter for member in group.members if member.role == READS}
        if not covered or reads - covered:
            found.append(group)
    return found


def self_correlations(
    graph_module: fx.GraphModule, readers: Sequence[Reader], images: Iterator[Tensor]
) -> dict[str, CrossMoments]:
    """Cross moments of the units that readers see with themselves, by :attr:`Reader.key`, from one pass."""
    device = next(graph_module.parameters()).device
    nodes = {node.name: node for node in graph_module.graph.nodes}
    sites: dict[str, list[Site]] = {}
    for reader in readers:
        assert reader.node in nodes
        places = torch.from_numpy(reader.member.positions()).to(device)
        sites[reader.key] = [Site(reader.node, reader.dim, places)]
    crossed = survey([graph_module], images, sites, {}, joint=True).crossed[0, 0]
    return {key: moments[0] for key, moments in crossed.items()}


def folded(
    state: Mapping[str, Tensor], cut: Cut, readers: Sequence[Reader], moments: Mapping[str, CrossMoments]
) -> dict[str, Tensor]:
    """The parameters with what removed units contribute added to their survivors' columns, and to biases."""
    result = dict(state)
    for reader in readers:
        kept = cut.kept.get(reader.group.name)
        if kept is not None:
            survivor, scale, rest = _assign(moments[reader.key], np.resize(kept, len(reader.member.positions())))
            _fold_reader(result, reader, survivor, scale, rest)
    return result


def _assign(moments: CrossMoments, kept: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """For every unit its survivor, the scale and the rest; removed units only have others than themselves."""
    products, mean, squares = moments.products, moments.a.mean, moments.a.squares
    alive = torch.from_numpy(kept).to(mean.device)
    survivors = alive.nonzero().squeeze(1)
    likeness = moments.correlation()[:, survivors].abs()  # (units, survivors)
    survivor = survivors[likeness.argmax(1)]
    own = torch.arange(len(kept), device=mean.device)
    varies = likeness.amax(1) > 0
    scale = products[own, survivor] / squares[survivor].clamp_min(torch.finfo(torch.float64).tiny)
    scale = torch.where(varies, scale, 0.0)
    rest = mean - scale * mean[survivor]
    survivor = torch.where(alive, own, survivor)
    return survivor, torch.where(alive, 0.0, scale), torch.where(alive, 0.0, rest)


def _fold_reader(state: dict[str, Tensor], reader: Reader, survivor: Tensor, scale: Tensor, rest: Tensor) -> None:
    weight = state[reader.weight]
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.movedim(reader.columns, 0).to(wide)  # (columns, rows, ...)
    places = torch.from_numpy(reader.member.positions()).to(weight.device)  # (units, places)
    gained = columns.clone()
    shift = torch.zeros(columns.shape[1], dtype=wide, device=weight.device)
    for place in places.T:
        mine = columns[place]
        each = scale.to(mine).view(-1, *[1] * (mine.ndim - 1)) * mine
        gained.index_add_(0, place[survivor], each)
        shift += rest.to(mine) @ mine.flatten(1).reshape(*mine.shape[:2], -1).sum(2)
    state[reader.weight] = gained.movedim(0, reader.columns).to(weight.dtype)
    if reader.bias is not None:
        state[reader.bias] = (state[reader.bias].to(wide) + shift).to(weight.dtype)


def _channel(op: Op, weight_dims: int) -> int:
    return op.input.ndim - 1 if weight_dims == 2 else op.input.ndim - (weight_dims - 1)

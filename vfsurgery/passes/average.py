"""Interpolation of aligned sources: ``sum_i w_i P_i(theta_i)``, tensor by tensor, into the tensors of one model.

Qu & Horvath, CPAL 2025, section 3: the whole state is interpolated, running statistics of normalization layers
included. Integer buffers (``num_batches_tracked``, index tables) are not numbers to average: the reference's are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from vfsurgery.discovery.maps import Order, UnitMap, map_tensor
from vfsurgery.groups import GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class Average(Pass):
    """Write the weighted mean of the aligned sources into the graph module's own tensors.

    One tensor at a time and in float32 or better, so beside the sources and the result no memory is needed but for
    the largest tensor.
    """

    name: ClassVar[str] = "average"
    needs_sources: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Average under the orders in ``context.permutations``."""
        states = [source.state for source in context.sources]
        for name, target in canonical_state(graph_module).items():
            if target.is_floating_point() or target.is_complex():
                write_mean(target, name, states, context.weights_of(name), context.groups, context.permutations)
            elif target.data_ptr() != states[0][name].data_ptr():
                target.copy_(states[0][name])
        if any(isinstance(order, UnitMap) for orders in context.permutations for order in orders.values()):
            for norm in batch_norm_nodes(graph_module).values():
                cast(Tensor, norm.running_var).clamp_min_(0)  # a sum with negative coefficients; RESET sets it anew
        return graph_module


def write_mean(
    target: Tensor,
    name: str,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    groups: GroupSet,
    orders: Sequence[Mapping[str, Order]],
) -> None:
    """Write the weighted mean of one entry of the sources' states, each under its orders, into ``target``.

    The sum is formed in ``target`` itself unless that is of half precision; no source may share its storage.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    total = target.zero_() if dtype == target.dtype else torch.zeros_like(target, dtype=dtype)
    for state, weight, order in zip(states, weights, orders, strict=True):
        if weight:
            total.add_(map_tensor(name, state[name], groups, order).to(target.device, dtype), alpha=weight)
    if total is not target:
        target.copy_(total)

"""Interpolation of aligned sources: ``sum_i w_i P_i(theta_i)``, tensor by tensor, into the tensors of one model.

Qu & Horvath, CPAL 2025, section 3: the whole state is interpolated, running statistics of normalization layers
included. Integer buffers (``num_batches_tracked``, index tables) are not numbers to average: the reference's are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.groups import GroupSet, Permutation, permute_tensor
from vfsurgery.passes.base import Context, Pass
from vfsurgery.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class Average(Pass):
    """Write the weighted mean of the aligned sources into the graph module's own tensors.

    One tensor at a time and in float32 or better, so beside the sources and the result no memory is needed but for
    the largest tensor.
    """

    name: ClassVar[str] = "average"

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Average under the orders in ``context.permutations``."""
        states = [source.state for source in context.sources]
        for name, target in canonical_state(graph_module).items():
            if target.is_floating_point() or target.is_complex():
                target.copy_(mean_tensor(name, states, context.weights, context.groups, context.permutations))
            elif target.data_ptr() != states[0][name].data_ptr():
                target.copy_(states[0][name])
        return graph_module


def mean_tensor(
    name: str,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    groups: GroupSet,
    orders: Sequence[Mapping[str, Permutation]],
) -> Tensor:
    """The weighted mean of one entry of the sources' states, each under its orders; on the first one's device."""
    first = states[0][name]
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=dtype)
    for state, weight, order in zip(states, weights, orders, strict=True):
        if weight:
            total.add_(permute_tensor(name, state[name], groups, order).to(first.device, dtype), alpha=weight)
    return total

"""RESET without data: what averaging does to the variances of BatchNorm layers, told from the weights alone.

The mean of imperfectly matched weights is shorter than they are, so what it puts out varies less than the average of
the sources' running variances says (Jordan et al., REPAIR, 2023, section 3), layer after layer. For inputs that vary
alike in all directions and in all sources, the variance of a unit goes with the square of its weights' norm, so

``var = (sum_i w_i var_i) * |sum_i w_i W_i|^2 / sum_i w_i |W_i|^2``

for every unit, ``W_i`` being its row in source ``i``, aligned. The factor is 1 where sources agree, and below it
elsewhere. Means are left averaged. Behind RESET, which measures, this is far: docs/renormalization.md has figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from vfsurgery.discovery.maps import map_tensor
from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import Producer, find_producers, has_prefixes
from vfsurgery.stats.batch_norms import BatchNorm, batch_norm_nodes
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class ClosedFormReset(Pass):
    """Shrink the averaged running variances of BatchNorm layers as averaging has shrunk the weights before them.

    Layers that read no convolution or linear layer directly, as those behind a sum, keep the average.
    """

    name: ClassVar[str] = "closed-form-reset"
    needs_sources: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("reset", "regress", "repair", "rescale", "reshift", "closed-form-repair")

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Set the variances, from the sources' weights and the merged ones.

        Raises:
            OptionError: the model has no BatchNorm with running statistics.
        """
        norms = batch_norm_nodes(graph_module)
        if not norms and not has_prefixes(graph_module):
            raise OptionError(
                explain(
                    "closed-form-reset needs BatchNorm layers with running statistics, and this model has none",
                    remedy="use renormalize='bias-calibration' without data, or 'repair' or 'rescale' with data",
                )
            )
        producers = {producer.node: producer for producer in find_producers(graph_module, context.groups, shared=True)}
        state = canonical_state(graph_module)
        ratios: dict[BatchNorm, list[Tensor]] = {}  # a layer that is called several times has one for each call
        nodes = {node.name: node for node in graph_module.graph.nodes}
        for name, norm in norms.items():
            producer = producers.get(nodes[name].all_input_nodes[0].name)
            if producer is not None and not producer.is_norm and producer.dim == 1 and producer.weight in state:
                ratios.setdefault(norm, []).append(_shrinkage(producer, state[producer.weight], context))
        for norm, found in ratios.items():
            variance = cast(Tensor, norm.running_var)
            variance.mul_(torch.stack(found).mean(0).to(variance))
        context.notes.append(f"closed-form-reset: {len(ratios)} of {len({*norms.values()})} BatchNorm layers, no data")
        return graph_module


def _shrinkage(producer: Producer, merged: Tensor, context: Context) -> Tensor:
    """For each unit the squared norm of its merged weights over the mean of the sources', ``(units,)``."""
    own = _squares(merged, producer.rows)
    total = torch.zeros_like(own)
    shares = context.weights_of(producer.weight)
    for source, share, orders in zip(context.sources, shares, context.permutations, strict=True):
        aligned = map_tensor(producer.weight, source.state[producer.weight], context.groups, orders)
        total.add_(_squares(aligned, producer.rows).to(own), alpha=share)
    return torch.where(total > 0, own / total, 1.0)


def _squares(weight: Tensor, rows: int) -> Tensor:
    weight = weight.abs() if weight.is_complex() else weight
    return torch.linalg.vector_norm(weight.movedim(rows, 0).flatten(1), dim=1, dtype=torch.float64).square()

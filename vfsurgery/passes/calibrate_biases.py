"""Bias calibration: let biases fade with depth like the features they are added to, without any data.

Averaging shrinks what the input induces at every layer, but each bias only by the layers after it, so late biases win.
``b_alpha^(l) = sum_i w_i^l b_i^(l)`` with ``l`` the layer's depth from the input, 1 for the first and the classifier
included (Qu & Horvath, CPAL 2025, section 5.3 and Eq. 3; for N sources the natural extension). It is defined for
networks without normalization layers; depth counts convolutions and linear layers on the longest path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vfsurgery.discovery.maps import map_tensor
from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import find_producers
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class CalibrateBiases(Pass):
    """Replace every merged bias by ``sum_i w_i^depth b_i``."""

    name: ClassVar[str] = "bias-calibration"
    needs_sources: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Set the biases from the sources'.

        Raises:
            OptionError: the model has normalization layers.
        """
        producers = find_producers(graph_module, context.groups)
        norm = next((producer for producer in producers if producer.is_norm), None)
        if norm is not None:
            raise OptionError(
                explain(
                    "bias calibration is defined for networks without normalization layers",
                    layer=norm.path,
                    remedy="use renormalize='reset' or 'repair' with data, or renormalize=None",
                )
            )
        state = canonical_state(graph_module)
        biased = [producer for producer in producers if producer.bias is not None]
        for producer in biased:
            name = str(producer.bias)
            total = torch.zeros_like(state[name], dtype=torch.promote_types(state[name].dtype, torch.float32))
            for source, weight, order in zip(
                context.sources, context.weights_of(name), context.permutations, strict=True
            ):
                aligned = map_tensor(name, source.state[name], context.groups, order)
                total.add_(aligned.to(total), alpha=weight**producer.depth)
            state[name].copy_(total)
        context.notes.append(f"bias-calibration: {len(biased)} biases, no data")
        return graph_module

"""RESET: recompute the running statistics of BatchNorm layers on the merged model's own activations.

Averaged running statistics are wrong for averaged weights: means stay right, variances come out too large, layer after
layer (Jordan et al., REPAIR, 2023, section 3; Qu & Horvath, CPAL 2025, A.3). One pass with the norm layers in training
mode: each batch is normalized by its own statistics, while exact moments of every norm's input over all batches
accumulate, the variation between batches included. Nothing else is switched to training. What becomes of a layer that
is called several times is said in :mod:`vfsurgery.stats.batch_norms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import has_prefixes
from vfsurgery.stats.batch_norms import OnBatches, batch_norm_nodes, calls_of, set_running


@dataclass(frozen=True, kw_only=True)
class Reset(Pass):
    """Re-estimate ``running_mean`` and ``running_var`` of all BatchNorm layers; affine parts are untouched."""

    name: ClassVar[str] = "reset"
    needs_data: ClassVar[bool] = True

    def applies(self, graph_module: fx.GraphModule, groups: GroupSet) -> bool:
        """Whether there are BatchNorm layers with running statistics."""
        return bool(batch_norm_nodes(graph_module))

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """One pass over the calibration data.

        Raises:
            OptionError: the model has no BatchNorm with running statistics.
            DataError: a batch is too small to have statistics.
        """
        norms = batch_norm_nodes(graph_module)
        if not norms and has_prefixes(graph_module):
            context.notes.append("reset: every BatchNorm layer is preserved")
            return graph_module
        if not norms:
            raise OptionError(
                explain(
                    "reset needs BatchNorm layers with running statistics, and this model has none",
                    remedy="use renormalize='repair' or 'rescale', or 'auto' to choose by architecture",
                )
            )
        work = OnBatches(graph_module, norms)
        for images in context.images("reset of the merged model"):
            work.run(images)
        layers = calls_of(norms)
        for norm, calls in layers.items():
            set_running(norm, [work.moments[call] for call in calls])
        context.notes.append(f"reset: {len(layers)} BatchNorm layers")
        return graph_module

"""RESET: recompute the running statistics of BatchNorm layers on the merged model's own activations.

Averaged running statistics are wrong for averaged weights: means stay right, variances come out too large, layer after
layer (Jordan et al., REPAIR, 2023, section 3; Qu & Horvath, CPAL 2025, A.3). One pass with the norm layers in training
mode: each batch is normalized by its own statistics, while exact moments of every norm's input over all batches
accumulate, the variation between batches included. Nothing else is switched to training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, fx, nn

from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import has_prefixes, is_batch_norm
from vfsurgery.stats.collect import Observer
from vfsurgery.stats.moments import Moments, add_batch
from vfsurgery.tracing.values import PRESERVED

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class Reset(Pass):
    """Re-estimate ``running_mean`` and ``running_var`` of all BatchNorm layers; affine parts are untouched."""

    name: ClassVar[str] = "reset"
    needs_data: ClassVar[bool] = True

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
        moments = self._measure(graph_module, context, norms)
        for node, norm in norms.items():
            set_running(norm, moments[node])
        context.notes.append(f"reset: {len(norms)} BatchNorm layers")
        return graph_module

    def _measure(
        self, graph_module: fx.GraphModule, context: Context, norms: dict[str, BatchNorm]
    ) -> dict[str, Moments]:
        totals: dict[str, Moments] = {}

        def watcher(names: list[str]) -> Callable[[Tensor], None]:
            def add(value: Tensor) -> None:
                batch = Moments.of(value, dim=1)
                for name in names:
                    add_batch(totals, name, batch)

            return add

        by_input: dict[str, list[str]] = {}
        for node in graph_module.graph.nodes:
            if node.name in norms:
                by_input.setdefault(node.args[0].name, []).append(node.name)
        observer = Observer(graph_module, {source: watcher(names) for source, names in by_input.items()})
        counters = {norm: norm.num_batches_tracked for norm in norms.values()}
        try:
            for norm in norms.values():
                norm.training, norm.num_batches_tracked = True, None  # a merge does not count as training
            for images in context.images("reset of the merged model"):
                observer.run(images)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                explain(
                    f"a batch is too small for BatchNorm statistics: {error}",
                    remedy="use larger batches, and drop a last batch of one image",
                )
            ) from error
        finally:
            for norm, counter in counters.items():
                norm.training, norm.num_batches_tracked = False, counter
        return totals


def set_running(norm: BatchNorm, moments: Moments) -> None:
    """Write mean and unbiased variance of a norm's input into its running statistics."""
    cast(Tensor, norm.running_mean).copy_(moments.mean)
    cast(Tensor, norm.running_var).copy_(moments.squares / max(moments.count - 1, 1))


def batch_norm_nodes(graph_module: fx.GraphModule) -> dict[str, BatchNorm]:
    """The BatchNorm layers that keep running statistics, by the name of their node, in graph order.

    Those of preserved prefixes keep the statistics of their source and are left out.
    """
    modules = dict(graph_module.named_modules())
    found: dict[str, BatchNorm] = {}
    for node in graph_module.graph.nodes:
        merged = node.op == "call_module" and PRESERVED not in node.meta
        module = modules.get(str(node.target)) if merged else None
        if module is not None and is_batch_norm(module) and cast(BatchNorm, module).running_var is not None:
            found[node.name] = cast(BatchNorm, module)
    return found

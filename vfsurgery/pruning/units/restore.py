"""Giving the units that are left the statistics that they had in the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vfsurgery.data.batches import Batches
from vfsurgery.discovery.recording import record
from vfsurgery.errors import OptionError, explain
from vfsurgery.passes import Context, Fold, Pass, Pipeline
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.recalibrate import Reset
from vfsurgery.passes.renormalize import Measured
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.stats.collect import Survey, survey
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.sources import Source, eval_mode


def check_restoring(passes: Sequence[Pass]) -> None:
    """Refuse passes that have no meaning for one source of another size.

    Raises:
        OptionError: names the pass.
    """
    for step in passes:
        if not isinstance(step, Reset | Measured):
            raise OptionError(
                explain(
                    f"renormalize={step.name!r} is for merged models, not for smaller ones",
                    accepted="auto, reset, repair, rescale, reshift, None",
                )
            )


def restore(
    source: Source,
    cut: Cut,
    smaller: nn.Module,
    passes: Sequence[Pass],
    inputs: tuple[torch.Tensor, ...],
    data: Batches,
    progress: bool,
) -> Context:
    """Run passes on a smaller model, in place; their goals are the original's statistics of the units that are left.

    Returns:
        What the passes noted.
    """
    graph_module = record(smaller, inputs)
    units = {name: site for step in passes for name, site in step.reads(source.graph_module, cut.groups).items()}
    found: Survey | None = None
    if units:
        images = calibration_images(data, "statistics of the original", progress)
        with eval_mode(source.graph_module):
            found = survey([source.graph_module], images, {}, units)
        targets = [p for step in passes if isinstance(step, Measured) for p in step.targets(graph_module, cut.groups)]
        whole = found.moments[0]
        rows = {p.node: cut.index(p.weight, p.rows, len(whole[p.node].mean)) for p in targets}
        kept = {node: whole[node] if index is None else _take(whole[node], index) for node, index in rows.items()}
        found = replace(found, moments=[kept])

    def statistics() -> Survey:
        assert found is not None
        return found

    context = Context(cut.groups, [source], [1.0], [{}], statistics, data, progress)
    with eval_mode(smaller, graph_module):
        Pipeline(tuple(each for step in passes for each in (step, Fold()))).run(graph_module, context)
    return context


def _take(moments: Moments, index: object) -> Moments:
    return moments.take(torch.as_tensor(index, device=moments.mean.device))

"""BatchNorm statistics of a joined network: of all tasks together, or of each on its own images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import mixed
from vfsurgery.merging.multitask.joined import Multitask
from vfsurgery.passes.base import calibration_images
from vfsurgery.stats.batch_norms import BatchNorm, OnBatches, batch_norm_nodes, calls_of, set_running
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.ops import canonical_parameters


def measure_joint(network: Multitask, images: Mapping[str, Batches], progress: bool) -> None:
    """Write into the trunk's BatchNorm layers the statistics of all tasks' images in equal turns; into those of a head
    the statistics of its own task's.
    """
    in_heads = network.places.in_heads
    names = canonical_parameters(network.network)
    trunk = {
        node: norm
        for node, norm in batch_norm_nodes(network.network).items()
        if names.get(id(norm.running_mean)) not in in_heads
    }
    work = OnBatches(network.network, trunk)
    if trunk:
        for batch in calibration_images(mixed([*images.values()]), "statistics of all tasks", progress):
            work.run(batch)
    for norm, calls in calls_of(trunk).items():
        set_running(norm, [work.moments[call] for call in calls])
    for task, own in images.items():
        graph_module = network.graph_of(task)
        norms = {
            node: norm
            for node, norm in batch_norm_nodes(graph_module).items()
            if names.get(id(norm.running_mean)) in in_heads
        }
        if norms:
            _measure(graph_module, norms, own, task, progress)


def measure_apart(network: Multitask, images: Mapping[str, Batches], progress: bool) -> dict[str, dict[str, Tensor]]:
    """The statistics of each task's own images, by the names of the tensors that they stand for.

    Those of a head's layers are written into them.
    """
    in_heads = network.places.in_heads
    names = canonical_parameters(network.network)
    found: dict[str, dict[str, Tensor]] = {}
    for task, own in images.items():
        graph_module = network.graph_of(task)
        norms = batch_norm_nodes(graph_module)
        moments = _moments(graph_module, norms, own, task, progress)
        found[task] = {}
        for norm, calls in calls_of(norms).items():
            mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            if names[id(mean)] in in_heads:
                set_running(norm, [moments[call] for call in calls])
                continue
            stand_in = nn.BatchNorm1d(0, momentum=norm.momentum)
            stand_in.running_mean, stand_in.running_var = mean.clone(), var.clone()
            set_running(stand_in, [moments[call] for call in calls])
            found[task] |= {names[id(mean)]: stand_in.running_mean, names[id(var)]: stand_in.running_var}
    return found


def _measure(
    graph_module: fx.GraphModule, norms: Mapping[str, BatchNorm], images: Batches, task: str, progress: bool
) -> None:
    moments = _moments(graph_module, norms, images, task, progress)
    for norm, calls in calls_of(norms).items():
        set_running(norm, [moments[call] for call in calls])


def _moments(
    graph_module: fx.GraphModule, norms: Mapping[str, BatchNorm], images: Batches, task: str, progress: bool
) -> dict[str, Moments]:
    """Of each norm's input, as it comes out with all norms before it on the statistics of the batch."""
    work = OnBatches(graph_module, norms)
    for batch in calibration_images(images, f"statistics of {task}", progress):
        work.run(batch)
    return work.moments

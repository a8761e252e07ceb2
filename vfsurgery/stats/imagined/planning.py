"""What is to be imagined, decided before any work: which networks are asked, what they remember, what it costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vfsurgery.errors import DataError, InvalidWeightsError, OptionError, explain
from vfsurgery.stats.batch_norms import is_batch_norm
from vfsurgery.stats.imagined.aims import Watched
from vfsurgery.stats.precision import image_dtype
from vfsurgery.stats.threads import affordable_flops, device_of
from vfsurgery.stats.together import images_together, run_kept
from vfsurgery.tracing.compatibility import check_finite
from vfsurgery.tracing.hooks import Hooks
from vfsurgery.tracing.precision import in_precision, is_inexact, real
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.tracing.wrappers import network

STEERED, SHARE = 200, 5
"""So many images are steered at least, and one in so many; the rest stay leaves, which cost nothing."""
LEAST_STEERED = 32
"""Of fewer, the statistics say more of chance than of the networks."""
BATCH = 200
"""Images whose statistics are looked at together."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Which networks are asked, and what will be done.

    ``flops`` are those of one image through all networks, there and back. ``batch`` is the number of images that may be
    computed together, ``steered`` how many will be moved. ``why`` says why there is nothing to move images to.
    """

    sources: tuple[Watched, ...]
    dtype: torch.dtype
    flops: float
    batch: int
    steered: int
    why: str = ""


def networks_of(models: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The networks themselves; of those in half precision copies in float32.

    Raises:
        OptionError: there is none, or one is no network.
        InvalidWeightsError: one holds NaN or infinite values, or none at all.
    """
    given = [models] if isinstance(models, nn.Module) else [*models]
    if not given:
        raise OptionError(explain("there is no network to imagine images for", remedy="imagine(model), or ([a, b])"))
    found: list[nn.Module] = []
    for number, each in enumerate(given):
        name = f"source {number}"
        model = network(each, name)
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            remedy = "load weights"
            raise InvalidWeightsError(explain(f"{name} is on the meta device and holds no values", remedy=remedy))
        check_finite(name, canonical_state(model))
        if any(is_inexact(tensor) and real(tensor.dtype).itemsize < 4 for tensor in tensors):
            model = in_precision(copy.deepcopy(model), torch.float32)
        found.append(model)
    return found


def plan(models: Sequence[nn.Module], example: Tensor, count: int, how: str, steps: int, memory: float) -> Plan:
    """Run the networks on the example, and see what there is to aim at and what that costs.

    Raises:
        DataError: a network does not run on the example.
        OptionError: ``how="statistics"`` and there is nothing to aim at, or no memory for two images.
    """
    examples = [run_on(model, example) for model in models]
    sources = tuple(Watched(model, own) for model, own in zip(models, examples, strict=True))
    flops = 2 * sum(map(flops_of_an_image, models, examples))  # there and back
    room = int(memory * GIB / max(2 * max(source.bytes for source in sources), 1))
    alone = Plan(sources, examples[0].dtype, flops, max(min(BATCH, room), 1), 0)
    if how == "leaves":
        return alone
    why = _nothing_to_aim_at(models, sources, examples)
    wanted = steered = min(count, max(STEERED, -(-count // SHARE)))
    if not why and room < 2:
        need = 4 * max(source.bytes for source in sources) / GIB
        why = f"two images take {need:.3g} GiB there and back, and memory={memory:g}"
    if not why and how == "auto":
        most = affordable_flops(sources[0].device)
        steered = min(wanted, int(most / max(flops * steps, 1)))
        if steered < min(wanted, LEAST_STEERED):
            why = f"{steps} steps of one image take {flops * steps:.1e} FLOPs, and {most:.0e} are spent unasked"
    if why and how == "statistics":
        remedy = "give more memory=" if "memory=" in why else "how='leaves' needs none"
        raise OptionError(explain("there are no statistics to move images to", because=why, remedy=remedy))
    return replace(alone, why=why) if why else replace(alone, steered=steered)


def run_on(model: nn.Module, images: Tensor) -> Tensor:
    """Images as a network takes them, on its device and in its precision, once it has run on them.

    Raises:
        DataError: it does not.
        HookError: a hook writes into its weights.
    """
    own = images.to(device_of(model), image_dtype(model) or torch.float32)
    try:
        run_kept(model, (own,))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a forward may raise
        raise DataError(
            explain(
                f"{type(model).__name__} does not run on images of {tuple(images.shape[1:])}",
                cause=str(error).partition("\n")[0],
                remedy="pass example_inputs= of the size that it takes",
            )
        ) from error
    Hooks.seen(model, (own,)).refuse_writers()  # the networks themselves are run, and shall stay as they are
    return own


def _nothing_to_aim_at(models: Sequence[nn.Module], sources: Sequence[Watched], examples: Sequence[Tensor]) -> str:
    """Why images cannot be moved to statistics; empty if they can."""
    if not any(source.aims for source in sources):
        if any(source.new for source in sources):
            return "the BatchNorm layers have never been trained: means are 0 and variances 1 throughout"
        if any(is_batch_norm(module) for model in models for module in model.modules()):
            return "the BatchNorm layers keep no running statistics"
        return "there is no BatchNorm layer"
    if any(images_together(model, (own,)) > 1 for model, own in zip(models, examples, strict=True)):
        return "the network does not compute each image by itself"
    return ""


def flops_of_an_image(model: nn.Module, example: Tensor) -> float:
    """Of one of the images, forward.

    Raises:
        SurgeryError: as for :func:`run_on`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton's part of torch

    with FlopCounterMode(display=False) as counter:
        run_on(model, example)
    return counter.get_total_flops() / len(example)

"""``imagine``: check the arguments, draw leaves, steer some of them, look at what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.data.procedural import Leaves
from vfsurgery.data.progress import progress_line
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.stats.imagined.aims import Watched
from vfsurgery.stats.imagined.images import Imagined
from vfsurgery.stats.imagined.judging import looks_of
from vfsurgery.stats.imagined.pixels import pixels_of
from vfsurgery.stats.imagined.planning import Plan, networks_of, plan, run_on
from vfsurgery.stats.imagined.ranges import trained_range
from vfsurgery.stats.imagined.report import ImagineReport, NormReport
from vfsurgery.stats.imagined.sizes import fitting_leaves, leaves_of
from vfsurgery.stats.imagined.steering import Steering
from vfsurgery.stats.threads import device_of
from vfsurgery.tracing.examples import ExampleInputs

How: TypeAlias = Literal["auto", "leaves", "statistics"]
HOWS = ("auto", "leaves", "statistics")

IMAGES, BYTES = 1000, 2**28
"""Images by default, fewer where they would take more than so many bytes in float32: 445 of 3 x 224 x 224."""
STEPS = 20
LOOKED_AT, LEAST_LOOKED_AT, LOOKED_FLOPS = 100, 8, 2e11
"""Images that the sources are asked about for the report, fewer where that takes more operations."""


def imagine(
    models: nn.Module | Sequence[nn.Module],
    images: int | None = None,
    how: How = "auto",
    *,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    steps: int | None = None,
    memory: float = 4.0,
    progress: bool = True,
) -> Imagined:
    """Make calibration images from the networks themselves, without one real image.

    All begin as dead leaves (:mod:`vfsurgery.data.procedural`), scaled to the pixels that the first network is
    configured for, or remembers. Where the networks have BatchNorm, a fifth of them, and at least 200, are then moved
    until its layers, in all networks, are given the means and deviations that they keep from training.

    Args:
        models: A network, or several that shall share the images. They are not changed. Sources on several devices are
            run each on its own; networks in half precision are run as copies in float32.
        images: How many; by default 1,000, fewer where they would take more than 256 MiB (445 of 3 x 224 x 224).
        how: ``"leaves"``, which costs next to nothing and works for every network that takes images; ``"statistics"``,
            which moves some of them; ``"auto"``, the latter where there are statistics and it is affordable (2e13
            floating-point operations on a CPU, some minutes), with fewer moved images if need be.
        example_inputs: As for :func:`trace`: one batch of images of the size that is wanted, of which nothing but the
            shape matters; by default the size that timm's or torchvision's configuration names, or a smaller one if
            the first network's BatchNorm layers clearly remember that: the report says so.
        seed: Of all that is drawn. torch's global random state is neither used nor changed.
        steps: How often images are moved, 20 by default.
        memory: GiB that the activations of a batch may take; smaller batches know less of the statistics.
        progress: Show how far it is, once it lasts over a second.

    Returns:
        A data set of images, to be passed as ``data=``, with a ``report``.

    Raises:
        ExampleInputError: no size is known and no example is given.
        DataError: the networks take several inputs, no images, or not those of this size.
        OptionError: an argument is not acceptable, or there are no statistics to move images to.
        InvalidWeightsError: a network holds NaN or infinite values, or none at all.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> imagine(net, 10, example_inputs=torch.zeros(1, 1, 8, 8))
    Imagined(10 images of 1x8x8, leaves, seed 0)
    """
    started = time.perf_counter()
    _check(images, how, steps, memory)
    networks = networks_of(models)
    devices = [device for device in {device_of(each) for each in networks} if device.type == "cuda"]
    with torch.random.fork_rng(devices), progress_line("imagined images", progress) as tell:
        tell("looking at the networks")
        few, *reasons = fitting_leaves(networks[0], example_inputs)
        channels, height, width = few.shape[1:]
        pixels, reason = trained_range(networks[0], run_on(networks[0], few), pixels_of(networks[0], channels))
        if reason:
            few, reasons = leaves_of(pixels, len(few), (channels, height, width)), [*reasons, reason]
        count = images or max(min(IMAGES, BYTES // (4 * few[0].numel())), 2)
        generator = torch.Generator().manual_seed(seed)
        planned = plan(networks, few, count, how, steps or STEPS, memory)
        tell(f"drawing {count} leaves")
        drawn = Leaves().draw(count, (channels, height, width), generator, pixels).to(planned.dtype)
        layers: tuple[NormReport, ...] = ()
        if planned.steered:
            steering = Steering(planned.steered, steps or STEPS, planned.batch, pixels, generator)
            layers = _steer(planned, steering, drawn[: planned.steered], tell)
        # any part of them is like the whole: what is held out, and what is looked at first
        drawn = drawn[torch.randperm(count, generator=generator)]
        tell("asking the networks")
        asked = drawn[: max(min(LOOKED_AT, int(LOOKED_FLOPS / max(planned.flops, 1))), LEAST_LOOKED_AT)]
        looks = looks_of(asked, [_logits(source, asked, planned.batch) for source in planned.sources])
    report = ImagineReport(
        images=count,
        size=(channels, height, width),
        how="statistics" if planned.steered else "leaves",
        steered=planned.steered,
        steps=(steps or STEPS) if planned.steered else 0,
        layers=layers,
        looks=looks,
        seconds=time.perf_counter() - started,
        flops=planned.flops * planned.steered * (steps or STEPS),
        seed=seed,
        notes=tuple(note for note in (*reasons, planned.why and f"not moved: {planned.why}") if note),
    )
    return Imagined(drawn, pixels, report)


def _check(images: int | None, how: str, steps: int | None, memory: float) -> None:
    if how not in HOWS:
        raise OptionError(explain(f"unknown how {how!r}", remedy=did_you_mean(how, HOWS)))
    for name, number in (("images", images), ("steps", steps)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise OptionError(explain(f"{name} must be a whole number of at least 1, got {number!r}"))
    if steps is not None and how == "leaves":
        raise OptionError(explain("leaves are drawn in no steps", remedy="leave steps= out, or how='statistics'"))
    if not memory > 0:
        raise OptionError(explain(f"memory must be a number of GiB above 0, got {memory!r}"))


def _steer(planned: Plan, steering: Steering, images: Tensor, tell: Callable[[str], None]) -> tuple[NormReport, ...]:
    """Move images, in place, and say how far each layer's statistics were and are."""
    before = _distances(planned, images)
    images.copy_(steering.steer(planned.sources, images, tell))
    after = _distances(planned, images)
    return tuple(
        NormReport(number, aim.name, len(aim.mean), first, last)
        for number, source in enumerate(planned.sources)
        for aim, first, last in zip(source.aims.values(), before[number], after[number], strict=True)
    )


def _distances(planned: Plan, images: Tensor) -> list[list[float]]:
    """Of each layer of each source, the mean over batches."""
    parts = images.tensor_split(max(-(-len(images) // planned.batch), 1))
    with torch.no_grad():
        seen = [[source.look(part.to(source.device))[0] for part in parts] for source in planned.sources]
    return [[float(torch.stack(own).mean()) for own in zip(*each, strict=True)] for each in seen]


def _logits(source: Watched, images: Tensor, batch: int) -> Tensor | None:
    with torch.no_grad():
        found = [source.look(part.to(source.device))[1] for part in images.split(batch)]
    return None if any(each is None for each in found) else torch.cat([each for each in found if each is not None])

"""Which size of images a network was trained on: what its BatchNorm layers remember tells it.

The configuration of torchvision's and timm's networks names the size of ImageNet's images, whatever they were trained
on. A resnet18 that was trained on 32 x 32 pixels gives on leaves of that size a distance of 0.16 from its statistics,
on 48 x 48 of 0.28, on 64 x 64 of 0.68, and on the 224 x 224 that it is configured for one of 12.8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfsurgery.data.procedural import Leaves, Pixels
from vfsurgery.stats.imagined.aims import Watched
from vfsurgery.stats.imagined.pixels import example_of, pixels_of
from vfsurgery.stats.imagined.planning import run_on
from vfsurgery.tracing.examples import ExampleInputs

SIDES = (32, 48, 64, 96, 128, 160, 192)
"""What networks are trained on, where it is less than what they are configured for."""
MOST_TOGETHER = 64
"""Images of an example that may belong together, as the frames of a clip; larger ones are plain batches."""
LOOKED_AT = 12
"""Leaves of each size."""
CLEARLY = 0.5
"""A size is taken if its distance is less than this share of that of the configured one."""


def fitting_leaves(model: nn.Module, given: ExampleInputs | None) -> tuple[Tensor, str]:
    """A few leaves of the size that a network is to be imagined images of, and why that is not the configured one.

    Args:
        model: The network itself.
        given: An example, whose size then counts; as many leaves as it has images, where those may belong together.

    Raises:
        ExampleInputError: nothing was given and the network does not say what it takes.
        DataError: it takes several inputs, no images, or not those of this size.
    """
    example = example_of(model, given)
    channels, height, width = example.shape[1:]
    count = len(example) if 1 < len(example) <= MOST_TOGETHER else 2
    pixels = pixels_of(model, channels)
    leaves = leaves_of(pixels, count, example.shape[1:])
    if given is not None or height != width:
        return leaves, ""
    side, reason = trained_size(model, run_on(model, leaves), pixels)
    return (leaves_of(pixels, count, (channels, side, side)), reason) if reason else (leaves, "")


def leaves_of(pixels: Pixels, count: int, size: Sequence[int]) -> Tensor:
    """Leaves to try networks on, always the same."""
    return Leaves().draw(count, size, torch.Generator().manual_seed(0), pixels)


def trained_size(model: nn.Module, example: Tensor, pixels: Pixels) -> tuple[int, str]:
    """The side of square images that a network remembers, and why it is another than the example's.

    Args:
        model: Runs on the example.
        example: Images of the size that it is configured for, ``(N, channels, side, side)``.
        pixels: Their range.

    Returns:
        The example's side and no reason where no other one fits clearly better, or there are no statistics.
    """
    configured = example.shape[3]
    watched = Watched(model, example)
    if not watched.aims:
        return configured, ""
    found: dict[int, float] = {}
    for side in (configured, *(side for side in SIDES if side < configured)):
        size = example.shape[1], side, side
        leaves = Leaves().draw(LOOKED_AT, size, torch.Generator().manual_seed(0), pixels).to(example)
        try:
            with torch.no_grad():
                distances, _ = watched.look(leaves)
        except Exception:  # whatever a forward may raise that takes one size alone
            continue
        if len(distances) == len(watched.aims):
            found[side] = float(torch.stack(distances).mean())
    best = min(found, key=lambda side: found[side], default=configured)
    if configured not in found or not found[best] < CLEARLY * found[configured]:
        return configured, ""
    return best, (
        f"of {best} x {best} pixels: their distance from BatchNorm statistics is {found[best]:.2f}, and of the "
        f"configured {configured} x {configured} it is {found[configured]:.2f}; example_inputs= decides otherwise"
    )

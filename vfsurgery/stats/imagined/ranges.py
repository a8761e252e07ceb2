"""Which range of pixels a network was trained on, where its configuration does not say: BatchNorm layers tell it.

Most networks take standardized images. Others take pixels from -1 to 1, from 0 to 1 or from 0 to 255 as they are, and
images of the wrong range are no use to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfsurgery.data.procedural import Leaves, Pixels
from vfsurgery.stats.imagined.aims import Watched
from vfsurgery.tracing.examples import normalization_of

STANDARD = "standardized"
RANGES = {"-1 to 1": (-1.0, 1.0), "0 to 1": (0.0, 1.0), "0 to 255": (0.0, 255.0)}
"""Ranges that are common, by the lowest and the highest value."""
MIDDLE, SPREAD = 0.45, 0.25
"""Mean and deviation of the pixels of photographs, as shares of the range."""
LOOKED_AT = 16
"""Leaves of each range."""
FIRST = 3
"""Layers that are asked: the first ones see pixels, the late ones what is in a picture."""
CLEARLY, NEAR = 0.5, 0.5
"""A range is taken if its distance is less than this share of that of standardized images, and less than that."""


def trained_range(model: nn.Module, example: Tensor, pixels: Pixels) -> tuple[Pixels, str]:
    """The pixels that a network remembers, and why they are others than ``pixels``.

    Args:
        model: Runs on the example.
        example: Images of the right size, ``(N, channels, height, width)``.
        pixels: Those that are taken where nothing speaks for others.

    Returns:
        ``pixels`` and no reason where the network's configuration says what it takes, where no common range fits
        clearly better, or where there are no statistics.
    """
    watched = Watched(model, example) if normalization_of(model) is None else None
    if watched is None or not watched.aims:
        return pixels, ""
    choices = {
        STANDARD: pixels,
        **{name: _between(low, high, example.shape[1]) for name, (low, high) in RANGES.items()},
    }
    found: dict[str, float] = {}
    for name, choice in choices.items():
        size = example.shape[1], example.shape[2], example.shape[3]
        leaves = Leaves().draw(LOOKED_AT, size, torch.Generator().manual_seed(0), choice).to(example)
        with torch.no_grad():
            distances, _ = watched.look(leaves)
        found[name] = float(torch.stack(distances[:FIRST]).mean())
    best = min(found, key=lambda name: found[name])
    if not found[best] < min(CLEARLY * found[STANDARD], NEAR):
        return pixels, ""
    return choices[best], (
        f"pixels from {best}: their distance from the first BatchNorm statistics is {found[best]:.2f}, "
        f"that of standardized ones {found[STANDARD]:.2f}"
    )


def _between(low: float, high: float, channels: int) -> Pixels:
    values = low + MIDDLE * (high - low), SPREAD * (high - low), low, high
    return Pixels(*((value,) * channels for value in values))

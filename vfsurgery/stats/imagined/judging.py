"""What networks find on images that were made for them, and how the images differ from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vfsurgery.stats.imagined.report import Looks

ALIKE = 0.99
"""Cosine, of images without their means, from which on two are near-duplicates."""
GRAIN = 16
"""Images are compared at this many points a side."""


def looks_of(images: Tensor, logits: Sequence[Tensor | None]) -> Looks:
    """Compare images with each other, and the logits ``(N, classes)`` of all sources on them.

    >>> images, logits = torch.randn(4, 3, 8, 8), torch.eye(4)
    >>> looks_of(torch.cat([images, images[:1]]), [logits[[0, 1, 2, 3, 0]]] * 2)
    Looks(images=5, agreement=1.0, classes=4, within=0.0, duplicates=1)
    """
    duplicates = count_duplicates(images)
    known = [each.double().cpu() for each in logits if each is not None]
    if not known or len(known) < len(logits) or len({each.shape for each in known}) > 1:
        return Looks(len(images), None, None, None, duplicates)
    found = torch.stack([each.argmax(1) for each in known])
    mean = torch.stack(known).mean(0)
    agreement = float((found == found[0]).all(0).double().mean())
    classes = mean.argmax(1)
    return Looks(len(images), agreement, len(classes.unique()), _within(mean, classes), duplicates)


def count_duplicates(images: Tensor) -> int:
    """How many images hardly differ from an earlier one, but for brightness and contrast; flat ones are all alike.

    >>> count_duplicates(torch.cat([torch.ones(2, 1, 2, 2), torch.randn(1, 1, 2, 2)]))
    1
    """
    height, width = (min(side, GRAIN) for side in images.shape[2:])
    rows = functional.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    scale = centred.norm(dim=1, keepdim=True)
    flat = scale.squeeze(1) <= 1e-6 * rows.norm(dim=1).clamp_min(1e-6)
    centred = (centred / scale.clamp_min(1e-12)).masked_fill(flat.unsqueeze(1), 0)
    alike = (centred @ centred.T).tril(-1) > ALIKE
    alike |= (flat.unsqueeze(1) & flat).tril(-1)
    return int(alike.any(1).sum())


def _within(logits: Tensor, classes: Tensor) -> float:
    """Share of the variance that lies within classes."""
    total = (logits - logits.mean(0)).square().sum()
    inside = torch.stack(
        [(own - own.mean(0)).square().sum() for own in (logits[classes == each] for each in classes.unique())]
    )
    return float(inside.sum() / total) if total > 0 else 0.0

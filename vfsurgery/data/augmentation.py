"""Random changes of training images that leave their class as it is, drawn from a generator of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Move every image by up to ``padding`` pixels each way, and mirror every second one left to right.

    What moves in from outside is zero, the mean colour of standardised images.

    Args:
        images: (N, C, H, W), anywhere.
        generator: On the CPU; draws the same whatever device the images are on.
        padding: Largest shift.

    Returns:
        New images of the same shape.

    >>> images = torch.arange(4.0).view(1, 1, 2, 2)
    >>> crop_and_flip(images, torch.Generator().manual_seed(1), padding=0)
    tensor([[[[1., 0.],
              [3., 2.]]]])
    """
    count, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    rows = shifts[0, :, None] + torch.arange(height)  # (N, H)
    columns = shifts[1, :, None] + torch.arange(width)  # (N, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (N, H, W, C), for the index to pick whole pixels
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()

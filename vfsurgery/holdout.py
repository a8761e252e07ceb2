"""Images that no statistic sees: every fifth one is held out where a step has to choose something on data.

A choice judged on the images that matching and statistics were fitted to would be flattered, and one judged on a test
set spoils that test set. So calibration data is split, by the place of each image in its order and not at random:
data that gives the same order on each pass is split alike on each, and data sorted by class keeps its shares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vfsurgery.batches import Batches
from vfsurgery.errors import DataError, explain

EVERY = 5
"""One image in so many is held out."""


class Part:
    """The held-out images of some batches, or the rest, without labels; a batch with nothing left is skipped."""

    def __init__(self, batches: Batches, every: int, held_out: bool) -> None:
        self.batches, self.every, self.held_out = batches, every, held_out

    def __len__(self) -> int:
        """The number of batches, for progress bars."""
        length = self.batches.length()
        if length is None:
            raise TypeError("the data does not say how many batches it has")
        return length

    def __iter__(self) -> Iterator[Tensor]:
        """One pass, on whatever device the batches are."""
        seen, found = 0, False
        for images, _ in self.batches:
            places = torch.arange(seen, seen + len(images))
            chosen = ((places % self.every == self.every - 1) == self.held_out).nonzero().flatten().to(images.device)
            seen += len(images)
            if len(chosen):
                found = True
                yield images[chosen]
        if not found:
            raise DataError(
                explain(
                    "the data is too small to hold images out",
                    images=seen,
                    expected=f"at least {self.every}: one in {self.every} is held out",
                    remedy="pass more images",
                )
            )


def split(data: Batches | None, every: int = EVERY) -> tuple[Batches, Batches]:
    """Split data into what statistics may see and what is held out, one image in ``every``.

    Data whose loader shuffles anew on each pass is split anew on each pass, too.

    Raises:
        DataError: there is no data.

    >>> rest, held_out = split(Batches(torch.arange(12.0).view(12, 1, 1, 1)))
    >>> [images.flatten().tolist() for images, _ in held_out]
    [[4.0, 9.0]]
    >>> sum(len(images) for images, _ in rest)
    10
    """
    if data is None:
        raise DataError(
            explain(
                "a step chooses on held-out images, and there is no data",
                remedy="pass data=, or choose yourself, as in RemoveBiases(layers=...)",
            )
        )
    rest, held_out = (Batches(Part(data, every, part)) for part in (False, True))
    return rest, held_out

"""Images that no statistic sees: every fifth one is held out where a step has to choose something on data.

A choice judged on the images that matching and statistics were fitted to would be flattered, and one judged on a test
set spoils that test set. So calibration data is split, by the place of each image in its order and not at random:
data that gives the same order on each pass is split alike on each, and data sorted by class keeps its shares. Images
that a model computes together are held out together.

Where whole merges are compared, a fifth of a small set is too few to tell good ones apart: on 59 of 297 digits, four
ways agreed with the ensemble on all, 2.6 points apart in accuracy. So up to half is held out, as long as enough is
left. On the trained digits pairs, statistics of 148 images instead of 238 cost the regression 0.1 points, but 100
instead of 160 cost 0.3, and 50 instead of 80 cost 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vfsurgery.data.batches import Batches
from vfsurgery.errors import DataError, explain

EVERY = 5
"""One image in so many is held out, where there are many."""
SHARES = (EVERY, 4, 3, 2)
"""What else it may be where merges are compared."""
WANTED = 200
"""So many images are then held out where the data has them and may spare them."""
LEFT = 140
"""So many are left for the statistics before more than a fifth is held out."""


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
        seen, found, together = 0, False, self.batches.together
        for images, _ in self.batches:
            places = torch.arange(seen, seen + len(images)) // together
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
                    expected=f"at least {self.every * together}: one in {self.every} is held out"
                    + (f", {together} together" if together > 1 else ""),
                    remedy="pass more images",
                )
            )


class First:
    """The first images of some batches, without labels."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Iterator[Tensor]:
        """One pass, which reads no more than it needs."""
        left = self.count
        for images, _ in self.batches:
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return


class Interleaved:
    """The images of several data in turns, without labels, so that every batch has some of each as long as there are.

    Those that belong together stay together.

    >>> both = Interleaved([Batches(torch.full((3, 1), float(value))) for value in (1, 2)])
    >>> [images.flatten().tolist() for images in both]
    [[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]
    >>> pairs = Interleaved([Batches(torch.full((4, 1), float(value)), together=2) for value in (1, 2)])
    >>> [images.flatten().tolist() for images in pairs]
    [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        """The number of batches, for progress bars."""
        lengths = [part.length() for part in self.parts]
        if None in lengths:
            raise TypeError("the data does not say how many batches it has")
        return sum(length or 0 for length in lengths)

    def __iter__(self) -> Iterator[Tensor]:
        """One pass."""
        running, together = [iter(part) for part in self.parts], self.parts[0].together
        while found := [images for images, _ in (next(each, (None, None)) for each in running) if images is not None]:
            places = torch.cat([torch.arange(len(images)) // together for images in found])
            mixed = torch.cat([*found])[places.argsort(stable=True).to(found[0].device)]
            yield from mixed.split(-(-len(mixed) // (len(found) * together)) * together)


def first(data: Batches, count: int) -> Batches | None:
    """The first ``count`` images; ``None`` where the data has not at least twice as many.

    >>> few = first(Batches(torch.zeros(300, 1, 1, 1)), 150)
    >>> few and [len(images) for images, _ in few]
    [128, 22]
    >>> first(Batches(torch.zeros(300, 1, 1, 1)), 151)
    """
    seen = 0
    for images, _ in data:
        seen += len(images)
        if seen >= 2 * count:
            return data.like(First(data, count))
    return None


def every_for(data: Batches) -> int:
    """One image in how many is to be held out for merges to be compared; reads as much as decides that.

    >>> [every_for(Batches(torch.zeros(count, 1, 1, 1))) for count in (100, 200, 300, 600, 1000, 5000)]
    [5, 4, 2, 3, 5, 5]
    """
    seen = 0
    for images, _ in data:
        seen += len(images)
        if seen >= EVERY * WANTED:
            break
    enough = (every for every in SHARES if seen // every >= WANTED)
    spared = (every for every in reversed(SHARES) if seen - seen // every >= LEFT)
    return next(enough, next(spared, EVERY))


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
    rest, held_out = (data.like(Part(data, every, part)) for part in (False, True))
    return rest, held_out


def mixed(parts: Sequence[Batches]) -> Batches:
    """Several data as one: see :class:`Interleaved`."""
    return parts[0].like(Interleaved(parts))

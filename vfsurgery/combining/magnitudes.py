"""The largest of all numbers of a task vector, exactly, without ever holding it.

Magnitudes sort like the bit patterns of float32. One pass counts their upper 16 bits, another the lower 16 of those
that share the threshold's upper ones: two passes and 2^17 counters give the very threshold that sorting would, and how
many numbers equal it. Only where more of these than are needed is a third pass made, to keep the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

HALF = 1 << 16
Place = tuple[str, int]
"""Name of a tensor and where in it a part begins."""
Parts = Callable[[], Iterable[tuple[Place, Tensor]]]
"""Goes through all numbers, the same each time, each part with its place."""


@dataclass(frozen=True)
class Threshold:
    """What is kept: all numbers of a greater magnitude than ``bits`` says, and of those that equal it all, or the
    first.

    ``first`` says how many come into question in each part, where not all do.
    """

    bits: int
    first: Mapping[Place, int] | None = field(default=None, repr=False)

    def keep(self, place: Place, values: Tensor) -> Tensor:
        """Which numbers of a part are kept."""
        bits = magnitude_bits(values)
        if self.first is None:
            return (bits >= self.bits).reshape(values.shape)
        kept, allowed = bits > self.bits, self.first[place]
        if allowed:
            equal = bits == self.bits
            kept |= equal & (equal.cumsum(0) <= allowed)
        return kept.reshape(values.shape)


def largest(parts: Parts, keep: int) -> Threshold:
    """The threshold that keeps exactly ``keep`` numbers, those of largest magnitude; ties go by place.

    >>> values = torch.tensor([3.0, -1.0, 2.0, 1.0])
    >>> found = largest(lambda: [(("w", 0), values)], keep=3)
    >>> found.keep(("w", 0), values)
    tensor([ True,  True,  True, False])
    """
    if keep <= 0:
        return Threshold(0x7FFFFFFF)  # more than infinity; as int32, which what is compared has
    high = torch.zeros(HALF, dtype=torch.int64)
    for _, part in parts():
        high += torch.bincount(magnitude_bits(part) >> 16, minlength=HALF)
    bucket, above = _reached(high, keep)
    low = torch.zeros(HALF, dtype=torch.int64)
    for _, part in parts():
        bits = magnitude_bits(part)
        low += torch.bincount(bits[(bits >> 16) == bucket] & (HALF - 1), minlength=HALF)
    place, above_there = _reached(low, keep - above)
    bits, ties = (bucket << 16) | place, keep - above - above_there
    if ties == int(low[place]) or not bits:  # zeros may all be kept
        return Threshold(bits)
    return Threshold(bits, dict(_first(parts, bits, ties)))


def _first(parts: Parts, bits: int, ties: int) -> Iterator[tuple[Place, int]]:
    for place, part in parts():
        found = min(ties, int((magnitude_bits(part) == bits).sum()))
        ties -= found
        yield place, found


def _reached(counts: Tensor, keep: int) -> tuple[int, int]:
    """From the top: the counter at which ``keep`` is reached, and how many lie above it."""
    upward = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(upward, keep)), len(counts) - 1)
    return len(counts) - 1 - place, int(upward[place] - counts[len(counts) - 1 - place])


def magnitude_bits(values: Tensor) -> Tensor:
    """The bit patterns of magnitudes in float32, flat, int32, on the CPU."""
    return values.detach().to("cpu", torch.float32).reshape(-1).view(torch.int32) & 0x7FFFFFFF


def count_of(share: float, total: int) -> int:
    """``floor(share * total)``, of the number as it is written: 0.29 of 100 are 29.

    >>> count_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(Fraction(repr(float(share))) * total)

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
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits: TypeAlias = "npt.NDArray[np.int32]"
HALF = 1 << 16
MOST = 1 << 22
"""Counters for all sources together: 16 MiB."""
Place = tuple[str, int]
"""Name of a tensor and where in it a part begins."""
Parts = Callable[[], Iterable[tuple[Place, Tensor]]]
"""Goes through all numbers, the same each time, each part with its place."""


@dataclass(frozen=True)
class Threshold:
    """What is kept: all numbers of a greater magnitude than ``bits`` says, and of those that equal it all, or the
    first.

    ``first`` says how many come into question in each part, where not all do; it is found out on the way where
    ``left`` says how many there are: the first time, parts come in their order.
    """

    bits: int
    first: Mapping[Place, int] | None = field(default=None, repr=False)
    left: list[int] = field(default_factory=list[int], repr=False)

    def keep(self, place: Place, values: Tensor) -> Tensor:
        """Which numbers of a part are kept."""
        bits = magnitude_bits(values)
        if self.first is None:
            return (bits >= self.bits).reshape(values.shape)
        kept, allowed = bits > self.bits, self._allowed(place, values)
        if allowed:
            equal = bits == self.bits
            kept |= equal & (equal.cumsum(0) <= allowed)
        return kept.reshape(values.shape)

    def trim_(self, place: Place, values: Tensor) -> None:
        """Set to zero what of a part is not kept."""
        limit = torch.tensor(self.bits, dtype=torch.int32).view(torch.float32)
        if values.dtype == torch.float32 and self.bits and limit.isfinite():  # at once, without masks
            allowed = None if self.first is None else self._allowed(place, values)
            if allowed is None or allowed == _equal(values, self.bits):
                limit = torch.tensor(self.bits - 1, dtype=torch.int32).view(torch.float32)
            elif allowed:
                values.mul_(self.keep(place, values).to(values.device))
                return
            torch.ops.aten.hardshrink.out(values, float(limit), out=values)
        else:
            values.mul_(self.keep(place, values).to(values.device))

    def _allowed(self, place: Place, values: Tensor) -> int:
        assert self.first is not None
        if place not in self.first:
            found = min(self.left[0], _equal(values, self.bits))
            self.left[0] -= found
            cast("dict[Place, int]", self.first)[place] = found
        return self.first[place]


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


def largest_of_each(
    parts: Parts, keep: int, total: int, sources: int, sample: Iterable[Tensor] = ()
) -> list[Threshold]:
    """As :func:`largest` for several sources, in one pass where a sample shows about where the thresholds lie.

    Args:
        parts: Goes through all numbers, those of all sources along a first dim.
        keep: How many of each are kept.
        total: How many there are of each.
        sources: How many sources there are.
        sample: Some of the numbers, in the same form.

    Returns:
        For each source what is kept. Ties are counted when parts are trimmed for the first time, in their order.
    """
    drawn = [magnitudes(part) for part in sample]
    around: list[tuple[int, int]] = []
    if drawn and 0 < keep < total:
        ranks = np.sort(np.concatenate(drawn, axis=1), axis=1)
        brackets = (_bracket(row, keep / total, MOST // sources) for row in ranks)
        around = [bracket for bracket in brackets if bracket]
    del drawn
    if len(around) < sources:
        return [_alone(parts, source, keep) for source in range(sources)]
    above = [0] * sources
    counts = [np.zeros(high - low, dtype=np.int32) for low, high in around]
    waiting: list[list[Bits]] = [[] for _ in range(sources)]

    def count(source: int) -> None:
        found = np.concatenate(waiting[source])
        counts[source] += np.bincount(found, minlength=len(counts[source])).astype(np.int32)
        waiting[source] = []

    for _, part in parts():
        for source, (bits, (low, high)) in enumerate(zip(magnitudes(part), around, strict=True)):
            above[source] += int(np.count_nonzero(bits >= high))
            bits -= low
            # as unsigned numbers what lies below is beyond all others
            waiting[source].append(bits[bits.view(np.uint32) < np.uint32(high - low)])
            if sum(map(len, waiting[source])) >= HALF:
                count(source)
    found: list[Threshold] = []
    for source, (low, _) in enumerate(around):
        count(source)
        there = torch.from_numpy(counts[source].astype(np.int64))
        missing = keep - above[source]
        if not 0 < missing <= int(there.sum()):  # the sample was misleading
            found.append(_alone(parts, source, keep))
            continue
        place, above_there = _reached(there, missing)
        ties = missing - above_there
        found.append(Threshold(low + place, None if ties == int(there[place]) else {}, [ties]))
    return found


def _alone(parts: Parts, source: int, keep: int) -> Threshold:
    return largest(lambda: ((place, part[source]) for place, part in parts()), keep)


def _bracket(ranked: Bits, share: float, most: int) -> tuple[int, int] | None:
    """Bit patterns between which the threshold lies in all likelihood; none where these are too many."""
    for margin in (0.01, 0.003):
        low, high = (int((1 - share + side) * len(ranked)) for side in (-margin, margin))
        if low >= 0 and high < len(ranked) and 0 < ranked[high] - ranked[low] < most and ranked[low] > 0:
            return int(ranked[low]), int(ranked[high])
    return None


def _first(parts: Parts, bits: int, ties: int) -> Iterator[tuple[Place, int]]:
    for place, part in parts():
        found = min(ties, _equal(part, bits))
        ties -= found
        yield place, found


def _reached(counts: Tensor, keep: int) -> tuple[int, int]:
    """From the top: the counter at which ``keep`` is reached, and how many lie above it."""
    upward = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(upward, keep)), len(counts) - 1)
    return len(counts) - 1 - place, int(upward[place] - counts[len(counts) - 1 - place])


def magnitudes(values: Tensor) -> Bits:
    """The same as NumPy's int32, in the shape of ``values``: its comparisons are many times faster."""
    return values.detach().to("cpu", torch.float32).contiguous().view(torch.int32).numpy() & np.int32(0x7FFFFFFF)


def _equal(values: Tensor, bits: int) -> int:
    return int(np.count_nonzero(magnitudes(values) == np.int32(bits)))


def magnitude_bits(values: Tensor) -> Tensor:
    """The bit patterns of magnitudes in float32, flat, int32, on the CPU."""
    return torch.from_numpy(magnitudes(values).reshape(-1))


def count_of(share: float, total: int) -> int:
    """``floor(share * total)``, of the number as it is written: 0.29 of 100 are 29.

    >>> count_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(Fraction(repr(float(share))) * total)

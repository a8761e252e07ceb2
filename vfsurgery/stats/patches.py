"""Means and covariances of what a layer reads, patch by patch, with what it should put out, without unfolding patches.

A convolution with ``k`` taps along a dim multiplies each pixel with those up to ``k - 1`` places before and after it.
In the second moments of unfolded patches each such product stands many times: the block of taps ``(i, j)`` is that of
``(i + 1, j + 1)`` but for the borders. Here products are formed once per distance along the first spatial dim,
borders apart, and added to all the blocks that they belong to; along the other dims the map is unfolded. For a kernel
of ``k x k`` that is ``k`` products of matrices that are ``k`` times smaller, a ``k``-th of the work.

Maps are read about the first batch's mean per channel, and a channel of ones counts where there is no padding. So
products of float32 numbers lose nothing to a large mean; they are summed in float64, and centred at the end, exactly.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from vfsurgery.tracing.ops import Op

Taps: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs of taps ``i <= j`` of the first dim, whose blocks a product belongs to."""


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input along its spatial dims; ``padding`` is before and after."""

    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    padding: tuple[tuple[int, int], ...] = ((0, 0),)
    mode: str = "zeros"

    @staticmethod
    def of(op: Op) -> Geometry:
        """That of a convolution."""
        weight = op.param("weight", 1)
        assert weight is not None
        kernel, dims = tuple(weight.shape[2:]), len(weight.shape) - 2
        stride, dilation = (_per_dim(op.argument(*option), dims) for option in (("stride", 3, 1), ("dilation", 5, 1)))
        padding: Any = op.argument("padding", 4, 0)
        if padding == "same":
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            amounts = tuple((total // 2, total - total // 2) for total in totals)
        else:
            amounts = tuple((amount, amount) for amount in _per_dim(0 if padding == "valid" else padding, dims))
        return Geometry(kernel, stride, dilation, amounts, op.argument("padding_mode", 99, "zeros"))

    def padded(self, value: Tensor) -> tuple[Tensor, Geometry]:
        """A map and its geometry with what is not padded by zeros padded for real."""
        flat = list(itertools.chain.from_iterable(reversed(self.padding)))
        if self.mode == "zeros" or not any(flat):
            return value, self
        none = ((0, 0),) * len(self.kernel)
        return functional.pad(value, flat, mode=self.mode), Geometry(self.kernel, self.stride, self.dilation, none)

    def live(self, dim: int, size: int, count: int) -> frozenset[int]:
        """The taps along a dim of ``size`` that see more than padding from any of ``count`` outputs."""
        taps = range(self.kernel[dim])
        places = [(tap, self.place(dim, output, tap)) for tap in taps for output in range(count)]
        return frozenset(tap for tap, place in places if 0 <= place < size)

    def place(self, dim: int, output: int, tap: int) -> int:
        """Where a tap of an output looks; outside of the map is padding."""
        return output * self.stride[dim] + tap * self.dilation[dim] - self.padding[dim][0]


Box: TypeAlias = tuple[tuple[int, int], ...]
"""First output and number of outputs along each spatial dim."""


class PatchSums:
    """Sums of products of patches and goals over batches.

    Args:
        geometry: How the layer reads its input.
        shapes: Shapes of the inputs, ``(images, channels, spatial...)``, and of the outputs, of all batches to come:
            taps that see nothing but padding in any are left out.
    """

    def __init__(self, geometry: Geometry, shapes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.geometry = geometry
        live: list[set[int]] = [set() for _ in geometry.kernel]
        grown = [a + b if geometry.mode != "zeros" else 0 for a, b in geometry.padding]
        plain = Geometry(geometry.kernel, geometry.stride, geometry.dilation, ((0, 0),) * len(grown))
        for inputs, outputs in set((tuple(a), tuple(b)) for a, b in shapes):
            for dim, found in enumerate(live):
                seen = plain if grown[dim] else geometry
                found |= seen.live(dim, inputs[2 + dim] + grown[dim], outputs[2 + dim])
        self._rows = sorted(live[0])
        self._taps = list(itertools.product(*(sorted(taps) for taps in live[1:])))
        self._products: dict[Taps, Tensor] = {}
        self._crossed: dict[int, Tensor] = {}
        self._offsets: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def add(self, value: Tensor, goals: Tensor, box: Box) -> None:
        """Add a batch.

        Args:
            value: The layer's inputs, ``(images, channels, spatial...)``.
            goals: What its outputs in ``box`` should be, ``(units, box's first dim, images, other dims of box...)``.
            box: Which outputs are looked at.
        """
        value, geometry = self.geometry.padded(value)
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        goals = goals.to(torch.promote_types(goals.dtype, torch.float32))
        if self._offsets is None:
            self._offsets = value.mean([dim for dim in range(value.ndim) if dim != 1]), goals.flatten(1).mean(1)
        steps = _steps(geometry, value.shape[2], box[0])
        patches = self._unfold(value - _wide(self._offsets[0], value.ndim - 1), geometry, steps.rows, box[1:])
        each = patches[0, 0, 0].numel()  # samples per row
        flat = patches.flatten(2).flatten(0, 1)  # (taps * (channels + 1), rows * each)
        ones = torch.ones_like(goals[:1])
        aims = torch.cat([goals - _wide(self._offsets[1], goals.ndim), ones]).flatten(1)
        self.count += aims.shape[1]
        for start, stop, partner, taps in steps.products:
            a, b = flat[:, start * each : stop * each], flat[:, partner * each : (partner + stop - start) * each]
            _add(self._products, taps, a @ b.T)
        for tap, output, row, count in steps.reads:
            read = flat[:, row * each : (row + count) * each]
            _add(self._crossed, tap, aims[:, output * each : (output + count) * each] @ read.T)
        squares = torch.linalg.vecdot(aims, aims).double()
        _add(self._crossed, -1, torch.stack([aims.sum(1, dtype=torch.float64), squares]))

    def _unfold(self, value: Tensor, geometry: Geometry, rows: Sequence[int], box: Box) -> Tensor:
        """What the outputs in a box see, ``(taps, channels + 1, rows, images, outputs...)``, the last channel ones."""
        shape = (len(self._taps), value.shape[1] + 1, len(rows), len(value), *(count for _, count in box))
        patches = value.new_zeros(shape)
        ordered = list(range(rows[0], rows[0] + len(rows))) == list(rows)
        value = (
            value[:, :, rows[0] : rows[-1] + 1]
            if ordered
            else value.index_select(2, torch.tensor(rows, device=value.device))
        )
        for number, taps in enumerate(self._taps):
            targets, origins = [], []
            for dim, (tap, (first, count)) in enumerate(zip(taps, box, strict=True), start=1):
                stride, size = geometry.stride[dim], value.shape[2 + dim]
                place = geometry.place(dim, first, tap)
                start = max(0, -(place // stride))  # the first output that sees the map
                stop = max(start, min(count, -((place - size) // stride)))
                targets.append(slice(start, stop))
                origins.append(slice(place + start * stride, max(place + (stop - 1) * stride + 1, 0), stride))
            target = patches[(number, slice(None), slice(None), slice(None), *targets)]
            target[:-1] = value[(slice(None), slice(None), slice(None), *origins)].movedim(0, 2)
            target[-1] = 1
        return patches

    def moments(self) -> PatchMoments:
        """What was gathered, about the means."""
        assert self._offsets is not None
        offset, goal_offset = (offset.double() for offset in self._offsets)
        channels, rows, taps = len(offset), self._rows, len(self._taps)
        width = taps * (channels + 1)
        like = next(iter(self._products.values()))
        products = like.new_zeros(len(rows), width, len(rows), width)
        for pairs, total in self._products.items():
            for i, j in pairs:
                products[rows.index(i), :, rows.index(j)] += total
        for i, j in itertools.combinations(range(len(rows)), 2):
            products[j, :, i] = products[i, :, j].T
        tapped = products.view(len(rows) * taps, channels + 1, len(rows) * taps, channels + 1)
        crossed = torch.stack([self._crossed.get(row, like.new_zeros(len(goal_offset) + 1, width)) for row in rows], 1)
        crossed = crossed.reshape(len(goal_offset) + 1, len(rows) * taps, channels + 1)
        second, cross, mean = _about_zero(tapped, crossed, offset)
        totals, squares = self._crossed[-1]
        goal_mean = totals[:-1] / self.count
        mean, cross = mean / self.count, cross[:-1] / self.count
        second = second.div_(self.count).sub_(torch.outer(mean, mean))
        return PatchMoments(
            self.count,
            self._columns(channels, like.device),
            mean,
            second,
            goal_offset + goal_mean,
            squares[:-1] / self.count - goal_mean.square(),
            cross - torch.outer(goal_mean, mean),
        )

    def _columns(self, channels: int, device: torch.device) -> Tensor:
        """Which columns of the layer's flattened weight the taps and channels are, in the order of the moments."""
        kernel = self.geometry.kernel
        taps = [
            sum(tap * math.prod(kernel[dim + 1 :]) for dim, tap in enumerate((row, *rest)))
            for row in self._rows
            for rest in self._taps
        ]
        places = torch.tensor(taps, device=device)[:, None]
        return (torch.arange(channels, device=device) * math.prod(kernel) + places).flatten()


@dataclass(frozen=True)
class PatchMoments:
    """Moments of what a layer reads and of its goals, float64, over ``count`` outputs.

    ``columns`` says which columns of the flattened weight the inputs here are: those that see more than padding.
    """

    count: int
    columns: Tensor  # (inputs,)
    mean: Tensor  # (inputs,)
    covariance: Tensor  # (inputs, inputs)
    goal_mean: Tensor  # (units,)
    goal_variance: Tensor  # (units,)
    cross: Tensor  # (units, inputs), covariance of goals with inputs

    def take(self, kept: Tensor) -> PatchMoments:
        """Without some of the inputs."""
        return PatchMoments(
            self.count,
            self.columns[kept],
            self.mean[kept],
            self.covariance[kept][:, kept],
            self.goal_mean,
            self.goal_variance,
            self.cross[:, kept],
        )


def _about_zero(products: Tensor, crossed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of products, of goals times inputs, and of inputs, with the channels' offset given back where maps are.

    ``products`` is ``(taps, channels + 1, taps, channels + 1)``, ``crossed`` ``(units + 1, taps, channels + 1)``; the
    last channel and the last unit are ones.
    """
    taps, channels = len(products), len(offset)
    wide = offset.view(1, channels, 1, 1)
    second = products[:, :-1, :, :-1].clone()
    second.addcmul_(wide, products[:, -1:, :, :-1])
    second.addcmul_(offset, products[:, :-1, :, -1:])
    second.addcmul_(wide * offset, products[:, -1:, :, -1:])
    cross = crossed[:, :, :-1] + crossed[:, :, -1:] * offset
    size = taps * channels
    return second.view(size, size), cross.flatten(1), cross[-1].flatten()


@dataclass(frozen=True)
class _Steps:
    """What to multiply along the first dim, ``rows`` of the map being laid out one after the other.

    ``products``: rows from a first to a last with as many from a third on, and whose blocks that is; ``reads``: a tap,
    a first output, the row it reads, and how many follow them.
    """

    rows: tuple[int, ...]
    products: tuple[tuple[int, int, int, Taps], ...]
    reads: tuple[tuple[int, int, int, int], ...]


@functools.lru_cache(maxsize=256)
def _steps(geometry: Geometry, size: int, outputs: tuple[int, int]) -> _Steps:
    first, count = outputs
    kernel, stride = geometry.kernel[0], geometry.stride[0]
    read = [[geometry.place(0, first + output, tap) for output in range(count)] for tap in range(kernel)]
    seen = {row for rows in read for row in rows if 0 <= row < size}
    rows = sorted(seen, key=lambda row: (row % stride, row))  # so that what one tap reads lies side by side
    at = {row: place for place, row in enumerate(rows)}
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in itertools.combinations_with_replacement(range(kernel), 2):
        for row, other in zip(read[i], read[j], strict=True):
            if row in at and other in at:
                blocks.setdefault((other - row, at[row]), []).append((i, j))
    products: list[tuple[int, int, int, Taps]] = []
    for distance, place in sorted(blocks):
        taps, partner = tuple(blocks[distance, place]), at[rows[place] + distance]
        if products:
            start, stop, begun, before = products[-1]
            if before == taps and place == stop and partner == begun + stop - start:
                products[-1] = (start, place + 1, begun, taps)
                continue
        products.append((place, place + 1, partner, taps))
    reads: list[tuple[int, int, int, int]] = []
    for tap, places in enumerate(read):
        inside = [output for output, row in enumerate(places) if row in at]
        if inside:
            reads.append((tap, inside[0], at[places[inside[0]]], len(inside)))
    return _Steps(tuple(rows), tuple(products), tuple(reads))


def _add(totals: dict[Any, Tensor], key: Any, found: Tensor) -> None:
    if key in totals:
        totals[key] += found
    else:
        totals[key] = found.double()


def _wide(values: Tensor, dims: int) -> Tensor:
    return values.view(-1, *[1] * (dims - 1))


def _per_dim(given: Any, dims: int) -> tuple[int, ...]:
    return tuple(given) * (dims if len(given) == 1 else 1) if isinstance(given, tuple | list) else (given,) * dims

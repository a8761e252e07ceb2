"""Ops that join tensors or pick parts of them: concatenation, chunks, slices, repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vfsurgery.axes import Concat, Constraint, Fixed, Product, Take, TensorRef, indifferent, tie, tie_all
from vfsurgery.rules.registry import rule
from vfsurgery.tracing.ops import Op


@rule("cat", "concat", "concatenate")
def cat(op: Op) -> Iterator[Constraint]:
    """Along ``dim`` the operands lie one after the other; other dims agree."""
    parts = [part for part in op.inputs if part.shape != (0,)]
    dim = op.argument("dim", 1, 0) % op.output.ndim
    yield tie(op.output.axis(dim), Concat(tuple(part.axis(dim) for part in parts)))
    for part in parts:
        yield from tie_all(part, op.output, skip=(dim,))


@rule("stack")
def stack(op: Op) -> Iterator[Constraint]:
    """A new dim numbers the operands; theirs pass through."""
    new = op.argument("dim", 1, 0) % op.output.ndim
    for part in op.inputs:
        for dim, axis in enumerate(part.axes()):
            yield tie(axis, op.output.axis(dim + (dim >= new)))


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(op: Op) -> Iterator[Constraint]:
    """The input along ``dim`` is its pieces one after the other."""
    dim = op.argument("dim", 2, 0) % op.input.ndim
    yield tie(op.input.axis(dim), Concat(tuple(piece.axis(dim) for piece in op.outputs)))
    for piece in op.outputs:
        yield from tie_all(op.input, piece, skip=(dim,))


@rule("unbind")
def unbind(op: Op) -> Iterator[Constraint]:
    """Each result is one index of ``dim``; other dims pass through."""
    removed = op.argument("dim", 1, 0) % op.input.ndim
    kept = [axis for axis in op.input.axes() if axis.dim != removed]
    for piece in op.outputs:
        for axis, own in zip(kept, piece.axes(), strict=True):
            yield tie(axis, own)


@rule("getitem")
def getitem(op: Op) -> Iterator[Constraint]:
    """Indexing: slices choose positions, ``None`` adds a dim, an integer removes one.

    Indices that are tensors choose by data, and an integer picks one position: what they index is pinned.
    """
    index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    if any(isinstance(item, TensorRef | list) for item in index):
        return
    source = op.input
    explicit = sum(item is not None and item is not Ellipsis for item in index)
    fill = (slice(None),) * (source.ndim - explicit)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *fill, *index[place + 1 :])
    else:
        index = (*index, *fill)
    yield from _index(op, source, index)


def _index(op: Op, source: TensorRef, index: tuple[Any, ...]) -> Iterator[Constraint]:
    mine = theirs = 0
    for item in index:
        if item is None:
            theirs += 1
        elif isinstance(item, slice):
            chosen = range(source.shape[mine])[item]
            axis = source.axis(mine)
            yield tie(op.output.axis(theirs), axis if len(chosen) == axis.size else Take(axis, tuple(chosen)))
            mine, theirs = mine + 1, theirs + 1
        else:
            mine += 1


@rule("narrow")
def narrow(op: Op) -> Iterator[Constraint]:
    """A slice along one dim."""
    dim = op.argument("dim", 1) % op.input.ndim
    start, length = op.argument("start", 2), op.argument("length", 3)
    yield tie(op.output.axis(dim), Take(op.input.axis(dim), tuple(range(start, start + length))))
    yield from tie_all(op.input, op.output, skip=(dim,))


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Op) -> Iterator[Constraint]:
    """Dims of size 1 are repeated; the others pass through. Of a second tensor only the shape counts."""
    yield from tie_all(op.input, op.output)
    for shape_giver in op.inputs[1:]:
        yield from map(indifferent, shape_giver.axes())


@rule("repeat", "tile")
def repeat(op: Op) -> Iterator[Constraint]:
    """Each dim is laid out ``k`` times in a row: a product of a fixed ``k`` and the dim."""
    ahead = op.output.ndim - op.input.ndim
    for axis in op.input.axes():
        result = op.output.axis(axis.dim + ahead)
        copies = result.size // axis.size
        yield tie(result, axis if copies == 1 else Product((Fixed(copies, "copies"), axis)))


@rule(nn.ChannelShuffle, "channel_shuffle", "native_channel_shuffle")
def channel_shuffle(op: Op) -> Iterator[Constraint]:
    """``(groups, c)`` channels are laid out as ``(c, groups)``."""
    groups = op.argument("groups", 1)
    channels = op.input.axis(1)
    width = channels.size // groups
    order = tuple(group * width + unit for unit in range(width) for group in range(groups))
    yield tie(op.output.axis(1), Take(channels, order))
    yield from tie_all(op.input, op.output, skip=(1,))


@rule(nn.PixelShuffle, "pixel_shuffle")
def pixel_shuffle(op: Op) -> Iterator[Constraint]:
    """``c * r * r`` channels become ``c`` channels on a map ``r`` times as wide and high."""
    channels = op.output.axis(-3)
    yield tie(op.input.axis(-3), Product((channels, Fixed(op.input.shape[-3] // channels.size, "places in a pixel"))))


@rule(nn.PixelUnshuffle, "pixel_unshuffle")
def pixel_unshuffle(op: Op) -> Iterator[Constraint]:
    """The inverse of a pixel shuffle."""
    channels = op.input.axis(-3)
    yield tie(op.output.axis(-3), Product((channels, Fixed(op.output.shape[-3] // channels.size, "places in a pixel"))))

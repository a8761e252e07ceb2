"""Ops that join tensors, pick parts of them or go along a dim: concatenation, chunks, slices, repeats, sorts, sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from vfsurgery.discovery.rules.registry import rule
from vfsurgery.groups.axes import (
    Concat,
    Constraint,
    Fixed,
    Fresh,
    Product,
    Take,
    TensorRef,
    allows,
    indifferent,
    tie,
    tie_all,
)
from vfsurgery.groups.symmetries import Symmetry
from vfsurgery.tracing.ops import Op
from vfsurgery.tracing.values import VALUE, TensorValue


@rule("cat", "concat", "concatenate")
def cat(op: Op) -> Iterator[Constraint]:
    """Along ``dim`` the operands lie one after the other; other dims agree."""
    parts = [part for part in op.inputs if part.shape != (0,)]
    dim = op.argument("dim", 1, 0) % op.output.ndim
    yield tie(op.output.axis(dim), Concat(tuple(part.axis(dim) for part in parts)))
    for part in parts:
        yield from tie_all(part, op.output, skip=(dim,))
    yield allows(Symmetry.GENERAL_LINEAR, *op.output.axes())


@rule("stack")
def stack(op: Op) -> Iterator[Constraint]:
    """A new dim numbers the operands; theirs pass through."""
    new = op.argument("dim", 1, 0) % op.output.ndim
    for part in op.inputs:
        for dim, axis in enumerate(part.axes()):
            yield tie(axis, op.output.axis(dim + (dim >= new)))
            yield allows(Symmetry.GENERAL_LINEAR, axis)


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(op: Op) -> Iterator[Constraint]:
    """The input along ``dim`` is its pieces one after the other."""
    dim = op.argument("dim", 2, 0) % op.input.ndim
    yield tie(op.input.axis(dim), Concat(tuple(piece.axis(dim) for piece in op.outputs)))
    for piece in op.outputs:
        yield from tie_all(op.input, piece, skip=(dim,))
    yield allows(Symmetry.GENERAL_LINEAR, *op.input.axes())


@rule("unbind")
def unbind(op: Op) -> Iterator[Constraint]:
    """Each result is one index of ``dim``; other dims pass through."""
    removed = op.argument("dim", 1, 0) % op.input.ndim
    kept = [axis for axis in op.input.axes() if axis.dim != removed]
    for piece in op.outputs:
        for axis, own in zip(kept, piece.axes(), strict=True):
            yield tie(axis, own)
    yield allows(Symmetry.GENERAL_LINEAR, *kept)


@rule("getitem")
def getitem(op: Op) -> Iterator[Constraint]:
    """Indexing: slices choose positions, ``None`` adds a dim, an integer or a tensor of indices picks positions.

    What is picked from stays pinned; the dims beside it pass through.
    """
    yield from _index(op.input, op.args[1], op.output)
    yield allows(Symmetry.GENERAL_LINEAR, *op.output.axes())


@rule("setitem")
def setitem(op: Op) -> Iterator[Constraint]:
    """``x[index] = value``: what indexing would read is what the value is written to; it may broadcast."""
    given, value = op.argument("index", 1), op.argument("value", 2)
    if _is_mask(op, given):  # the same everywhere it is true
        if not isinstance(value, TensorRef) or not value.ndim:
            yield from tie_all(given, op.input)
            yield from map(indifferent, op.input.axes())
    elif isinstance(value, TensorRef):
        yield from _index(op.input, given, value)
    elif _plain_slices(given):  # a number, the same everywhere in the dims that are written whole
        index: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            index = (*index[:place], *(slice(None),) * (op.input.ndim - len(index) + 1), *index[place + 1 :])
        for axis in op.input.axes():
            if axis.dim >= len(index) or index[axis.dim] == slice(None):
                yield indifferent(axis)


def _is_mask(op: Op, index: Any) -> bool:
    """Whether something is written where a tensor of truth values of the same shape is true."""
    node = op.node.args[1] if len(op.node.args) > 1 else None
    found = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
    whole = isinstance(index, TensorRef) and index.shape == op.input.shape
    return whole and isinstance(found, TensorValue) and found.dtype == torch.bool


def _plain_slices(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is Ellipsis or isinstance(item, slice | int) for item in items)


def _index(source: TensorRef, given: Any, result: TensorRef) -> Iterator[Constraint]:
    """Tie what ``source[given]`` passes through to ``result``, whose dims are aligned from the last one backwards."""
    index: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    tensors = [item for item in index if isinstance(item, TensorRef)]
    if any(isinstance(item, list) for item in index) or len(tensors) > 1:
        return
    if any(item is True or item is False for item in index):
        return
    explicit = sum(item is not None and item is not Ellipsis for item in index)
    fill = (slice(None),) * (source.ndim - explicit)
    if Ellipsis in [item for item in index if not isinstance(item, TensorRef)]:
        place = next(place for place, item in enumerate(index) if item is Ellipsis)
        index = (*index[:place], *fill, *index[place + 1 :])
    else:
        index = (*index, *fill)
    if tensors and any(isinstance(item, int) for item in index):
        return  # integers and tensors together may move dims to the front
    picked = sum(item is not None and not isinstance(item, TensorRef | int) for item in index)
    picked += sum(item is None for item in index) + sum(tensor.ndim for tensor in tensors)
    if tensors and picked != result.ndim:
        return  # a mask: it takes several dims and gives one
    yield from _pass_through(source, index, result, picked - result.ndim)


def _pass_through(source: TensorRef, index: tuple[Any, ...], result: TensorRef, missing: int) -> Iterator[Constraint]:
    """``missing`` leading dims of what is indexed do not appear in ``result``, against which they broadcast."""
    mine, theirs = 0, -missing
    for item in index:
        if item is None:
            theirs += 1
        elif isinstance(item, slice):
            chosen = range(source.shape[mine])[item]
            axis = source.axis(mine)
            if theirs >= 0 and result.shape[theirs] == len(chosen):
                whole = len(chosen) == axis.size and chosen.step == 1
                yield tie(result.axis(theirs), axis if whole else Take(axis, tuple(chosen)))
            elif len(chosen) == axis.size:
                yield indifferent(axis)  # written whole with values that are the same everywhere
            mine, theirs = mine + 1, theirs + 1
        elif isinstance(item, TensorRef):
            mine, theirs = mine + 1, theirs + item.ndim
        else:
            mine += 1


MOVED_WHOLE = ("index_select", "roll", "flip", "cumsum", "diff")
"""Ops that do the same to each index beside their own dims, and linearly."""


@rule("index_select", "gather", "take_along_dim", "index_add", "index_copy", "scatter", "scatter_add")
@rule("cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "diff", "select", "fft", "ifft", "rfft", "irfft")
@rule("fft2", "ifft2", "rfft2", "irfft2", "fft_rfft2", "fft_irfft2", "fft_fft2", "fft_ifft2")
@rule("fft_rfft", "fft_irfft", "fft_fft", "fft_ifft")
def along_dims(op: Op) -> Iterator[Constraint]:
    """What these ops compute depends on the order along their own dims, which are pinned; others pass through."""
    place: int = 1
    default: Any = None
    if op.key == "topk":
        place, default = 2, -1
    elif op.key in ("roll", "take_along_dim"):
        place = 2
    elif op.key == "diff":
        place, default = 2, -1
    elif op.key in ("sort", "argsort"):
        default = -1
    elif "fft" in str(op.key):
        place, default = 2, (-2, -1) if str(op.key).endswith("2") else -1
    given = op.argument("dims" if op.key in ("flip", "roll") else "dim", place, default)
    if given is None:
        return
    dims = given if isinstance(given, tuple | list) else (given, *(op.args[2:] if op.key == "flip" else ()))
    own = {dim % op.input.ndim for dim in dims}
    if op.key == "select":  # which removes its dim
        kept = [axis for axis in op.input.axes() if axis.dim not in own]
        yield from (tie(axis, result) for axis, result in zip(kept, op.output.axes(), strict=True))
        yield allows(Symmetry.GENERAL_LINEAR, *kept)
        return
    others = [tensor for tensor in (*op.inputs[1:], *op.outputs) if tensor.ndim == op.input.ndim]
    for axis in op.input.axes():
        if axis.dim not in own:
            yield from (tie(axis, other.axis(axis.dim)) for other in others if other.shape[axis.dim] == axis.size)
            if op.key in MOVED_WHOLE:
                yield allows(Symmetry.GENERAL_LINEAR, axis)


@rule(nn.Embedding, "embedding")
def embedding(op: Op) -> Iterator[Constraint]:
    """Rows are picked by number and pinned; the width passes through."""
    table = op.parameters["weight"] if op.module is not None else op.inputs[1]
    indices = op.inputs[0]
    yield tie(table.axis(1), op.output.axis(-1))
    yield allows(Symmetry.GENERAL_LINEAR, op.output.axis(-1))
    for axis in indices.axes():
        yield tie(axis, op.output.axis(axis.dim))


@rule(nn.EmbeddingBag, "embedding_bag")
def embedding_bag(op: Op) -> Iterator[Constraint]:
    """Rows are picked by number, summed, averaged or compared, so they are pinned; the width passes through."""
    table = op.parameters["weight"] if op.module is not None else op.inputs[1]
    yield tie(table.axis(1), op.output.axis(-1))
    if op.input.ndim == 2:
        yield tie(op.input.axis(0), op.output.axis(0))


@rule("triu", "tril")
def triangle(op: Op) -> Iterator[Constraint]:
    """A triangle of the last two dims stays, so that they must not move; dims before them pass through."""
    for axis in op.input.axes()[:-2]:
        yield tie(axis, op.output.axis(axis.dim))


@rule("one_hot")
def one_hot(op: Op) -> Iterator[Constraint]:
    """A number becomes a last dim with a one at its place, which stays put; dims of the numbers pass through."""
    for axis in op.input.axes():
        yield tie(axis, op.output.axis(axis.dim))


@rule("meshgrid")
def meshgrid(op: Op) -> Iterator[Constraint]:
    """Each result repeats one vector along the dims of the others: dim ``i`` runs over vector ``i``.

    Under ``indexing="xy"`` the first two dims are exchanged.
    """
    order = list(range(len(op.inputs)))
    if op.kwargs.get("indexing") == "xy":
        order[:2] = reversed(order[:2])
    for result in op.outputs:
        for dim, place in enumerate(order):
            if op.inputs[place].ndim:
                yield tie(op.inputs[place].axis(0), result.axis(dim))


@rule("unfold", nn.Unfold)
def unfold(op: Op) -> Iterator[Constraint]:
    """As a method, windows along one dim; as a function, windows of a map laid out as ``channel x offsets``."""
    if op.node.op == "call_method":
        dim = op.argument("dimension", 1) % op.input.ndim
        yield from (tie(axis, op.output.axis(axis.dim)) for axis in op.input.axes() if axis.dim != dim)
        return
    channels = op.input.axis(-3)
    yield tie(op.output.axis(-2), Product((channels, Fixed(op.output.shape[-2] // channels.size, "kernel offsets"))))
    yield allows(Symmetry.GENERAL_LINEAR, channels)
    if op.input.ndim == 4:
        yield tie(op.input.axis(0), op.output.axis(0))


@rule("fold", nn.Fold)
def fold(op: Op) -> Iterator[Constraint]:
    """The inverse of a functional unfold: overlapping windows are summed into a map."""
    channels = op.output.axis(-3)
    yield tie(op.input.axis(-2), Product((channels, Fixed(op.input.shape[-2] // channels.size, "kernel offsets"))))
    if op.input.ndim == 3:
        yield tie(op.input.axis(0), op.output.axis(0))


@rule(
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero",
    "fill", "rand_like", "randn_like",
)  # fmt: skip
def filled(op: Op) -> Iterator[Constraint]:
    """The same number everywhere, or one drawn for each place: any order is the right one; only the shape counts."""
    for tensor in (*op.inputs, *op.outputs):
        yield from map(indifferent, tensor.axes())
    yield from (allows(Symmetry.GENERAL_LINEAR, *tensor.axes()) for tensor in op.inputs)


@rule("diagonal", "diag_embed")
def diagonal(op: Op) -> Iterator[Constraint]:
    """Two dims in the same order become one, put last, or the other way round; other dims pass through in order."""
    wide, narrow = (op.input, op.output) if op.key == "diagonal" else (op.output, op.input)
    first = 0 if op.key == "diagonal" else -2
    pair = {op.argument(f"dim{n + 1}", n + 2, first + n) % wide.ndim for n in range(2)}
    if op.argument("offset", 1, 0) or len({wide.shape[dim] for dim in pair}) > 1:
        return
    yield from (tie(wide.axis(dim), narrow.axis(-1)) for dim in pair)
    kept = [axis for axis in wide.axes() if axis.dim not in pair]
    yield from (tie(axis, other) for axis, other in zip(kept, narrow.axes(), strict=False))


@rule("complex", "view_as_real", "view_as_complex", "real", "imag", "polar")
def complex_parts(op: Op) -> Iterator[Constraint]:
    """Real and imaginary part: as tensors of their own, or as a last dim of two that stays where it is."""
    for operand in op.inputs:
        for mine, theirs in zip(operand.axes(), op.output.axes(), strict=False):
            yield tie(mine, theirs)


@rule("narrow")
def narrow(op: Op) -> Iterator[Constraint]:
    """A slice along one dim."""
    dim = op.argument("dim", 1) % op.input.ndim
    start, length = op.argument("start", 2), op.argument("length", 3)
    yield tie(op.output.axis(dim), Take(op.input.axis(dim), tuple(range(start, start + length))))
    yield from tie_all(op.input, op.output, skip=(dim,))
    yield allows(Symmetry.GENERAL_LINEAR, *op.output.axes())


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Op) -> Iterator[Constraint]:
    """Dims of size 1 are repeated, in no particular order; others pass through. Of a second tensor the shape counts."""
    yield from tie_all(op.input, op.output)
    ahead = op.output.ndim - op.input.ndim
    for axis in op.output.axes():
        if axis.dim < ahead or op.input.shape[axis.dim - ahead] != axis.size:
            yield indifferent(axis)
        else:
            yield allows(Symmetry.GENERAL_LINEAR, axis)
    for shape_giver in op.inputs[1:]:
        yield from map(indifferent, shape_giver.axes())
        yield allows(Symmetry.GENERAL_LINEAR, *shape_giver.axes())


@rule("repeat", "tile")
def repeat(op: Op) -> Iterator[Constraint]:
    """Each dim is laid out ``k`` times in a row: a product of ``k`` copies, equal ones, and the dim."""
    ahead = op.output.ndim - op.input.ndim
    yield from (indifferent(axis) for axis in op.output.axes()[:ahead])
    for axis in op.input.axes():
        result = op.output.axis(axis.dim + ahead)
        copies = result.size // axis.size
        yield tie(result, axis if copies == 1 else Product((Fresh(f"copies {axis.dim}", copies), axis)))
        yield allows(Symmetry.GENERAL_LINEAR, axis)


@rule("repeat_interleave")
def repeat_interleave(op: Op) -> Iterator[Constraint]:
    """Each index is repeated in place: a product of the dim and a number of equal copies."""
    copies, dim = op.argument("repeats", 1), op.argument("dim", 2)
    if isinstance(copies, int) and dim is not None:
        dim = dim % op.input.ndim
        yield tie(op.output.axis(dim), Product((op.input.axis(dim), Fresh("copies", copies))))
        yield allows(Symmetry.GENERAL_LINEAR, *op.input.axes())
        yield from (tie(axis, op.output.axis(axis.dim)) for axis in op.input.axes() if axis.dim != dim)


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
    yield allows(Symmetry.GENERAL_LINEAR, channels)


@rule(nn.PixelUnshuffle, "pixel_unshuffle")
def pixel_unshuffle(op: Op) -> Iterator[Constraint]:
    """The inverse of a pixel shuffle."""
    channels = op.input.axis(-3)
    yield tie(op.output.axis(-3), Product((channels, Fixed(op.output.shape[-3] // channels.size, "places in a pixel"))))
    yield allows(Symmetry.GENERAL_LINEAR, channels)

"""Projections that lie in one matrix: queries, keys and values of an attention, and how to take them apart.

Methods that take singular vectors see a packed matrix as one, though its three maps have nothing to do with each other.
What is packed, and in which order of rows, is told by the graph: two runs of rows become units that an op multiplies
with each other and sums over, as queries with keys. Names and shapes tell it of ``nn.MultiheadAttention`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vfsurgery.combining.base import Entry, Kind, Store, check_choice
from vfsurgery.discovery.unification import LocalAxis, Unification
from vfsurgery.errors import OptionError, explain
from vfsurgery.groups.axes import AxisRef, Fresh, Tie, mentioned
from vfsurgery.groups.layouts import Atom, Layout, Run

Packed: TypeAlias = Literal["whole", "split"]
"""Whether packed projections are one matrix or several."""

Parts: TypeAlias = tuple[tuple[int, ...], ...]
"""The rows of each projection."""


def parts_of_graph(solved: Unification, rows: Mapping[str, int]) -> dict[str, Parts]:
    """Which matrices are several projections to queries, keys or values.

    Args:
        solved: What the ops say.
        rows: The dim of the units that each matrix writes.
    """
    compared = _compared(solved)
    found: dict[str, Parts] = {}
    for axis in [*solved.axes]:
        if not isinstance(axis, AxisRef) or axis.tensor.kind != "parameter":
            continue
        if rows.get(axis.tensor.name) == axis.dim:
            parts = _parts(solved.layouts.resolve(solved.layout_of(axis)), compared)
            if len(parts) > 1:
                found[axis.tensor.name] = parts
    return found


def _compared(solved: Unification) -> set[Atom]:
    """Units that an op multiplies with units of another value, and sums over."""
    found: set[Atom] = set()
    for said in solved.said:
        for constraint in said.constraints:
            if not isinstance(constraint, Tie) or not constraint.dual:
                continue
            axes = [*mentioned(constraint)]
            if all(isinstance(axis, Fresh) or axis.tensor.name in solved.roles.reached for axis in axes):
                for axis in axes:
                    known = axis if isinstance(axis, AxisRef) else LocalAxis(said.op.node.name, axis)
                    found.update(solved.atoms(known) if known in solved.axes else ())
    return found


def _parts(layout: Layout, compared: set[Atom]) -> Parts:
    """Rows of queries, of keys, and of what is left; nothing where rows are no such units, or cannot be told apart."""
    pairs = [run for run in layout if not compared.isdisjoint(run.atoms)]
    rest = [run for run in layout if compared.isdisjoint(run.atoms)]
    half = len(pairs) // 2
    if len(pairs) > 2:  # units inside of heads are in several runs, as where positions turn them; alike in both
        first, second = (sorted(_serials(run) for run in some) for some in (pairs[:half], pairs[half:]))
        if first != second:
            return ()
    groups = [pairs[:half], pairs[half:], rest] if len(pairs) > 1 else [pairs, rest]
    if not pairs:
        return ()
    return tuple(tuple(sorted(int(at) for run in group for at in run.at)) for group in groups if group)


def _serials(run: Run) -> tuple[int, ...]:
    return tuple(atom.serial for atom in run.atoms)


def parts_by_name(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Parts | None:
    """The same of a name and shapes: ``None`` where three projections may lie in one, in an order that they do not say.

    >>> parts_by_name("in_proj_weight", {"in_proj_weight": (6, 2), "out_proj.weight": (2, 2)})
    ((0, 1), (2, 3), (4, 5))
    >>> parts_by_name("fc.weight", {"fc.weight": (5, 2)}), parts_by_name("qkv.weight", {"qkv.weight": (6, 2)})
    ((), None)
    """
    shape = shapes[name]
    if len(shape) < 2 or shape[0] != 3 * shape[1] or math.prod(shape[2:]) > 1:
        return ()
    path, _, last = name.rpartition(".")
    if last != "in_proj_weight" or f"{path}.out_proj.weight".lstrip(".") not in shapes:
        return None
    size = shape[1]
    return tuple(tuple(range(start, start + size)) for start in (0, size, 2 * size))


def check_packed(packed: str) -> None:
    """Refuse what is no way to take packed projections.

    Raises:
        OptionError: lists them.
    """
    check_choice("packed", packed, get_args(Packed))


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix, as a tensor of its own; all of them where ``rows`` is ``None``."""

    entry: Entry
    rows: Tensor | None = None


def pieces(entry: Entry, packed: Packed) -> list[Piece]:
    """The matrices that a tensor is to be taken for.

    Raises:
        OptionError: it is to be split, and may hold several in an order that nothing tells.
    """
    parts = entry.trait.parts
    if packed == "whole" or entry.trait.kind is not Kind.MATRIX or parts == ():
        return [Piece(entry)]
    if parts is None:
        raise OptionError(
            explain(
                "whether queries, keys and values lie in one matrix, and in which order, names and shapes do not say",
                tensor=entry.name,
                shape=entry.shape,
                remedy="name the architecture, whose graph tells: model= or --model; or packed='whole'",
            )
        )
    return [_piece(entry, number, torch.tensor(rows)) for number, rows in enumerate(parts)]


def _piece(entry: Entry, number: int, rows: Tensor) -> Piece:
    dim = 1 - entry.trait.reads
    shape = tuple(len(rows) if at == dim else size for at, size in enumerate(entry.shape))

    def only(store: Store) -> Store:
        return Rows(store, entry.name, entry.shape, dim, rows)

    piece = replace(
        entry,
        name=f"{entry.name}, part {number}",
        shape=shape,
        trait=replace(entry.trait, parts=()),
        stores=[only(store) for store in entry.stores],
        base=None if entry.base is None else only(entry.base),
        start=0,
        stop=math.prod(shape),
    )
    return Piece(piece, rows)


@dataclass(frozen=True)
class Rows:
    """Some rows of one tensor of a :class:`Store`, whatever name they are asked for by."""

    store: Store = field(repr=False)
    name: str
    shape: tuple[int, ...]
    dim: int
    rows: Tensor = field(repr=False)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`~vfsurgery.combining.base.Store`."""
        whole = self.store.read(self.name, 0, math.prod(self.shape)).reshape(self.shape)
        return whole.index_select(self.dim, self.rows.to(whole.device)).reshape(-1)[start:stop]


def together(entry: Entry, found: Sequence[Piece], combined: Callable[[Entry], Tensor]) -> Tensor:
    """What becomes of a tensor, from what becomes of its pieces."""
    if found[0].rows is None:
        return combined(found[0].entry)
    whole: Tensor | None = None
    for piece in found:
        own = combined(piece.entry)
        whole = own.new_empty(entry.shape) if whole is None else whole
        assert piece.rows is not None
        whole.index_copy_(1 - entry.trait.reads, piece.rows.to(own.device), own)
    assert whole is not None
    return whole


def told_split(entries: Iterator[Entry], packed: Packed) -> Iterator[str]:
    """For the report: which matrices were taken apart."""
    names = [entry.name for entry in entries if entry.trait.parts] if packed == "split" else []
    if names:
        yield f"{len(names)} matrices were taken apart into queries, keys and values (first: {names[0]})"

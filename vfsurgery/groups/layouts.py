"""The algebra of axes: an axis is a concatenation of products of atoms, and ties are solved by unification.

An :class:`Atom` is a run of interchangeable units (a convolution's output channels) that may later turn out to have
structure: it is then *bound* to a layout of smaller atoms, like a variable to a term. A :class:`Run` is a product of
atoms placed at given positions of an axis; a layout is the tuple of runs that fill an axis. Three operations suffice:

- :meth:`Layouts.resolve` replaces bound atoms by what they are bound to;
- :meth:`Layouts.split` refines runs along arbitrary subsets of their positions (a chunk, a shuffled slice);
- :meth:`Layouts.unify` makes two layouts equal by binding, factoring (``n = m x k``) and splitting (``n = m + k``)
  atoms.

Refining only ever removes freedom, so every answer is safe; where two arrangements cannot be matched, what is involved
is pinned. A 512-channel axis flattened over a 7 x 7 map is ``Run((channel, fixed 49))``; DenseNet's concatenations are
layouts of many runs; a channel shuffle is a run whose positions are not consecutive.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Atom:
    """``size`` interchangeable units; ``pin`` says why they may not move, ``bound`` what they turned out to be."""

    size: int
    serial: int
    pin: str | None = None
    bound: Layout | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A product of atoms, slowest first: its index ``k`` lies at position ``at[k]`` of the axis."""

    atoms: tuple[Atom, ...]
    at: Positions = field(compare=False)

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the atoms."""
        return tuple(atom.size for atom in self.atoms)


Layout: TypeAlias = tuple[Run, ...]


class Layouts:
    """Makes atoms and keeps them consistent; one per discovery."""

    def __init__(self) -> None:
        self._serial = itertools.count()

    def atom(self, size: int, pin: str | None = None) -> Atom:
        """A new atom, free unless ``pin`` gives a reason."""
        return Atom(size, next(self._serial), pin)

    def axis(self, size: int, pin: str | None = None) -> Layout:
        """A layout of one new atom; empty for an empty axis."""
        if size == 0:
            return ()
        return (Run((self.atom(size, pin),), np.arange(size)),)

    def resolve(self, layout: Layout) -> Layout:
        """The layout in terms of atoms that are not bound; runs sorted by their first position."""
        runs: list[Run] = []
        for run in layout:
            runs.extend(self._resolve_run(run))
        return tuple(sorted(runs, key=lambda run: int(run.at[0])))

    def _resolve_run(self, run: Run) -> Layout:
        if not any(atom.bound is not None or atom.size == 1 for atom in run.atoms):
            return (run,)
        factors = [self._expand(atom) for atom in run.atoms if atom.size > 1]
        if not factors:  # a single index: nothing to permute, so any of its atoms will do
            return (Run(run.atoms[:1], run.at),)
        inner = product(factors)
        return tuple(Run(part.atoms, run.at[part.at]) for part in inner)

    def _expand(self, atom: Atom) -> Layout:
        """What an atom turned out to be; a chain of atoms that are each the next one is followed without recursion."""
        chain: list[Atom] = []
        while (following := _same_as(atom)) is not None:
            chain.append(atom)
            atom = following
        if atom.bound is not None:
            found = atom.bound = self.resolve(atom.bound)
        else:
            found = (Run((atom,), np.arange(atom.size)),)
        for link in chain:
            link.bound = found
        return found

    def pin(self, layout: Layout, reason: str) -> None:
        """Forbid every atom of the layout to move."""
        for run in self.resolve(layout):
            for atom in run.atoms:
                if atom.pin is None:
                    atom.pin = reason

    def take(self, layout: Layout, positions: Positions) -> Layout:
        """The layout of an axis whose index ``i`` is index ``positions[i]`` of this one."""
        size = sum(len(run.at) for run in layout)
        if len(np.unique(positions)) != len(positions):
            self.pin(layout, "indices are used more than once")
            return self.axis(len(positions), "indices are used more than once")
        new_position = np.full(size, -1)
        new_position[positions] = np.arange(len(positions))
        taken: list[Run] = []
        for run in self.split(layout, new_position >= 0):
            at = new_position[run.at]
            if at[0] >= 0:
                taken.append(Run(run.atoms, at))
        return tuple(sorted(taken, key=lambda run: int(run.at[0])))

    def split(self, layout: Layout, labels: NDArray[np.generic]) -> Layout:
        """Refine the layout until every run lies within positions of one label (``labels``: one per position)."""
        layout = self.resolve(layout)
        while True:
            mixed = [run for run in layout if (labels[run.at] != labels[run.at[0]]).any()]
            if not mixed:
                return layout
            for run in mixed:
                self._split_run(run, labels[run.at])
            layout = self.resolve(layout)

    def _split_run(self, run: Run, labels: NDArray[np.generic]) -> None:
        """Bind the run's atoms to parts so that each product of parts has one label.

        Two units of an atom belong to the same part when they see the same labels in every combination with the
        other atoms; blocks of such parts are then constant.
        """
        grid = labels.reshape(run.grid)
        for dim, atom in enumerate(run.atoms):
            if atom.bound is not None:
                continue
            slices = np.moveaxis(grid, dim, 0).reshape(atom.size, -1)
            _, part_of = np.unique(slices, axis=0, return_inverse=True)
            parts = _in_order_of_appearance(part_of.reshape(-1))
            if len(parts) > 1:
                atom.bound = tuple(Run((self.atom(len(at), atom.pin),), at) for at in parts)

    def unify(self, left: Layout, right: Layout) -> None:
        """Make two layouts of equally many positions the same, by binding atoms."""
        while True:
            left, right = self.resolve(left), self.resolve(right)
            if self._bind_whole(left, right) or self._bind_whole(right, left):
                return
            left = self.split(left, _run_of_position(right))
            right = self.split(self.resolve(right), _run_of_position(left))
            left = self.resolve(left)
            pairs = self._pair_runs(left, right)
            if pairs is None:
                continue
            changed = False
            for mine, other in pairs:
                if len(mine.at) == 1:
                    continue
                if any(atom.bound is not None for atom in (*mine.atoms, *other.atoms)):
                    changed = True
                elif mine.atoms != other.atoms or not np.array_equal(mine.at, other.at):
                    changed |= self._unify_runs(mine, other)
            if not changed:
                return

    def _bind_whole(self, variable: Layout, value: Layout) -> bool:
        """Bind an axis that is one free atom to whatever the other side is: the common case, in constant time."""
        if len(variable) != 1 or len(variable[0].atoms) != 1:
            return False
        atom, at = variable[0].atoms[0], variable[0].at
        if atom.pin is not None or any(atom is other for run in value for other in run.atoms):
            return False
        unit_at = np.empty(len(at), dtype=np.int64)
        unit_at[at] = np.arange(len(at))
        atom.bound = tuple(Run(run.atoms, unit_at[run.at]) for run in value)
        return True

    def _pair_runs(self, left: Layout, right: Layout) -> list[tuple[Run, Run]] | None:
        """Runs that fill the same positions; ``None`` when splitting one side has split the other again."""
        by_start = {int(run.at.min()): run for run in right}
        pairs: list[tuple[Run, Run]] = []
        for run in left:
            other = by_start.get(int(run.at.min()))
            if other is None or len(other.at) != len(run.at):
                return None
            pairs.append((run, other))
        return pairs

    def _unify_runs(self, mine: Run, other: Run) -> bool:
        """Make two runs on the same positions equal; return whether anything was bound or pinned."""
        if np.array_equal(mine.at, other.at):
            return self._unify_products(list(mine.atoms), list(other.atoms))
        if self._bind_whole((mine_local := _localize(mine, mine.at),), (_localize(other, mine.at),)):
            return True
        if self._bind_whole((_localize(other, other.at),), (_localize(mine, other.at),)):
            return True
        for order in itertools.permutations(range(len(other.atoms))):
            turned = other.at.reshape(other.grid).transpose(order).reshape(-1)
            if np.array_equal(turned, mine.at):
                return self._unify_products(list(mine.atoms), [other.atoms[i] for i in order])
        return self._pin_runs(mine_local, other, "tied to a reordering of itself")

    def _pin_runs(self, mine: Run, other: Run, reason: str) -> bool:
        """Pin what cannot be matched. Two runs in which nothing moves agree already."""
        free = [atom for atom in (*mine.atoms, *other.atoms) if atom.pin is None]
        for atom in free:
            atom.pin = reason
        return bool(free)

    def _unify_products(self, left: list[Atom], right: list[Atom]) -> bool:
        """Bind atoms pairwise from the slowest factor on; sizes that differ are factored, else pinned."""
        while left and right:
            mine, other = left.pop(0), right.pop(0)
            if mine is other:
                continue
            if mine.size == other.size:
                if mine.pin is not None and other.pin is not None:
                    continue
                return self._bind_atoms(mine, other)
            large, small = (mine, other) if mine.size > other.size else (other, mine)
            if large.size % small.size:
                everything = (mine, other, *left, *right)
                return self._pin_runs(Run(everything, np.arange(0)), Run((), np.arange(0)), "incompatible factors")
            factors = (self.atom(small.size, large.pin), self.atom(large.size // small.size, large.pin))
            large.bound = (Run(factors, np.arange(large.size)),)
            return True
        return False

    def _bind_atoms(self, mine: Atom, other: Atom) -> bool:
        """Make two atoms of one size the same; a pinned one wins."""
        variable, value = (mine, other) if mine.pin is None else (other, mine)
        variable.bound = (Run((value,), np.arange(value.size)),)
        return True


def _same_as(atom: Atom) -> Atom | None:
    """The atom that a bound one is, index by index, if it is a single one."""
    if atom.bound is None or len(atom.bound) != 1 or len(atom.bound[0].atoms) != 1:
        return None
    run = atom.bound[0]
    return run.atoms[0] if np.array_equal(run.at, np.arange(atom.size)) else None


def concat(layouts: list[Layout]) -> Layout:
    """The layout of axes laid one after the other."""
    runs: list[Run] = []
    start = 0
    for layout in layouts:
        runs.extend(Run(run.atoms, run.at + start) for run in layout)
        start += sum(len(run.at) for run in layout)
    return tuple(runs)


def product(layouts: list[Layout]) -> Layout:
    """The layout of the product of axes, slowest first; products distribute over concatenations."""
    sizes = [sum(len(run.at) for run in layout) for layout in layouts]
    runs: list[Run] = []
    for choice in itertools.product(*layouts):
        at = np.zeros(1, dtype=np.int64)
        for run, size in zip(choice, sizes, strict=True):
            at = (at[:, None] * size + run.at[None, :]).reshape(-1)
        runs.append(Run(tuple(atom for run in choice for atom in run.atoms), at))
    return tuple(sorted(runs, key=lambda run: int(run.at[0])))


def _in_order_of_appearance(part_of: Positions) -> list[Positions]:
    """Indices of each part, parts ordered by their first index."""
    parts = [np.flatnonzero(part_of == part) for part in range(int(part_of.max()) + 1)]
    return sorted(parts, key=lambda at: int(at[0]))


def _run_of_position(layout: Layout) -> Positions:
    """For every position of the axis the number of the run that fills it."""
    labels = np.empty(sum(len(run.at) for run in layout), dtype=np.int64)
    for number, run in enumerate(layout):
        labels[run.at] = number
    return labels


def _localize(run: Run, frame: Positions) -> Run:
    """The run with positions counted within ``frame``, a listing of the same positions."""
    order = np.argsort(frame)
    return Run(run.atoms, order[np.searchsorted(frame, run.at, sorter=order)])

"""Which symmetry the units of each group have: what is left when every op that touches them has had its say.

A permutation leaves the function of a network unchanged wherever units move together. More does where all ops that
touch them are linear in the units, contract them, or look at nothing but their length (RMSNorm) or their length and
mean (LayerNorm): orthogonal or any invertible matrices. Rules say for their ops by what units may be mapped
(``allows``), and the smallest of that counts; what no rule speaks of lets permutations through.

A *place* is one factor of one run of an axis: where the units of an atom lie on it. Ties join places, a contraction
joins them with a twist: what is multiplied and summed over transforms by the inverse transposed (*dual*). So queries
take ``A`` and keys ``A^-T``, rows of a weight ``T`` and columns ``T^-T``. Where a place is its own dual, as that of an
embedding that is read again at the end, only orthogonal matrices are both.

A weight that multiplies single units (a norm's scale, LayerScale) would leave nothing but permutations. It counts for
nothing where it can be folded away: see :mod:`vfsurgery.discovery.foldings`. A *view* of it, ``gamma.view(1, -1, 1,
1)``, is taken for the weight itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from vfsurgery.discovery.unification import LocalAxis, Said, Unification
from vfsurgery.groups import Symmetry
from vfsurgery.groups.axes import (
    Allows,
    AxisRef,
    Concat,
    Expression,
    Fixed,
    Fresh,
    Indifferent,
    Product,
    Scales,
    Take,
    TensorRef,
    Tie,
    mentioned,
)
from vfsurgery.groups.layouts import Atom, Positions
from vfsurgery.tracing.ops import Op

NOWHERE = TensorRef("", "", ())
"""Where an axis lies that no tensor shows."""
Axis: TypeAlias = AxisRef | LocalAxis
Place: TypeAlias = tuple[Axis, int, int]
"""An axis, which of its runs, and which factor of that."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A run as part of an expression: its atoms, the places that they are on some axis, and its positions."""

    atoms: tuple[Atom, ...]
    places: tuple[Place | None, ...]
    at: Positions


@dataclass
class Joined:
    """Places joined by ties, each with a sign against the first of its class: whether it is that one's dual.

    ``clashes`` are the classes, by their first place, in which one is its own dual.
    """

    above: dict[Place, tuple[Place, bool]] = field(default_factory=dict[Place, tuple[Place, bool]])
    clashes: set[Place] = field(default_factory=set[Place])

    def find(self, place: Place) -> tuple[Place, bool]:
        """The first place of the class, and whether this one is its dual."""
        chain: list[Place] = []
        self.above.setdefault(place, (place, False))
        while self.above[place][0] != place:
            chain.append(place)
            place = self.above[place][0]
        dual = False
        for link in reversed(chain):  # from the one next to the root
            dual ^= self.above[link][1]
            self.above[link] = (place, dual)
        return place, dual

    def join(self, left: Place, right: Place, dual: bool) -> None:
        """Join two places."""
        (first, mine), (second, other) = self.find(left), self.find(right)
        twist = mine ^ other ^ dual
        if first == second:
            if twist:
                self.clashes.add(first)
            return
        self.above[second] = (first, twist)
        if second in self.clashes:
            self.clashes.add(first)


@dataclass(frozen=True)
class Class:
    """Places that one op ties together: what it allows there, and which of them a weight multiplies."""

    places: tuple[Place, ...]
    allowed: Symmetry
    scaled: tuple[Place, ...]


@dataclass
class Views:
    """Values that are a weight in another shape.

    ``weights`` has the place on the weight for each of theirs, ``makers`` the weight's name and the op, by its place in
    ``solved.said``, and ``scaling`` the ops that multiply units by them.
    """

    weights: dict[Place, Place] = field(default_factory=dict[Place, Place])
    makers: dict[TensorRef, tuple[str, int]] = field(default_factory=dict[TensorRef, tuple[str, int]])
    scaling: dict[TensorRef, set[int]] = field(default_factory=lambda: defaultdict[TensorRef, set[int]](set))

    def note(self, op: Op, number: int, classes: Sequence[Class]) -> None:
        """Note what an op makes, if it is that."""
        shown = op.key == "getitem" or (op.steps and op.pick is None)
        if shown and op.input.kind == "parameter" and math.prod(op.input.shape) == math.prod(op.output.shape):
            self.makers[op.output] = op.input.name, number
            for each in classes:
                if len(each.places) == 2:
                    weight, view = sorted(each.places, key=lambda place: tensor_of(place) == op.output)
                    self.weights[view] = weight

    def scaled(self, place: Place, number: int) -> Place:
        """A place where an op multiplies units by a weight; that on the weight itself, if it is one of a view."""
        if place in self.weights:
            self.scaling[tensor_of(place)].add(number)
        return self.weights.get(place, place)


class Symmetries:
    """What rules say beyond orders, by the places of a solved unification.

    ``classes`` has the classes of each op, in the order of ``solved.said``; ``twisted`` joins all places there are.
    ``uses`` are the ops that use a weight, by its name and their places in ``solved.said``.
    """

    def __init__(self, solved: Unification) -> None:
        self.solved = solved
        self.twisted = Joined()
        self._broken: set[Atom] = set()
        self._views = Views()
        self.classes: list[tuple[Class, ...]] = []
        for number, said in enumerate(solved.said):
            self.classes.append(tuple(self._classes_of(said, number)))
            self._views.note(said.op, number, self.classes[-1])
        self.uses = self._used()

    def of_atoms(self, folded: Mapping[int, frozenset[Place]]) -> dict[int, Symmetry]:
        """The symmetry of every atom that is not pinned, by its serial.

        Args:
            folded: For an op, by its place in ``solved.said``, the places on which a weight multiplies single units and
                can be folded away.
        """
        found: dict[int, Symmetry] = defaultdict(lambda: Symmetry.GENERAL_LINEAR)
        for number, classes in enumerate(self.classes):
            for each in classes:
                held = set(each.scaled) - folded.get(number, frozenset())
                vote = Symmetry.PERMUTATION if held else each.allowed
                for place in each.places:
                    serial = self.atom(place).serial
                    found[serial] = min(found[serial], vote)
        for clash in self.twisted.clashes:
            serial = self.atom(clash).serial
            found[serial] = min(found[serial], Symmetry.ORTHOGONAL)
        return dict(found) | {atom.serial: Symmetry.PERMUTATION for atom in self._broken}

    def is_dual(self, place: Place) -> bool:
        """Whether units at a place transform by the inverse transposed of those at the first place of their class."""
        return self.twisted.find(place)[1]

    def is_self_dual(self, place: Place) -> bool:
        """Whether the class of a place is its own dual, so that :meth:`is_dual` says nothing."""
        return self.twisted.find(place)[0] in self.twisted.clashes

    def atom(self, place: Place) -> Atom:
        """The atom at a place."""
        axis, run, factor = place
        return self.solved.axes[axis][run].atoms[factor]

    def _used(self) -> dict[str, set[int]]:
        """The ops that use a weight, by its name: where units are multiplied by a view of it, it is that op."""
        uses, takers = defaultdict[str, set[int]](set), defaultdict[TensorRef, set[int]](set)
        for number, said in enumerate(self.solved.said):
            for tensor in (*said.op.inputs, *said.op.parameters.values()):
                takers[tensor].add(number)
                if tensor.kind == "parameter":
                    uses[tensor.name].add(number)
        for view, (name, number) in self._views.makers.items():
            if takers[view] == self._views.scaling[view] and view not in self.solved.returned:
                uses[name] = uses[name] - {number} | takers[view]
        return uses

    def _classes_of(self, said: Said, number: int) -> Iterator[Class]:
        """Those of one op."""
        ties = [constraint for constraint in said.constraints if isinstance(constraint, Tie)]
        name = said.op.node.name
        own, contracted = Joined(), set[Place]()
        for tie in ties:
            for left, right in self._pairs(tie, name):
                own.join(left, right, dual=False)
                self.twisted.join(left, right, tie.dual)
                if tie.dual:
                    contracted.add(left)
        allowed: dict[Place, Symmetry] = {own.find(place)[0]: Symmetry.GENERAL_LINEAR for place in contracted}
        scaled: dict[Place, list[Place]] = defaultdict(list)
        touched = {place for tie in ties for place in self._places(tie, name)}
        for constraint in said.constraints:
            match constraint:
                case Allows():
                    for place in (place for axis in constraint.axes for place in self._of(axis, name)):
                        first = own.find(place)[0]
                        allowed[first] = min(allowed.get(first, constraint.symmetry), constraint.symmetry)
                case Scales():
                    for place in self._of(constraint.axis, name):
                        scaled[own.find(place)[0]].append(place)
                case Indifferent():
                    touched.update(self._of(constraint.axis, name))
                case _:
                    pass
        by_first: dict[Place, list[Place]] = defaultdict(list)
        for place in touched:
            by_first[own.find(place)[0]].append(place)
        for first, places in by_first.items():
            multiplied = {place: self._views.scaled(place, number) for place in scaled.get(first, ())}
            yield Class(
                tuple(multiplied.get(place, place) for place in places),
                allowed.get(first, Symmetry.PERMUTATION),
                tuple(multiplied.values()),
            )

    def _places(self, tie: Tie, op: str) -> Iterator[Place]:
        for ref in mentioned(tie):
            yield from self._of(ref, op)

    def _of(self, expression: Expression, op: str) -> Iterator[Place]:
        """The places of all free units in an expression."""
        for spot in self._spots(expression, op):
            for place in spot.places:
                if place is not None:
                    yield place

    def _pairs(self, tie: Tie, op: str) -> Iterator[tuple[Place, Place]]:
        """The places that a tie joins; atoms that are tied in another way than place by place are noted."""
        right = {int(spot.at[0]): spot for spot in self._spots(tie.right, op)}
        for spot in self._spots(tie.left, op):
            other = right.get(int(spot.at[0]))
            fits = other is not None and other.atoms == spot.atoms and np.array_equal(other.at, spot.at)
            if other is None or not fits:
                self._broken.update(spot.atoms, () if other is None else other.atoms)
                continue
            for mine, theirs in zip(spot.places, other.places, strict=True):
                if mine is not None and theirs is not None:
                    yield mine, theirs

    def _spots(self, expression: Expression, op: str) -> list[Spot]:
        """The runs of an expression, without single units."""
        return [spot for spot in self._runs(expression, op) if any(atom.size > 1 for atom in spot.atoms)]

    def _runs(self, expression: Expression, op: str) -> list[Spot]:
        match expression:
            case AxisRef() | Fresh():
                axis = expression if isinstance(expression, AxisRef) else LocalAxis(op, expression)
                layout = self.solved.axes[axis] = self.solved.layouts.resolve(self.solved.layout_of(axis))
                return [
                    Spot(run.atoms, tuple(_free(atom, (axis, number, k)) for k, atom in enumerate(run.atoms)), run.at)
                    for number, run in enumerate(layout)
                ]
            case Fixed():
                return [Spot((Atom(expression.size, -1, expression.reason),), (None,), np.arange(expression.size))]
            case Concat():
                found: list[Spot] = []
                start = 0
                for part in expression.parts:
                    found += [Spot(each.atoms, each.places, each.at + start) for each in self._runs(part, op)]
                    start += part.size
                return found
            case Product():
                return self._product(expression, op)
            case Take():
                return list(self._taken(expression, op))

    def _product(self, expression: Product, op: str) -> list[Spot]:
        found = [Spot((), (), np.zeros(1, dtype=np.int64))]
        for factor in expression.factors:
            own = self._runs(factor, op)
            found = [
                Spot(
                    left.atoms + right.atoms,
                    left.places + right.places,
                    (left.at[:, None] * factor.size + right.at[None, :]).reshape(-1),
                )
                for left in found
                for right in own
            ]
        return [_without_single_units(spot) for spot in found]

    def _taken(self, expression: Take, op: str) -> Iterator[Spot]:
        new = np.full(expression.axis.size, -1)
        new[list(expression.positions)] = np.arange(len(expression.positions))
        for spot in self._runs(expression.axis, op):
            at = new[spot.at]
            if (at >= 0).all():
                yield Spot(spot.atoms, spot.places, at)
            elif (at >= 0).any():  # a part of it: the units are not tied as such
                self._broken.update(spot.atoms)


def tensor_of(place: Place) -> TensorRef:
    """The tensor on which a place lies."""
    return place[0].tensor if isinstance(place[0], AxisRef) else NOWHERE


def _free(atom: Atom, place: Place) -> Place | None:
    return place if atom.pin is None and atom.size > 1 else None


def _without_single_units(spot: Spot) -> Spot:
    kept = [(atom, place) for atom, place in zip(spot.atoms, spot.places, strict=True) if atom.size > 1]
    return Spot(tuple(atom for atom, _ in kept), tuple(place for _, place in kept), spot.at)

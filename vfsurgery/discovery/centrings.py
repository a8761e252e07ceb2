"""Whether the mean over the units of a group is seen by anything: if LayerNorms alone look at them, it is not.

That a group is orthogonal fixing ones does not say so: a linear head that reads the sum of a residual stream without a
norm, or a norm that takes one mean over the units of several places (patch merging), lets such matrices through and
sees the mean. So the units are followed from the LayerNorms that read them to all that writes them, and from there to
all that takes them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from vfsurgery.discovery.foldings import Foldings
from vfsurgery.discovery.members import member_of
from vfsurgery.discovery.symmetries import Class, Place, Symmetries, tensor_of
from vfsurgery.groups import Centring, Member, Symmetry
from vfsurgery.groups.axes import AxisRef
from vfsurgery.tracing.ops import Op

At: TypeAlias = tuple[int, Class]
"""An op, by its place in ``solved.said``, and what it ties together."""


class _Seen(Exception):
    """Something sees the mean over the units."""


@dataclass
class _Walk:
    """What was found of one group: places of values that hold its units before any norm, and who writes them."""

    waiting: list[Place] = field(default_factory=list[Place])
    known: set[Place] = field(default_factory=set[Place])
    visited: set[tuple[int, Place]] = field(default_factory=set[tuple[int, Place]])
    """Ops with the places of weights at which they were found to write."""
    writers: dict[Place, None] = field(default_factory=dict[Place, None])
    scales: dict[Place, None] = field(default_factory=dict[Place, None])

    def meet(self, place: Place) -> None:
        """Note a place to go on from."""
        if place not in self.known:
            self.known.add(place)
            self.waiting.append(place)


class Centrings:
    """What is known of the means over units, by the serial of an atom: :meth:`of`."""

    def __init__(self, found: Symmetries, foldings: Foldings) -> None:
        self._found, self._said, self._foldings = found, found.solved.said, foldings
        self._by_place: dict[Place, list[At]] = defaultdict(list)
        self._norms: dict[int, list[Place]] = defaultdict(list)
        for number, said in enumerate(self._said):
            for each in found.classes[number]:
                for place in each.places:
                    self._by_place[place].append((number, each))
                if each.allowed is Symmetry.ORTHOGONAL_FIXING_ONES and _is_layer_norm(said.op):
                    for place in each.places:
                        if _is_value(place) and tensor_of(place) not in said.op.outputs:
                            self._norms[found.atom(place).serial].append(place)

    def of(self, serial: int, group: str) -> Centring:
        """Of the units of one atom, which are those of a group of that name."""
        walk = _Walk()
        for place in self._norms.get(serial, ()):
            walk.meet(place)
        try:
            while walk.waiting:
                place = walk.waiting.pop()
                for number, each in self._by_place[place]:
                    self._follow(number, each, place, walk)
            self._check_whole(walk)
        except _Seen as seen:
            return Centring(group, reason=str(seen))
        if not walk.writers:
            return Centring(group, reason="nothing writes these units but what is not a weight")
        return Centring(group, tuple(map(self._member, walk.writers)), tuple(map(self._member, walk.scales)))

    def _follow(self, number: int, each: Class, came: Place, walk: _Walk) -> None:
        """Go on from a place through one of the ops that make or take it."""
        op = self._said[number].op
        if each.allowed is Symmetry.ORTHOGONAL_FIXING_ONES and _is_layer_norm(op):
            self._check_norm(op, each, came)
            return
        if each.allowed is not Symmetry.GENERAL_LINEAR:
            raise _Seen(f"{_named(op)} sees the mean over these units")
        folded = self._foldings.places.get(number, frozenset())
        if not folded.issuperset(each.scaled):
            raise _Seen(f"{_named(op)} multiplies single units by a weight that cannot be folded away")
        if self._found.is_self_dual(came):
            raise _Seen("they are multiplied by themselves, or a weight both writes and reads them")
        for place in each.places:
            if self._found.is_dual(place) != self._found.is_dual(came):
                raise _Seen(f"{_named(op)} reads these units without a LayerNorm before it")
            if place in each.scaled:
                walk.scales[place] = None
                walk.visited.add((number, place))
            elif _is_value(place):
                walk.meet(place)
            elif _is_weight(place):
                walk.writers[place] = None
                walk.visited.add((number, place))

    def _check_norm(self, op: Op, each: Class, came: Place) -> None:
        """A norm must take its mean over these units and no others; what it gives out must have no mean."""
        atoms = [atom for other in self._found.solved.axes[came[0]] for atom in other.atoms if atom.size > 1]
        if tensor_of(came) in op.outputs:
            if any(_is_weight(place) for place in each.places):
                raise _Seen(f"{_named(op)} writes these units, with a scale and a shift of its own")
        elif tensor_of(came) != op.input or atoms != [self._found.atom(came)]:
            raise _Seen(f"{_named(op)} takes its mean over more than these units")

    def _check_whole(self, walk: _Walk) -> None:
        """All uses of a weight must be on the way: a table of embeddings that is read again is not."""
        for place in (*walk.writers, *walk.scales):
            name = tensor_of(place).name
            for number in self._found.uses[name]:
                if (number, place) not in walk.visited:
                    raise _Seen(f"{_named(self._said[number].op)} uses {name} in another way")

    def _member(self, place: Place) -> Member:
        axis, run, factor = place
        assert isinstance(axis, AxisRef)
        return member_of(axis, self._found.solved.axes[axis][run], factor, None)


def _is_layer_norm(op: Op) -> bool:
    return op.key == "layer_norm" or (isinstance(op.key, type) and issubclass(op.key, nn.LayerNorm))


def _is_value(place: Place) -> bool:
    return tensor_of(place).kind == "node"


def _is_weight(place: Place) -> bool:
    return tensor_of(place).kind == "parameter"


def _named(op: Op) -> str:
    """What an op is called in a sentence: its module if it is one, and its node."""
    return op.path if op.module is not None else f"{op.name} (node {op.node.name}{f' in {op.path}' if op.path else ''})"

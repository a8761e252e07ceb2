"""Weights that multiply single units and can be folded into others, with nothing changed in what a network computes.

The scale of a norm goes into all weights that read what it gives out, if nothing else looks at it. A factor behind a
linear layer (LayerScale) goes into that layer's rows. Whatever lies between has to be linear in the units: reshapes,
windows, dropout, sums over tokens. What is folded leaves ones behind, and units that can be rotated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from vfsurgery.discovery.symmetries import NOWHERE, Class, Place, Symmetries, tensor_of
from vfsurgery.groups import Folding, Member, Reader, Symmetry
from vfsurgery.groups.axes import AxisRef, TensorRef
from vfsurgery.groups.layouts import Atom
from vfsurgery.tracing.ops import PERMUTES, RESHAPES, Op

Key: TypeAlias = tuple[str, int]
"""A tensor by the name of its node and its item."""


@dataclass
class _Walk:
    """What was found on the way from the units that a weight multiplies, or back to where they come from.

    ``atoms`` are those of the run of the weight: the runs that it is folded into have to be made alike.
    """

    atoms: tuple[Atom, ...]
    readers: list[Reader] = field(default_factory=list[Reader])
    writers: list[Member] = field(default_factory=list[Member])
    ends: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    """Weights that were found, each with the op that uses it."""


_KEEPS_CONSTANTS = (
    "pick getitem unbind select index_select narrow chunk split split_with_sizes tensor_split roll flip expand "
    "expand_as repeat repeat_interleave mean Identity Flatten Unflatten Dropout Dropout1d Dropout2d Dropout3d "
    "AlphaDropout FeatureAlphaDropout dropout dropout1d dropout2d dropout3d"
)
KEEPS_CONSTANTS = frozenset(_KEEPS_CONSTANTS.split())
"""Ops, by their names, behind which a shift is what it was before; others scale it, sum it up, or pad with zeros."""
Step: TypeAlias = Callable[[int, Class, _Walk], bool]
"""Goes on from a class of an op, writes down the weights that it meets, and says whether it met nothing else."""


class Foldings:
    """Weights that multiply single units and can be folded away.

    ``each`` has them all; ``places``, by the op's place in ``solved.said``, those where units are multiplied.
    """

    def __init__(self, found: Symmetries) -> None:
        self._found, self._said = found, found.solved.said
        self._returned = {_key(tensor) for tensor in found.solved.returned}
        self._made = {_key(x): number for number, said in enumerate(self._said) for x in said.op.outputs}
        self._takers: dict[Key, list[int]] = defaultdict(list)
        self._uses = found.uses
        for number, said in enumerate(self._said):
            for tensor in dict.fromkeys((*said.op.inputs, *said.op.parameters.values())):
                self._takers[_key(tensor)].append(number)
        self.each: list[Folding] = []
        self.places: dict[int, frozenset[Place]] = {}
        runs: dict[tuple[Any, int], list[Place]] = defaultdict(list)  # a run may be the product of several units
        for scale in dict.fromkeys(place for classes in found.classes for each in classes for place in each.scaled):
            runs[scale[:2]].append(scale)
        for scales in runs.values():
            foldings = [self._folding(scale) for scale in scales]
            if foldings[0] is not None and all(folding == foldings[0] for folding in foldings):
                self.each.append(foldings[0])
                for number in self._uses[foldings[0].scale.parameter]:
                    self.places[number] = self.places.get(number, frozenset()) | {*scales}

    def _folding(self, scale: Place) -> Folding | None:
        """Of what lies at a place of a weight, if it is possible at all ops that use the weight."""
        if tensor_of(scale).kind != "parameter":
            return None
        uses = self._uses[tensor_of(scale).name]
        at = [(n, each) for n in sorted(uses) for each in self._found.classes[n] if scale in each.scaled]
        if {number for number, _ in at} != uses:
            return None
        back, ahead = self._walk(at, scale, self._back), self._walk(at, scale, self._ahead)
        linear = all(each.allowed is Symmetry.GENERAL_LINEAR for _, each in at)
        walk = (back or ahead) if linear else ahead
        shifts = {self._shift(number, each) for number, each in at}
        if walk is None or len(shifts) > 1:
            return None
        shift = shifts.pop()
        return Folding(
            tuple(self._said[number].op.node.name for number, _ in at),
            self._run_of(scale),
            None if shift is None else self._run_of(shift),
            tuple(walk.readers),
            tuple(walk.writers),
        )

    def _walk(self, at: list[tuple[int, Class]], scale: Place, step: Step) -> _Walk | None:
        """Follow all uses; ``None`` if something else than weights is met, or a weight that others use too."""
        walk = _Walk(self._atoms(scale))
        if not all(step(number, each, walk) for number, each in at):
            return None
        names = {name for name, _ in walk.ends}
        whole = all({number for end, number in walk.ends if end == name} == self._uses[name] for name in names)
        return walk if whole and names else None

    def _ahead(self, number: int, each: Class, walk: _Walk, uneven: bool = False) -> bool:
        """From what an op gives out to all weights that read it; ``uneven`` if a shift does not come through."""
        for place in each.places:
            key = _key(tensor_of(place))
            if key not in self._outputs(number):
                continue
            if key in self._returned:
                return False
            for other in self._takers[key]:
                classes = [one for one in self._found.classes[other] if place in one.places]
                if not all(self._passes_on(other, one, place, walk, uneven) for one in classes):
                    return False
        return True

    def _passes_on(self, number: int, each: Class, came: Place, walk: _Walk, uneven: bool) -> bool:
        """Whether an op hands units on to weights alone, and whatever else it hands them to does."""
        op = self._said[number].op
        if each.allowed is not Symmetry.GENERAL_LINEAR or each.scaled:
            return False
        hands_on = False
        for place in each.places:
            tensor = tensor_of(place)
            if tensor.kind == "parameter":
                if self._found.is_dual(place) == self._found.is_dual(came) or self._atoms(place) != walk.atoms:
                    return False
                walk.ends.add((tensor.name, number))
                walk.readers.append(Reader(op.node.name, self._run_of(place), self._bias(number, place, uneven)))
            elif _key(tensor) in self._outputs(number):
                hands_on = True
            elif tensor is not NOWHERE and place[0] != came[0]:  # other units come in
                return False
        return not hands_on or self._ahead(number, each, walk, uneven or not _keeps_constants(op))

    def _back(self, number: int, each: Class, walk: _Walk) -> bool:
        """From what goes into an op back to the weights that write it, if nothing else looks at it on the way."""
        own = self._said[number].op.node.name
        for place in each.places:
            tensor, key = tensor_of(place), _key(tensor_of(place))
            if tensor.kind != "node" or key in self._outputs(number):
                continue
            takers = {self._said[taker].op.node.name for taker in self._takers[key]}
            if key not in self._made or takers != {own} or key in self._returned:
                return False
            maker = self._made[key]
            for one in self._found.classes[maker]:
                if place in one.places and not self._is_written(maker, one, place, walk):
                    return False
        return True

    def _is_written(self, number: int, each: Class, made: Place, walk: _Walk) -> bool:
        """Whether an op's units come from weights alone that write them, there or before."""
        if each.allowed is not Symmetry.GENERAL_LINEAR or each.scaled:
            return False
        before = False
        for place in each.places:
            tensor = tensor_of(place)
            if tensor.kind == "parameter":
                if self._found.is_dual(place) != self._found.is_dual(made) or self._atoms(place) != walk.atoms:
                    return False
                walk.ends.add((tensor.name, number))
                walk.writers.append(self._run_of(place))
            else:
                before |= tensor.kind == "node" and _key(tensor) not in self._outputs(number)
        return not before or self._back(number, each, walk)

    def _shift(self, number: int, each: Class) -> Place | None:
        """Where the numbers lie that a norm adds to its units."""
        op = self._said[number].op
        bias = op.param("bias", 3) if any(tensor_of(place) == op.param("weight", 2) for place in each.scaled) else None
        return None if bias is None else next((place for place in each.places if tensor_of(place) == bias), None)

    def _bias(self, number: int, read: Place, uneven: bool) -> str | None:
        """The bias of what reads, if a shift of what it reads can go into it: the same at all positions.

        It is not where maps are padded with zeros, nor behind a transposed convolution, whose columns come first.
        """
        op, weight, dim = self._said[number].op, tensor_of(read), read[0].dim if isinstance(read[0], AxisRef) else 0
        bias = op.parameters.get("in_proj_bias") or op.param("bias", 2)
        padding = op.argument("padding", 4, 0)
        pads = (
            uneven
            or dim != 1
            or (padding not in (0, "valid") and any(padding if isinstance(padding, tuple | list) else [1]))
        )
        if bias is None or pads or bias.kind != "parameter" or self._uses[bias.name] != self._uses[weight.name]:
            return None
        return bias.name if weight.ndim > 1 and bias.shape == (weight.shape[1 - dim],) else None

    def _outputs(self, number: int) -> set[Key]:
        """What an op gives out."""
        return {_key(tensor) for tensor in self._said[number].op.outputs}

    def _atoms(self, place: Place) -> tuple[Atom, ...]:
        """Those of the run of a place."""
        return self._found.solved.axes[place[0]][place[1]].atoms

    def _run_of(self, place: Place) -> Member:
        """All numbers of the run of a place, one by one."""
        axis, run, _ = place
        assert isinstance(axis, AxisRef)
        at = self._found.solved.axes[axis][run].at
        return Member(axis.tensor.name, axis.dim, len(at), indices=tuple(at.tolist()))


def _keeps_constants(op: Op) -> bool:
    """Whether what is added to all places alike is added to all places of the result, as it was."""
    name = op.key if isinstance(op.key, str) else op.key.__name__
    return bool(op.steps) or op.key in RESHAPES or op.key in PERMUTES or name in KEEPS_CONSTANTS


def _key(tensor: TensorRef) -> Key:
    return tensor.name, tensor.item

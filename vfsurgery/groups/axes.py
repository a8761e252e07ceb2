"""What coupling rules say: ties and pins between axes, as pure data.

An axis is one dim of one tensor. A rule relates axes through expressions that mirror how an op arranges indices:

- :class:`AxisRef`: a dim of a parameter or of an activation, as it is;
- :class:`Concat`: parts one after the other (``torch.cat`` along that dim);
- :class:`Product`: factors from the slowest to the fastest index (a flattened map is ``channel x height x width``);
- :class:`Take`: chosen positions of an axis (a slice, a channel shuffle);
- :class:`Fresh`: an axis that no tensor shows (the groups of a grouped convolution); :class:`Fixed`: one that never
  moves.

``tie(x, y)`` says that ``x`` and ``y`` are the same arrangement of the same units; ``pin(x, reason)`` that ``x`` must
not move; ``indifferent(x)`` that the op does not care about the order of ``x`` (a sum over it). A dim that a rule
does not mention is pinned: nothing is guessed. ``mixes(x)`` adds that what is computed at one index along ``x`` depends
on the others (a softmax), which matters where units inside each of them have an order of their own. ``reads(x)`` adds
that a weight takes in, along ``x``, units that no input of the op shows.

More than orders may be free: ``contract(x, y)`` ties axes that are multiplied and summed over, ``allows(symmetry, x)``
says by what units may be mapped besides (:mod:`vfsurgery.groups.symmetries`), and ``scales(w)`` that a weight
multiplies single units. Where a rule says none of these, permutations are all that its op lets through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from vfsurgery.errors import SurgeryError
from vfsurgery.groups.symmetries import Symmetry


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a trace: a parameter or buffer by its state-dict key, or the value of a node.

    ``kind`` is ``"parameter"`` or ``"node"``; ``item`` selects one tensor of a node whose value is a tuple.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    item: int = -1

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    def axis(self, dim: int) -> AxisRef:
        """The axis ``dim``; negative values count from the end.

        >>> TensorRef("parameter", "fc.weight", (10, 64)).axis(-1).dim
        1
        """
        if not -self.ndim <= dim < self.ndim:
            raise SurgeryError(f"{self} has no dim {dim}")
        return AxisRef(self, dim % self.ndim)

    def axes(self) -> tuple[AxisRef, ...]:
        """All its axes in order."""
        return tuple(AxisRef(self, dim) for dim in range(self.ndim))

    def __str__(self) -> str:
        item = f"#{self.item}" if self.item >= 0 else ""
        return f"{self.name}{item} {tuple(self.shape)}"


@dataclass(frozen=True, slots=True)
class AxisRef:
    """Dim ``dim`` of ``tensor``."""

    tensor: TensorRef
    dim: int

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.tensor.shape[self.dim]

    def __str__(self) -> str:
        return f"{self.tensor.name}[{self.dim}]"


@dataclass(frozen=True, slots=True)
class Fresh:
    """An axis that no tensor shows; equal ``key`` within one op means the same axis."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Fixed:
    """``size`` indices that never move."""

    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts laid one after the other."""

    parts: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Sum of the parts' sizes."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Product:
    """Factors from the slowest to the fastest index."""

    factors: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Product of the factors' sizes."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Take:
    """Index ``i`` is index ``positions[i]`` of ``axis``."""

    axis: Expression
    positions: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chosen positions."""
        return len(self.positions)


Expression: TypeAlias = AxisRef | Fresh | Fixed | Concat | Product | Take


@dataclass(frozen=True, slots=True)
class Tie:
    """Both sides are the same arrangement of the same units; ``dual`` if the op multiplies them and sums over them."""

    left: Expression
    right: Expression
    dual: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """The axis must not move."""

    axis: Expression
    reason: str


@dataclass(frozen=True, slots=True)
class Indifferent:
    """The op gives the same result whatever the order along the axis."""

    axis: Expression


@dataclass(frozen=True, slots=True)
class Mixes:
    """Along these axes taken together every index influences every other."""

    axes: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Reads:
    """A weight reads units along this axis."""

    axis: AxisRef


@dataclass(frozen=True, slots=True)
class Allows:
    """Units along these axes may be mapped by more than permutations."""

    symmetry: Symmetry
    axes: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Scales:
    """A weight multiplies each unit along this axis by a number of its own."""

    axis: AxisRef


Constraint: TypeAlias = Tie | Pin | Indifferent | Mixes | Reads | Allows | Scales


def tie(left: Expression, right: Expression) -> Tie:
    """Say that two axes are the same arrangement of the same units.

    Raises:
        SurgeryError: the sizes differ.
    """
    if left.size != right.size:
        raise SurgeryError(f"cannot tie axes of {left.size} and {right.size} indices: {left}, {right}")
    return Tie(left, right)


def contract(left: Expression, right: Expression) -> Tie:
    """Tie two axes that the op multiplies and sums over: any matrix on one is undone by its inverse on the other.

    Raises:
        SurgeryError: the sizes differ.
    """
    return replace(tie(left, right), dual=True)


def allows(symmetry: Symmetry, *axes: Expression) -> Allows:
    """Say that the op commutes with more than permutations along these axes and all that it ties to them.

    Whatever is tied and not spoken of lets permutations through. It does not tie or pin.
    """
    return Allows(symmetry, axes)


def scales(axis: AxisRef) -> Scales:
    """Say that a weight multiplies single units: as long as it does, they can be reordered and nothing else.

    What :func:`allows` says of the op counts once the weight is folded into others. It does not tie or pin.
    """
    return Scales(axis)


def pin(axis: Expression, reason: str) -> Pin:
    """Say that an axis must not move, and why."""
    return Pin(axis, reason)


def indifferent(axis: Expression) -> Indifferent:
    """Say that the op does not care about the order of an axis."""
    return Indifferent(axis)


def mixes(*axes: Expression) -> Mixes:
    """Say that the op normalizes over these axes, taken together: each index influences all others along them.

    It does not tie or pin them; it forbids that an axis beside them is ordered differently for each of their indices.
    """
    return Mixes(axes)


def reads(axis: AxisRef) -> Reads:
    """Say that a weight reads units along this axis, where the op makes them itself and shows them to nobody.

    An axis tied to the op's input reads anyway. It does not tie or pin.
    """
    return Reads(axis)


def tie_all(left: TensorRef, right: TensorRef, *, skip: tuple[int, ...] = ()) -> Iterator[Tie]:
    """Tie the dims of two tensors pairwise from the last one backwards, as broadcasting pairs them.

    A dim of size 1 against a larger one is broadcast: it has a single index, which cannot move, so nothing is tied.
    ``skip`` lists dims of ``left``, counted from its front, that are left out.
    """
    for back in range(1, min(left.ndim, right.ndim) + 1):
        mine, other = left.axis(-back), right.axis(-back)
        if mine.dim not in skip and mine.size == other.size:
            yield tie(mine, other)


def mentioned(constraint: Constraint) -> Iterator[AxisRef | Fresh]:
    """All axes, of tensors or fresh, that a constraint speaks of."""
    if isinstance(constraint, Tie):
        yield from references(constraint.left)
        yield from references(constraint.right)
    elif isinstance(constraint, Pin | Indifferent):  # the others say nothing about the order
        yield from references(constraint.axis)


def references(expression: Expression) -> Iterator[AxisRef | Fresh]:
    """All axes, of tensors or fresh, inside an expression."""
    if isinstance(expression, AxisRef | Fresh):
        yield expression
    elif isinstance(expression, Concat):
        for part in expression.parts:
            yield from references(part)
    elif isinstance(expression, Product):
        for factor in expression.factors:
            yield from references(factor)
    elif isinstance(expression, Take):
        yield from references(expression.axis)

"""What a matcher is given and what it returns.

A :class:`Matcher` finds, for every source but the first, an order of the units of each permutation group that makes the
source's units correspond to the first one's (the *reference*).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import GroupSet
from vfsurgery.registry import Registry
from vfsurgery.stats.correlation import CrossMoments


@dataclass(frozen=True)
class Gain:
    """What matching one group achieved: similarity to the reference before and after, and the units that moved."""

    group: str
    before: float
    after: float
    moved: int


@dataclass(frozen=True)
class Matching:
    """The orders (or maps) found for one source, by group name, and what each of them gained."""

    permutations: Mapping[str, Order]
    gains: tuple[Gain, ...] = ()


@dataclass(frozen=True)
class Problem:
    """All that a matcher may look at.

    ``states`` are the sources' parameters and buffers by canonical state-dict key, the reference first.
    ``correlations()`` runs the sources over the calibration data, once, and gives for every source but the first the
    cross moments of each group, one for every place where its units are read. ``joint()`` gives those of all pairs of
    sources ``i <= j``, each source with itself among them, or of pairs ``i < j`` alone. ``seed`` is the only source of
    randomness. Where groups have more symmetry than permutations the states are in canonical form, and ``duals`` says,
    by group and place that its units are read at, whether they are mapped by the inverse transposed there.
    """

    groups: GroupSet
    states: Sequence[Mapping[str, Tensor]]
    correlations: Callable[[], Sequence[Mapping[str, Sequence[CrossMoments]]]]
    seed: int = 0
    advance: Callable[[str], None] = field(default=lambda message: None)
    joint: Callable[[], Mapping[tuple[int, int], Mapping[str, Sequence[CrossMoments]]]] = dict
    duals: Mapping[str, Sequence[bool]] = field(default_factory=dict[str, "Sequence[bool]"])

    def generator(self) -> torch.Generator:
        """A fresh generator seeded with ``seed``."""
        return torch.Generator().manual_seed(self.seed)


Symmetries: TypeAlias = Literal["all", "permutations"]
"""What matchers may make of units: all that leaves the function unchanged, or orders alone."""


SYMMETRIES = ("auto", *get_args(Symmetries))
"""The same for a merge: ``auto`` leaves it to the matcher, or tries both where that is chosen too."""


def check_symmetries(symmetries: str, known: Sequence[str] = get_args(Symmetries)) -> str:
    """Return a choice of symmetries, if there is such a one.

    Raises:
        OptionError: with the nearest spelling.
    """
    if symmetries not in known:
        raise OptionError(explain(f"unknown symmetries {symmetries!r}", remedy=did_you_mean(symmetries, known)))
    return symmetries


@runtime_checkable
class Matcher(Protocol):
    """Anything with a name, a statement whether it needs data, and a ``match``.

    One that asks for ``problem.joint()`` says so by an attribute ``needs_joint = True``, or ``needs_pairs = True`` if
    pairs ``i < j`` are enough for it; one that maps units by more than orders where that is exact, by ``symmetries =
    "all"``.
    """

    @property
    def name(self) -> str:
        """Short name for reports."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether ``match`` asks for correlations."""
        ...

    def match(self, problem: Problem) -> list[Matching]:
        """One :class:`Matching` per source after the first; one per source if the first is mapped too."""
        ...


MATCHERS: Registry[Callable[[], Matcher]] = Registry("matching")
"""Matchers by name; a class or function that makes one."""

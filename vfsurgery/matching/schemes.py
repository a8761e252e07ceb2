"""More than two sources: whom each one is matched to, and when.

Orders ``P_i`` bring every source to one common frame, so those between any two sources, ``P_j P_i^-1``, are consistent
around every cycle whatever the scheme; orders found pair by pair are not. The schemes differ in the similarity reached,

``sum over pairs i < j of <P_i x_i, P_j x_j>``,

which Crisostomi et al., "C2M3: cycle-consistent multi-model merging" (2024), maximise by Frank-Wolfe over all groups
and sources at once. Here it is coordinate ascent, over sources and within each over groups: as a function of ``P_i``
alone the sum is the similarity of source ``i`` to the mean of all others, ``(N - 1) <P_i x_i, mean of P_j x_j>``, a
matching of two (Ainsworth et al., "Git Re-Basin", 2023, Alg. 3, which starts from the sources as they come).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, Permutations
from vfsurgery.matching.nested import whole_order

Scheme: TypeAlias = Literal["iterative", "reference", "sequential"]

DEFAULT: Scheme = "iterative"
MAX_ROUNDS = 100

Fit: TypeAlias = Callable[[int, Sequence[int], Sequence[Permutations]], Permutations]
"""Match one source to the mean of others, given the orders of all; from its own order on if it has one, never down."""


def check_scheme(scheme: str, max_rounds: int) -> None:
    """Refuse options that no scheme knows.

    Raises:
        OptionError: with the nearest spelling.
    """
    if scheme not in get_args(Scheme):
        raise OptionError(explain(f"unknown scheme {scheme!r}", remedy=did_you_mean(scheme, get_args(Scheme))))
    if max_rounds < 1:
        raise OptionError(explain(f"max_rounds is {max_rounds}", remedy="pass 1 or more"))


def align(
    scheme: Scheme,
    groups: GroupSet,
    sources: int,
    fit: Fit,
    generator: torch.Generator,
    max_rounds: int = MAX_ROUNDS,
) -> list[Permutations]:
    """Find the orders of all sources, the first one's being that it has.

    ``"reference"`` matches every source to the first, ``"sequential"`` each to the aligned one before it.
    ``"iterative"`` begins as ``"reference"`` does. Then, round after round and in random order, each source, the first
    one too, is matched to the mean of all others, until a round moves nothing. The sum of pairwise similarities never
    falls on the way if ``fit`` keeps its promise. In the end all is expressed in the first one's order.

    Args:
        scheme: One of the three.
        groups: The groups that are matched; for nested ones with the groups around them.
        sources: How many there are.
        fit: Matches one source to others.
        generator: Draws the orders of visits.
        max_rounds: Most rounds of ``"iterative"``.
    """
    found: list[Permutations] = [{group.name: group.identity() for group in groups}, *[{}] * (sources - 1)]
    for source in range(1, sources):
        found[source] = fit(source, [source - 1 if scheme == "sequential" else 0], found)
    for _ in range(max_rounds if scheme == "iterative" and sources > 2 else 0):
        before = list(found)
        for source in torch.randperm(sources, generator=generator).tolist():
            found[source] = fit(source, [other for other in range(sources) if other != source], found)
        if found == before:
            break
    return [relative(orders, found[0], groups) for orders in found]


def relative(orders: Permutations, frame: Permutations, groups: GroupSet) -> dict[str, Permutation]:
    """Orders that match a source to another one as it is, from those that match both to a common frame.

    ``orders`` makes of one source ``x`` what ``frame`` makes of another ``y``; the result makes of ``x`` what is in the
    order of ``y`` itself.

    >>> from vfsurgery.groups import Member, PermutationGroup
    >>> groups = GroupSet((PermutationGroup("g0", 3, (Member("weight", 0, 3),)),))
    >>> orders, frame = {"g0": Permutation((0, 2, 1))}, {"g0": Permutation((1, 2, 0))}
    >>> relative(orders, frame, groups)["g0"].order
    (1, 0, 2)
    """
    return {name: _relative(groups[name], order, frame) for name, order in orders.items()}


def _relative(group: PermutationGroup, order: Permutation, frame: Permutations) -> Permutation:
    """Find where each unit of the frame's source stands; what ``order`` puts there corresponds to it."""
    if group.blocks == 1:
        return Permutation(tuple(order.order[place] for place in frame[group.name].inverse().order))
    places = units_in_order(group, frame).inverse().order  # blocks move too, and take the units inside with them
    inside = (order.order[place] % group.size for place in places)
    return Permutation(tuple(unit // group.size * group.size + at for unit, at in enumerate(inside)))


def units_in_order(group: PermutationGroup, orders: Permutations) -> Permutation:
    """The order of all units of a group, those of nested ones after their blocks have moved."""
    if not group.outer:
        return orders[group.name]
    return whole_order(orders[group.outer], orders[group.name], group.size)

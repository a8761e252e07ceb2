"""What correlations leave open is decided by the weights: units that are constant on the data, or say the same there.

A unit that never varies correlates with nothing, and two units that correlate alike with all others can change places
without a loss: the assignment pairs them at random, and averages what is not the same. So where an order leaves such
*ties*, weight matching (:mod:`vfsurgery.matching.weights`) goes over the tied units alone, all others staying where
their activations put them. It maximises

``<a, P(b)> - PRIOR * bound * (correlation that P loses)``,

with ``bound`` no less than any similarity of two units' weights: correlations come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vfsurgery.discovery.maps import permutations_of
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, Permutations, permute_tensor
from vfsurgery.matching.base import Gain, Problem
from vfsurgery.matching.nested import Family, families
from vfsurgery.matching.schemes import units_in_order
from vfsurgery.matching.similarity import States
from vfsurgery.matching.weights import match_open

TIE = 1e-6
"""Correlation that two units may lose together by changing places and still be tied: rounding makes as much."""
ROWS = 256
"""Units compared with all others at a time."""


@dataclass(frozen=True)
class Ties:
    """The open groups of one family, all of their units or the tied ones, and what it costs to pair these otherwise.

    ``losses`` are ``(units, units)``, by group name: rows are units of a, columns those of b in the order found, whose
    diagonal is zero. ``units`` are the tied ones of a group by itself; nested groups are gone over whole.
    """

    groups: tuple[PermutationGroup, ...]
    losses: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    units: tuple[int, ...] = ()

    @staticmethod
    def of(family: Family, correlations: Mapping[str, Tensor], orders: Permutations) -> Ties | None:
        """What the correlations of one family leave open; ``None`` if nothing.

        Args:
            family: The groups.
            correlations: ``(units a, units b)`` by group name, of those that were read.
            orders: What they were found to be; of the groups that were read, and the outer one.
        """
        losses = {
            group.name: _losses(correlations[group.name], units_in_order(group, orders))
            for group in family.groups
            if group.name in correlations
        }
        tied = {name: _tied(loss) for name, loss in losses.items()}
        if not any(tied.values()):
            return None
        if family.inners:
            return Ties(family.groups, losses)
        ((name, units),) = tied.items()
        places = torch.tensor(units, device=losses[name].device)
        return Ties((_part(family.outer, units),), {name: losses[name][places[:, None], places]}, units)

    def spread(self, group: PermutationGroup, order: Permutation) -> Permutation:
        """An order of the open units as one of all units of a group."""
        if not self.units:
            return order
        places, units = np.arange(group.size), np.asarray(self.units)
        places[units] = units[list(order.order)]
        return Permutation(tuple(places.tolist()))


def break_ties(
    problem: Problem, states: States, found: Permutations, ties: Sequence[Ties]
) -> tuple[dict[str, Permutation], list[Gain]]:
    """Match what activations leave open by the weights: tied units, and groups that no activation shows.

    Args:
        problem: As for :meth:`Matcher.match`.
        states: Parameters of the source and of what it is matched to, which comes first.
        found: The orders that activations gave.
        ties: What they leave open.

    Returns:
        Orders of all groups; gains of those that activations do not show.
    """
    tied = {group.name: (group, own) for own in ties for group in own.groups}
    unseen = {
        group.name: group
        for family in families(problem.groups)
        for group in family.groups
        if family.outer.name not in tied and any(other.name not in found for other in family.groups)
    }
    names = [group.name for group in problem.groups if group.name in tied or group.name in unseen]
    groups = GroupSet(tuple(tied[name][0] if name in tied else unseen[name] for name in names))
    a, b = states
    aligned = {name: permute_tensor(name, b[name], problem.groups, found) for name in groups.by_parameter}
    kept = {name: group.identity() for name, group in unseen.items() if name in found}
    losses = {name: loss for own in ties for name, loss in own.losses.items()}
    matching = match_open(problem, groups, (a, aligned), kept, losses)
    settled = permutations_of(matching.permutations)
    before = {group.name: found.get(group.name, group.identity()) for group in problem.groups}
    moved = {
        group.name: tied[group.name][1].spread(group, order) if group.name in tied else order
        for group in problem.groups
        for order in [settled.get(group.name, group.identity())]
    }
    orders = {group.name: _one_after_the_other(group, before, moved) for group in problem.groups}
    gains = (gain for gain in matching.gains if gain.group not in found)
    return orders, [replace(gain, moved=orders[gain.group].moved) for gain in gains]


def _one_after_the_other(group: PermutationGroup, first: Permutations, then: Permutations) -> Permutation:
    """The order that does what two do."""
    if group.blocks == 1:
        return Permutation(tuple(first[group.name].order[place] for place in then[group.name].order))
    whole, moved = (units_in_order(group, orders).order for orders in (first, then))
    inside = (whole[place] % group.size for place in moved)
    return Permutation(tuple(unit // group.size * group.size + at for unit, at in enumerate(inside)))


def _part(group: PermutationGroup, units: Sequence[int]) -> PermutationGroup:
    """A group that moves some of a group's units and leaves the others where they are."""
    members = (
        replace(member, size=len(units), start=0, inner=1, outer=1, indices=tuple(places[list(units)].flat))
        for member in group.members
        for places in [member.positions()]
    )
    return group if len(units) == group.size else replace(group, size=len(units), members=tuple(members))


def _losses(correlation: Tensor, order: Permutation) -> Tensor:
    """Zero on the diagonal; the sum along any other order is what that order loses, below zero."""
    gains = correlation[:, torch.tensor(order.order, device=correlation.device)]
    own = gains.diagonal() / 2
    return gains.sub_(own.clone()[:, None]).sub_(own.clone())


def _tied(losses: Tensor) -> tuple[int, ...]:
    """Units that can change places with another one."""
    found: list[int] = []
    for start in range(0, len(losses), ROWS):
        swapped = losses[start : start + ROWS] + losses[:, start : start + ROWS].T
        swapped.diagonal(start).fill_(-torch.inf)
        found += (start + torch.nonzero((swapped >= -TIE).any(1))[:, 0]).tolist()
    return tuple(found)

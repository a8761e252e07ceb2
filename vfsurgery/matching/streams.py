"""Streams: the rotation of a space between LayerNorms that brings one source's units to another's.

Of the cross products ``M = sum of x_a x_b'`` of what is to agree, ``Q = U V'`` with ``U S V' = svd(M)`` maximises
``<Q, M>`` (Schönemann's orthogonal Procrustes problem, 1966); so that ones stay, the same within what is orthogonal to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, UnitMap, map_tensor
from vfsurgery.groups import GroupSet, PermutationGroup, Symmetry
from vfsurgery.groups.symmetries import complement_of_ones
from vfsurgery.matching.base import Gain
from vfsurgery.matching.similarity import States, is_matrix, member_rows
from vfsurgery.stats.correlation import CrossMoments

Orders = Mapping[str, Order]


def procrustes(cross: Tensor, symmetry: Symmetry = Symmetry.ORTHOGONAL) -> Tensor:
    """The orthogonal ``Q`` with the largest ``<Q, M>``, so that ``x_a ~ Q x_b`` for ``M = sum of x_a x_b'``.

    Args:
        cross: ``(..., d, d)`` in float64.
        symmetry: ``ORTHOGONAL_FIXING_ONES`` keeps ones where they are.

    >>> turn = Symmetry.ORTHOGONAL.random(3, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(procrustes(turn @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())), turn))
    True
    """
    if symmetry is Symmetry.ORTHOGONAL_FIXING_ONES:
        size = cross.shape[-1]
        basis = complement_of_ones(size).to(cross.device)
        return basis @ procrustes(basis.T @ cross @ basis) @ basis.T + 1 / size
    left, _, right = torch.linalg.svd(cross)
    return left @ right


@dataclass(frozen=True)
class Turn:
    """The rotation of one space, and what it gains."""

    map: UnitMap
    gain: Gain


def best_turn(group: PermutationGroup, cross: Tensor | None) -> Turn:
    """The best rotation of one space; none where nothing is known of it."""
    if cross is None or not bool(cross.any()):
        return Turn(UnitMap.of(group.identity()), Gain(group.name, 0.0, 0.0, 0))
    turn = procrustes(cross, min(group.symmetry, Symmetry.ORTHOGONAL))
    before, after = float(cross.diagonal().sum()), float((turn * cross).sum())
    found = UnitMap(turn, turn.T)
    return Turn(found, Gain(group.name, before, after, found.moved))


def evidence(
    group: PermutationGroup, groups: GroupSet, states: States, orders: Orders, known_only: bool = False
) -> Tensor | None:
    """Cross products of the weights that write or read a space, each divided by its norms.

    They are computed in float32, where the weights are. A few weights, of fewer columns than the space has units, are
    multiplied in float64: rounding would decide what they leave open.

    Args:
        group: The space.
        groups: All groups of the architecture.
        states: The weights of both, as they came.
        orders: What b's units are brought to; that of this space does not count.
        known_only: Leave out weights that touch other groups than ``orders`` has.
    """
    a, b = states
    others = {name: order for name, order in orders.items() if name != group.name}
    total: Tensor | None = None
    for name in dict.fromkeys(member.parameter for member in group.members):
        partners = {owner.name for owner, _ in groups.by_parameter[name]} - {group.name}
        if not is_matrix(a[name]) or (known_only and not partners <= others.keys()):
            continue
        mine, theirs = a[name], map_tensor(name, b[name], groups, others)
        for member in (member for member in group.members if member.parameter == name and not member.scales):
            rows = member_rows(mine, member), member_rows(theirs, member)
            if known_only:
                rows = rows[0].double(), rows[1].double()
            cross = (rows[0] @ rows[1].T).double() / norms_of(*rows)
            total = cross if total is None else total.add_(cross)
    return total


def crossed(moments: Sequence[CrossMoments]) -> Tensor:
    """Cross products about the means of all places, each divided by its norms."""
    return torch.stack([scaled(each) for each in moments]).sum(0)


def scaled(moments: CrossMoments) -> Tensor:
    """Cross products over the norms of both sources' units, float64."""
    norms = (moments.a.squares.sum() * moments.b.squares.sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return moments.products.double() / norms


def norms_of(a: Tensor, b: Tensor) -> Tensor:
    """What products of two matrices are divided by: both norms."""
    return (a.norm().double() * b.norm().double()).clamp_min(torch.finfo(torch.float64).tiny)

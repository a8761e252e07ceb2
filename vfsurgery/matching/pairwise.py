"""How similar several sources are to each other under given orders: what schemes of matching are compared by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vfsurgery.discovery.maps import Order, map_tensor
from vfsurgery.groups import GroupSet, PermutationGroup, Permutations, permute_tensor
from vfsurgery.matching.base import Gain
from vfsurgery.matching.schemes import units_in_order
from vfsurgery.matching.similarity import is_matrix, member_rows
from vfsurgery.stats.correlation import CrossMoments, mean_correlation
from vfsurgery.tracing.precision import as_real

Crossed = Mapping[tuple[int, int], Mapping[str, Sequence[CrossMoments]]]
"""For pairs of sources ``i < j`` and each group the cross moments of its units, one for each place they are read at."""


def describe(
    groups: GroupSet,
    states: Sequence[Mapping[str, Tensor]],
    orders: Sequence[Permutations],
    pairs: Crossed | None = None,
) -> list[str]:
    """Say how similar all sources are to each other as they came and aligned; by activations too, given ``pairs``."""
    both: list[Sequence[Permutations]] = [[{}] * len(orders), orders]
    before, after = (pairwise_similarity(groups, states, own) for own in both)
    found = [f"mean similarity of two sources' weights: {before:.4f} as they came, {after:.4f} aligned"]
    if pairs is not None:
        before, after = (pairwise_correlation(groups, pairs, own) for own in both)
        found.append(f"mean correlation of two sources' units: {before:.4f} as they came, {after:.4f} aligned")
    return found


def mean_state(
    groups: GroupSet, states: Sequence[Mapping[str, Tensor]], orders: Sequence[Mapping[str, Order]]
) -> dict[str, Tensor]:
    """The mean of aligned sources' weights, in float32 or better; what weight matching ignores is the first one's.

    Args:
        groups: The groups of their architecture.
        states: Parameters and buffers of each source by state-dict key.
        orders: What aligns each of them.
    """
    mean = dict(states[0])
    for name in groups.by_parameter:
        if is_matrix(mean[name]):
            aligned = (map_tensor(name, state[name], groups, own) for state, own in zip(states, orders, strict=True))
            total = next(aligned)
            if len(states) > 1:
                total = total.to(torch.promote_types(total.dtype, torch.float32), copy=True)
                for tensor in aligned:
                    total += tensor
                total /= len(states)
            mean[name] = total
    return mean


def gains_of_all(
    groups: GroupSet,
    states: Sequence[Mapping[str, Tensor]],
    known: Sequence[Permutations],
    orders: Sequence[Permutations],
) -> list[tuple[Gain, ...]]:
    """For every source what aligning all did for ``<x, y>``, of its units' weights with the mean of all others'.

    Args:
        groups: The groups of their architecture.
        states: Parameters and buffers of each source by state-dict key.
        known: The orders that each source had before; of their groups nothing is said.
        orders: Those it has now, of all groups.
    """
    found: list[tuple[Gain, ...]] = []
    for source, own in enumerate(orders):
        before, after = (_similar_to_others(groups, states, of, source) for of in (known, orders))
        new = (name for name in own if name not in known[source])
        found.append(tuple(Gain(name, before[name], after[name], own[name].moved) for name in new))
    return found


def _similar_to_others(
    groups: GroupSet, states: Sequence[Mapping[str, Tensor]], orders: Sequence[Permutations], source: int
) -> dict[str, float]:
    """Of one source's units with the mean of all others', by group."""
    others = [other for other in range(len(states)) if other != source]
    mean = mean_state(groups, [states[other] for other in others], [orders[other] for other in others])
    own = mean_state(groups, [states[source]], [orders[source]])
    return {group.name: _similarity(group, mean, own) for group in groups}


def _similarity(group: PermutationGroup, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    members = [member for member in group.members if is_matrix(a[member.parameter])]
    pairs = ([member_rows(state[member.parameter], member).flatten() for state in (a, b)] for member in members)
    return sum(float(torch.linalg.vecdot(*rows)) for rows in pairs)


def pairwise_similarity(
    groups: GroupSet, states: Sequence[Mapping[str, Tensor]], orders: Sequence[Permutations]
) -> float:
    """Cosine of the angle between aligned sources' weights, pooled over all pairs.

    ``sum over i < j of <P_i x_i, P_j x_j> / sum over i < j of |x_i| |x_j|``, over all matrices and kernels that lie in
    a group: what weight matching maximises, scaled to [-1, 1].

    Args:
        groups: The groups of their architecture.
        states: Parameters and buffers of each source by state-dict key.
        orders: What aligns each of them; groups left out stay as they are.

    >>> from vfsurgery.groups import Member, Permutation, PermutationGroup
    >>> groups = GroupSet((PermutationGroup("g0", 2, (Member("weight", 0, 2),)),))
    >>> states = [{"weight": torch.tensor([[1.0], [0.0]])}, {"weight": torch.tensor([[0.0], [1.0]])}]
    >>> pairwise_similarity(groups, states, [{}, {}])
    0.0
    >>> pairwise_similarity(groups, states, [{}, {"g0": Permutation((1, 0))}])
    1.0
    """
    products = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in groups.by_parameter:
        if is_matrix(states[0][name]):
            pairs = zip(states, orders, strict=True)
            rows = torch.stack(
                [as_real(permute_tensor(name, state[name], groups, own)).flatten() for state, own in pairs]
            )
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            products += (rows @ rows.T).to(products)
    norms = products.diagonal().clamp_min(0).sqrt()
    upper = torch.triu(torch.ones_like(products), diagonal=1).bool()
    most = float(norms.outer(norms)[upper].sum())
    return float(products[upper].sum()) / most if most else 0.0


def pairwise_correlation(groups: GroupSet, pairs: Crossed, orders: Sequence[Permutations]) -> float:
    """Mean correlation of corresponding units, over all pairs of sources and all units of groups that were read.

    ``sum over i < j of tr(P_i C_ij P_j^T)``, which activation matching maximises group by group, over the number of
    units and pairs.

    Args:
        groups: The groups of the sources' architecture.
        pairs: Their cross moments; needed of all pairs.
        orders: What aligns each source, for all groups that were read and those around them; ``{}`` leaves it as it is.
    """
    total, count = 0.0, 0
    whole = [{**{group.name: group.identity() for group in groups}, **own} for own in orders]
    for i, j in itertools.combinations(range(len(orders)), 2):
        for name, moments in pairs[i, j].items():
            correlation = mean_correlation(moments)
            rows, columns = (list(units_in_order(groups[name], whole[source]).order) for source in (i, j))
            total += float(correlation[rows, columns].sum())
            count += len(correlation)
    return total / count if count else 0.0

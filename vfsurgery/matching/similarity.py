"""The similarity of the units of one group in two states of one architecture, kept up to date while others move.

``A = sum over members  mat(a) mat(P_others(b))^T``, where ``mat`` brings the group's units to the rows (Ainsworth et
al., "Git Re-Basin", 2023, Alg. 1). Only parameters of two and more dims count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vfsurgery.groups import GroupSet, Member, Permutation, PermutationGroup, gather_index, permute_tensor
from vfsurgery.stats.correlation import unit_rows
from vfsurgery.tracing.precision import as_real, is_inexact

States = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass
class _Part:
    """What one member adds to ``A``: ``indices`` or ``added`` is what was last counted for it."""

    member: Member
    partners: frozenset[str]
    indices: dict[int, np.ndarray] | None = None
    signature: tuple[Permutation | None, ...] | None = None
    added: Tensor | None = None


class Similarity:
    """``A`` of one group; rows are units of a, columns b's in their own order.

    ``total`` is the matrix; ``headroom`` bounds what another order can gain over the one last solved for.

    Args:
        group: The group.
        groups: All groups of the architecture.
        states: The parameters of a and b by state-dict key.
        members: The members that count; all by default.
        family: Names of the groups matched together with this one, whose orders say nothing here.
    """

    def __init__(
        self,
        group: PermutationGroup,
        groups: GroupSet,
        states: States,
        members: Iterable[Member] | None = None,
        family: Collection[str] = (),
    ) -> None:
        self.group, self.groups = group, groups
        self.total: Tensor | None = None
        self.headroom = 0.0
        self._a, self._b = states
        self._family = {group.name, *family}
        self._parts = [
            _Part(member, frozenset(owner.name for owner, _ in groups.by_parameter[member.parameter]) - self._family)
            for member in (group.members if members is None else members)
            if is_matrix(self._a[member.parameter])
        ]

    def bring_up_to_date(self, orders: Mapping[str, Permutation], own: Permutation | None) -> None:
        """Apply what other groups have moved since the last call.

        A member counts once all groups that share its parameter have an order: an arbitrary order would add noise only.

        Args:
            orders: The present order of every group that has one.
            own: The order of this similarity's rows that was last solved for, if any.
        """
        change: Tensor | None = None
        for part in self._parts:
            step = self._step(part, orders) if part.partners <= orders.keys() else None
            if step is not None:
                change = step if change is None else change.add_(step)
        if change is None:
            return
        if own is not None:
            self.headroom += float((change.amax(1) - change.gather(1, columns(own, change))[:, 0]).sum())
        self.total = change if self.total is None else self.total.add_(change)

    def under(self, order: Permutation) -> float:
        """The similarity that an order reaches."""
        if self.total is None:
            return 0.0
        return float(self.total.gather(1, columns(order, self.total)).sum(dtype=torch.float64))

    def _step(self, part: _Part, orders: Mapping[str, Permutation]) -> Tensor | None:
        """What a member's share has changed by; ``None`` if by nothing."""
        member = part.member
        a, b = self._a[member.parameter], self._b[member.parameter]
        if self._has_blocks_across(member.parameter):
            return self._whole_step(part, orders, a, b)
        new, old = self._other_dims(member, b, orders), part.indices
        if old is not None and all(np.array_equal(new[dim], old[dim]) for dim in new):
            return None
        part.indices = new
        return _product(member, a, _gather(b, new)) if old is None else _difference(member, a, b, new, old)

    def _has_blocks_across(self, parameter: str) -> bool:
        """Whether another family has units here whose blocks lie along another dim: no index per dim says how."""
        return any(
            member.block_dim >= 0 and owner.name not in self._family
            for owner, member in self.groups.by_parameter[parameter]
        )

    def _whole_step(self, part: _Part, orders: Mapping[str, Permutation], a: Tensor, b: Tensor) -> Tensor | None:
        signature = tuple(orders.get(name) for name in sorted(part.partners))
        if signature == part.signature:
            return None
        others = {name: order for name, order in orders.items() if name not in self._family}
        new = _product(part.member, a, permute_tensor(part.member.parameter, b, self.groups, others))
        step = new if part.added is None else new - part.added
        part.signature, part.added = signature, new.clone() if step is new else new
        return step

    def _other_dims(self, member: Member, b: Tensor, orders: Mapping[str, Permutation]) -> dict[int, np.ndarray]:
        """For each dim that other groups lie on: where its indices come from under their current orders.

        On the member's own dim these are groups that share its positions but do not belong to its family.
        """
        entries = self.groups.by_parameter[member.parameter]
        indices: dict[int, np.ndarray] = {}
        for dim in {other.dim for _, other in entries}:
            others = entries
            if dim == member.dim:
                others = tuple(
                    (owner, other)
                    for owner, other in entries
                    if owner.name not in self._family and other.overlaps(member)
                )
                if not others:
                    continue
            index = gather_index(others, dim, b.shape[dim], orders)
            indices[dim] = np.arange(b.shape[dim]) if index is None else index
        return indices


def is_matrix(tensor: Tensor) -> bool:
    """Whether a parameter counts for weight matching: numbers in two and more dims."""
    return is_inexact(tensor) and tensor.ndim > 1


def columns(order: Permutation, like: Tensor) -> Tensor:
    """An order as the column index of each row."""
    return torch.tensor(order.order, device=like.device)[:, None]


def member_rows(tensor: Tensor, member: Member) -> Tensor:
    """The member's units as rows of a matrix, float32 or better, without a copy where they lie so already.

    Of complex numbers both parts stand there: the product of two such rows is the real part of their inner product.
    """
    tensor = as_real(tensor)
    whole = member.size == tensor.shape[member.dim] and not member.indices
    if whole and member.dim == 0 and tensor.dtype.itemsize >= 4:
        return tensor.reshape(member.size, -1)
    places = None if whole else torch.from_numpy(member.positions()).to(tensor.device)
    return unit_rows(tensor, places, member.dim)


def _gather(tensor: Tensor, indices: Mapping[int, np.ndarray]) -> Tensor:
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return tensor


def _difference(
    member: Member, a: Tensor, b: Tensor, new: Mapping[int, np.ndarray], old: Mapping[int, np.ndarray]
) -> Tensor:
    """The member's share of ``A`` under the new indices minus that under the old ones."""
    moved = {dim: np.flatnonzero(new[dim] != old[dim]) for dim in new}
    only = [dim for dim in moved if len(moved[dim])]
    if len(only) == 1 and only[0] != member.dim:  # all else equal: only the moved columns count
        (dim,) = only
        a = _gather(a, {dim: moved[dim]})
        new = {**new, dim: new[dim][moved[dim]]}
        old = {**old, dim: old[dim][moved[dim]]}
    return _product(member, a, _gather(b, new) - _gather(b, old))


def _product(member: Member, a: Tensor, b: Tensor) -> Tensor:
    return member_rows(a, member) @ member_rows(b, member).T

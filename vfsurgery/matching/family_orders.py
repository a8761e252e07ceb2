"""The orders of one family of groups that are best for the weights while all other groups stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vfsurgery.groups import GroupSet, Member, Permutation, PermutationGroup, permute_tensor
from vfsurgery.matching.assignment import assign
from vfsurgery.matching.nested import BlockAssignment, Family, joined, whole_order
from vfsurgery.matching.similarity import Similarity, States, is_matrix, member_rows
from vfsurgery.tracing.precision import as_real

PRIOR = 1e3
"""How much correlation counts beside weights where it leaves ties: a thousandth of it outweighs any similarity."""
ROUNDS = 5
"""Most rounds over the inner groups of a family whose parameters have units of several of them."""


class FamilyProblem:
    """The similarities of one family's groups, and the orders that are best for them while all others stay.

    Members fall into three kinds: those of whole blocks (``outer``), those of the units of one inner group (``inner``,
    all units of all blocks against all of the other's), and *joint* ones, where one parameter has units of several
    inner groups, as the weight of a grouped convolution has inputs and outputs. Joint ones count only once the blocks
    have been paired: they are compared inside pairs of blocks, one inner group at a time.
    """

    def __init__(
        self, family: Family, groups: GroupSet, states: States, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        self.family, self.groups = family, groups
        self._a, self._b = states
        names = [group.name for group in family.groups]
        self.joint = [
            (group, member)
            for group in family.inners
            for member in group.members
            if is_matrix(self._a[member.parameter]) and _is_joint(group, member, family, groups)
        ]
        self._outer = Similarity(family.outer, groups, states, _whole_blocks(family, groups), names)
        self._inner = {
            group.name: Similarity(group, groups, states, self._plain(group, inside=True), names)
            for group in family.inners
        }
        self._flat = {  # what a group whose one order serves all blocks has beside them
            group.name: Similarity(group, groups, states, self._plain(group, inside=False), names)
            for group in family.inners
        }
        self._similarities = (self._outer, *self._inner.values(), *self._flat.values())
        parameters = {member.parameter for _, member in self.joint}
        self._partners = {
            name: {owner.name for owner, _ in groups.by_parameter[name]} - set(names) for name in parameters
        }
        self._seen: tuple[Permutation | None, ...] = ()
        self._joint_moved = False
        self._losses = [  # that no weights have joined yet
            (self._outer if group is family.outer else self._inner[group.name], losses[group.name])
            for group in family.groups
            if losses and group.name in losses
        ]

    def _plain(self, group: PermutationGroup, inside: bool) -> list[Member]:
        joint = [member for owner, member in self.joint if owner is group]
        return [member for member in group.members if member not in joint and (member.blocks > 1) == inside]

    @property
    def headroom(self) -> float:
        """A bound on what other orders can gain; infinite when a joint parameter has changed."""
        return float("inf") if self._joint_moved else sum(similarity.headroom for similarity in self._similarities)

    def bring_up_to_date(self, orders: Mapping[str, Permutation], present: Mapping[str, Permutation] | None) -> bool:
        """Apply what other groups have moved; return whether anything is known yet."""
        own = None if present is None else present[self.family.outer.name]
        self._outer.bring_up_to_date(orders, own)
        for group in self.family.inners:
            inner = None if present is None else present[group.name]
            whole = None if own is None or inner is None else whole_order(own, inner, group.size)
            self._inner[group.name].bring_up_to_date(orders, whole)
            self._flat[group.name].bring_up_to_date(orders, inner)
        if self.joint:
            seen = tuple(orders.get(name) for name in sorted(set().union(*self._partners.values())))
            self._joint_moved, self._seen = seen != self._seen, seen
        known = any(similarity.total is not None for similarity in self._similarities)
        if known and self._losses:
            weight = PRIOR * (self._bound() or 1.0)
            for similarity, losses in self._losses:
                similarity.total = losses * weight if similarity.total is None else similarity.total + losses * weight
                similarity.headroom = float("inf")
            self._losses = []
        return known

    def _bound(self) -> float:
        """No two units' weights are more similar."""
        members = (m for group in self.family.groups for m in group.members if is_matrix(self._a[m.parameter]))
        longest = (
            [member_rows(state[member.parameter], member).norm(dim=1).max() for state in (self._a, self._b)]
            for member in members
        )
        return sum(float(a * b) for a, b in longest)

    def total(self, found: Mapping[str, Permutation], orders: Mapping[str, Permutation]) -> float:
        """The similarity of all parameters of the family under the given orders of its groups."""
        outer = found[self.family.outer.name]
        total = self._outer.under(outer)
        for group in self.family.inners:
            total += self._inner[group.name].under(whole_order(outer, found[group.name], group.size))
            total += self._flat[group.name].under(found[group.name])
        for name in dict.fromkeys(member.parameter for _, member in self._known_joint(orders)):
            moved = permute_tensor(name, self._b[name], self.groups, {**orders, **found})
            both = (as_real(tensor).flatten().float() for tensor in (self._a[name], moved))
            total += float(torch.linalg.vecdot(*both))
        return total

    def solve(
        self, present: Mapping[str, Permutation] | None, orders: Mapping[str, Permutation]
    ) -> dict[str, Permutation]:
        """The best orders found, by group name."""
        for similarity in self._similarities:
            similarity.headroom = 0.0
        if not self.family.inners:
            assert self._outer.total is not None
            return {self.family.outer.name: assign(self._outer.total).permutation}
        found = self._assign_blocks()
        if not self._known_joint(orders):
            return found
        candidates = [self._refine(found, orders)]
        if present is not None:
            candidates.append(self._refine(present, orders))
        return max(candidates, key=lambda candidate: self.total(candidate, orders))

    def _assign_blocks(self) -> dict[str, Permutation]:
        known = {name: similarity.total for name, similarity in self._inner.items() if similarity.total is not None}
        shared = {group.name: self._flat[group.name].total for group in self.family.inners if group.blocks == 1}
        assignment = BlockAssignment(
            self.family.outer.size,
            self._outer.total,
            known,
            {name: flat for name, flat in shared.items() if name in known},
        )
        found = assignment.solve()
        orders = {group.name: found.get(group.name, group.identity()) for group in self.family.inners}
        return {self.family.outer.name: found[""], **orders}

    def complete(self, orders: Mapping[str, Permutation], known: Mapping[str, Permutation]) -> dict[str, Permutation]:
        """The best orders of the inner groups that are not known, from those they have; the outer one is known."""
        missing = [group for group in self.family.inners if group.name not in known]
        start = {group.name: orders.get(group.name, group.identity()) for group in self.family.groups}
        self.bring_up_to_date(orders, None)
        return self._refine(start, orders, missing)

    def _refine(
        self,
        found: Mapping[str, Permutation],
        orders: Mapping[str, Permutation],
        inners: Sequence[PermutationGroup] | None = None,
    ) -> dict[str, Permutation]:
        """Improve inner orders one group at a time, blocks paired as they are, with joint parameters counted too."""
        best = dict(found)
        for _ in range(ROUNDS):
            before = dict(best)
            for group in dict.fromkeys(group for group, _ in self.joint) if inners is None else inners:
                best[group.name] = self._best_inside(group, best, orders)
            if best == before:
                break
        return best

    def _best_inside(
        self, group: PermutationGroup, found: Mapping[str, Permutation], orders: Mapping[str, Permutation]
    ) -> Permutation:
        pairs = self._inside_pairs(group, found[self.family.outer.name])
        others = {name: order for name, order in {**orders, **found}.items() if name != group.name}
        for owner, member in self._known_joint(orders):
            if owner is group:
                moved = permute_tensor(member.parameter, self._b[member.parameter], self.groups, others)
                a, b = (self._block_rows(group, member, x) for x in (self._a[member.parameter], moved))
                step = a @ b.transpose(1, 2)
                pairs = pairs + (step if len(step) == len(pairs) else step / len(pairs))
        if group.blocks > 1:
            return joined([assign(matrix).permutation.order for matrix in pairs])
        flat = self._flat[group.name].total
        return assign(pairs.sum(0) if flat is None else pairs.sum(0) + flat).permutation

    def _inside_pairs(self, group: PermutationGroup, outer: Permutation) -> Tensor:
        """Plain similarities inside each chosen pair of blocks, ``(blocks, size, size)``."""
        blocks, size, total = self.family.outer.size, group.size, self._inner[group.name].total
        if total is None:
            like = next(iter(self._a.values()))
            return torch.zeros(blocks, size, size, device=like.device)
        pairs = total.reshape(blocks, size, blocks, size)
        chosen = torch.tensor(outer.order, device=total.device)
        return pairs[torch.arange(blocks, device=total.device), :, chosen]

    def _block_rows(self, group: PermutationGroup, member: Member, tensor: Tensor) -> Tensor:
        """The units inside each block as rows, ``(blocks, size, rest)``; one block where the blocks do not show."""
        if member.block_dim < 0:
            return member_rows(tensor, member).reshape(member.blocks, member.size, -1)
        rows = self.groups.blocks_of(member.parameter, member, group)
        picked = [tensor.index_select(member.block_dim, torch.from_numpy(places).to(tensor.device)) for places in rows]
        return torch.stack([member_rows(block, member) for block in picked])

    def _known_joint(self, orders: Mapping[str, Permutation]) -> list[tuple[PermutationGroup, Member]]:
        """Joint members of parameters whose other groups all have an order."""
        return [(group, member) for group, member in self.joint if self._partners[member.parameter] <= orders.keys()]


def _whole_blocks(family: Family, groups: GroupSet) -> list[Member]:
    """The members of the outer group on whose positions no inner group lies."""
    inner = {group.name for group in family.inners}

    def holds_units(member: Member) -> bool:
        inside = [other for owner, other in groups.by_parameter[member.parameter] if owner.name in inner]
        return any(other.block_dim == member.dim or other.overlaps(member) for other in inside)

    return [member for member in family.outer.members if not holds_units(member)]


def _is_joint(group: PermutationGroup, member: Member, family: Family, groups: GroupSet) -> bool:
    """Whether a parameter has units of another inner group on, or across, this member's positions."""
    if member.block_dim >= 0:
        return True
    names = {inner.name for inner in family.inners} - {group.name}
    outer_dims = {m.dim for owner, m in groups.by_parameter[member.parameter] if owner is family.outer}
    if member.blocks == 1 and outer_dims:  # one order for all blocks, which lie along another dim
        return True
    return any(
        other.block_dim >= 0 or other.dim != member.dim or other.overlaps(member)
        for owner, other in groups.by_parameter[member.parameter]
        if owner.name in names
    )

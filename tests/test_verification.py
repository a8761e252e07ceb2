"""What a verification says, in few passes: which groups are wrong, and where rounding is as large as an error."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import Verification
from vfsurgery.discovery.verification.proof import drawn_orders
from vfsurgery.groups import GroupSet


class Chaos(nn.Module):
    """A logistic map iterated until a change in the last place of a number is all that is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.body(x))
        for _ in range(60):
            y = 3.9 * y * (1 - y)
        return y


def test_what_rounding_alone_can_explain_is_undecided():
    x, model = torch.randn(16, 4), Chaos()
    proof = surgery.verify(model, surgery.find_groups(model, x), x)
    assert not proof
    assert proof.undecided
    assert "UNDECIDED, rounding alone makes" in str(proof)


def test_a_wrong_group_of_a_tame_network_is_wrong_and_not_undecided():
    x, model = torch.randn(2, 4), Chaos().body
    (group,) = surgery.find_groups(model, x)
    proof = surgery.verify(model, GroupSet((replace(group, members=group.members[1:]),)), x)
    assert not proof
    assert not proof.undecided
    assert "NOT proven" in str(proof)


class Counting(nn.Module):
    """Counts its forward passes, those of its copies included."""

    passes: ClassVar[int] = 0

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        Counting.passes += 1
        return self.layers(x)


class Sum(nn.Module):
    """Many small networks side by side: as many groups, each of which the output shows."""

    def __init__(self, count: int, units: int) -> None:
        super().__init__()
        self.reads = nn.ModuleList(nn.Linear(4, units) for _ in range(count))
        self.heads = nn.ModuleList(nn.Linear(units, 3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return sum(head(read(x).tanh()) for read, head in zip(self.reads, self.heads, strict=True))  # type: ignore[return-value]


class Residual(nn.Module):
    """Two layers whose outputs are added up, so that their units have one order."""

    def __init__(self, units: int, count: int = 1) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(4, units) for _ in range(count)) for _ in "lr")
        self.heads = nn.ModuleList(nn.Linear(units, 3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.left, self.right, self.heads, strict=True)
        return sum(head((left(x) + right(x)).tanh()) for left, right, head in parts)  # type: ignore[return-value]


def counted(model: nn.Module, groups: GroupSet, x: Tensor) -> tuple[Verification, int]:
    Counting.passes = 0
    proof = surgery.verify(model, groups, x)
    return proof, Counting.passes


@pytest.mark.parametrize(
    "layers",
    [
        *(Sum(97, 5), Sum(97, 2), Sum(1, 2), Residual(2, 30)),
        nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(20))),
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 3)),
    ],
    ids=["97x5", "97x2", "1x2", "30 sums", "deep", "norm"],
)
def test_ten_passes_prove_a_network_that_holds(layers: nn.Module) -> None:
    model, x = Counting(layers), torch.randn(8, 4)
    proof, passes = counted(model, surgery.find_groups(model, x), x)
    assert proof
    assert passes == proof.passes <= 10
    assert proof.worst_group == "" and "group g" not in str(proof)


@pytest.mark.parametrize("which", [0, 41, 96])
@pytest.mark.parametrize("lost", [0, -1], ids=["written", "read"])
def test_a_wrong_member_among_97_groups_is_found_and_named(which: int, lost: int) -> None:
    model, x = Counting(Sum(97, 5)), torch.randn(8, 4)
    right = surgery.find_groups(model, x)
    wrong = list(right)
    members = list(wrong[which].members)
    del members[lost]
    wrong[which] = replace(wrong[which], members=tuple(members))
    proof, passes = counted(model, GroupSet(tuple(wrong), in_training=False), x)
    assert not proof and not proof.undecided
    assert proof.worst_group == f"group {wrong[which]}" and proof.wrong == (proof.worst_group,)
    assert passes <= 40


def test_all_wrong_groups_are_named() -> None:
    model, x = Sum(97, 5), torch.randn(8, 4)
    chosen = {3, 40, 41}
    groups = [
        replace(group, members=group.members[1:]) if place in chosen else group
        for place, group in enumerate(surgery.find_groups(model, x))
    ]
    proof = surgery.verify(model, GroupSet(tuple(groups)), x)
    assert set(proof.wrong) == {f"group {groups[place]}" for place in chosen}
    assert proof.worst_group in proof.wrong and "also wrong: group" in str(proof)


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_group_torn_in_two_does_not_hold(units: int, seed: int) -> None:
    """Where both halves moved alike each time, nothing would be seen: of two units there is one other order."""
    model, x = Residual(units, 3), torch.randn(8, 4)
    groups = []
    for group in surgery.find_groups(model, x):
        left = [member for member in group.members if "left" in member.parameter]
        rest = tuple(member for member in group.members if member not in left)
        groups += [replace(group, members=tuple(left), name=f"{group.name}l"), replace(group, members=rest)]
    proof = surgery.verify(model, GroupSet(tuple(groups)), x, seed=seed)
    assert not proof and proof.wrong


def test_every_group_moves_and_none_like_another() -> None:
    groups = surgery.find_groups(Sum(3, 2), torch.randn(8, 4))
    draws = drawn_orders(groups, torch.Generator().manual_seed(0), 2)
    orders = [tuple(drawn[group.name] for drawn in draws) for group in groups]
    assert len(set(orders)) == 3
    assert all(any(not order.is_identity for order in own) for own in orders)


def test_units_that_nothing_reads_are_no_control() -> None:
    class Dead(Sum):
        def forward(self, x: Tensor) -> Tensor:
            parts = list(zip(self.reads, self.heads, strict=True))
            seen = sum(head(read(x).tanh()) for read, head in parts[1::2])
            return seen + sum(0.0 * head(read(x).tanh()) for read, head in parts[::2])

    model, x = Dead(6, 5), torch.randn(8, 4)
    assert surgery.verify(model, surgery.find_groups(model, x), x)


class Faint(nn.Module):
    """Hidden units whose outputs are normalized away; with ``mean``, units of which only the mean is read, too."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean, self.one, self.norm, self.two = mean, nn.Conv2d(3, 6, 1), nn.GroupNorm(6, 6), nn.Conv2d(6, 4, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(self.norm(self.one(x))).mean((2, 3))  # constant: each unit's mean over places is its bias
        return self.head(x).mean((2, 3)) + hidden.mean(1, keepdim=True) if self.mean else hidden


def test_a_network_whose_outputs_cannot_tell_is_undecided():
    model, x = Faint(mean=False).double().eval(), torch.randn(4, 3, 5, 5).double()
    proof = surgery.verify(model, surgery.find_groups(model, x), x)
    assert not proof and proof.undecided and proof.error < 1e-13
    assert "UNDECIDED, the outputs hardly depend on groups that were broken on purpose" in str(proof)


def test_groups_that_change_nothing_when_they_are_broken_leave_the_proof_to_others():
    model, x = Faint(mean=True).double().eval(), torch.randn(4, 3, 5, 5).double()
    proof = surgery.verify(model, surgery.find_groups(model, x), x)
    assert proof and not proof.undecided and proof.control_error > 1e-6

"""What a verification says where rounding is as large as an error could be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import vfsurgery as surgery
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

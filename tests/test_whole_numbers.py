"""Sources whose saved integers or masks differ: there is no mean of them, and one for the other is another network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Chosen(nn.Module):
    """Hidden units under a table that is saved."""

    def __init__(self, table: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.register_buffer("table", table)
        self.register_buffer("steps", torch.randint(1000, ()))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.out(F.relu(self.b(self.use(F.relu(self.a(x)), self.table))))


def order(h: Tensor, table: Tensor) -> Tensor:
    return h[:, table]


def scaled(h: Tensor, table: Tensor) -> Tensor:
    return h * table


def written(h: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, table] = h
    return out


TABLES = {
    "order": (order, lambda seed: torch.randperm(10, generator=torch.Generator().manual_seed(seed))),
    "written": (written, lambda seed: torch.randperm(10, generator=torch.Generator().manual_seed(seed))),
    "mask": (scaled, lambda seed: torch.rand(10, generator=torch.Generator().manual_seed(seed)) > 0.5),
    "number": (scaled, lambda seed: torch.tensor(2 + seed)),
}


def net(kind: str, table: int, seed: int) -> Chosen:
    use, make = TABLES[kind]
    torch.manual_seed(seed)
    return Chosen(make(table), use).double().eval()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_integers_and_masks_that_differ_are_refused(kind: str, data: bool):
    given = {"data": X.repeat(16, 1)} if data else {"example_inputs": X}
    with pytest.raises(surgery.SurgeryError, match=r"different integers or masks.*\n  buffer    table"):
        surgery.merge(net(kind, 0, 0), net(kind, 1, 1), progress=False, **given)


@pytest.mark.parametrize("kind", TABLES)
def test_equal_ones_merge_whatever_is_counted(kind: str):
    a, b = net(kind, 0, 0), net(kind, 0, 1)
    assert int(a.steps) != int(b.steps)
    merged = surgery.merge(a, b, example_inputs=X, renormalize=None, alpha=1.0, progress=False)
    with torch.no_grad():
        assert torch.allclose(merged(X), b(X), rtol=1e-9, atol=1e-12)


def test_units_under_a_mask_stay_where_they_are():
    a, b = net("mask", 0, 0), net("mask", 0, 1)
    groups = surgery.find_groups(a, X)
    assert not any(member.parameter == "a.weight" for group in groups for member in group.members)
    assert any("cannot be averaged" in str(pin) for pin in groups.pinned)
    assert surgery.verify(a, groups, X)
    with torch.no_grad():
        a.table.fill_(True)
        b.table.fill_(True)
    free = surgery.find_groups(a, X)
    assert any(member.parameter == "a.weight" for group in free for member in group.members)


@pytest.mark.parametrize("images", [None, X])
@pytest.mark.parametrize("kind", TABLES)
def test_soups_refuse_integers_and_masks_that_differ(kind: str, images: Tensor | None):
    models = [net(kind, table, seed) for seed, table in enumerate([0, 0, 1])]
    for model in models:
        model.steps.fill_(0)
    with pytest.raises(
        surgery.SurgeryError, match=r"sources 0 and 2 .*different integers or masks.*\n  buffer    table"
    ):
        surgery.soup(models, greedy=False, calibration=images, progress=False)
    mixed = surgery.soup(models[:2], greedy=False, calibration=images, progress=False)
    assert torch.equal(mixed.table, models[0].table)


def test_soups_let_counters_differ_that_no_output_depends_on():
    models = [net("order", 0, 0), net("order", 0, 1)]
    models[1].steps.fill_(int(models[0].steps) + 1)
    mixed = surgery.soup(models, greedy=False, calibration=X, progress=False)
    assert torch.allclose(mixed.a.weight, (models[0].a.weight + models[1].a.weight) / 2)
    with pytest.raises(
        surgery.SurgeryError, match=r"(?s)buffer    steps.*or pass calibration="
    ):  # without images nobody can say
        surgery.soup(models, greedy=False, progress=False)

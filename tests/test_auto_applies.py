"""``renormalize="auto"`` chooses nothing that finds no layer to correct; who asks for such a step by name is told."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import OptionError
from vfsurgery.passes import CalibrateBiases, Regress, Repair, Rescale, Reset

NOTE = "nothing is renormalized: no layer takes a scale and a shift, or keeps statistics"


class LowRank(nn.Linear):
    """A layer with a weight that its forward computes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + self.up @ self.down, self.bias)


class Tied(nn.Module):
    """A layer that serves twice, in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.layer(x).relu()).relu())


def low_rank() -> nn.Module:
    return nn.Sequential(LowRank(6, 8), nn.ReLU(), LowRank(8, 8), nn.GELU(), nn.Linear(8, 3))


def weight_normed() -> nn.Module:
    layers = [parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 8))]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))


def single() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3))


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False, affine=False), nn.Linear(8, 3))


def pair(make) -> tuple[nn.Module, nn.Module]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make().double().eval()
        randomize(model, torch.Generator().manual_seed(seed))
        found.append(model)
    return found[0], found[1]


def data(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("count", [20, 120], ids=["few images", "images to judge by"])
@pytest.mark.parametrize("make", [low_rank, weight_normed, Tied, single, frozen])
def test_a_merge_with_data_finds_something_that_applies(make, count):
    a, b = pair(make)
    merged = surgery.merge(a, b, data=data(count), progress=False)
    report = surgery.report_of(merged)
    assert (NOTE in report.notes) == (report.renormalize == ())
    assert not any("failed" in note for note in report.notes)
    assert merged(data(4)).isfinite().all()


@pytest.mark.parametrize("make", [low_rank, Tied])
def test_a_smaller_network_is_made_with_data_too(make):
    smaller = surgery.prune_units(pair(make)[0], 0.3, data=data(20), progress=False)
    assert smaller(data(4)).isfinite().all()


@pytest.mark.parametrize("name", ["repair", "rescale", "reshift", "closed-form-repair", "reset"])
def test_a_step_that_is_asked_for_and_finds_nothing_says_so(name):
    a, b = pair(Tied)
    with pytest.raises(OptionError, match=r"(?s)no layer to correct|needs BatchNorm layers.*remedy"):
        surgery.merge(a, b, data=data(20), renormalize=name, progress=False)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (low_rank, {"regress", "bias-calibration"}),
        (frozen, {"regress", "bias-calibration"}),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), None),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), None),
    ],
)
def test_steps_know_where_they_apply(make, expected):
    model = pair(make)[0]
    graph_module = surgery.trace(model, data(2))
    groups = surgery.find_groups(graph_module)
    steps = [Repair(), Rescale(), Reset(), Regress(), CalibrateBiases()]
    found = {step.name for step in steps if step.applies(graph_module, groups)}
    whole = {step.name for step in steps}
    assert found == (expected or (whole if "BatchNorm" in str(model) else whole - {"reset"}))
    for step in steps[:4]:  # what applies runs, what does not is refused
        with nullcontext() if step.name in found else pytest.raises(OptionError):
            surgery.merge(model, copy.deepcopy(model), data=data(20), renormalize=step, progress=False)

"""Models that cannot be recorded as a whole: groups of their parts, and nothing that would be wrong."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.partial import watch
from vfsurgery.errors import OptionError, TraceError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tower(inputs: int = 6, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1))


class Detector(nn.Module):
    """A backbone, a tower that runs at two scales, and a head on a list, among decisions that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tower(3, 6)
        self.towers = nn.ModuleList([tower()])
        self.head = ListHead()
        self.scale = nn.Parameter(torch.rand(4))
        self.spare = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.backbone(x)
        if x.sum() > 1e6:
            x = x + 1
        maps = [self.towers[0](x), self.towers[0](x[:, :, ::2, ::2])]
        return [self.scale * y for y in self.head(maps)]


class ListHead(nn.Module):
    """Called with a list, so no part; the layers inside are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.body(x.mean((2, 3))) for x in maps]


class Leaky(Detector):
    """A part whose inner value is read from outside after it has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Storing()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = super().forward(x)
        return [*found, self.backbone.inner[:, 0]]


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.inner = self.first(x)
        return self.second(self.inner.relu())


class Nosy(Detector):
    """A weight of a part that is read from outside."""

    def forward(self, x: Tensor) -> list[Tensor]:
        found = super().forward(x)
        return [*found, self.backbone[0].bias[0]]


class Lender(Detector):
    """A weight that two parts share."""

    def __init__(self) -> None:
        super().__init__()
        self.towers.append(tower())
        self.towers[1][0].weight = self.towers[0][0].weight

    def forward(self, x: Tensor) -> list[Tensor]:
        found = super().forward(x)
        return [*found, self.towers[1](self.backbone(x))]


class Forked(Detector):
    """A part that computes different things for different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([Fickle()])


class Fickle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y.cumsum(1) if x.shape[-1] < 8 else y.relu())


def sizes(model: nn.Module) -> dict[str, int]:
    return {group.label: group.size for group in surgery.find_groups(model, X)}


def test_every_part_has_its_groups_and_the_rest_its_reason():
    model = Detector()
    groups = surgery.find_groups(model, X)
    assert {group.label: group.size for group in groups} == {"backbone.0": 8, "towers.0.0": 8, "head.body.0": 7}
    assert surgery.verify(model, groups, X)
    reasons = {str(pin).partition(" x")[0]: pin.reason for pin in groups.pinned}
    assert reasons["backbone.2.weight[0]"] == "output of backbone"
    assert reasons["towers.0.0.weight[1]"] == "input of towers.0"
    assert reasons["scale[0]"].startswith("in no part that can be recorded: cannot trace Detector")
    assert reasons["spare.weight[1]"].startswith("in no part that can be recorded")
    assert 0.5 < groups.coverage < 1


@pytest.mark.parametrize(
    ("cls", "without"),
    [(Leaky, "backbone.first"), (Nosy, "backbone.0"), (Lender, "towers.0.0"), (Forked, "towers.0.first")],
)
def test_what_is_not_closed_is_no_part(cls, without):
    model = cls()
    expected = {"backbone.0": 8, "backbone.first": 8, "towers.0.0": 8, "head.body.0": 7}
    found = sizes(model)
    assert without not in found
    assert found.items() <= expected.items()
    assert found["head.body.0"] == 7
    assert surgery.verify(model, surgery.find_groups(model, X), X)


class Constants(Detector):
    """Constants made after a part has freed its tensors: often in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Passing()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = super().forward(x)
        ones = [torch.tensor(1.0) for _ in range(20)]
        return [torch.stack(ones).mean() * y for y in found]


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = [self.layer(x) for _ in range(20)]
        return sum(inner, torch.zeros(()))


def test_memory_that_is_given_away_again_does_not_count_as_the_old_tensor():
    assert [watch(Constants(), (X,)).leaks for _ in range(5)] == [set()] * 5


def test_the_watched_model_is_left_alone():
    model = Leaky().train()
    state = torch.get_rng_state()
    run = watch(model, (X,))
    assert run.leaks == {"backbone"}
    assert run.readers["scale"] == set()
    assert len(run.calls["towers.0"]) == 2
    assert model.training
    assert not hasattr(model.backbone, "inner")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("pins", "gone"), [("backbone", "backbone.0"), ("towers.0.0.bias", "towers.0.0"), ("head*", "head.body.0")]
)
def test_pins_hold_in_parts(pins, gone):
    groups = surgery.find_groups(Detector(), X, pins=pins)
    labels = {"backbone.0", "towers.0.0", "head.body.0"}
    assert {group.label for group in groups} == labels - {gone}
    assert f"pinned by the user ({pins})" in {pin.reason for pin in groups.pinned}


def test_pins_that_match_nothing_are_refused_in_parts_too():
    with pytest.raises(OptionError, match=r"pins='bakbone' matches nothing.*\n.*did you mean 'backbone'"):
        surgery.find_groups(Detector(), X, pins="bakbone")


class Hopeless(nn.Module):
    """Has no part with a group."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3))) if x.sum() < 1e6 else x


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (Hopeless(), X, {}),
        (Detector(), torch.randn(2, 5, 8, 8), {}),
        (Detector(), X, {"strict": True}),
        (Detector(), X, {"leaf": "spare"}),
    ],
    ids=["no part", "does not run", "strict", "leaf"],
)
def test_the_reason_is_told_where_parts_do_not_help(model, x, options):
    with pytest.raises(TraceError, match=f"cannot trace {type(model).__name__}"):
        surgery.find_groups(model, x, **options)


def test_a_merge_of_a_model_with_parts_only_says_how_to_merge_them():
    a, b = Detector(), Detector()
    with pytest.raises(TraceError, match=r"(?s)cannot trace Detector.*merge\(a\.PART, b\.PART"):
        surgery.merge(a, b, example_inputs=X)
    merged = surgery.merge(a.backbone, b.backbone, example_inputs=X, inplace=True)
    assert merged is a.backbone


def test_a_detection_model():
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64).eval()
    groups = surgery.find_groups(model, torch.randn(1, 3, 64, 64))
    assert groups.coverage > 0.9
    assert any(group.label.startswith("backbone.body") for group in groups)
    assert any(group.label.startswith("roi_heads.box_head") for group in groups)

"""Sources that differ in what no checkpoint holds compute different things, and are refused by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.errors import IncompatibleModelsError
from vfsurgery.tracing.constants import same_values

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).double()


class Fourier(nn.Module):
    """Random features, kept in a way that subclasses choose, and two layers on them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 2)
        self.keep(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).double())

    def keep(self, waves: Tensor) -> None:
        self.register_buffer("waves", waves, persistent=False)

    def features(self) -> Tensor:
        return self.waves

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first((x @ self.features()).sin()).relu())


class Plain(Fourier):
    def keep(self, waves: Tensor) -> None:
        self.waves = waves


class Listed(Fourier):
    def keep(self, waves: Tensor) -> None:
        self.waves = [{"waves": waves}]

    def features(self) -> Tensor:
        return self.waves[0]["waves"]


class Array(Fourier):
    def keep(self, waves: Tensor) -> None:
        self.waves = waves.numpy()

    def features(self) -> Tensor:
        return torch.from_numpy(self.waves)


class Scaled(nn.BatchNorm1d):
    """A layer that stays a single node of the trace, with a buffer that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__(6)
        self.register_buffer("scale", torch.full((6,), 1.0 + seed).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class InLayer(Fourier):
    def __init__(self, seed: int) -> None:
        super().__init__(0)
        self.second = nn.Sequential(Scaled(seed), nn.Linear(6, 2))


CLASSES = {cls.__name__: cls for cls in (Fourier, Plain, Listed, Array, InLayer)}
NAMES = {
    "Fourier": "waves",
    "Plain": "waves",
    "Listed": r"waves\[0\]\['waves'\]",
    "Array": "a NumPy array",
    "InLayer": r"second\.0\.scale",
}
ACTS: dict[str, Callable[..., object]] = {
    "merge": lambda a, b: surgery.merge(a, b, example_inputs=X, renormalize=None, progress=False),
    "match": lambda a, b: surgery.match(a, b, example_inputs=X, progress=False),
    "several": lambda a, b: surgery.merge([a, copy.deepcopy(a), b], example_inputs=X, progress=False),
    "passes": lambda a, b: surgery.run_passes(a, "fold", sources=[b], example_inputs=X, progress=False),
}


def net(name: str, seed: int, constants: int) -> nn.Module:
    torch.manual_seed(seed)
    return CLASSES[name](constants).double()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("act", ACTS)
def test_different_constants_are_refused_by_name(act, name):
    models = [net(name, 0, 0), net(name, 1, 1)]
    with pytest.raises(IncompatibleModelsError, match=f"different constants(.|\n)*constant +.*{NAMES[name]}"):
        ACTS[act](*models)


@pytest.mark.parametrize("name", CLASSES)
def test_equal_constants_are_merged(name):
    """The negative control: what is refused is the difference, not the constant."""
    a, b = net(name, 0, 3), net(name, 1, 3)
    merged = surgery.merge(a, b, example_inputs=X, renormalize=None, alpha=1.0, progress=False)
    assert torch.allclose(merged.eval()(X), b.eval()(X))


def test_soups_compare_them_too():
    models = [net("Plain", 0, 0), net("Plain", 1, 1)]
    with pytest.raises(IncompatibleModelsError, match=r"waves"):
        surgery.soup(models, greedy=False, recalibrate=False, progress=False)
    same = [net("Plain", 0, 0), net("Plain", 1, 0)]
    assert surgery.soup(same, greedy=False, recalibrate=False, progress=False)(X).isfinite().all()


def test_nan_in_the_same_places_is_the_same():
    a = torch.tensor([1.0, torch.nan])
    assert same_values(a, a.clone())
    assert not same_values(a, torch.tensor([torch.nan, 1.0]))
    assert not same_values(a, a.double())


def test_a_constant_that_the_forward_does_not_read_is_no_difference():
    a, b = net("Plain", 0, 0), net("Plain", 1, 0)
    a.class_weights, b.class_weights = torch.ones(2), torch.full((2,), 2.0)  # of a loss, say
    surgery.merge(a, b, example_inputs=X, renormalize=None, progress=False)


def test_one_that_only_one_source_has_is_a_difference():
    class Optional(nn.Linear):
        def __init__(self, mean: Tensor | None) -> None:
            super().__init__(3, 4)
            self.mean = mean

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if self.mean is None else x - self.mean)

    models: list[Any] = [nn.Sequential(Optional(mean), nn.ReLU(), nn.Linear(4, 2)).double() for mean in (X[0], None)]
    with pytest.raises(IncompatibleModelsError, match="compute different things"):
        surgery.merge(*models, example_inputs=X)
    with pytest.raises(IncompatibleModelsError, match=r"0\.mean(.|\n)*absent"):
        surgery.soup(models, greedy=False, progress=False)


def test_units_that_a_constant_lies_on_keep_their_order():
    """Its numbers belong to units: no group may move them, in eval or train mode."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("gate", torch.rand(8).double(), persistent=False)
            self.offset = torch.rand(8).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) * self.gate + self.offset).relu())

    model = Gated().double()
    groups = surgery.find_groups(model, X)
    assert not groups.groups
    assert surgery.verify(model, groups, X)

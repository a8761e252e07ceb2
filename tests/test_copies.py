"""What a forward has computed and kept goes into no copy, no trace, no certificate and no result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import IncompatibleModelsError, SurgeryError
from vfsurgery.tracing.copies import copied, fresh, plain_tensors

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)).double()
DATA = torch.randn(200, 5, generator=torch.Generator().manual_seed(4)).double()


class Keeper(nn.Module):
    """A network whose second layer adds a table that it makes of a parameter, once; subclasses say where it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 7)
        self.table, self.head = nn.Parameter(torch.randn(3, 7)), nn.Linear(7, 4)
        self.index = torch.tensor([2, 0, 1])

    def make(self) -> Tensor:
        return self.table[self.index].exp().mean(0)

    def kept(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu()
        return self.head((self.second(y) + self.kept()).relu())


class InAttribute(Keeper):
    cache: Tensor | None = None

    def kept(self) -> Tensor:
        if self.cache is None:
            self.cache = self.make()
        return self.cache


class InNewAttribute(Keeper):
    def kept(self) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache = self.make()
        return self.cache


class InDict(Keeper):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, Any] = {"deep": {}}

    def kept(self) -> Tensor:
        tables = self.tables["deep"]
        if "cpu" not in tables:
            tables["cpu"] = self.make()
        return tables["cpu"]


class InList(Keeper):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Tensor] = []

    def kept(self) -> Tensor:
        if not self.tables:
            self.tables.append(self.make())
        return self.tables[0]


class InTuple(Keeper):
    def __init__(self) -> None:
        super().__init__()
        self.pair: tuple[int, Tensor] | None = None

    def kept(self) -> Tensor:
        if self.pair is None:
            self.pair = (1, self.make())
        return self.pair[1]


class ClearedByTrain(InDict):
    def train(self, mode: bool = True) -> ClearedByTrain:
        self.tables = {"deep": {}}
        return super().train(mode)


KEEPERS = {cls.__name__: cls for cls in (InAttribute, InNewAttribute, InDict, InList, InTuple, ClearedByTrain)}

RUNS: dict[str, Callable[[nn.Module], object]] = {
    "with gradients": lambda model: model(X),
    "without": lambda model: torch.no_grad()(model)(X),
}


def lively(cls: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = cls().double()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def has_run(model: nn.Module, how: str) -> nn.Module:
    RUNS[how](model)
    return model


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("name", KEEPERS)
def test_a_model_that_has_run_merges_as_one_that_has_not(name, how):
    options: dict[str, Any] = {"data": DATA, "matching": "weights", "renormalize": "reset", "progress": False}
    expected = surgery.merge(*(lively(KEEPERS[name], seed) for seed in range(2)), **options)
    for ran in ((0, 1), (0,), (1,)):
        models = [lively(KEEPERS[name], seed) for seed in range(2)]
        for number in ran:
            has_run(models[number], how)
        before = [out(model) for model in models]
        merged = surgery.merge(*models, **options)
        state = merged.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
        assert [plain.path for plain in plain_tensors(merged)] == ["index"]
        assert torch.equal(out(merged), out(copy.deepcopy(expected)))
        assert all(torch.equal(*pair) for pair in zip(before, map(out, models), strict=True))


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("name", KEEPERS)
def test_what_was_kept_is_not_traced(name, how):
    model = has_run(lively(KEEPERS[name], 0), how)
    assert str(surgery.trace(model, X).graph) == str(surgery.trace(lively(KEEPERS[name], 0), X).graph)
    assert surgery.verify(model, surgery.find_groups(model, X), X)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("name", ["InAttribute", "InDict"])
def test_other_surgeries_leave_no_stale_table(name, how):
    def on(ran: bool) -> list[nn.Module]:
        a, b = (lively(KEEPERS[name], seed) for seed in range(2))
        if ran:
            has_run(a, how), has_run(b, how)
        data = [(DATA, torch.arange(len(DATA)) % 4)]
        return [
            surgery.prune_units(a, 0.4, renormalize=None, example_inputs=X),
            surgery.renormalize(copied(a), reference=a, data=[DATA], progress=False),
            surgery.run_passes(a, "reset", data=DATA, progress=False),
            surgery.merge(a, b, data=DATA, matching="weights", renormalize=None, preserve=1, progress=False),
            surgery.soup([a, b], data=data, progress=False),
            surgery.soup([a, b], greedy=False, recalibrate=False, progress=False) if how == "with gradients" else a,
        ]

    assert all(torch.equal(*map(out, pair)) for pair in zip(on(True), on(False), strict=True))


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("name", KEEPERS)
def test_writing_into_a_model_drops_what_it_has_kept(name, how):
    a, b = (has_run(lively(KEEPERS[name], seed), how) for seed in range(2))
    options: dict[str, Any] = {"example_inputs": X, "matching": "weights", "renormalize": None, "progress": False}
    expected = out(surgery.merge(a, b, **options))
    assert torch.equal(out(surgery.merge(a, b, inplace=True, **options)), expected)


def test_the_table_matters():
    """The negative control: a stale table changes what the networks of these tests compute."""
    model = has_run(lively(InAttribute, 0), "without")
    stale = out(model)
    with torch.no_grad():
        model.table.add_(1)
    assert torch.equal(out(model), stale)
    model.cache = None
    assert not torch.allclose(out(model), stale)


def test_constants_stay():
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 4)
            self.scale: Tensor | None = torch.full((4,), 3.0, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:  # looks like a table that is made once, but the user has set another
                self.scale = torch.ones(4, dtype=torch.float64)
            return super().forward(x) * self.scale

    model = Scaled().double()
    assert fresh(model, (X,)).scale is not None
    assert torch.equal(out(fresh(model, (X,))), out(model))
    assert torch.equal(out(copied(model)), out(model))


def test_a_fresh_twin_shares_parameters_and_keeps_modes():
    model = has_run(lively(ClearedByTrain, 0), "with gradients")
    model.norm.train()
    twin = fresh(model, (X,))
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(mine is not theirs for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True))
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert model.tables["deep"]


def test_weights_that_hooks_compute_are_no_caches():
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(5, 6), "weight", amount=0.5), nn.Linear(6, 2)).double()
    model(X).sum().backward()
    assert torch.equal(copied(model)[0].weight, model[0].weight)
    assert torch.equal(out(copied(model)), out(model))
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 2))).double()
    normed(X)
    assert torch.equal(out(copied(normed)), out(normed))


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(5, 2))
    model[0].stream = (number for number in range(3))
    with pytest.raises(SurgeryError, match=r"cannot be copied.*\n.*attribute +0\.stream"):
        surgery.trace(model, X.float())


def test_what_was_computed_before_the_forward_is_named():
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)
            self.scaled = self.inner.weight * 2

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.scaled.T

    with pytest.raises(SurgeryError, match=r"computed of its weights(.|\n)*attribute +scaled(.|\n)*detach"):
        surgery.merge(Once(), Once(), example_inputs=X.float())


def test_networks_of_timm_that_keep_tables_of_biases():
    timm = pytest.importorskip("timm")
    models = [timm.create_model("levit_128s", depth=(1, 1, 1), num_classes=3).eval() for _ in range(2)]
    x = torch.randn(1, 3, 224, 224)
    options: dict[str, Any] = {"example_inputs": x, "matching": "identity", "renormalize": None, "progress": False}
    expected = surgery.merge(*models, **options)
    for model in models:
        model(x)
    assert torch.equal(surgery.merge(*models, **options)(x), expected(x))
    assert torch.equal(surgery.merge(*models, inplace=True, **options)(x), expected(x))


def test_sources_that_cached_different_constants_are_refused():
    """A table that was not made again the same is a constant, and constants have to agree."""
    models = [has_run(lively(InAttribute, seed), "without") for seed in range(2)]
    with torch.no_grad():
        models[1].table.add_(1)  # what it has kept is stale: it computes with it all the same
    with pytest.raises(IncompatibleModelsError, match="cache"):
        surgery.merge(*models, example_inputs=X)

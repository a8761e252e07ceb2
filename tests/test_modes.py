"""A trace does in training what its model does there, where the difference lies in arguments of calls."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.tracing.followers import FOLLOWS_MODE
from vfsurgery.tracing.modes import in_training

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # (batch, tokens, channels)


class Inner(nn.Module):
    """What the forward under test lies in: a module below the top, so that its mode can be another one.

    Without a parameter it would stay a single node of the graph, which knows its mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Attends(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(8, 24), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)


class Normalizes(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, None, self.training, 0.3)


class Leaks(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.rrelu(self.fc(x), training=self.training)


class Scales(Inner):
    def forward(self, x: Tensor) -> Tensor:
        low, high = (-0.5, 0.5) if self.training else (-2, None)
        return x.clamp(low, high).mul(3.0 if self.training else 0.25) + x[:, : 6 if not self.training else 1]


class Resizes(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=1.5, mode="linear" if self.training else "nearest").mean(-1, keepdim=True)


class Negated(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(x, 3, 1, 1, count_include_pad=not self.training)


class AlwaysDrops(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3) + F.dropout(x, 0.5, training=False)


class DropsInPlace(Inner):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        F.dropout(y, 0.5, self.training, inplace=True)
        return y


class Multihead(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def by_its_mode(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training)


class AsksElsewhere(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return by_its_mode(self, x)


INNER = [Attends, Normalizes, Leaks, Scales, Resizes, Negated, AlwaysDrops, DropsInPlace, Multihead, AsksElsewhere]


class Net(nn.Module):
    def __init__(self, inner: type[Inner]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner(), nn.LazyLinear(3)
        with torch.no_grad():
            self(X.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def net(inner: type[Inner]) -> nn.Module:
    torch.manual_seed(1)
    model = Net(inner).double()
    randomize(model, torch.Generator().manual_seed(2))
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor = X, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


@pytest.mark.parametrize("inner", INNER)
def test_arguments_follow_the_mode(inner: type[Inner]) -> None:
    model = net(inner)
    graph = surgery.trace(model, X)
    assert in_training(graph) is None
    for training in (False, True, False):
        expected = run(copy.deepcopy(model).train(training))
        own = copy.deepcopy(graph).train(training)
        assert torch.equal(run(own), expected)
    trained, own = copy.deepcopy(model).train(), copy.deepcopy(graph).train()
    assert not torch.equal(run(trained), run(model)) or inner is AlwaysDrops
    run(own)
    assert all(torch.equal(mine, trained.state_dict()[name]) for name, mine in own.state_dict().items())


@pytest.mark.parametrize("inner", [Attends, Scales, Leaks])
def test_the_mode_is_that_of_the_module_that_asks(inner: type[Inner]) -> None:
    model = net(inner).train()
    model.inner.eval()
    graph = surgery.trace(model, X)
    assert torch.equal(run(graph), run(model))
    assert not torch.equal(run(graph.train()), run(model))
    graph.inner.eval()
    assert torch.equal(run(graph), run(model))


@pytest.mark.parametrize("inner", [Attends, Leaks, Scales, Resizes])
def test_a_graph_that_follows_the_mode_is_saved_copied_and_exported(inner: type[Inner]) -> None:
    model = net(inner)
    graph = surgery.run_passes(model, Restructure(), example_inputs=X, progress=False)
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    for twin in (graph, torch.load(file, weights_only=False), copy.deepcopy(graph), torch.fx.symbolic_trace(graph)):
        for training in (False, True):
            assert torch.equal(run(twin.train(training)), run(copy.deepcopy(model).train(training)))
        assert all(type(module).__module__.startswith("torch") for module in twin.modules())
    for training in (False, True):
        program = torch.export.export(graph.train(training), (X,))
        assert torch.allclose(run(program.module()), run(copy.deepcopy(model).train(training)))


class Restructure(surgery.Pass):
    """Makes another graph of the network, which computes the same."""

    name = "restructure-by-a-test"
    preserves_function = True

    def run(self, graph_module: torch.fx.GraphModule, context: surgery.Context) -> torch.fx.GraphModule:
        (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.mul, (output.args[0], 1.0)),)
        return graph_module


VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
SWIN = {"img_size": 32, "depths": (1, 2), "embed_dim": 12, "num_heads": (2, 3), "window_size": 4}
NOISES = {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}


def transformer(name: str, **rates: float) -> nn.Module:
    torch.manual_seed(4)
    options = VIT if name.startswith("vit") else SWIN
    model = timm.create_model(name, num_classes=5, **options, **rates)
    randomize(model, torch.Generator().manual_seed(5))
    return model.eval()


NAMES = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("rates", [NOISES, {"attn_drop_rate": 0.3}], ids=["all", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_drop_what_they_drop(name: str, rates: dict[str, float]) -> None:
    model = transformer(name, **rates)
    graph = surgery.trace(model, IMAGES)
    assert torch.equal(run(graph, IMAGES), run(model, IMAGES))
    assert torch.equal(run(graph.train(), IMAGES), run(copy.deepcopy(model).train(), IMAGES))
    assert not torch.equal(run(graph, IMAGES, 7), run(graph, IMAGES, 8))
    assert surgery.find_groups(model, IMAGES).in_training is False


@pytest.mark.parametrize("name", NAMES)
def test_preserved_attention_drops_in_training_and_not_in_eval_mode(name: str) -> None:
    a, b = (transformer(name, attn_drop_rate=rate, drop_path_rate=0.0) for rate in (0.3, 0.1))
    options = {"matching": "weights", "renormalize": None, "progress": False}
    kept = surgery.merge(a, b, preserve=3, example_inputs=IMAGES, **options)
    assert torch.equal(run(kept.eval(), IMAGES, 7), run(kept, IMAGES, 8))
    assert not torch.equal(run(kept.train(), IMAGES, 7), run(kept, IMAGES, 8))
    quiet = surgery.merge(
        *(transformer(name, drop_path_rate=0.0) for _ in "ab"), preserve=3, example_inputs=IMAGES, **options
    )
    assert torch.equal(run(quiet.train(), IMAGES, 7), run(quiet, IMAGES, 8))


def test_sources_may_drop_at_different_rates_or_not_at_all() -> None:
    sources = [transformer(NAMES[0], attn_drop_rate=rate) for rate in (0.3, 0.0, 0.1)]
    merged = surgery.merge(sources, example_inputs=IMAGES, matching="weights", renormalize=None, progress=False)
    assert type(merged) is type(sources[0])


class Layers(nn.Module):
    """Drops a layer at random in training; an integer buffer and a norm are counted up there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if self.training and random.random() < 0.5:
            return self.last(x)
        return self.last(x.relu() + torch.rand(()) * self.training)


def test_recording_training_leaves_model_and_random_states_alone() -> None:
    model = Layers().double()
    before = copy.deepcopy(model.state_dict())
    states = random.getstate(), torch.get_rng_state()
    guards = [surgery.trace(model, X).meta["guards"] for _ in range(3)]
    assert guards[0] == guards[1] == guards[2]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and "training" not in vars(nn.Module)


def test_what_depends_on_the_number_of_images_is_a_guard() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            parts = [part * 2 for part in x]
            return torch.stack(parts) if 6 in x.shape and len(x) > 1 and not x.is_cuda else x

    guards = surgery.trace(Counts(), X).meta["guards"]
    assert "len(x) == 4" in guards and "x.is_cuda == False" in guards
    assert any(guard.startswith("6 in ") and guard.endswith("== True") for guard in guards)


def test_a_mode_that_nobody_asks_for_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vfsurgery.tracing import modes

    calls: list[bool] = []
    record: Callable[..., object] = modes.record_forward
    spy = lambda *args, training=False, **rest: (calls.append(training), record(*args, training=training, **rest))[1]  # noqa: E731
    monkeypatch.setattr(modes, "record_forward", spy)
    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(8, 3)).double()
    graph = surgery.trace(plain, X)
    assert calls == [False]
    assert not any(FOLLOWS_MODE in node.meta for node in graph.graph.nodes)
    surgery.trace(net(Attends), X)
    assert calls == [False, False, True]

"""A model that runs on borrowed weights is afterwards what it was, object by object and bit by bit."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_nets import images
from torch import Tensor, nn
from torch.func import functional_call

import vfsurgery as surgery
from vfsurgery.discovery.verification import outputs_of, randomize, relative_error
from vfsurgery.passes.costs import cost_of
from vfsurgery.tracing.borrowed import borrowed, containers_of, contents_of
from vfsurgery.tracing.sources import canonical_state

X = images(4).double()


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Aliased(nn.Module):
    """An encoder that is registered whole and part by part, as in U-Nets on a ready-made encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([block(3, 6), block(6, 8)])
        self.first, self.second, self.head = self.encoder[0], self.encoder[1], nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(torch.cat([x, self.second(x)], 1))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() + self.b(x.flip(1)).relu())


class Both(Tied):
    """A layer under two paths whose weight another one shares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"again": self.a})


class Writer(nn.Module):
    """A forward that writes wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(3, 6), nn.Conv2d(6, 4, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.scale, self.seen, self.sizes, self.record = torch.ones(1), [torch.zeros(2)], {}, SimpleNamespace(last=None)
        self.pairs, self.names = (torch.zeros(2), [1]), {"a"}
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(1.0)
        self.calls += 1
        self.head.weight.data.clamp_(-0.1, 0.1)  # by way of .data, which no version counter sees
        with torch.no_grad():
            self.body[0].weight.renorm_(2, 0, 0.3)
        self.body[0].bias.data = self.body[0].bias.data * 2
        y = self.body(x)
        self.mean += y.mean((0, 2, 3))
        self.mean = self.mean * 0.5
        self.scale = self.scale + 1
        self.seen[0].add_(1)
        self.seen.append(y)
        self.sizes["last"], self.record.last = y.shape, y
        self.pairs[0].add_(1)
        self.pairs[1].append(2)
        self.names.add("b")
        self.extra = nn.Identity()
        self.training = True
        if self.fails:
            raise ArithmeticError("as asked")
        return self.head(y)


NETS = {"aliased": Aliased, "tied": Tied, "both": Both, "writer": Writer}


def lively(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = cls().double()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def frozen(model: nn.Module) -> list[Any]:
    """All that a model holds: containers, what is in them, and the numbers of tensors."""
    found: list[Any] = []
    for container in containers_of(model):
        for key, value in contents_of(container.items):
            found.append((container.path, id(container.items), key, id(value), str(value)))
            if isinstance(value, Tensor):
                found.append((value.detach().clone(), value.requires_grad, type(value), value.data_ptr()))
    return found


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(x[0], y[0]) and x[1:] == y[1:] if isinstance(x[0], Tensor) else x == y
        for x, y in zip(before, after, strict=True)
    )


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() * 2 + 1 for name, tensor in canonical_state(model).items()}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(name, training):
    model = lively(NETS[name]).train(training)
    next(model.parameters()).requires_grad_(False)
    before, given, x = frozen(model), other_state(model), X.clone()
    kept = {name: tensor.clone() for name, tensor in given.items()}
    outputs_of(model, given, (x,))
    assert same(before, frozen(model))
    assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
    assert torch.equal(x, X)
    outputs_of(model, canonical_state(model), (x,))  # on tensors that share the model's own memory
    assert same(before, frozen(model))


def test_nothing_is_left_behind_when_the_forward_raises():
    model = lively(Writer)
    model.fails = True
    before = frozen(model)
    with pytest.raises(ArithmeticError):
        outputs_of(model, canonical_state(model), (X,))
    assert same(before, frozen(model))


def test_the_net_of_this_test_does_change_what_it_can():
    """The negative control: what is compared above is what a forward changes."""
    model = lively(Writer)
    before = frozen(model)
    with torch.no_grad():
        model(X.clone())
    assert not same(before, frozen(model))
    aliased = lively(Aliased)
    before = frozen(aliased)
    functional_call(aliased, other_state(aliased), (X,), tie_weights=True)
    assert not same(before, frozen(aliased))


@pytest.mark.parametrize("name", ["aliased", "tied", "both"])
def test_the_given_weights_are_those_that_count(name):
    a, b = (lively(NETS[name], seed) for seed in (0, 1))
    (found,) = outputs_of(a, canonical_state(b), (X,))
    assert torch.equal(found, b(X))
    assert not torch.equal(found, a(X))


def test_weights_in_lists_are_lent_too():
    class Listed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.all = [self.weight, {"bias": self.bias}]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.all[0].T + self.all[1]["bias"]

    model = Listed()
    with torch.no_grad(), borrowed(model, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}):
        assert torch.equal(model(torch.randn(1, 3)), torch.ones(1, 2))
    assert model.all[0] is model.weight


def test_recurrent_layers_read_the_lent_weights():
    a, b = (nn.LSTM(3, 4, batch_first=True).double() for _ in range(2))
    x = torch.randn(2, 5, 3).double()
    found = outputs_of(a, canonical_state(b), (x,))
    assert relative_error(found, tuple(outputs_of(b, canonical_state(b), (x,)))) == 0
    assert relative_error(found, tuple(outputs_of(a, canonical_state(a), (x,)))) > 0.1


def test_what_is_left_out_is_converted_and_put_back():
    model = lively(Writer)
    constants = model.mean, model.scale
    with torch.no_grad(), borrowed(model, canonical_state(model), lambda tensor: tensor.to(torch.float16)):
        assert model.mean.dtype == model.scale.dtype == torch.float16
        assert model.head.weight.dtype == torch.float64
    assert (model.mean, model.scale) == constants


SURGERIES: dict[str, Any] = {
    "merge by weights": lambda a, b: surgery.merge(a, b, example_inputs=X, renormalize=None, progress=False),
    "merge": lambda a, b: surgery.merge(a, b, data=images(128).double(), matching="activations", progress=False),
    "match": lambda a, b: surgery.match(a, b, example_inputs=X, progress=False),
    "verify": lambda a, b: surgery.verify(b, surgery.find_groups(a, X), X),
    "prune_units": lambda a, b: surgery.prune_units(b, 0.3, renormalize=None, example_inputs=X),
    "cost_of": lambda a, b: cost_of(b, X),
}


@pytest.mark.parametrize("name", ["aliased", "tied", "both"])
@pytest.mark.parametrize("what", SURGERIES)
def test_sources_are_what_they_were(name, what):
    models = [lively(NETS[name], seed).train(seed == 1) for seed in range(2)]
    before = [frozen(model) for model in models]
    result = SURGERIES[what](*models)
    assert all(same(state, frozen(model)) for state, model in zip(before, models, strict=True))
    if isinstance(result, nn.Module):
        mine = {tensor.data_ptr() for tensor in result.state_dict().values()}
        assert not mine & {tensor.data_ptr() for model in models for tensor in model.state_dict().values()}


def test_a_module_under_two_paths_merges_to_what_it_merges_to_under_one():
    twice = [lively(Aliased, seed) for seed in range(2)]
    once = copy.deepcopy(twice)
    for model in once:  # the same layers, under one path each
        layers = [model.first, model.second]
        model.encoder = nn.ModuleList()
        model.first, model.second = layers
    options: dict[str, Any] = {"data": images(160).double(), "matching": "activations", "progress": False}
    for renormalize in ("reset", "repair"):
        merged = [surgery.merge(*models, renormalize=renormalize, **options) for models in (twice, once)]
        assert torch.equal(*(model(X) for model in merged))
        assert isinstance(merged[0].encoder[0][0].weight, nn.Parameter)
        assert merged[0].encoder[0] is merged[0].first


def test_hooks_keep_their_order():
    model = nn.Sequential(nn.Linear(3, 2))
    handles = [model[0].register_forward_hook(lambda *_: None) for _ in range(3)]
    keys = list(model[0]._forward_hooks)
    outputs_of(model, other_state(model), (torch.randn(1, 3),))
    assert isinstance(model[0]._forward_hooks, OrderedDict)
    assert list(model[0]._forward_hooks) == keys == [handle.id for handle in handles]

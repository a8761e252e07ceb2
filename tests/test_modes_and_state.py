"""Models whose own ``train()`` writes into weights, whose forward counts or draws: sources stay, proofs hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.chance import without_chance

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = torch.randn(120, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Adapted(nn.Linear):
    """Its low-rank factors are added to the weight by ``eval()`` and taken out by ``train()``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.added = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if mode == self.added:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.added = not mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        return y if self.added else y + input @ self.down.T @ self.up.T


class FrozenFirst(nn.Sequential):
    """Its ``train()`` freezes its first layer, as backbones of detectors do."""

    def train(self, mode: bool = True) -> FrozenFirst:
        super().train(mode)
        self[0].requires_grad_(False)
        return self


class Counting(nn.Module):
    """Counts its calls, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        h = F.relu(self.a(x))
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.out(F.relu(self.b(h)))


class Queue(nn.Module):
    """Writes what it computes into a memory at a place that it keeps as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 12), nn.Linear(12, 5)
        self.register_buffer("memory", torch.randn(5, 32))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.out(F.relu(self.a(x)))
        logits = keys @ self.memory.clone()
        if self.training:
            start = int(self.place)
            self.memory[:, start : start + len(keys)] = keys.detach().T
            self.place[0] = (start + len(keys)) % 32
        return logits


class Chance(nn.Module):
    """Draws in training: layers that are left out, and a mixture of the batch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            share = float(torch.distributions.Beta(1.0, 1.0).sample())
            x = share * x + (1 - share) * x[torch.randperm(x.shape[0])]
        h = F.relu(self.a(x))
        if not self.training or self.draw() > 0.1:
            h = h + F.relu(self.b(h))
        return self.out(F.relu(self.c(h)))


DRAWS = {"torch": lambda: torch.rand(1).item(), "python": random.random, "numpy": lambda: float(np.random.rand())}


def adapted() -> nn.Module:
    return nn.Sequential(Adapted(6, 12), nn.ReLU(), Adapted(12, 10), nn.GELU(), nn.Linear(10, 3))


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


def output(model: nn.Module, training: bool = False) -> Tensor:
    with torch.no_grad(), without_chance():
        return copy.deepcopy(model).train(training)(X)


def same(a: nn.Module, b: nn.Module, training: bool = False) -> bool:
    return torch.allclose(output(a, training), output(b, training), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_sources_keep_weights_that_their_own_eval_would_change(matching: str, training: bool):
    sources = [made(adapted, seed).train(training) for seed in (0, 1)]
    before = [copy.deepcopy(source.state_dict()) for source in sources]
    merged = surgery.merge(*sources, data=DATA, matching=matching, renormalize=None, alpha=1.0, progress=False)
    for source, state in zip(sources, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())
        assert [layer.added for layer in source if isinstance(layer, Adapted)] == [not training] * 2
    assert same(merged, sources[1])
    assert same(merged, sources[1], training=True)


def test_sources_of_which_one_has_its_factors_added_are_refused():
    with pytest.raises(surgery.SurgeryError, match="compute different things"):
        surgery.merge(made(adapted, 0).eval(), made(adapted, 1).train(), example_inputs=X, progress=False)


def test_a_mode_is_set_and_nothing_else():
    model = made(lambda: FrozenFirst(adapted(), nn.BatchNorm1d(3)), 0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    state = copy.deepcopy(model.state_dict())
    set_mode(model, False)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.eval()  # what it would have done
    assert not torch.equal(model[0][0].weight, state["0.0.weight"])


def test_what_a_forward_counts_is_not_counted_in_sources():
    sources = [made(Counting, seed).eval() for seed in (0, 1)]
    before = [copy.deepcopy(source.state_dict()) for source in sources]
    groups = surgery.find_groups(sources[0], X)
    assert surgery.verify(sources[0], groups, X)
    for renormalize in (None, "repair", "auto"):
        surgery.merge(*sources, data=DATA, matching="activations", renormalize=renormalize, progress=False)
    surgery.prune_units(sources[0], 0.3, renormalize=None, example_inputs=X, progress=False)
    for source, state in zip(sources, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())


def test_units_are_removed_from_what_looks_at_a_number_in_training():
    model = made(Queue, 0).eval()
    smaller = surgery.prune_units(model, 0.3, renormalize=None, example_inputs=X, progress=False)
    assert smaller.a.out_features < 12
    assert smaller.train()(X).shape == (8, 32)
    assert int(model.place) == 0


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_training_leaves_to_chance_is_no_reason_to_refuse(draw: Callable[[], float]):
    a = made(lambda: Chance(draw), 0).eval()
    smaller = surgery.prune_units(a, 0.3, renormalize=None, example_inputs=X, progress=False)
    assert smaller.a.out_features < 8
    assert "holds, in training too" in str(surgery.report_of(smaller))
    order = torch.randperm(8)
    b = copy.deepcopy(a)
    with torch.no_grad():
        for tensor in (b.a.weight, b.a.bias, b.b.weight, b.b.bias):
            tensor.copy_(tensor[order].clone())
        for tensor in (b.b.weight, b.c.weight):
            tensor.copy_(tensor[:, order].clone())
    merged = surgery.merge(a, b, example_inputs=X, matching="weights", renormalize=None, progress=False)
    assert same(merged, a)
    assert same(merged, a, training=True)


def test_numpys_random_state_is_kept():
    state = np.random.get_state()[1].copy()
    with without_chance():
        drawn = np.random.rand()
    with without_chance():
        assert np.random.rand() == drawn
    assert (np.random.get_state()[1] == state).all()

"""Weights that modules compute: units are permuted in what is stored, and what is averaged is made consistent again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import OptionError
from vfsurgery.groups import permute_tensor, random_permutations
from vfsurgery.tracing.computed import settle
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.sources import canonical_state

X = torch.randn(3, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Wrap = Callable[[Any], nn.Module]


class Net(nn.Module):
    def __init__(self, wrap: Wrap, last: Wrap) -> None:
        super().__init__()
        self.a, self.b = wrap(nn.Conv2d(3, 6, 3)), wrap(nn.Conv2d(6, 6, 3))
        self.c = wrap(nn.Conv2d(6, 6, 3, groups=6))
        self.hidden, self.out = last(nn.Linear(6, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3))
        return self.out(F.relu(self.hidden(x)))


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def positive(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def plain(layer: nn.Module) -> nn.Module:
    return layer


def net(wrap: Wrap, last: Wrap = plain, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net(wrap, last).double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    settle(model)
    return model


def on(kind: Callable[..., nn.Module], **options: Any) -> Wrap:
    return lambda layer: kind(layer, **options)


KINDS: dict[str, tuple[Wrap, Wrap, int]] = {
    "weight norm": (parametrizations.weight_norm, parametrizations.weight_norm, 3),
    "weight norm of columns": (on(parametrizations.weight_norm, dim=1), plain, 3),
    "weight norm of all": (on(parametrizations.weight_norm, dim=None), plain, 3),
    "spectral norm": (parametrizations.spectral_norm, parametrizations.spectral_norm, 3),
    "orthogonal": (plain, parametrizations.orthogonal, 2),
    "orthogonal, householder": (plain, on(parametrizations.orthogonal, orthogonal_map="householder"), 2),
    "orthogonal, without base": (
        plain, on(parametrizations.orthogonal, orthogonal_map="householder", use_trivialization=False), 1,
    ),
    "the user's": (positive, plain, 3),
    "one after the other": (lambda layer: parametrizations.spectral_norm(positive(layer)), plain, 3),
    "weight norm of old": (nn.utils.weight_norm, nn.utils.weight_norm, 3),
    "spectral norm of old": (nn.utils.spectral_norm, nn.utils.spectral_norm, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_units_are_permuted_in_what_is_stored(name: str) -> None:
    wrap, last, count = KINDS[name]
    model = net(wrap, last)
    groups = surgery.find_groups(model, X)
    assert surgery.verify(model, groups, X)
    assert len(groups) == count  # nothing stored follows the columns of an orthogonal weight: what goes in stays
    orders = random_permutations(groups, torch.Generator().manual_seed(1))
    permuted = copied(model)
    with torch.no_grad():
        for key, tensor in canonical_state(permuted).items():
            tensor.copy_(permute_tensor(key, tensor.clone(), groups, orders))
    torch.testing.assert_close(permuted(X), model(X))
    merged = surgery.merge(model, permuted, matching="weights", example_inputs=X, renormalize=None, progress=False)
    torch.testing.assert_close(merged(X), model(X))
    assert list(merged.state_dict()) == list(model.state_dict())
    other = surgery.merge(model, net(wrap, last, 1), example_inputs=X, renormalize=None, progress=False)
    assert bool(other(X).isfinite().all())


@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_the_mean_of_layers_with_spectral_norm_has_spectral_norm_one(kind: Wrap) -> None:
    merged = surgery.merge(net(kind), net(kind, seed=1), example_inputs=X, renormalize=None, progress=False)
    merged(X)
    for layer in (merged.a, merged.b):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-3)


def test_without_settling_the_mean_is_scaled_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfsurgery.merging.combined.settle", lambda *given: None)
    kind = parametrizations.spectral_norm
    merged = surgery.merge(net(kind), net(kind, seed=1), example_inputs=X, renormalize=None, progress=False)
    norm = float(torch.linalg.matrix_norm(merged.b.weight.detach().flatten(1), 2))
    assert norm != pytest.approx(1, abs=1e-2)


def test_the_mean_of_orthogonal_layers_is_orthogonal() -> None:
    models = [net(plain, parametrizations.orthogonal, seed) for seed in (0, 1)]
    merged = surgery.merge(*models, example_inputs=X, renormalize=None, progress=False)
    weight = merged.hidden.weight.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(6, dtype=torch.float64))


def test_merges_with_itself_return_the_network() -> None:
    model = net(parametrizations.spectral_norm, parametrizations.orthogonal)
    merged = surgery.merge(model, copied(model), alpha=0.3, example_inputs=X, renormalize=None, progress=False)
    torch.testing.assert_close(merged(X), model(X))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_of_old_norms_are_what_is_stored_after_a_merge_in_place() -> None:
    model, other = net(nn.utils.weight_norm), net(nn.utils.weight_norm, seed=1)
    merged = surgery.merge(model, other, example_inputs=X, renormalize=None, inplace=True, progress=False)
    assert merged is model
    stored = torch._weight_norm(model.a.weight_v, model.a.weight_g, 0)
    torch.testing.assert_close(model.a.weight.detach(), stored.detach())


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (parametrizations.weight_norm, r"parametrize.remove_parametrizations\(model.a, 'weight'\)$"),
        (
            nn.utils.spectral_norm,
            r"a hook of spectral_norm .*utils.remove_spectral_norm\(model.a, 'weight'\)$",
        ),
        (lambda layer: prune.random_unstructured(layer, "weight", amount=0.3), r"prune.remove\(model.a, 'weight'\)"),
    ],
)
def test_units_of_computed_weights_are_not_removed_and_the_remedy_helps(wrap: Wrap, remedy: str) -> None:
    with pytest.raises(OptionError, match=rf"(?s)a.weight cannot be written.*{remedy}"):
        surgery.prune_units(net(wrap), 0.3, example_inputs=X)


def test_recurrent_layers_with_weight_norm_stay_whole_and_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = parametrizations.weight_norm(nn.LSTM(5, 6, batch_first=True), "weight_hh_l0")
            self.out = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0])

    model, x = Recurrent().double().eval(), torch.randn(2, 3, 5, dtype=torch.float64)
    groups = surgery.find_groups(model, x)
    assert not groups.groups and "ParametrizedLSTM" in groups.unknown_ops[0]


class Counted(TorchDispatchMode):
    """Counts what torch is asked to do."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_layers_that_hold_their_weights_are_not_even_looked_at():
    counts = []
    for wrap in (plain, parametrizations.spectral_norm):
        model, other = (nn.Sequential(wrap(nn.Linear(4, 4)), nn.BatchNorm1d(4)) for _ in range(2))
        with Counted() as counted:
            settle(model, other)
        counts.append(counted.calls)
    assert counts[0] == 0 < counts[1]  # comparing took memory for the largest weight, several times over

"""Sparse model soups in phases, and training that holds a mask."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from test_merge import Everything
from torch import nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.errors import DataError, IncompatibleModelsError, OptionError, SurgeryError
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.pruning import Masks, prune
from vfsurgery.soups.phases import Retraining, sparse_soup
from vfsurgery.training import from_seed, train

SPLITS = digits()
BRIEF = Retraining(epochs=1, lr=0.02)


def dense(net: type[nn.Module] = TinyConvNet, width: int = 4) -> nn.Module:
    model = from_seed(lambda: net(width=width), 0)
    return train(model, SPLITS.train, epochs=2, lr=0.02, seed=0, progress=False)


def run(model: nn.Module | None = None, **options: object) -> surgery.SparseSoup:
    settings = {"sparsity": 0.8, "phases": 2, "copies": 2, "retraining": BRIEF, "progress": False, **options}
    return sparse_soup(model or dense(), SPLITS.train, SPLITS.calibration, **settings)


# Training with a mask


@pytest.mark.parametrize("options", [{}, {"momentum": 0.95, "nesterov": False}, {"weight_decay": 0.1}, {"lr": 0.2}])
@pytest.mark.parametrize("net", [TinyConvNet, TinyResNet])
def test_training_moves_every_kept_weight_and_no_pruned_one(net, options):
    options = {"epochs": 1, "lr": 0.02, "seed": 1, "progress": False, **options}
    pruned = prune(from_seed(lambda: net(width=4), 0), 0.7)
    masks, before = Masks.of(pruned), {name: x.clone() for name, x in pruned.state_dict().items()}
    train(pruned, SPLITS.train, masks=masks, **options)
    assert Masks.of(pruned) == masks
    moved = [(before[name] != pruned.get_parameter(name))[mask] for name, mask in masks.items()]
    assert torch.cat(moved).double().mean() > 0.9
    freely = train(prune(from_seed(lambda: net(width=4), 0), 0.7), SPLITS.train, **options)
    assert Masks.of(freely).sparsity < 0.2  # a unit that is dead stays at zero without a mask, too


def test_weights_are_masked_before_the_first_step():
    model = from_seed(lambda: TinyConvNet(width=4), 0)
    masks = Masks.of(prune(model, 0.5))
    train(model, SPLITS.train, epochs=1, lr=1e-9, seed=0, masks=masks, progress=False)
    assert Masks.of(model) == masks


def test_masks_of_another_network_are_refused():
    with pytest.raises(IncompatibleModelsError, match="the masks do not fit this TinyConvNet"):
        train(dense(), SPLITS.train, epochs=1, lr=0.1, seed=0, masks=Masks.of(TinyResNet()), progress=False)


def test_a_linear_learning_rate_rises_over_a_tenth_and_falls_to_zero(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def noted(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    data = TensorDataset(torch.zeros(40, 1, 8, 8), torch.zeros(40, dtype=torch.long))
    train(TinyConvNet(width=2), data, epochs=5, lr=0.1, seed=0, batch_size=8, shape="linear", progress=False)
    assert len(rates) == 25
    assert rates.index(max(rates)) in (1, 2) and max(rates) == pytest.approx(0.1)
    falls = [later - earlier for earlier, later in pairwise(rates[2:])]
    assert falls == pytest.approx([falls[0]] * len(falls)) and falls[0] < 0
    assert 0 < rates[-1] == pytest.approx(-falls[0])
    with pytest.raises(OptionError, match=r"shape='linar' is unknown\n  remedy  did you mean 'linear'"):
        train(TinyConvNet(width=2), data, epochs=1, lr=0.1, seed=0, shape="linar", progress=False)


# Phases


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_each_phase_prunes_the_same_share_of_what_remains(phases):
    found = run(phases=phases, plain=False)
    left = [1.0, *(1 - phase.sparsity for phase in found.phases)]
    shares = [1 - later / earlier for earlier, later in pairwise(left)]
    assert shares == pytest.approx([1 - 0.2 ** (1 / phases)] * phases, abs=2e-3)
    assert found.masks == Masks.of(found.model) and found.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert found.plain is None and found.phases[-1].plain is None


def test_what_is_pruned_stays_pruned_and_the_model_is_left_alone(monkeypatch):
    model, seen = dense(TinyResNet), []
    everything = Everything(model)
    mixed = surgery.soups.averaging.soup
    phases = sys.modules["vfsurgery.soups.phases"]

    def noted(models, **options):
        seen.append([Masks.of(one) for one in models])
        return mixed(models, **options)

    monkeypatch.setattr(phases, "soup", noted)
    found = run(model, copies=3, plain=False)
    assert everything.changes() == []
    assert all(masks == copies[0] for copies in seen for masks in copies)
    assert (seen[0][0] & seen[1][0]) == seen[1][0] == found.masks != seen[0][0]


def test_one_copy_is_iterative_magnitude_pruning_by_hand():
    found = run(copies=1)
    by_hand = dense()
    for number, sparsity in ((1, 1 - 0.2**0.5), (2, 0.8)):
        by_hand = prune(by_hand, sparsity, scope="global")
        options = {"epochs": 1, "lr": 0.02, "shape": "linear", "masks": Masks.of(by_hand), "progress": False}
        train(by_hand, SPLITS.train, seed=100 * number, **options)
    for state in (found.model.state_dict(), found.plain.state_dict()):
        assert all(torch.equal(tensor, state[name]) for name, tensor in by_hand.state_dict().items())
    three = run(copies=3)
    assert all(torch.equal(tensor, three.plain.state_dict()[name]) for name, tensor in by_hand.state_dict().items())
    assert any(not torch.equal(tensor, three.model.state_dict()[name]) for name, tensor in by_hand.state_dict().items())


def test_copies_differ_in_their_seed_or_in_their_weight_decay_alone(monkeypatch):
    calls = []
    phases = sys.modules["vfsurgery.soups.phases"]
    monkeypatch.setattr(
        phases, "train", lambda *args, **options: calls.append((options["seed"], options["weight_decay"])) or args[0]
    )
    run(plain=False, phases=2)
    assert calls == [(100, 5e-4), (101, 5e-4), (200, 5e-4), (201, 5e-4)]
    calls.clear()
    run(plain=False, phases=1, seed=7, retraining=Retraining(epochs=1, weight_decay=(1e-4, 1e-3)))
    assert calls == [(107, 1e-4), (107, 1e-3)]


def test_same_settings_same_weights_and_another_seed_others():
    first, again, other = run(), run(), run(seed=5)
    state, same = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in state.items())
    assert any(not torch.equal(tensor, other.model.state_dict()[name]) for name, tensor in state.items())


def test_scope_exclusions_and_greedy_soups_reach_their_functions():
    found = run(scope="layer", exclude="fc", greedy=True, phases=1, plain=False)
    assert set(found.masks) == {f"convs.{number}.weight" for number in range(6)}
    assert list(found.masks.by_layer.values()) == pytest.approx([0.8] * 6, abs=0.03)
    assert float(found.model.fc.weight.ne(0).double().mean()) == 1
    assert surgery.report_of(found.model).greedy
    assert found.phases[0].soup >= max(found.phases[0].copies)


def test_the_table_has_a_row_per_phase():
    found = run(copies=3)
    lines = str(found).splitlines()
    assert lines[0].startswith("dense ") and len(lines) == 4
    assert lines[1].split() == ["sparsity", "pruned", "copy", "0", "copy", "1", "copy", "2", "soup", "one", "copy"]
    assert all(line.count("%") == 7 for line in lines[2:])
    plain = json.loads(json.dumps(found.to_dict()))
    assert len(plain["phases"]) == 2 and plain["phases"][1]["soup"] == found.phases[1].soup
    for phase, model in ((found.phases[-1], found.model),):
        assert phase.soup == surgery.evaluate(model, SPLITS.calibration, progress=False).accuracy


def test_a_copy_that_revives_a_weight_is_caught(monkeypatch):
    phases = sys.modules["vfsurgery.soups.phases"]

    def careless(model, *args, masks, **options):
        return train(model, *args, **options)

    monkeypatch.setattr(phases, "train", careless)
    with pytest.raises(SurgeryError, match="the soup does not keep the zeros of pruned weights"):
        run(plain=False, phases=1)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\) but is 1.0"),
        ({"sparsity": -0.1}, r"sparsity must lie in \[0, 1\)"),
        ({"phases": 0}, "phases must be at least 1, got 0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"retraining": Retraining(epochs=0)}, "epochs must be at least 1"),
        ({"retraining": Retraining(weight_decay=(1e-4,))}, "1 values of weight_decay were given for 2 copies"),
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(options, message, monkeypatch):
    monkeypatch.delattr("vfsurgery.soups.phases.train")
    with pytest.raises(OptionError, match=message):
        run(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), **options)


def test_validation_needs_labels():
    with pytest.raises(DataError, match="batch 0 has no labels"):
        sparse_soup(dense(), SPLITS.train, [torch.randn(8, 1, 8, 8)], sparsity=0.5, retraining=BRIEF, progress=False)

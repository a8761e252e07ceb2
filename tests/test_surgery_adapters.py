"""Representation surgery: it starts as nothing, comes nearer to the expert's features, and never goes farther away."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from vfsurgery.errors import DataError, OptionError
from vfsurgery.merging.multitask.surgery_adapters import fit_corrections


def features(count: int = 150, units: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.randn(count, units)
    return own, own - 0.5 * (own @ torch.randn(units, units) / units).relu() - 0.2


def test_no_step_is_no_correction():
    own, goals = features()
    found = fit_corrections({"a": own}, {"a": goals}, steps=0)["a"]
    assert torch.equal(found.module(own), own)
    assert found.step == 0 and found.after == found.before and "no correction" in str(found)


def test_features_come_nearer_to_the_experts():
    own, goals = features()
    found = fit_corrections({"a": own, "b": own}, {"a": goals, "b": own}, lr=1e-2)
    assert found["a"].after < 0.8 * found["a"].before
    held = torch.arange(len(own)) % 5 == 4
    assert float((found["a"].module(own[held]) - goals[held]).abs().mean()) == pytest.approx(found["a"].after)
    assert found["b"].step == 0 and torch.equal(found["b"].module(own), own)  # which was right already


def test_it_is_never_farther_away():
    own, goals = features()
    found = fit_corrections({"a": own}, {"a": goals}, lr=100.0, steps=20)["a"]
    assert found.after <= found.before


def test_tokens_have_features_each_and_seeds_repeat():
    own, goals = torch.randn(40, 5, 8), torch.randn(40, 5, 8)
    first, again, other = (fit_corrections({"a": own}, {"a": goals}, steps=30, seed=seed)["a"] for seed in (0, 0, 1))
    assert first.module(own).shape == own.shape
    assert all(torch.equal(x, y) for x, y in zip(first.module.parameters(), again.module.parameters(), strict=True))
    assert first.after != other.after


def test_it_is_saved_and_exported_without_the_library():
    own, goals = features()
    module = fit_corrections({"a": own}, {"a": goals}, steps=50, lr=1e-2)["a"].module
    file = io.BytesIO()
    torch.save(module, file)
    assert b"vfsurgery" not in file.getvalue()
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(own), module(own))
    exported = torch.export.export(nn.Sequential(module), (own,))
    torch.testing.assert_close(exported.module()(own), module(own))


@pytest.mark.parametrize("wrong", ["absent", "other units", "too few"])
def test_features_that_do_not_fit_are_refused(wrong):
    own, goals = features(3 if wrong == "too few" else 20)
    experts = {} if wrong == "absent" else {"a": goals[:, 1:] if wrong == "other units" else goals}
    with pytest.raises(DataError, match="task 'a' do not fit"):
        fit_corrections({"a": own}, experts)


def test_options_are_checked():
    own, goals = features()
    with pytest.raises(OptionError, match="rank >= 1"):
        fit_corrections({"a": own}, {"a": goals}, rank=0)

"""Soups: averages of models of one ancestor, greedy or not, and phases of pruning, retraining and averaging."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_merge import Everything
from test_sparse_merge import pruned
from tiny_nets import images, net, state_of
from torch import Tensor, nn
from torch.nn.utils import prune

import vfsurgery as surgery
from vfsurgery.errors import DataError, IncompatibleModelsError, InvalidWeightsError, OptionError, SurgeryError
from vfsurgery.passes import Reset
from vfsurgery.pruning import Masks
from vfsurgery.pruning.layers import prunable
from vfsurgery.scoring.soups import averaging as soups


def near(model: nn.Module, seed: int, spread: float = 0.2) -> nn.Module:
    """A copy whose weights moved a little, zeros aside."""
    generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + spread * noise)
    return moved


def family(name: str, count: int = 3, share: float = 0.5, spread: float = 0.2) -> list[nn.Module]:
    """Sparse models of one ancestor."""
    ancestor = pruned(net(name, 1), share)
    return [near(ancestor, seed, spread) for seed in range(count)]


def labelled(model: nn.Module, noise: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    """Images with the classes that a model gives them, when it sees them with some noise."""
    x = images(200, 3)
    with torch.no_grad():
        labels = model.eval()(x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).argmax(1)
    return list(zip(x.split(50), labels.split(50), strict=True))


def soup(models: list[nn.Module], **options: object) -> nn.Module:
    return surgery.soup(models, **{"progress": False, **options})


def accuracy(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    return surgery.evaluate(model, data, progress=False).accuracy


# Averages of all


@pytest.mark.parametrize("name", ["chain", "residual", "grouped"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_soup_of_equal_models_is_the_model_to_the_last_bit(name, count):
    model = pruned(net(name, 1))
    mixed = soup([copy.deepcopy(model) for _ in range(count)], greedy=False, recalibrate=False)
    assert all(torch.equal(tensor, mixed.state_dict()[key]) for key, tensor in model.state_dict().items())
    other = soup([model, near(model, 0)], greedy=False, recalibrate=False)
    assert any(not torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3], [0.0, 1.0, 0.0]])
def test_the_weighted_mean_of_all_tensors_and_the_first_models_integers(weights):
    models = [net("residual", seed) for seed in (1, 2, 3)]
    everything = Everything(*models)
    mixed = soup(models, greedy=False, recalibrate=False, weights=weights)
    shares = weights or [1 / 3] * 3
    first = next(number for number, share in enumerate(shares) if share)
    for name, tensor in mixed.state_dict().items():
        states = [state_of(model)[name] for model in models]
        if tensor.is_floating_point():
            expected = sum(share * own for share, own in zip(shares, states, strict=True))
            assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, states[first])
    assert everything.changes() == []
    assert [one.kept for one in surgery.report_of(mixed).ingredients] == [share > 0 for share in shares]


def test_averaging_in_half_precision_sums_in_single():
    models = [net("chain", 1).bfloat16() for _ in range(9)]
    for number, model in enumerate(models):
        model[0].bias.data.fill_(1 + number * 2**-7)
    assert soup(models, greedy=False)[0].bias[0].item() == 1 + 4 * 2**-7


# Recalibration


def test_batch_norm_is_measured_anew_on_the_calibration_images():
    models = family("residual", share=0.0)
    calibration = [images(64, 5)]
    mixed = soup(models, greedy=False, calibration=calibration)
    averaged = soup(models, greedy=False, recalibrate=False)
    inputs: list[Tensor] = []
    averaged.norm.train().register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        averaged.train()(calibration[0])
    found = inputs[0].transpose(0, 1).flatten(1)
    assert torch.allclose(mixed.norm.running_mean, found.mean(1), atol=1e-5)
    assert torch.allclose(mixed.norm.running_var, found.var(1), rtol=1e-4)
    assert torch.equal(mixed.norm.num_batches_tracked, models[0].norm.num_batches_tracked)
    assert surgery.report_of(mixed).recalibrated == 6
    weights = {name for name, _ in mixed.named_parameters()}
    assert all(
        torch.equal(mixed.state_dict()[name], soup(models, greedy=False, recalibrate=False).state_dict()[name])
        for name in weights
    )


def test_recalibration_needs_images_only_where_there_is_batch_norm():
    with pytest.raises(DataError, match=r"6 BatchNorm layers have to be recalibrated, and there are no images"):
        soup(family("residual"), greedy=False)
    assert surgery.report_of(soup(family("chain"), greedy=False)).recalibrated == 0


# Masks


@pytest.mark.parametrize("name", ["chain", "residual"])
@pytest.mark.parametrize("greedy", [True, False])
def test_one_mask_is_kept_exactly(name, greedy):
    models = family(name)
    mixed = soup(models, data=labelled(models[0]), greedy=greedy)
    assert Masks.of(mixed) == Masks.of(models[0])
    masks = surgery.report_of(mixed).masks
    assert (masks.choice, masks.result) == ("same", Masks.of(models[0]).sparsity)


def test_a_revived_weight_is_caught(monkeypatch):
    def reviving(self, graph_module, context):
        graph_module.get_parameter("stem.weight").data.clamp_(min=1e-9)
        return graph_module

    monkeypatch.setattr(Reset, "run", reviving)
    with pytest.raises(SurgeryError, match="reset does not keep the zeros of pruned weights"):
        soup(family("residual"), greedy=False, calibration=[images(16)])
    soup(family("residual", share=0.0), greedy=False, calibration=[images(16)])
    monkeypatch.setattr(soups.Pot, "pour", lambda pot: pot.state["stem.weight"].fill_(1))
    with pytest.raises(SurgeryError, match="the average does not keep the zeros of pruned weights"):
        soup(family("residual"), greedy=False, recalibrate=False)


def test_different_masks_need_a_choice():
    models = [pruned(net("chain", 1), 0.5, seed) for seed in range(3)]
    with pytest.raises(OptionError, match=r"the sources have different masks[^$]*remedy +mask='intersect', 'union' or"):
        soup(models, greedy=False)
    masks = [Masks.of(model) for model in models]
    found = {choice: soup(models, greedy=False, mask=choice) for choice in ("intersect", "union", "reprune", None)}
    assert Masks.of(found["intersect"]) == masks[0] & masks[1] & masks[2]
    assert Masks.of(found["union"]) == Masks.of(found[None]) == masks[0] | masks[1] | masks[2]
    assert surgery.report_of(found[None]).masks is None
    for name, weight in prunable(found["reprune"]).items():
        assert int(weight.count_nonzero()) == round(sum(int(own[name].sum()) for own in masks) / 3)


def test_only_the_members_of_a_greedy_soup_decide_about_its_mask():
    ancestor = net("chain", 1)
    data = labelled(ancestor, noise=0.0)
    useless = pruned(net("chain", 7), 0.5, 1)
    models = [pruned(copy.deepcopy(ancestor), 0.1, seed) for seed in (1, 2)]
    mixed = soup([useless, *models], data=data, mask="intersect")
    kept = [one.model for one in surgery.report_of(mixed).ingredients if one.kept]
    assert 0 not in kept
    expected = Masks.of([useless, *models][kept[0]])
    for number in kept[1:]:
        expected = expected & Masks.of(models[number - 1])
    assert Masks.of(mixed) == expected


# Greedy soups


@pytest.mark.parametrize("name", ["chain", "residual"])
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_a_greedy_soup_is_never_worse_than_the_best_model(name, spread):
    ancestor = pruned(net(name, 1))
    models = [near(ancestor, seed, spread) for seed in range(5)]
    data = labelled(ancestor)
    mixed = soup(models, data=data)
    report = surgery.report_of(mixed)
    alone = [accuracy(model, data) for model in models]
    assert accuracy(mixed, data) == report.accuracy >= max(alone)
    assert [one.accuracy for one in report.ingredients] == sorted(alone, reverse=True)
    assert all(one.accuracy == alone[one.model] for one in report.ingredients)


def test_a_model_stays_in_only_if_the_soup_is_as_good_as_the_best_so_far():
    ancestor = pruned(net("chain", 1))
    models = [near(ancestor, seed, 0.5) for seed in range(6)]
    data = labelled(ancestor)
    mixed = soup(models, data=data)
    report, members, best = surgery.report_of(mixed), list[int](), 0.0
    for one in report.ingredients:
        trial = (
            soup([models[number] for number in (*members, one.model)], greedy=False) if members else models[one.model]
        )
        found = accuracy(trial, data)
        assert found == one.soup and one.kept == (found >= best)
        if one.kept:
            members, best = [*members, one.model], found
    kinds = {one.kept for one in report.ingredients}
    assert kinds == {True, False}, "a test that sees no rejection, or no addition, says nothing"
    again = soup([models[number] for number in members], greedy=False)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in mixed.state_dict().items())


def test_where_nothing_helps_the_best_model_comes_back_untouched():
    ancestor = net("residual", 1)
    data = labelled(ancestor, noise=0.0)
    mixed = soup([net("residual", 5), ancestor, net("residual", 6)], data=data)
    assert all(torch.equal(tensor, mixed.state_dict()[key]) for key, tensor in ancestor.state_dict().items())
    report = surgery.report_of(mixed)
    assert [one.model for one in report.ingredients if one.kept] == [1] and report.recalibrated == 0


def test_a_candidate_costs_one_evaluation(monkeypatch):
    calls = []
    monkeypatch.setattr(
        soups, "evaluate", lambda *args, **options: calls.append(1) or surgery.evaluate(*args, **options)
    )
    models = family("chain", count=4)
    soup(models, data=labelled(models[0]))
    assert len(calls) == 4 + 3  # each alone, and each but the best in the soup


def test_models_and_random_state_are_left_alone_and_modes_are_the_first_models():
    models = family("residual")
    models[0].block1.eval()
    models[0].stem.train()
    everything = Everything(*models)
    mixed = soup(models, data=labelled(copy.deepcopy(models[0])))
    assert everything.changes() == []
    modes = {name: module.training for name, module in mixed.named_modules()}
    assert modes == {name: module.training for name, module in models[0].named_modules()} and modes["stem"]


def test_the_report_has_the_table():
    models = family("chain")
    report = surgery.report_of(soup(models, data=labelled(models[0])))
    text = str(report)
    assert text.startswith("greedy soup of ") and "masks same: sparsity 50.60%" in text
    assert text.count("%") >= 6
    plain = json.loads(report.to_json())
    assert len(plain["ingredients"]) == 3 and plain["masks"]["choice"] == "same"
    assert sum(one["weight"] for one in plain["ingredients"]) == pytest.approx(1)


# Bad input


def test_a_greedy_soup_needs_labels():
    models = family("chain")
    with pytest.raises(DataError, match="a greedy soup compares accuracies, and there is no data"):
        soup(models)
    with pytest.raises(DataError, match=r"batch 0 has no labels[^$]*or greedy=False, which averages all models"):
        soup(models, data=[images(8)])


def test_what_cannot_be_a_soup_is_refused():
    a, b = family("chain", count=2)
    with pytest.raises(OptionError, match="a soup needs at least two models"):
        soup([a], greedy=False)
    with pytest.raises(OptionError, match=r"model 1 of the soup is no torch.nn.Module but OrderedDict"):
        soup([a, b.state_dict()], greedy=False)
    with pytest.raises(InvalidWeightsError, match="sources 0 and 1 share the storage"):
        soup([a, a], greedy=False)
    with pytest.raises(IncompatibleModelsError, match="are not the same architecture"):
        soup([a, net("residual", 1)], greedy=False)
    with pytest.raises(OptionError, match=r"mask='sam' is unknown\n  remedy  did you mean 'same'\?"):
        soup([a, b], greedy=False, mask="sam")
    with pytest.raises(OptionError, match="weights= is for the average of all models"):
        soup([a, b], data=labelled(a), weights=[0.5, 0.5])
    with pytest.raises(OptionError, match="weights must lie in"):
        soup([a, b], greedy=False, weights=[0.5, 0.6])


def test_a_model_that_is_not_finite_is_refused():
    a, b = family("chain", count=2)
    b[0].bias.data[0] = torch.inf
    with pytest.raises(InvalidWeightsError, match="source 1 holds NaN or infinite values"):
        soup([a, b], greedy=False)


def test_pruning_hooks_are_refused():
    a, b = net("chain", 1), net("chain", 2)
    prune.l1_unstructured(a[0], "weight", 0.5)
    with pytest.raises(OptionError, match="source 0 has pruning hooks on"):
        soup([a, b], greedy=False)

"""Repair after compression: the dense statistics come back, zeros stay, nothing is added, whatever compressed it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_nets import Chain, LayerNormed, images, lively, net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import vfsurgery as surgery
from vfsurgery.errors import DataError, IncompatibleModelsError, InvalidWeightsError, OptionError, SurgeryError
from vfsurgery.passes import ClosedFormRepair, Fold, Repair, Reset
from vfsurgery.pruning import Masks
from vfsurgery.pruning.layers import LAYERS
from vfsurgery.tracing.copies import copied

BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
DATA = [images(96)]
SMALL = [images(96)[start : start + 12] for start in range(0, 96, 12)]
NAMES = ["chain", "residual", "grouped", "dense"]
EXACT = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
"""How far moments may lie from their goal, in deviations: rounding of weights, biases and activations."""


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def pruned(dense: nn.Module, share: float = 0.6, scope: str = "layer", hooks: bool = False) -> nn.Module:
    """A copy whose smallest weights are zero, by ``torch.nn.utils.prune``."""
    model = copy.deepcopy(dense)
    weights = [(layer, "weight") for layer in layers(model)]
    if scope == "global":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    elif scope == "2:4":
        for layer, _ in weights:
            rows = layer.weight.detach().flatten(1)
            usable = rows.shape[1] // 4 * 4
            mask = torch.ones_like(rows)
            mask[:, :usable] = (rows[:, :usable].abs().unflatten(1, (-1, 4)).argsort(2).argsort(2) > 1).flatten(1)
            prune.custom_from_mask(layer, "weight", mask.view_as(layer.weight))
    else:
        for layer, name in weights:
            prune.l1_unstructured(layer, name, amount=share)
    if not hooks:
        for layer, name in weights:
            prune.remove(layer, name)
    return model


def factored(dense: nn.Module, rank: int) -> nn.Module:
    """A chain whose second linear layer is the product of two, by singular values."""
    model = copy.deepcopy(dense)
    u, s, v = torch.linalg.svd(model[8].weight.detach())
    model[8] = nn.Sequential(nn.Linear(54, rank, bias=False), nn.Linear(rank, 12))
    with torch.no_grad():
        model[8][0].weight.copy_(v[:rank])
        model[8][1].weight.copy_(u[:, :rank] * s[:rank])
        model[8][1].bias.copy_(dense[8].bias)
    return model


def rounded(dense: nn.Module) -> nn.Module:
    """Weights on a grid of seven values per layer."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in layers(model):
            step = layer.weight.abs().max() / 3
            layer.weight.copy_((layer.weight / step).round() * step)
    return model


def outputs(model: nn.Module, data: list[Tensor] = DATA) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.cat(data)).double()


def distance(model: nn.Module, dense: nn.Module) -> float:
    """Mean squared distance of the outputs over the variance of the dense ones, on images nothing was fitted to."""
    fresh = [images(200, seed=9)]
    goal = outputs(dense, fresh)
    return float((outputs(model, fresh) - goal).square().mean() / goal.var(0).mean())


def moments_gap(model: nn.Module, dense: nn.Module, data: list[Tensor] = DATA) -> float:
    """How far means and deviations of a model's outputs lie from the dense ones', in deviations."""
    mine, goal = outputs(model, data), outputs(dense, data)
    std = goal.std(0)
    return float(torch.maximum((mine.mean(0) - goal.mean(0)).abs() / std, (mine.std(0) / std - 1).abs()).max())


COMPRESSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "magnitude": pruned,
    "global magnitude": lambda dense: pruned(dense, scope="global"),
    "2:4": lambda dense: pruned(dense, scope="2:4"),
    "hooks on": lambda dense: pruned(dense, hooks=True),
    "rounded weights": rounded,
}


@pytest.mark.parametrize("data", [DATA, SMALL], ids=["one batch", "small batches"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_its_own_reference_stays_what_it_is(name, data):
    dense = net(name)
    repaired = surgery.renormalize(copy.deepcopy(dense), reference=dense, data=data)
    torch.testing.assert_close(outputs(repaired), outputs(dense), rtol=1e-4, atol=1e-4)
    assert distance(pruned(dense), dense) > 1e-2


def test_reset_of_its_own_reference_moves_it_by_what_the_sample_allows():
    dense = net("residual")
    few, many = (
        surgery.renormalize(copy.deepcopy(dense), reference=dense, data=[images(count, seed=4)], renormalize="reset")
        for count in (8, 512)
    )
    calibrated = surgery.renormalize(dense, reference=many, data=[images(2048, seed=5)], renormalize="reset")
    assert distance(many, calibrated) < distance(few, calibrated) / 4


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_dense_statistics_and_come_closer(name, kind):
    dense = net(name)
    compressed = COMPRESSIONS[kind](dense)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert moments_gap(repaired, dense) < EXACT[torch.float32] < moments_gap(compressed, dense)
    assert distance(repaired, dense) < distance(compressed, dense)


def test_every_layer_has_the_dense_statistics():
    dense = net("chain")
    compressed = pruned(dense)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    for depth in (1, 3, 5, 9, 11):
        mine, bad, goal = (model[:depth](images(96)).detach() for model in map(unshared, (repaired, compressed, dense)))
        mine, bad, goal = (value.movedim(1, 0).flatten(1) for value in (mine, bad, goal))
        torch.testing.assert_close(mine.mean(1), goal.mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.std(1), goal.std(1), rtol=1e-3, atol=1e-3)
        assert (bad.std(1) / goal.std(1) - 1).abs().max() > 1e-2


def unshared(model: nn.Module) -> nn.Sequential:
    """As a plain sequence whose activations do not write into what came before."""
    return nn.Sequential(*(nn.ReLU() if isinstance(part, nn.ReLU) else part for part in model))


@pytest.mark.parametrize("kind", ["magnitude", "global magnitude", "2:4", "hooks on"])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_zeros_class_and_keys_stay(name, kind):
    dense = net(name)
    compressed = COMPRESSIONS[kind](dense)
    before = {key: value.clone() for key, value in compressed.state_dict().items()}
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert Masks.of(repaired) == Masks.of(compressed) != Masks.of(dense)
    assert type(repaired) is type(compressed)
    assert list(repaired.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in compressed.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in repaired.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_hooks_on_gives_what_hooks_removed_gives(name, inplace):
    dense = net(name)
    hooked, removed = pruned(dense, hooks=True), pruned(dense)
    expected = surgery.renormalize(removed, reference=dense, data=DATA)
    repaired = surgery.renormalize(hooked, reference=dense, data=DATA, inplace=inplace)
    assert torch.equal(outputs(repaired), outputs(expected))
    layer = layers(repaired)[0]
    assert "weight_orig" in dict(layer.named_parameters())
    assert torch.equal(layer.weight_mask, layers(hooked)[0].weight_mask)
    for each in layers(repaired):
        prune.remove(each, "weight")
    assert torch.equal(outputs(repaired), outputs(expected))


def test_folding_gives_what_the_correction_gives(monkeypatch):
    dense = net("chain")
    compressed = pruned(dense)
    unfolded: list[Tensor] = []
    fold = Fold.run

    def watching(self, graph_module, context):
        unfolded.append(graph_module(images(96)).double())
        return fold(self, graph_module, context)

    monkeypatch.setattr(Fold, "run", watching)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    torch.testing.assert_close(outputs(repaired), unfolded[0], rtol=1e-4, atol=1e-4)
    assert (outputs(compressed) - unfolded[0]).abs().max() > 1e-2


def test_small_batches_do_as_well_as_one():
    dense = net("residual")
    compressed = pruned(dense)
    whole = surgery.renormalize(compressed, reference=dense, data=DATA)
    pieces = surgery.renormalize(compressed, reference=dense, data=SMALL)
    assert distance(pieces, dense) < 1.5 * distance(whole, dense) < distance(compressed, dense)


def test_64_images_do_for_repair_what_reset_needs_many_for():
    dense = net("residual")
    dense = surgery.renormalize(copy.deepcopy(dense), reference=dense, data=[images(2000)], renormalize="reset")
    compressed = pruned(dense, 0.3)
    few = [images(64, seed=3)]
    repaired, reset = (
        surgery.renormalize(compressed, reference=dense, data=few, renormalize=choice) for choice in ("repair", "reset")
    )
    assert distance(repaired, dense) < distance(reset, dense) < distance(compressed, dense)


def test_a_layer_of_low_rank_takes_the_scale_into_its_second_factor():
    dense = net("chain")
    compressed = factored(dense, rank=3)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert moments_gap(repaired, dense) < EXACT[torch.float32] < moments_gap(compressed, dense)
    assert torch.equal(repaired[8][0].weight, compressed[8][0].weight)
    assert not torch.equal(repaired[8][1].weight, compressed[8][1].weight)
    assert "left as it is, 8.0: a factor of 8, which 8.1 completes" in str(surgery.report_of(repaired))


def test_a_half_precision_copy_takes_a_float32_reference():
    dense = net("residual")
    compressed = pruned(dense).to(torch.bfloat16)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert {parameter.dtype for parameter in repaired.parameters()} == {torch.bfloat16}
    assert Masks.of(repaired) == Masks.of(compressed)
    half = [images(96, dtype=torch.bfloat16)]
    goal, mine, bad = outputs(dense), outputs(repaired, half), outputs(compressed, half)
    gaps = [float(((x.mean(0) - goal.mean(0)).abs() / goal.std(0)).max()) for x in (mine, bad)]
    assert gaps[0] < EXACT[torch.bfloat16] < gaps[1]


def test_a_removed_layer_is_no_hindrance_to_the_rest():
    dense = net("residual")
    edited = pruned(dense)
    edited.block1.conv2, edited.block1.bn2 = nn.Identity(), nn.Identity()
    repaired = surgery.renormalize(edited, reference=dense, data=DATA)
    report = surgery.report_of(repaired)
    assert [(entry.layer, entry.reason) for entry in report.unpaired] == [("block1.bn2", "only the reference has it")]
    assert len(report.paired) == 6
    assert moments_gap(repaired, dense) < EXACT[torch.float32] < moments_gap(edited, dense)


def test_an_added_layer_is_named_and_left_alone():
    dense = net("residual")
    edited = pruned(dense)
    edited.block1.down = nn.Sequential(nn.Conv2d(6, 7, 1), nn.ReLU(), nn.Conv2d(7, 6, 1))
    repaired = surgery.renormalize(edited, reference=dense, data=DATA)
    named = {entry.layer: entry.reason for entry in surgery.report_of(repaired).unpaired}
    assert list(named) == ["block1.down.0", "block1.down.2"]
    assert named["block1.down.0"] == "no conv layer of 7 units is left in its place of the reference"
    assert torch.equal(repaired.block1.down[0].weight, edited.block1.down[0].weight)
    assert moments_gap(repaired, dense) < EXACT[torch.float32] < moments_gap(edited, dense)


def test_kept_units_are_compared_with_themselves():
    dense = net("chain")
    small, left = Chain(width=5).eval(), [0, 2, 3, 5, 7]
    small.load_state_dict(dense.state_dict() | {
        "0.weight": dense[0].weight[left], "0.bias": dense[0].bias[left], "2.weight": dense[2].weight[:, left]
    })  # fmt: skip
    repaired = surgery.renormalize(small, reference=dense, data=DATA, keep={"0": left})
    torch.testing.assert_close(repaired[0].weight, dense[0].weight[left], rtol=1e-4, atol=1e-4)
    assert moments_gap(repaired, dense) < EXACT[torch.float32]
    wrong = surgery.renormalize(small, reference=dense, data=DATA, keep={"0": left[::-1]})
    assert (wrong[0].weight - dense[0].weight[left]).abs().max() > 1e-2


def test_a_parametrized_weight_is_left_alone_and_named():
    dense = net("chain")
    compressed = pruned(dense)
    parametrizations.weight_norm(compressed[2])
    expected = outputs(compressed)
    before = copy.deepcopy(compressed.state_dict())
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert list(repaired.state_dict()) == list(before)
    named = {entry.layer: entry.reason for entry in surgery.report_of(repaired).unpaired}
    assert named == {"2": "nothing can be folded into its weight: a parametrization computes it"}
    assert all(torch.equal(value, before[key]) for key, value in repaired.state_dict().items() if key.startswith("2."))
    assert torch.equal(outputs(compressed), expected)
    assert moments_gap(repaired, dense) < EXACT[torch.float32]


def test_a_mask_on_a_bias_leaves_its_layer_alone():
    dense = net("chain")
    compressed = pruned(dense)
    prune.l1_unstructured(compressed[2], "bias", amount=0.5)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert [entry.layer for entry in surgery.report_of(repaired).unpaired] == ["2"]
    assert torch.equal(repaired[2].bias == 0, compressed[2].bias == 0)


def test_fake_quantized_modules_are_named_and_the_norm_behind_one_is_repaired():
    qat = pytest.importorskip("torch.ao.nn.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    dense = net("residual")
    compressed = copy.deepcopy(dense)
    config = quantization.QConfig(quantization.default_observer, quantization.default_weight_fake_quant)
    for owner, name in ((compressed, "stem"), (compressed, "fc")):
        layer = getattr(owner, name)
        layer.qconfig = config
        kind = qat.Conv2d if name == "stem" else qat.Linear
        setattr(owner, name, kind.from_float(layer))
    compressed(images(4))
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    report = surgery.report_of(repaired)
    assert "norm" in {pair.layer for pair in report.paired}
    assert {entry.layer: entry.reason for entry in report.unpaired} == {
        "stem": "nothing can be folded into a Conv2d",
        "fc": "nothing can be folded into a Linear",
    }


def test_a_norm_without_scale_is_reset_and_the_rest_repaired():
    dense = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    dense = surgery.renormalize(dense, reference=copy.deepcopy(dense), data=DATA, renormalize="reset")
    repaired = surgery.renormalize(pruned(dense), reference=dense, data=DATA)
    assert surgery.report_of(repaired).passes == ("reset", "repair")
    values = repaired[:2](images(96)).detach()
    torch.testing.assert_close(values.std((0, 2, 3)), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_layer_norms_and_the_layers_before_them_are_repaired():
    dense = lively(LayerNormed())
    compressed = pruned(dense, 0.3)
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert [pair.layer for pair in surgery.report_of(repaired).paired] == ["first", "norm", "last"]
    assert moments_gap(repaired, dense) < EXACT[torch.float32] < moments_gap(compressed, dense)


def test_a_layer_without_bias_gets_one_and_the_report_says_so():
    dense = lively(Chain(bias=False))
    repaired = surgery.renormalize(pruned(dense), reference=dense, data=DATA)
    report = surgery.report_of(repaired)
    assert report.created_biases == ("0.bias", "2.bias", "4.bias")
    assert set(repaired.state_dict()) - set(dense.state_dict()) == set(report.created_biases)
    hooked = surgery.renormalize(pruned(dense, hooks=True), reference=dense, data=DATA)
    assert torch.equal(outputs(hooked), outputs(repaired))
    rescaled = surgery.renormalize(pruned(dense), reference=dense, data=DATA, renormalize="rescale")
    assert not surgery.report_of(rescaled).created_biases


def test_the_report_says_what_was_done():
    dense = net("residual")
    repaired = surgery.renormalize(pruned(dense), reference=dense, data=SMALL)
    report = surgery.report_of(repaired)
    assert isinstance(report, surgery.RenormalizeReport)
    assert (report.images, report.passes, report.created_biases) == (96, ("repair",), ())
    assert report.sparsity == pytest.approx(Masks.of(repaired).sparsity)
    assert report.to_dict()["paired"][0]["layer"] == "norm"
    assert "Residual renormalized after Residual: repair on 96 images" in str(report)
    assert max(pair.scale for pair in report.paired) > 1.05


def test_both_networks_run_once_over_the_data(monkeypatch):
    dense = net("chain")
    calls = {"dense": 0, "compressed": 0}
    convolve = nn.Conv2d._conv_forward

    def counting(self, x, weight, bias):
        if type(x) is Tensor and any(x.shape == batch.shape and torch.equal(x, batch) for batch in SMALL):
            calls["dense" if torch.equal(weight, dense[0].weight) else "compressed"] += 1
        return convolve(self, x, weight, bias)

    compressed = pruned(dense)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counting)
    surgery.renormalize(compressed, reference=dense, data=SMALL)
    assert calls == {"dense": len(SMALL), "compressed": len(SMALL)}


def test_modes_random_state_and_the_reference_stay():
    dense = net("residual")
    compressed = pruned(dense).train()
    compressed.block1.eval()
    modes = [module.training for module in compressed.modules()]
    state, rng = copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    repaired = surgery.renormalize(compressed, reference=dense, data=DATA)
    assert [module.training for module in compressed.modules()] == modes
    assert [module.training for module in repaired.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())


def test_inplace_writes_into_the_same_tensors():
    dense = net("chain")
    compressed = pruned(dense)
    expected = surgery.renormalize(compressed, reference=dense, data=DATA)
    tensors = {name: parameter.data_ptr() for name, parameter in compressed.named_parameters()}
    assert surgery.renormalize(compressed, reference=dense, data=DATA, inplace=True) is compressed
    assert {name: parameter.data_ptr() for name, parameter in compressed.named_parameters()} == tensors
    assert torch.equal(outputs(compressed), outputs(expected))


def test_inplace_leaves_all_as_it_was_when_something_fails():
    dense = net("chain")
    compressed = pruned(dense, hooks=True)
    before = copy.deepcopy(compressed.state_dict())
    with pytest.raises(DataError, match="NaN"):
        surgery.renormalize(
            compressed, reference=dense, data=[*DATA, images(8) * torch.nan], inplace=True, example_inputs=images(2)
        )
    assert all(torch.equal(value, before[key]) for key, value in compressed.state_dict().items())


def test_a_weight_that_would_round_to_zero_is_an_error():
    dense = net("chain")
    compressed = copy.deepcopy(dense).to(torch.float16)
    with torch.no_grad():
        compressed[2].weight.mul_(64)
        compressed[2].weight[0, 0, 0, 0] = 6e-8
    with pytest.raises(SurgeryError, match=r"2\.weight has lost its zero pattern in torch\.float16"):
        surgery.renormalize(compressed, reference=dense, data=DATA)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (lambda: net("chain", seed=1), "its weights have nothing in common with 0 of the reference"),
        (lambda: net("chain", classes=7), r"reference   \(2, 7\)"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "cannot run on what",
        ),
        (lambda: net("residual"), "no conv layer of 8 units"),
    ],
)
def test_a_reference_of_another_architecture_is_refused(reference, message):
    with pytest.raises(IncompatibleModelsError, match=message):
        surgery.renormalize(net("chain"), reference=reference(), data=DATA)


def test_bad_input_is_named_with_a_remedy():
    dense = net("chain")
    compressed = pruned(dense)
    with pytest.raises(OptionError, match="are the same object"):
        surgery.renormalize(dense, reference=dense, data=DATA)
    with pytest.raises(DataError, match="renormalize needs data"):
        surgery.renormalize(compressed, reference=dense)
    with pytest.raises(DataError, match="the data is empty"):
        surgery.renormalize(compressed, reference=dense, data=[])
    with pytest.raises(DataError, match="cannot run on images like those in the data"):
        surgery.renormalize(compressed, reference=dense, data=[images(4, channels=5)])
    with pytest.raises(OptionError, match="did you mean 'repair'"):
        surgery.renormalize(compressed, reference=dense, data=DATA, renormalize="repiar")
    for choice in ("regress", ClosedFormRepair()):
        with pytest.raises(OptionError, match="compares no network with a reference"):
            surgery.renormalize(compressed, reference=dense, data=DATA, renormalize=choice)
    with pytest.raises(OptionError, match="leaves nothing to do"):
        surgery.renormalize(compressed, reference=dense, data=DATA, renormalize=[])
    with pytest.raises(OptionError, match="reset needs BatchNorm"):
        surgery.renormalize(compressed, reference=dense, data=DATA, renormalize=Reset())
    compressed[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InvalidWeightsError, match="the compressed model holds NaN"):
        surgery.renormalize(compressed, reference=dense, data=DATA)
    with pytest.raises(InvalidWeightsError, match="the reference holds NaN"):
        surgery.renormalize(dense, reference=compressed, data=DATA)


def test_inplace_refuses_to_change_the_reference():
    dense = net("chain")
    compressed = pruned(dense)
    compressed[10] = dense[10]
    with pytest.raises(InvalidWeightsError, match=r"would change the reference(.|\n)*10\.weight"):
        surgery.renormalize(compressed, reference=dense, data=DATA, inplace=True)
    surgery.renormalize(compressed, reference=dense, data=DATA)


def test_sequential_meets_the_goals_over_many_batches():
    dense = net("chain")
    compressed = pruned(dense, 0.4)
    together, one_by_one = (
        surgery.renormalize(
            compressed, reference=dense, data=SMALL, renormalize=Repair(include_output=True, sequential=sequential)
        )
        for sequential in (False, True)
    )
    assert moments_gap(one_by_one, dense, SMALL) < EXACT[torch.float32] < moments_gap(together, dense, SMALL)


def test_a_copy_of_a_hooked_model_needs_no_trick_of_the_user():
    hooked = pruned(net("chain"), hooks=True)
    with pytest.raises(RuntimeError):
        copy.deepcopy(hooked)
    assert torch.equal(outputs(copied(hooked)), outputs(hooked))


@pytest.mark.pairs
@pytest.mark.slow
@pytest.mark.parametrize(("name", "sparsity"), [("vgg11_half", 0.7), ("tv_resnet18", 0.8)])
def test_64_images_win_back_half_of_what_pruning_has_cost(name, sparsity, shared: Path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark, pairs = importlib.import_module("renormalize_pruned"), importlib.import_module("pairs")
    found = pairs.load_images(shared, pairs.ROOT / "out" / "cache", calibration=64, test=1000)
    dense, _ = benchmark.load_pair(shared, name)
    compressed = benchmark.pruned_copy(dense, "layer", sparsity)
    repaired = surgery.renormalize(compressed, reference=dense, data=found.calibration, progress=False)
    best, lost, now = (benchmark.accuracy(model, found) for model in (dense, compressed, repaired))
    assert best - lost > 20
    assert now - lost > (best - lost) / 2


def test_the_benchmark_says_what_is_missing_and_stops(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    importlib.import_module("renormalize_pruned").main(["--shared", str(tmp_path / "nowhere")])
    assert "nowhere: nothing to measure. Name it with --shared." in capsys.readouterr().out

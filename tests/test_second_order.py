"""What layers read on the data, and the pruners that use it: Wanda, and SparseGPT's optimal brain surgery."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_nets import Chain, images, lively, net
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.errors import OptionError
from vfsurgery.pruning import Masks, Pruning, SparseGPT
from vfsurgery.pruning.inputs import input_norms, second_moments, watched
from vfsurgery.pruning.layers import prunable
from vfsurgery.pruning.selection import kept_count
from vfsurgery.pruning.sparsegpt import inverse_factor
from vfsurgery.stats import inputs
from vfsurgery.stats.inputs import Call, Layout

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (5, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 5, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, stride=2, groups=4), (3, 4, 7, 7)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (3, 4, 5, 5)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 5, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 5, 5)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 5)),
    "transposed, cut": (nn.ConvTranspose2d(4, 6, 2, padding=2, dilation=2), (3, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2, groups=2), (3, 4, 5)),
}


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[int, ...]]:
    """A fresh layer and the shape of its inputs."""
    layer, shape = LAYERS[kind]
    return copy.deepcopy(layer).to(dtype), shape


def work_on(model: nn.Module, data: object = None, **options: object) -> Pruning:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    weights = {name: model.get_parameter(name) for name in prunable(model)}
    layouts = {name: Layout.of(model, name) for name in weights}
    batches = None if data is None else Batches(data)
    return Pruning(model, weights, layouts, data=batches, progress=False, **options)


def calls_of(model: nn.Module, x: Tensor) -> list[Call]:
    work, seen = work_on(model), list[Call]()
    with watched(work, list(work.weights), seen.append):
        work.model(x)
    return seen


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_its_rows_times_its_columns(kind: str) -> None:
    layer, shape = made(kind, torch.float64)
    model = nn.Sequential(layer)
    x = torch.randn(shape, dtype=torch.float64)
    (call,) = calls_of(model, x)
    columns, rows = call.columns(call.inputs), call.layout.rows(layer.weight)
    found = rows @ columns  # (groups, units, places)
    output = model(x) - layer.bias.view(-1, *(1,) * len(call.kernel))
    units = -1 if kind == "linear" else output.ndim - len(call.kernel) - 1
    by_unit = output.movedim(units, 0).flatten(1)
    torch.testing.assert_close(found.flatten(0, 1), by_unit)
    torch.testing.assert_close(call.square_sums(), columns.square().sum(2))
    torch.testing.assert_close(call.second_moments()[0], columns @ columns.mT)


@pytest.mark.parametrize("setting", ["stride", "padding", "dilation"])
def test_every_setting_of_a_layer_counts(setting: str) -> None:
    (call,) = calls_of(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), torch.randn(3, 4, 9, 9))
    others = {name: value for name, value in call.settings.items() if name != setting}
    other = Call(call.name, call.input, call.kernel, call.layout, others)
    assert call.square_sums().shape == other.square_sums().shape
    assert not torch.allclose(call.square_sums(), other.square_sums())


def test_statistics_do_not_depend_on_how_images_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net("grouped", 0), images(24)
    whole, parts = work_on(model, [x]), work_on(model, list(x.split([5, 16, 3])))
    norms = [input_norms(work, "") for work in (whole, parts)]
    moments = [second_moments(whole, "", list(whole.weights), None)]
    monkeypatch.setattr(inputs, "CHUNK", 500)
    moments.append(second_moments(parts, "", list(parts.weights), None))
    for name in whole.weights:
        torch.testing.assert_close(norms[0][name], norms[1][name])
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-4, atol=1e-4)
        diagonal = 24 * moments[0][name].diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(norms[0][name].square().float(), diagonal, rtol=1e-4, atol=1e-4)


class Functional(nn.Module):
    """Uses a layer's weight in a function, another layer twice, and one that it standardizes on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.standard = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(functional.linear(x, self.first.weight)).relu())
        return functional.linear(x, self.standard.weight - self.standard.weight.mean())


def test_layers_are_seen_in_their_calls_however_they_are_made() -> None:
    model, x = Functional(), torch.randn(10, 6)
    work = work_on(model, x)
    norms = input_norms(work, "")
    torch.testing.assert_close(norms["first.weight"][0].float(), x.norm(dim=0))
    once = functional.linear(x, model.first.weight)
    again = model.twice(once).relu()
    torch.testing.assert_close(norms["twice.weight"][0].float(), torch.cat([once, again]).norm(dim=0).detach())
    assert list(work.dense) == ["standard.weight"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_no_call_uses_stays_dense_and_is_named(method: str) -> None:
    sparse = surgery.prune(Functional(), 0.5, method=method, data=torch.randn(10, 6))
    (layer,) = [layer for layer in surgery.report_of(sparse).layers if layer.dense]
    assert (layer.name, layer.sparsity) == ("standard.weight", 0)
    assert "no convolution or linear call" in layer.dense


def test_fused_attention_stays_dense_and_is_named() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sparse = surgery.prune(encoder, 0.5, method="wanda", data=torch.randn(4, 5, 8))
    dense = [layer.name for layer in surgery.report_of(sparse).layers if layer.dense]
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight"} <= set(dense)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "depthwise", "transposed, grouped"])
def test_wanda_is_magnitude_times_the_norm_of_the_input_within_a_unit(kind: str) -> None:
    layer, shape = made(kind)
    model, x = nn.Sequential(layer), torch.randn(shape)
    (call,) = calls_of(model, x)
    saliency = call.layout.rows(layer.weight.detach().abs()) * call.columns(call.inputs).norm(dim=2).unsqueeze(1)
    kept = call.layout.rows(prunable(surgery.prune(model, 0.5, method="wanda", data=[x]))["0.weight"]) != 0
    assert set(kept.sum(2).flatten().tolist()) == {kept_count(kept.shape[2], 0.5)}
    lowest_kept = saliency.masked_fill(~kept, torch.inf).amin(2)
    assert bool((lowest_kept >= saliency.masked_fill(kept, 0).amax(2)).all())


def test_wanda_drops_large_weights_of_small_inputs_and_magnitude_does_not() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(50, 8) * torch.tensor([100.0] * 4 + [0.01] * 4)
    by_input = Masks.of(surgery.prune(model, 0.5, method="wanda", data=x))["0.weight"]
    assert bool(by_input[:, :4].all())
    assert not bool(by_input[:, 4:].any())
    assert not torch.equal(by_input, Masks.of(surgery.prune(model, 0.5))["0.weight"])


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(3, 10, 40, dtype=torch.float64)
    moments = x @ x.mT
    factor, damping = inverse_factor(moments.clone(), 0.01)
    damped = moments + 0.01 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(10)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor, damped.inverse())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    for x in (torch.zeros(8, 6), torch.randn(8, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])):
        sparse = surgery.prune(nn.Sequential(nn.Linear(6, 4)), 0.5, method="sparsegpt", data=x)
        assert Masks.of(sparse).sparsity == 0.5
        assert bool(sparse[0].weight.isfinite().all())
    live = Masks.of(sparse)["0.weight"]
    assert live[:, :3].all()


def test_singular_moments_get_more_damping_and_a_note() -> None:
    one = torch.ones(4, 64)
    sparse = surgery.prune(nn.Sequential(nn.Linear(64, 4)), 0.5, method=SparseGPT(damping=1e-12), data=one)
    assert "0.weight: damping" in str(surgery.report_of(sparse))


def layer_error(layer: nn.Module, weight: Tensor, x: Tensor) -> float:
    """Squared error of the layer's outputs with another weight, in float64."""
    model = nn.Sequential(layer)
    (call,) = calls_of(model, x)
    difference = call.layout.rows(weight.double() - layer.weight.detach().double())
    return float((difference @ call.columns(call.inputs).double()).square().sum())


def least_squares(layer: nn.Module, mask: Tensor, x: Tensor) -> Tensor:
    """The weight on this support whose outputs are nearest to the layer's: unit by unit, by the normal equations."""
    (call,) = calls_of(nn.Sequential(layer), x)
    columns = call.columns(call.inputs).double()
    rows, kept = call.layout.rows(layer.weight.detach().double()), call.layout.rows(mask)
    found = torch.zeros_like(rows)
    for group in range(rows.shape[0]):
        for unit in range(rows.shape[1]):
            on = kept[group, unit]
            target = rows[group, unit] @ columns[group]
            found[group, unit, on] = torch.linalg.lstsq(columns[group, on].T, target).solution
    return call.layout.weight(found, mask.shape)


CASES = ["linear", "conv2d", "grouped", "depthwise", "transposed", "transposed, grouped"]


def correlated(shape: tuple[int, ...]) -> Tensor:
    """Inputs whose channels (features, for three dims) hang together, so that some can make up for others."""
    x = torch.randn(64, *shape[1:])
    dim = 2 if len(shape) == 3 and shape[2] == 6 else 1
    mix = torch.randn(shape[dim], shape[dim])
    return torch.movedim(torch.movedim(x, dim, -1) @ mix, -1, dim)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("block", [4, 128])
def test_sparsegpt_is_between_masking_and_the_optimum_on_its_support(kind: str, block: int) -> None:
    errors: list[tuple[float, float, float]] = []
    for seed in range(5):  # a greedy order may do harm to one tiny layer, but not to most
        torch.manual_seed(seed)
        layer, shape = made(kind)
        layer.reset_parameters()
        x, method = correlated(shape), SparseGPT(images=None, block=block)
        weight = surgery.prune(nn.Sequential(layer), 0.5, method=method, data=[x])[0].weight.detach()
        others = (least_squares(layer, weight != 0, x), weight, layer.weight.detach() * (weight != 0))
        best, error, masked = (layer_error(layer, other, x) for other in others)
        assert best * (1 - 1e-4) <= error
        magnitude = surgery.prune(nn.Sequential(layer), 0.5, scope="layer")[0].weight.detach()
        errors.append((error, masked, layer_error(layer, magnitude, x)))
    error, masked, magnitude = map(sum, zip(*errors, strict=True))
    assert error < masked
    assert error < magnitude


@pytest.mark.parametrize("block", [2, 4, 128])
def test_sparsegpt_is_exact_where_all_that_is_dropped_stands_first(block: int) -> None:
    layer, x = nn.Linear(6, 4).double(), correlated((5, 3, 6)).double()
    with torch.no_grad():
        layer.weight[:, :3] *= 1e-3  # so that these are dropped, and all later ones can make up for them
    exact = SparseGPT(images=None, damping=1e-12, block=block, rechoose=False)
    weight = surgery.prune(nn.Sequential(layer), 0.5, method=exact, scope="row", data=[x])[0].weight.detach()
    assert torch.equal(weight != 0, (torch.arange(6) >= 3).expand(4, 6))
    torch.testing.assert_close(weight, least_squares(layer, weight != 0, x))
    assert not torch.allclose(weight[:, 3:], layer.weight[:, 3:], rtol=1e-6)


def test_choosing_anew_is_better_than_choosing_once() -> None:
    errors = {True: 0.0, False: 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        layer, x = nn.Linear(64, 16), torch.randn(400, 64) @ torch.randn(64, 64)
        for rechoose in errors:
            method = SparseGPT(block=16, counts="obs", rechoose=rechoose)
            sparse = surgery.prune(nn.Sequential(layer), 0.7, method=method, data=x)
            errors[rechoose] += layer_error(layer, sparse[0].weight.detach(), x)
    assert errors[True] < errors[False]


def test_without_choosing_anew_the_masks_are_those_of_the_saliencies() -> None:
    layer, x = nn.Linear(8, 4).double(), torch.randn(100, 8).double()
    sparse = surgery.prune(nn.Sequential(layer), 0.5, method=SparseGPT(counts="obs", rechoose=False), data=x)
    moments = x.T @ x
    moments += 0.01 * moments.diagonal().mean() * torch.eye(8)
    saliency = layer.weight.detach().square() / moments.inverse().diagonal()
    assert torch.equal(sparse[0].weight != 0, saliency >= saliency.flatten().sort(descending=True)[0][15])


@pytest.mark.parametrize(("scope", "count"), [("layer", lambda kept: kept.sum()), ("row", lambda kept: kept.sum(2))])
def test_blocks_keep_as_many_as_their_masks(scope: str, count: Callable[[Tensor], Tensor]) -> None:
    model = lively(Chain())
    x = images(64)
    once, anew = (
        surgery.prune(model, 0.6, method=SparseGPT(block=8, rechoose=rechoose), scope=scope, data=x)
        for rechoose in (False, True)
    )
    for name, weight in prunable(once).items():
        layout = Layout.of(model, name)
        for a, b in zip(layout.rows(weight).split(8, 2), layout.rows(prunable(anew)[name]).split(8, 2), strict=True):
            assert torch.equal(count(a != 0), count(b != 0))
    assert Masks.of(once) != Masks.of(anew)


def test_magnitudes_of_all_layers_say_how_many_weights_each_keeps() -> None:
    model, x = lively(Chain()), images(64)
    found = Masks.of(surgery.prune(model, 0.6, method="sparsegpt", data=x))
    largest = Masks.of(surgery.prune(model, 0.6, method="magnitude"))
    assert found.by_layer == largest.by_layer
    assert found != largest
    assert len({round(share, 2) for share in found.by_layer.values()}) > 1
    by_error = surgery.prune(model, 0.6, method=SparseGPT(counts="obs"), data=x, allow_empty=True)
    assert Masks.of(by_error).by_layer != largest.by_layer


def test_several_passes_within_the_memory_give_what_one_gives() -> None:
    model, x = net("chain"), images(32)
    work = work_on(model)
    sizes = [layout.rows(work.weights[name]).shape[2] ** 2 * 4 for name, layout in work.layouts.items()]
    passes: list[int] = []

    class Counted(list[Tensor]):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    roomy, tight = (
        surgery.prune(model, 0.5, method="sparsegpt", data=Counted([x]), memory=memory / 2**30)
        for memory in (4 * sum(sizes), 3 * max(sizes))
    )
    assert len(passes) > 3
    for name, weight in prunable(roomy).items():
        torch.testing.assert_close(prunable(tight)[name], weight)
    with pytest.raises(OptionError, match=r"2.weight takes 0.0 GiB for .*\n  allowed +memory=1e-06 GiB\n  remedy"):
        surgery.prune(model, {"2": 0.5}, method="sparsegpt", data=x, memory=1e-6)


def test_options_of_sparsegpt_are_checked() -> None:
    for options in ({"damping": 0}, {"block": 0}, {"images": 0}, {"counts": "all"}):
        with pytest.raises(OptionError, match=r"SparseGPT\(.*cannot work"):
            SparseGPT(**options)


@pytest.mark.cuda
def test_moments_on_a_gpu_are_those_of_the_cpu() -> None:
    model, x = net("grouped"), images(24)
    own = second_moments(work_on(model, [x]), "", list(prunable(model)), None)
    there = work_on(model.cuda(), [x.cuda()])
    for name, moments in second_moments(there, "", list(prunable(model)), None).items():
        torch.testing.assert_close(moments.cpu(), own[name], rtol=1e-2, atol=1e-2)  # convolutions in TF32

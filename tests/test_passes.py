"""Each pass does what its formula says, measured independently with hooks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from tiny_nets import Chain, LayerNormed, groups_of, images, lively, net, permuted, planted, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.discovery.verification import TOLERANCE
from vfsurgery.errors import DataError, OptionError, SurgeryError
from vfsurgery.groups import Permutation, permute_tensor, random_permutations
from vfsurgery.passes import (
    Average,
    CalibrateBiases,
    Context,
    Fold,
    Pass,
    Pipeline,
    Repair,
    Rescale,
    Reset,
    Reshift,
)
from vfsurgery.passes.affine import Affine, insert_affine
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.producers import find_producers
from vfsurgery.passes.renormalize import Renormalize
from vfsurgery.stats.collect import Site, survey
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.sources import Source, canonical_state

EXACT = 1e-6
"""Relative error of float32 sums of a few terms."""

STATISTICS = TOLERANCE[torch.float32]
"""Relative error of unit statistics that went through all layers in float32."""

SAMPLING = 0.3
"""Relative difference of outputs under running statistics from different images of one distribution, 200 at a time."""

Orders = Sequence[Mapping[str, Permutation]]


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    """Whether the largest difference is small beside the largest expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).abs().max()) <= tolerance * float(expected.double().abs().max())


def operate(
    passes: Sequence[Pass],
    models: Sequence[nn.Module],
    data: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] = (0.5, 0.5),
    orders: Orders | None = None,
) -> tuple[nn.Module, fx.GraphModule, Context]:
    """Run passes on a copy of the first model; returns the model, its graph and the context."""
    dtype = next(models[0].parameters()).dtype
    sources = [Source.of(model, surgery.trace(model, images(2, dtype=dtype))) for model in models]
    groups = surgery.find_groups(sources[0].graph_module)
    units: dict[str, Site] = {}
    for step in passes:
        units.update(step.reads(sources[0].graph_module, groups))
    batches = None if data is None else Batches(data)

    def statistics():
        seen = calibration_images(batches, "sources", False)
        return survey([source.graph_module for source in sources], seen, {}, units)

    target = sources[0].clone()
    context = Context(groups, sources, weights, orders or [{} for _ in models], statistics, batches, progress=False)
    target.model.eval()
    with torch.no_grad():
        graph_module = Pipeline(tuple(passes)).run(target.graph_module, context)
    return target.model, graph_module, context


def pair(name: str) -> tuple[nn.Module, nn.Module, list[dict[str, Permutation]]]:
    """Two networks and orders of the second one's units that are not the identity."""
    a, b = net(name, 1), net(name, 2)
    return a, b, [{}, random_permutations(groups_of(a), torch.Generator().manual_seed(9))]


def aligned(models: Sequence[nn.Module], orders: Orders) -> list[nn.Module]:
    return [permuted(m, groups_of(models[0]), order) for m, order in zip(models, orders, strict=True)]


@torch.no_grad()
def unit_statistics(model: nn.Module, paths: Sequence[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every output unit of chosen layers."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, out: Tensor) -> None:
        rows = out.double().movedim(1, 0).flatten(1)
        found[path] = rows.mean(1), rows.std(1, correction=0)

    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: see(path, out))
        for path in paths
    ]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


# Average


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (1.0, 0.0), (0.0, 1.0), (0.2, 0.3, 0.5)])
def test_average_is_the_weighted_mean_of_the_aligned_states(weights: tuple[float, ...]) -> None:
    models = [net("residual", seed) for seed in range(len(weights))]
    groups = groups_of(models[0])
    orders = [{}, *(random_permutations(groups, torch.Generator().manual_seed(s)) for s in range(1, len(models)))]
    merged, _, context = operate([Average()], models, weights=weights, orders=orders)
    states = [canonical_state(model) for model in aligned(models, orders)]
    plain = [canonical_state(model) for model in models]
    differing = 0
    for name, found in canonical_state(merged).items():
        if found.is_floating_point():
            assert close(found, sum(w * state[name].double() for w, state in zip(weights, states, strict=True)))
            differing += not close(
                found, sum(w * state[name].double() for w, state in zip(weights, plain, strict=True))
            )
        else:
            assert torch.equal(found, states[0][name])  # counters are not numbers to average
    assert (differing == 0) == (weights[0] == 1)
    assert context.notes == []


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_the_average_are_the_aligned_sources_themselves(end: int) -> None:
    a, b, orders = pair("chain")
    merged, _, _ = operate([Average()], [a, b], weights=(1.0 - end, float(end)), orders=orders)
    assert same_state(merged.state_dict(), aligned([a, b], orders)[end].state_dict())
    assert not same_state(merged.state_dict(), aligned([a, b], orders)[1 - end].state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    models = [net("chain", seed).to(dtype) for seed in range(3)]
    weights = (0.3, 0.3, 0.4)
    merged, _, _ = operate([Average()], models, weights=weights)
    states = [canonical_state(model) for model in models]
    rounded_often = rounded_otherwise = count = 0
    for name, found in canonical_state(merged).items():
        terms = [w * state[name].float() for w, state in zip(weights, states, strict=True)]
        assert found.dtype == dtype
        assert close(found, sum(terms), torch.finfo(dtype).eps / 2 + EXACT)
        expected = sum(terms).to(dtype)
        rounded_otherwise, count = rounded_otherwise + int((found != expected).sum()), count + found.numel()
        rounded_often += int(((terms[0].to(dtype) + terms[1].to(dtype) + terms[2].to(dtype)) != expected).sum())
    assert rounded_otherwise < 0.01 * count  # a sum in another order may round the other way
    assert rounded_often > rounded_otherwise


def test_average_leaves_the_sources_alone() -> None:
    a, b, orders = pair("residual")
    before = state_of(a), state_of(b)
    operate([Average()], [a, b], orders=orders)
    assert same_state(a.state_dict(), before[0]) and same_state(b.state_dict(), before[1])


# Reset


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def cumulative(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose running statistics torch has estimated itself."""
    result = copy.deepcopy(model)
    for norm in norms_of(result):
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    with torch.no_grad():
        for batch in batches:
            result(batch)
    return result.eval()


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_reset_on_one_batch_gives_torchs_own_statistics(name: str) -> None:
    a, b, orders = pair(name)
    x = images(48)
    averaged, _, _ = operate([Average()], [a, b], orders=orders)
    merged, _, context = operate([Average(), Reset()], [a, b], [x], orders=orders)
    expected = cumulative(averaged, [x])
    for found, norm, before in zip(norms_of(merged), norms_of(expected), norms_of(averaged), strict=True):
        assert close(found.running_mean, norm.running_mean, STATISTICS)
        assert close(found.running_var, norm.running_var, STATISTICS)
        assert not close(found.running_var, before.running_var, STATISTICS)
        assert torch.equal(found.weight, before.weight) and torch.equal(found.bias, before.bias)
    assert context.notes == [f"reset: {len(norms_of(merged))} BatchNorm layers"]


def test_reset_counts_the_variation_between_batches() -> None:
    a = net("residual", 1)
    batches = [images(16), images(16, 2) + 2, images(16, 3) - 2]
    merged, _, _ = operate([Reset()], [a, a], batches)
    rows = a.stem(torch.cat(batches)).detach().movedim(1, 0).flatten(1)  # the first norm's input
    assert close(merged.norm.running_mean, rows.mean(1), STATISTICS)
    assert close(merged.norm.running_var, rows.var(1), STATISTICS)
    assert not close(cumulative(a, batches).norm.running_var, rows.var(1), STATISTICS)


def test_reset_keeps_counters_momentum_and_modes() -> None:
    a = net("residual", 1)
    merged, _, _ = operate([Reset()], [a, a], images(32))
    for found, norm in zip(norms_of(merged), norms_of(a), strict=True):
        assert torch.equal(found.num_batches_tracked, norm.num_batches_tracked)
        assert (found.momentum, found.training) == (norm.momentum, False)


def test_reset_leaves_an_unmerged_model_as_it_is_up_to_sampling() -> None:
    trained = cumulative(net("residual", 1), [images(200, 7)])
    x = images(64, 8)
    reset, _, _ = operate([Reset()], [trained, trained], images(200, 9))
    with torch.no_grad():
        assert close(reset(x), trained(x), SAMPLING)
        broken = copy.deepcopy(trained)
        for norm in norms_of(broken):
            norm.running_var.mul_(4)
        assert not close(broken(x), trained(x), SAMPLING)
        mended, _, _ = operate([Reset()], [broken, broken], images(200, 9))
        assert close(mended(x), trained(x), SAMPLING)


def test_reset_refuses_models_without_batch_norm() -> None:
    with pytest.raises(OptionError, match=r"(?s)reset needs BatchNorm layers with running statistics.*remedy  use"):
        operate([Reset()], [net("chain"), net("chain", 1)], images(8))


class VectorNormed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(432, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


def test_reset_refuses_a_batch_of_one_value() -> None:
    model = VectorNormed().eval()
    counter = model[2].num_batches_tracked
    with pytest.raises(DataError, match=r"(?s)a batch is too small for BatchNorm statistics.*drop a last batch of one"):
        operate([Reset()], [model, model], [images(4), images(1)])
    assert model[2].num_batches_tracked is counter and not model[2].training


def test_reset_passes_on_what_is_wrong_with_the_data() -> None:
    model = VectorNormed().eval()
    with pytest.raises(DataError, match=r"batch 1 holds NaN"):
        operate([Reset()], [model, model], [images(4), images(4) * float("nan")])


@pytest.mark.parametrize("step", [Reset(), Repair()])
def test_passes_with_data_ask_for_it(step: Pass) -> None:
    models = [net("residual"), net("residual", 1)]
    with pytest.raises(DataError, match=r"(?s)needs calibration data.*remedy  pass data="):
        operate([Average(), step], models, None)


# Repair, Rescale, Reshift

TARGETS = {
    "chain": ["0", "2", "4", "8"],
    "residual": ["norm", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2", "block2.down.1"],
    "dense": ["conv0", "conv1", "conv2", "norm"],
    "grouped": ["conv", "grouped", "point", "depthwise", "last"],
}
RENORMALIZATIONS = {
    "repair": (Repair(), True, True),
    "rescale": (Rescale(), False, True),
    "reshift": (Reshift(), True, False),
}


@pytest.mark.parametrize("method", RENORMALIZATIONS)
@pytest.mark.parametrize("name", TARGETS)
def test_merged_units_reach_the_goals_on_one_batch(name: str, method: str) -> None:
    a, b, orders = pair(name)
    x, weights = images(32), (0.3, 0.7)
    step, means, stds = RENORMALIZATIONS[method]
    merged, graph_module, context = operate([Average(), step, Fold()], [a, b], [x], weights, orders)
    plain, _, _ = operate([Average()], [a, b], None, weights, orders)
    references = [unit_statistics(model, TARGETS[name], x) for model in aligned([a, b], orders)]
    found, before = (unit_statistics(model, TARGETS[name], x) for model in (merged, plain))
    for path in TARGETS[name]:
        mean, std = (sum(w * r[path][k] for w, r in zip(weights, references, strict=True)) for k in (0, 1))
        size = float(std.max())
        reached = [float((f - goal).abs().max()) / size for f, goal in zip(found[path], (mean, std), strict=True)]
        missed = [float((f - goal).abs().max()) / size for f, goal in zip(before[path], (mean, std), strict=True)]
        assert (reached[0] <= STATISTICS) or not means
        assert (reached[1] <= STATISTICS) or not stds
        assert missed[1] > STATISTICS  # the mean of a first layer is linear in the weights and needs no correction
    assert context.notes == [f"{method}: {len(TARGETS[name])} layers"]
    assert not any(isinstance(module, Affine) for module in graph_module.modules())


@pytest.mark.parametrize("name", ["chain", "residual", "grouped"])
def test_goals_are_those_of_the_aligned_sources(name: str) -> None:
    """Negative control of the test above: goals taken in the sources' own order would be others."""
    a, b, orders = pair(name)
    x = images(32)
    merged = [operate([Average(), Repair(), Fold()], [a, b], [x], orders=o)[0] for o in (orders, None)]
    found = [unit_statistics(model, TARGETS[name][:1], x)[TARGETS[name][0]] for model in merged]
    assert not close(found[0][1], found[1][1], STATISTICS)


@pytest.mark.parametrize("method", RENORMALIZATIONS)
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_model_merged_with_itself_stays_itself(name: str, method: str) -> None:
    a = net(name, 1)
    groups = groups_of(a)
    b = planted(a, groups)
    truth = random_permutations(groups, torch.Generator().manual_seed(5))
    orders = [{}, {group: order.inverse() for group, order in truth.items()}]
    x = images(64)
    # with running statistics of the very batch, BatchNorm in training and in evaluation are one
    merged, _, _ = operate([Average(), RENORMALIZATIONS[method][0], Fold()], [a, b], [x], orders=orders)
    misaligned, _, _ = operate([Average(), RENORMALIZATIONS[method][0], Fold()], [a, b], [x])
    with torch.no_grad():
        assert close(merged(x), a(x), STATISTICS)
        assert not close(misaligned(x), a(x), STATISTICS)


@pytest.mark.parametrize("method", RENORMALIZATIONS)
@pytest.mark.parametrize("name", TARGETS)
def test_folding_changes_nothing_of_the_output(name: str, method: str) -> None:
    a, b, orders = pair(name)
    x = images(16)
    step = RENORMALIZATIONS[method][0]
    _, unfolded, _ = operate([Average(), step], [a, b], [x], orders=orders)
    merged, folded, _ = operate([Average(), step, Fold()], [a, b], [x], orders=orders)
    plain, _, _ = operate([Average()], [a, b], orders=orders)
    assert sum(isinstance(module, Affine) for module in unfolded.modules()) == len(TARGETS[name])
    with torch.no_grad():
        assert close(merged(x), unfolded(x), STATISTICS)
        assert torch.equal(merged(x), folded(x))
        assert not close(plain(x), unfolded(x), STATISTICS)


def test_the_output_layer_is_corrected_only_when_asked() -> None:
    a, b, orders = pair("chain")
    _, _, context = operate([Average(), Repair(include_output=True), Fold()], [a, b], images(16), orders=orders)
    assert context.notes == ["repair: 5 layers"]


def test_folding_keeps_zeros() -> None:
    a, b = net("chain", 1), net("chain", 2)
    masks = {}
    with torch.no_grad():
        for path in ("0", "2", "4", "8"):
            masks[path] = torch.rand(a.get_submodule(path).weight.shape) < 0.5
            for model in (a, b):
                model.get_submodule(path).weight[masks[path]] = 0
    merged, _, _ = operate([Average(), Repair(), Fold()], [a, b], images(32))
    for path, mask in masks.items():
        weight = merged.get_submodule(path).weight
        assert not weight[mask].any() and weight[~mask].all()


@pytest.mark.parametrize("step", [Repair(), Rescale()])
def test_units_that_are_constant_are_not_blown_up(step: Pass) -> None:
    a, b = net("chain", 1), net("chain", 2)
    with torch.no_grad():
        for model, sign in ((a, 1), (b, -1)):
            model[0].weight[3] = sign * torch.ones(3, 3, 3)  # they cancel in the average, but for rounding
            model[0].bias[3] = 0.7
    merged, _, _ = operate([Average(), step, Fold()], [a, b], images(32))
    assert not merged[0].weight[3].any()
    expected = {"repair": 0.7, "rescale": 0.7}[step.name]
    goal = sum(unit_statistics(m, ["0"], images(32))["0"][0][3] for m in (a, b)) / 2
    assert float(merged[0].bias[3].detach()) == pytest.approx(
        float(goal) if step.name == "repair" else expected, abs=1e-5
    )
    assert all(bool(tensor.isfinite().all()) for tensor in merged.state_dict().values())


def test_a_bias_that_a_shift_needs_is_created_and_named() -> None:
    a, b = (lively(Chain(bias=False), seed) for seed in (1, 2))
    x = images(32)
    merged, _, context = operate([Average(), Repair(), Fold()], [a, b], [x])
    assert context.created_biases == ["0.bias", "2.bias", "4.bias"]
    assert set(merged.state_dict()) - set(a.state_dict()) == set(context.created_biases)
    assert a[0].bias is None
    with pytest.raises(RuntimeError, match="Unexpected key"):
        copy.deepcopy(a).load_state_dict(merged.state_dict())
    with_biases = Chain(bias=True).eval()
    with_biases.load_state_dict(merged.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(with_biases(x), merged(x))
    assert copy.deepcopy(a).load_state_dict(merged.state_dict(), strict=False).missing_keys == []


def test_rescale_creates_no_bias() -> None:
    a, b = (lively(Chain(bias=False), seed) for seed in (1, 2))
    merged, _, context = operate([Average(), Rescale(), Fold()], [a, b], images(32))
    assert context.created_biases == [] and list(merged.state_dict()) == list(a.state_dict())


def test_statistics_over_several_batches_are_those_of_all_images() -> None:
    a, b, orders = pair("chain")
    x = images(60)
    merged = [operate([Average(), Repair(), Fold()], [a, b], x.split(size), orders=orders)[0] for size in (60, 20)]
    # the first layer's input does not depend on how images are cut
    assert close(merged[1][0].weight, merged[0][0].weight, STATISTICS)
    assert close(merged[1][0].bias, merged[0][0].bias, STATISTICS)


class Headless(nn.Module):
    """One linear layer, which is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(432, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_a_model_with_nothing_to_correct_is_refused() -> None:
    with pytest.raises(OptionError, match=r"(?s)repair found no layer to correct.*remedy   use renormalize='auto'"):
        operate([Average(), Repair()], [lively(Headless(), 1), lively(Headless(), 2)], images(8))


# Fold


def test_an_affine_node_after_something_else_is_refused() -> None:
    graph_module = surgery.trace(net("chain"), images(2))
    insert_affine(graph_module, "_1", Affine(torch.ones(8), torch.zeros(8), 1))
    context = Context(surgery.find_groups(net("chain"), images(2)), [], [], [], lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(SurgeryError, match=r"(?s)does not follow a layer that can absorb it.*after   _1 \(1\)"):
        Fold().run(graph_module, context)


def test_two_affine_nodes_fold_one_after_the_other() -> None:
    model = net("chain")
    graph_module = surgery.trace(copy.deepcopy(model), images(2))
    insert_affine(graph_module, "_0", Affine(torch.full((8,), 2.0), torch.full((8,), 1.0), 1))
    insert_affine(graph_module, "_0", Affine(torch.full((8,), -3.0), torch.full((8,), 0.5), 1))
    graph_module.recompile()
    x = images(4)
    with torch.no_grad():
        expected = graph_module(x)
        context = Context(groups_of(model), [], [], [], lambda: None)  # type: ignore[arg-type,return-value]
        found = Fold().run(graph_module, context)
        found.recompile()
        assert close(found(x), expected, STATISTICS)
        assert not close(model(x), expected, STATISTICS)


class NoBias(nn.Module):
    """A functional convolution over a bare parameter: nowhere to put a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(nn.functional.conv2d(x, self.kernel)).mean((2, 3)))


def test_a_shift_that_has_nowhere_to_go_is_refused() -> None:
    models = [lively(NoBias(), seed) for seed in (1, 2)]
    with pytest.raises(SurgeryError, match=r"(?s)repair found no layer to correct.*is called without a bias"):
        operate([Average(), Repair(), Fold()], models, images(16))
    operate([Average(), Rescale(), Fold()], models, images(16))


# Bias calibration


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 0.3])
def test_biases_fade_with_their_depth(alpha: float) -> None:
    a, b, orders = pair("chain")
    weights = (1 - alpha, alpha)
    merged, _, context = operate([Average(), CalibrateBiases()], [a, b], None, weights, orders)
    states = [canonical_state(model) for model in aligned([a, b], orders)]
    averaged = canonical_state(operate([Average()], [a, b], None, weights, orders)[0])
    found = canonical_state(merged)
    for depth, path in enumerate(["0", "2", "4", "8", "10"], start=1):
        bias = sum(w**depth * state[f"{path}.bias"].double() for w, state in zip(weights, states, strict=True))
        assert close(found[f"{path}.bias"], bias)
        assert close(found[f"{path}.bias"], averaged[f"{path}.bias"]) == (depth == 1 or alpha in (0, 1))
        assert torch.equal(found[f"{path}.weight"], averaged[f"{path}.weight"])
    if alpha == 0.5:
        mean = (states[0]["10.bias"] + states[1]["10.bias"]) / 2
        assert close(found["10.bias"], mean / 2**4)
    assert context.notes == ["bias-calibration: 5 biases, no data"]


def test_bias_calibration_of_three_models() -> None:
    models, weights = [net("chain", seed) for seed in range(3)], (0.2, 0.3, 0.5)
    merged, _, _ = operate([Average(), CalibrateBiases()], models, None, weights)
    assert close(merged[4].bias, sum(w**3 * model[4].bias.detach() for w, model in zip(weights, models, strict=True)))


class Shortcut(nn.Module):
    """Layer ``last`` lies three deep along the longer of two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last((x + torch.relu(self.inner(x))).mean((2, 3)))


def test_depth_counts_the_longest_path() -> None:
    models = [lively(Shortcut(), seed) for seed in (1, 2)]
    merged, graph_module, _ = operate([Average(), CalibrateBiases()], models)
    depths = {producer.path: producer.depth for producer in find_producers(graph_module, groups_of(models[0]))}
    assert depths == {"first": 1, "inner": 2, "last": 3}
    assert close(merged.last.bias, (models[0].last.bias + models[1].last.bias) / 8)


@pytest.mark.parametrize(
    ("make", "layer"),
    [(lambda seed: net("residual", seed), "norm"), (lambda seed: lively(LayerNormed(), seed), "norm")],
)
def test_bias_calibration_refuses_normalization_layers(make, layer: str) -> None:
    with pytest.raises(
        OptionError, match=rf"(?s)defined for networks without normalization.*layer   {layer}\n.*remedy"
    ):
        operate([Average(), CalibrateBiases()], [make(1), make(2)])


# Producers and the pipeline


def test_producers_say_which_layers_feed_a_batch_norm_and_which_end_the_network() -> None:
    model = net("residual")
    found = {p.path: p for p in find_producers(surgery.trace(model, images(2)), groups_of(model))}
    assert {path for path, p in found.items() if p.feeds_norm} == {
        *("stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.down.0")
    }
    assert {path for path, p in found.items() if p.is_output} == {"fc"}
    assert {path for path, p in found.items() if p.is_norm} == set(TARGETS["residual"])


class OwnNorm(nn.LayerNorm):
    """A norm layer that is traced through, as timm's are."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
def test_a_norm_layer_is_one_in_either_spelling(norm: type[nn.LayerNorm]) -> None:
    a, b = (nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    data = [torch.randn(64, 4)]
    graph = surgery.trace(a, data[0])
    found = find_producers(graph, surgery.find_groups(graph))
    assert [(p.weight, p.bias, p.dim, p.is_norm) for p in found] == [
        ("0.weight", "0.bias", 1, False), ("1.weight", "1.bias", 1, True), ("3.weight", "3.bias", 1, False)
    ]  # fmt: skip
    assert surgery.report_of(merged := surgery.merge(a, b, data=data, progress=False)).renormalize == ("repair",)
    plain = surgery.merge(a, b, example_inputs=data[0], progress=False)
    assert surgery.report_of(plain).renormalize == ()
    assert merged(data[0]).isfinite().all()


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
        return self.fc(x.mean((2, 3)))


def test_a_layer_used_twice_is_no_producer() -> None:
    model = lively(Shared())
    found = [p.path for p in find_producers(surgery.trace(model, images(2)), groups_of(model))]
    assert found == ["first", "fc"]


class Biases(nn.Module):
    """A layer whose bias is put together from parts, as for queries, keys and values; two that share one; others."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.one, self.two = (nn.Conv2d(i, 4, 1, bias=False) for i in (3, 4, 4))
        self.low, self.high, self.common = (nn.Parameter(torch.randn(size)) for size in (2, 2, 4))
        self.own, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.parts.weight, torch.cat((self.low, self.high))).relu()
        x = nn.functional.conv2d(x, self.one.weight, self.common).relu()
        x = nn.functional.conv2d(x, self.two.weight, self.common).relu()
        return self.fc(self.own(x).relu().mean((2, 3)))


@pytest.mark.parametrize("step", ["repair", "rescale", "regress", "closed-form-repair", "bias-removal"])
def test_layers_whose_bias_is_not_theirs_alone_are_no_producers(step: str) -> None:
    a, b = (lively(Biases(), seed) for seed in (1, 2))
    found = [p.path for p in find_producers(surgery.trace(a, images(2)), groups_of(a))]
    assert found == ["own", "fc"]
    merged = surgery.merge(a, b, data=images(64), renormalize=step, matching="weights", progress=False)
    plain = surgery.merge(a, b, data=images(64), renormalize=None, matching="weights", progress=False)
    changed = {n for n, t in plain.state_dict().items() if not torch.equal(t, merged.state_dict()[n])}
    assert changed or step == "bias-removal"  # which finds by trying that none is best
    assert changed <= {"own.weight", "own.bias", "fc.weight", "fc.bias"}


class Called(nn.Linear):
    """A linear layer whose forward is traced through."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


@pytest.mark.parametrize("step", ["repair", "reshift", "rescale", "regress", "closed-form-repair"])
def test_a_call_without_bias_is_scaled_and_not_shifted(step: str) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), Called(432, 6, bias=False), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)
        )

    a, b = (lively(network(), seed) for seed in (1, 2))
    options = {"data": images(64), "matching": "weights", "progress": False}
    merged = surgery.merge(a, b, renormalize=step, **options)
    assert list(merged.state_dict()) == list(a.state_dict())
    plain = surgery.merge(a, b, renormalize=None, **options)
    changed = {n for n, t in plain.state_dict().items() if not torch.equal(t, merged.state_dict()[n])}
    assert ("1.weight" in changed) == (step == "rescale") and changed & {"3.weight", "3.bias"}


class Rename(Pass):
    """Leaves a note."""

    name = "note"

    def __init__(self, note: str) -> None:
        self.note = note

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        assert not torch.is_grad_enabled()
        context.notes.append(self.note)
        return graph_module


def test_the_observer_sees_every_step_between_its_neighbours() -> None:
    graph_module = surgery.trace(net("chain"), images(2))
    context = Context(groups_of(net("chain")), [], [], [], lambda: None)  # type: ignore[arg-type,return-value]
    first, second = Rename("one"), Rename("two")
    seen: list[tuple[Pass | None, Pass | None, int]] = []
    pipeline = Pipeline((first, second), lambda before, module, after: seen.append((before, after, len(context.notes))))
    assert pipeline.run(graph_module, context) is graph_module
    assert seen == [(None, first, 0), (first, second, 1), (second, None, 2)]
    assert context.notes == ["one", "two"]
    assert Pipeline(()).run(graph_module, context) is graph_module


def test_a_pipeline_refuses_an_invalid_graph() -> None:
    class Break(Rename):
        def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
            nodes = list(graph_module.graph.nodes)
            nodes[1].append(nodes[0])  # the input now comes after its first use
            return graph_module

    with pytest.raises(SurgeryError, match=r"(?s)pass 'note' left an invalid graph.*before it has been defined"):
        operate([Break("")], [net("chain"), net("chain", 1)])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Pass().run(None, None), "Pass has no run method"),  # type: ignore[arg-type]
        (lambda: Renormalize().correct(None, None, None), "Renormalize does not say how to correct"),  # type: ignore[arg-type]
    ],
)
def test_unfinished_passes_say_what_is_missing(act, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        act()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_affine_module_scales_and_shifts_along_its_dim(dim: int) -> None:
    x = torch.randn(4, 4, 4)
    scale, shift = torch.arange(1.0, 5), torch.arange(4.0)
    found = Affine(scale, shift, dim)(x)
    assert close(found.movedim(dim, -1), x.movedim(dim, -1) * scale + shift)
    assert Affine(scale.double(), shift.double(), dim)(x).dtype == torch.float32


def test_repair_corrects_by_the_formula() -> None:
    moments = Moments(10, torch.tensor([1.0, 5.0]).double(), torch.tensor([40.0, 0.0]).double())
    mean, std = torch.tensor([3.0, 7.0]).double(), torch.tensor([1.0, 2.0]).double()
    scale, shift = Repair().correct(moments, mean, std)
    assert (scale.tolist(), shift.tolist()) == ([0.5, 1.0], [2.5, 2.0])  # the second unit is constant
    scale, shift = Rescale().correct(moments, mean, std)
    assert (scale.tolist(), shift.tolist()) == ([0.5, 1.0], [0.0, 0.0])
    scale, shift = Reshift().correct(moments, mean, std)
    assert (scale.tolist(), shift.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_permute_tensor_is_what_the_expectations_here_rest_on() -> None:
    a = net("chain", 1)
    groups = groups_of(a)
    orders = {"g0": Permutation((7, *range(7)))}
    found = permute_tensor("0.weight", a[0].weight, groups, orders)
    assert torch.equal(found[0], a[0].weight[7]) and not torch.equal(found, a[0].weight)

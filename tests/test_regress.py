"""Least-squares merging, and running graphs in lockstep: what they keep, what they gain, what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_nets import Grouped, LayerNormed, groups_of, images, lively, net, permuted, planted, state_of
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import relative_error
from vfsurgery.errors import DataError, OptionError
from vfsurgery.passes.regress import Regress
from vfsurgery.passes.ridge import Solution
from vfsurgery.stats.lockstep import Lockstep, live_bytes
from vfsurgery.stats.patches import Geometry, PatchMoments, PatchSums

DATA = [part.contiguous() for part in images(600).split(100)]
OPTIONS = {"data": DATA, "matching": "activations", "progress": False}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped"])
def test_a_source_merged_with_a_permuted_copy_of_itself_stays_what_it_is(name):
    """BatchNorm layers do change: they get the statistics of these very images, which RESET alone does not make up."""
    a, x = net(name), images(16, seed=9)
    pair = a, planted(a, groups_of(a))
    error = {
        way: relative_error((outputs(surgery.merge(*pair, renormalize=way, **OPTIONS), x),), (outputs(a, x),))
        for way in ("regress", "reset" if name in ("residual", "dense") else "reshift")
    }
    other = net(name, 1)
    assert error.pop("regress") < max(2e-2, *error.values())
    assert relative_error((outputs(other, x),), (outputs(a, x),)) > 0.2


@pytest.mark.parametrize(("name", "other"), [("chain", "rescale"), ("residual", "reset"), ("dense", "reset")])
def test_the_fitted_merge_is_nearer_to_the_mean_of_the_sources_outputs_than_one_with_unit_statistics_put_right(
    name, other
):
    a, b = net(name, 1), net(name, 2)
    x = images(200, seed=9)
    goal = (outputs(a, x) + outputs(b, x)) / 2
    missed = {
        way: float((outputs(surgery.merge(a, b, renormalize=way, **OPTIONS), x) - goal).var(0).sum())
        for way in ("regress", other)
    }
    assert missed["regress"] < 0.7 * missed[other], missed


def test_hidden_units_have_the_means_and_deviations_of_the_sources():
    a, b = net("chain", 1), net("chain", 2)
    groups = groups_of(a)
    found = surgery.match(a, b, data=DATA, progress=False)
    merged = surgery.merge(
        a, b, renormalize=Regress(images=600), data=DATA, matching=surgery.Given(found), progress=False
    )
    aligned = permuted(b, groups, found)
    x = torch.cat(DATA)
    for depth in (1, 3, 5):
        units = [_units(model, depth, x) for model in (merged, a, aligned)]
        assert torch.allclose(units[0].mean(1), (units[1].mean(1) + units[2].mean(1)) / 2, atol=0.05)
        assert torch.allclose(units[0].std(1), (units[1].std(1) + units[2].std(1)) / 2, rtol=0.1, atol=0.02)
    naive = surgery.merge(a, b, renormalize=None, **OPTIONS)
    assert not torch.allclose(_units(naive, 5, x).std(1), (units[1].std(1) + units[2].std(1)) / 2, rtol=0.1, atol=0.02)


def _units(model: nn.Module, depth: int, x: Tensor) -> Tensor:
    assert isinstance(model, nn.Sequential)
    return outputs(nn.Sequential(*list(model)[:depth]), x).movedim(1, 0).flatten(1)


def test_batch_norms_hold_the_statistics_of_the_merged_model_itself():
    merged = surgery.merge(net("residual", 1), net("residual", 2), renormalize=Regress(images=600), **OPTIONS)
    x = outputs(merged.stem, torch.cat(DATA))
    assert torch.allclose(merged.norm.running_mean, x.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(merged.norm.running_var, x.var((0, 2, 3)), rtol=1e-3)


def test_layers_that_are_no_dense_matrix_get_repaired_and_missing_biases_are_made():
    a, b = lively(Grouped(), 1), lively(Grouped(), 2)
    merged = surgery.merge(a, b, renormalize="regress", **OPTIONS)
    x, goal = images(200, seed=9), [outputs(model, images(200, seed=9)) for model in (a, b)]
    naive = surgery.merge(a, b, renormalize=None, **OPTIONS)
    misses = [float((outputs(model, x) - sum(goal) / 2).var(0).sum()) for model in (merged, naive)]
    assert misses[0] < misses[1]
    bare = [
        lively(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(600, 5)), s)
        for s in (1, 2)
    ]
    created = surgery.report_of(surgery.merge(*bare, renormalize="regress", **OPTIONS)).created_biases
    assert created == ("0.bias",)


def test_a_net_with_layer_norms_and_half_precision_and_three_sources():
    models = [lively(LayerNormed(), seed).to(torch.bfloat16) for seed in (1, 2, 3)]
    merged = surgery.merge(models, weights=(0.5, 0.3, 0.2), renormalize="regress", **OPTIONS)
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
    assert bool(torch.isfinite(outputs(merged, images(4, dtype=torch.bfloat16))).all())


def test_the_sources_stay_as_they_are_and_the_same_data_give_the_same_result():
    a, b = net("chain", 1), net("chain", 2)
    before = [state_of(model) for model in (a, b)]
    merged = [surgery.merge(a, b, renormalize="regress", **OPTIONS) for _ in range(2)]
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, tensor in merged[0].state_dict().items():
        assert torch.equal(tensor, merged[1].state_dict()[name])


def test_memory_limits_the_images_and_the_report_says_how_many_there_were():
    a, b = net("chain", 1), net("chain", 2)
    merged = surgery.merge(a, b, renormalize=Regress(images=250), **OPTIONS)
    assert "5 layers on 250 images" in "\n".join(surgery.report_of(merged).notes)
    few = surgery.merge(a, b, renormalize=Regress(memory=1e-3), **OPTIONS)
    (note,) = [note for note in surgery.report_of(few).notes if note.startswith("regress")]
    assert 2 <= int(note.split(" images")[0].split()[-1]) < 100


def test_one_image_is_too_few_and_a_model_without_layers_has_nothing_to_fit():
    a, b = net("chain", 1), net("chain", 2)
    with pytest.raises(DataError, match="regress needs at least two images"):
        surgery.merge(a, b, data=[images(1)], matching="weights", renormalize="regress", progress=False)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).mean((2, 3))

    with pytest.raises(OptionError, match="regress found no layer to fit"):
        surgery.merge(Scale(), Scale(), data=DATA, matching="identity", renormalize="regress", progress=False)


def moments_of(x: Tensor, z: Tensor) -> PatchMoments:
    """Moments of inputs and goals, ``(samples, columns)`` and ``(samples, units)``."""
    sums = PatchSums(Geometry(), [((len(x), x.shape[1], 1), (len(z), z.shape[1], 1))])
    sums.add(x[:, :, None], z.T[:, None], ((0, 1),))
    return sums.moments()


def linear_samples(columns: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what a linear layer makes of them, and other weights to start from."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, columns, generator=generator, dtype=torch.float64) + 2
    z = x @ torch.randn(columns, 3, generator=generator, dtype=torch.float64) + 1
    return x, z, torch.randn(3, columns, generator=generator, dtype=torch.float64)


def test_the_solution_is_that_of_ridge_regression_on_centred_samples():
    x, z, start = linear_samples()
    moments = moments_of(x, z)
    weight, bias, place = Solution(moments, moments).solve(start, None, [1e-9, 10.0])
    assert place == 0
    assert torch.allclose(x @ weight.T + bias, z, atol=1e-6)
    held, shift, _ = Solution(moments, moments).solve(start, None, [1e6])
    assert not torch.allclose(x @ held.T + shift, z, atol=0.1)
    direction = held / held.norm(dim=1, keepdim=True)
    assert torch.allclose(direction, start / start.norm(dim=1, keepdim=True), atol=1e-3)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_solution_meets_the_normal_equations(ridge):
    x, z, start = linear_samples()
    moments = moments_of(x, z)
    weight, bias, _ = Solution(moments, moments).solve(start, None, [ridge])
    spread = (z - z.mean(0)).std(0, correction=0)
    x = x - x.mean(0)
    start = start * (spread / (x @ start.T).std(0, correction=0))[:, None]
    unit = x.square().mean()
    covariance = x.T @ x / len(x)
    expected = torch.linalg.solve(
        covariance + ridge * unit * torch.eye(6, dtype=x.dtype),
        ((z - z.mean(0)).T @ x / len(x) + ridge * unit * start).T,
    ).T
    assert torch.allclose(weight, expected, rtol=1e-8)
    assert torch.allclose(bias, z.mean(0) - expected @ (linear_samples()[0].mean(0)), rtol=1e-8)


@pytest.mark.parametrize("first", range(6))
def test_the_best_ridge_is_found_from_wherever_the_search_starts(first):
    x, z, start = linear_samples(60)
    generator = torch.Generator().manual_seed(1)
    z = z + 20 * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    ridges = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]
    parts = moments_of(x[:100], z[:100]), moments_of(x[100:], z[100:])
    _, _, place = Solution(*parts).solve(start, None, ridges, first)
    residual = x[100:] - x[100:].mean(0), z[100:] - z[100:].mean(0)
    errors = []
    for ridge in ridges:
        weight, _, _ = Solution(*parts).solve(start, None, [ridge])
        errors.append(float((((residual[0] @ weight.T - residual[1]) / z[:100].std(0, correction=0)) ** 2).sum()))
    assert place == errors.index(min(errors)) and 0 < place < 5


def test_inputs_that_never_vary_keep_their_weights_and_cost_no_accuracy():
    x, z, start = linear_samples()
    constant = torch.cat([x, torch.full((400, 2), 7.0, dtype=x.dtype)], 1)
    wider = torch.cat([start, torch.ones(3, 2, dtype=x.dtype)], 1)
    moments, more = moments_of(x, z), moments_of(constant, z)
    ridges = [0.04]
    weight, bias, _ = Solution(moments, moments).solve(start, None, ridges)
    found, shift, _ = Solution(more, more).solve(wider, None, [ridges[0] * 8 / 6])  # its unit is the mean variance
    assert torch.allclose(found[:, :6], weight)
    assert torch.allclose(constant @ found.T + shift, x @ weight.T + bias)
    assert torch.allclose(found[:, 6:] / found[:, 6:7], torch.ones(3, 2, dtype=x.dtype))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
        nn.Linear(12, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("least", [20_000, 300])
def test_a_layer_is_fitted_to_what_it_computes_whichever_outputs_are_looked_at(layer, least, monkeypatch):
    """A goal that the layer can meet is met: inputs and goals are read in the same places."""
    monkeypatch.setattr("vfsurgery.passes.regress.LEAST_SAMPLES", least)
    monkeypatch.setattr("vfsurgery.passes.regress.IMAGES_AT_A_PLACE", 10)
    sources = [lively(nn.Sequential(copy.deepcopy(layer)), seed) for seed in (1, 2)]
    merged = surgery.merge(*sources, data=DATA, matching="identity", renormalize=Regress(ridge=1e-7), progress=False)
    x = images(8, seed=4)
    goal = (outputs(sources[0], x) + outputs(sources[1], x)) / 2
    assert torch.allclose(outputs(merged, x), goal, atol=1e-3)
    assert not torch.allclose(outputs(sources[0], x), goal, atol=1e-3)


def test_a_graph_in_lockstep_computes_what_the_model_does_and_forgets_what_is_done():
    model = net("residual")
    graph = surgery.trace(model, images(2))
    batches = [images(4, seed=1), images(3, seed=2)]
    run = Lockstep(graph, batches)
    with torch.no_grad():
        last = run.run_through("fc")
        for value, batch in zip(run.of(last), batches, strict=True):
            assert torch.allclose(value, model(batch), atol=1e-5)
    assert set(run.values[0]) == {last}


def test_a_layer_changed_before_its_turn_changes_what_comes_after():
    model = copy.deepcopy(net("chain"))
    run = Lockstep(surgery.trace(model, images(2)), [images(4)])
    with torch.no_grad():
        run.run_before("_8")
        model[8].weight.zero_()
        model[8].bias.fill_(3.0)
        node = run.run_through("_8")
        assert bool((next(run.of(node)) == 3.0).all())


def test_the_values_alive_at_once_are_counted_per_image():
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    assert live_bytes(surgery.trace(model, torch.randn(2, 4))) == 4 * 200

"""Moments and correlations are exact however the samples are split, and one pass over the data gathers them all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_nets import groups_of, images, net
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.stats.collect import Observer, Site, group_sites, survey
from vfsurgery.stats.correlation import Centred, CrossMoments
from vfsurgery.stats.moments import Moments, weighted_goal
from vfsurgery.stats.precision import image_dtype

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Error of means and variances relative to the largest one; half precision is computed in float32."""

ABSOLUTE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Error of correlations."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return float((found - expected).abs().max()) <= RELATIVE[dtype] * float(expected.abs().max())


def samples(dtype: torch.dtype = torch.float64, offset: float = 0.0, units: int = 5, count: int = 60) -> Tensor:
    """Samples of units with means, spreads and a trend of their own, so that parts differ from the whole."""
    spread = torch.arange(1.0, units + 1, dtype=torch.float64)[:, None]
    trend = torch.linspace(-3, 3, count, dtype=torch.float64)
    return (torch.randn(units, count, dtype=torch.float64) * spread + trend + offset).to(dtype)


def random_parts(whole: Tensor, seed: int) -> list[Tensor]:
    """The samples cut at random places, in random order."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, whole.shape[1]), size=rng.integers(1, 6), replace=False))
    parts = list(torch.tensor_split(whole, cuts.tolist(), dim=1))
    return [parts[index] for index in rng.permutation(len(parts))]


def is_right(found: Moments, whole: Tensor, dtype: torch.dtype) -> bool:
    exact = whole.double()
    return (
        found.count == whole.shape[1]
        and found.mean.dtype == found.squares.dtype == torch.float64
        and close(found.mean, exact.mean(1), dtype)
        and close(found.var, exact.var(1, correction=0), dtype)
        and torch.equal(found.std, found.var.sqrt())
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_do_not_depend_on_how_samples_are_split(dtype: torch.dtype, offset: float, seed: int) -> None:
    whole = samples(dtype, offset)
    first, *rest = random_parts(whole, seed)
    merged = updated = reverse = Moments.of(first)
    for part in rest:
        merged, updated, reverse = merged.merge(Moments.of(part)), updated.update(part), Moments.of(part).merge(reverse)
    for found in (Moments.of(whole), merged, updated, reverse):
        assert is_right(found, whole, dtype)
    assert not is_right(Moments.of(first), whole, dtype)


def test_merging_counts_the_variation_between_parts() -> None:
    whole = samples()
    parts = whole.split(20, dim=1)
    mean_of_variances = torch.stack([Moments.of(part).var for part in parts]).mean(0)
    assert not close(mean_of_variances, whole.var(1, correction=0), torch.float64)


def test_merging_leaves_moments_as_they_are() -> None:
    x, y = Moments.of(samples()), Moments.of(samples())
    before = (x.mean.clone(), x.squares.clone(), y.mean.clone(), y.squares.clone())
    x.merge(y)
    assert all(torch.equal(*pair) for pair in zip(before, (x.mean, x.squares, y.mean, y.squares), strict=True))


@pytest.mark.parametrize("dim", [0, 1, 3, -1])
def test_moments_of_units_along_any_dim(dim: int) -> None:
    tensor = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    assert is_right(Moments.of(tensor, dim=dim), tensor.movedim(dim, 0).flatten(1), torch.float64)


@pytest.mark.parametrize("places", [[[0, 1], [2, 3], [4, 5]], [[4, 0], [1, 5], [2, 3]]])
def test_units_that_own_several_places_are_read_there(places: list[list[int]]) -> None:
    tensor = torch.randn(7, 6, 2, dtype=torch.float64) + torch.arange(6.0).view(1, 6, 1)
    rows = torch.stack([tensor[:, unit].flatten() for unit in places])
    assert is_right(Moments.of(tensor, torch.tensor(places), dim=1), rows, torch.float64)
    swapped = torch.tensor(places)[[1, 0, 2]]
    assert not is_right(Moments.of(tensor, swapped, dim=1), rows, torch.float64)


def test_moments_in_another_order() -> None:
    whole = samples()
    order = torch.tensor([3, 1, 4, 0, 2])
    assert is_right(Moments.of(whole).take(order), whole[order], torch.float64)
    assert not is_right(Moments.of(whole).take(order), whole, torch.float64)


def test_goals_average_standard_deviations_and_not_variances() -> None:
    x, y = samples(), 3 * samples()
    mean, std = weighted_goal([Moments.of(x), Moments.of(y)], [0.25, 0.75])
    sides = [x.std(1, correction=0), y.std(1, correction=0)]
    assert close(mean, 0.25 * x.mean(1) + 0.75 * y.mean(1), torch.float64)
    assert close(std, 0.25 * sides[0] + 0.75 * sides[1], torch.float64)
    assert not close(std, (0.25 * sides[0] ** 2 + 0.75 * sides[1] ** 2).sqrt(), torch.float64)


def cross(x: Tensor, y: Tensor) -> CrossMoments:
    return CrossMoments.of(Centred.of(x, None, 0), Centred.of(y, None, 0))


def correlates_right(found: CrossMoments, x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    with np.errstate(invalid="ignore"):  # numpy has no value for units that are constant; here they get 0
        both = np.nan_to_num(np.corrcoef(np.concatenate([x.double().numpy(), y.double().numpy()])))
    expected = torch.from_numpy(both[: len(x), len(x) :].copy())
    correlation = found.correlation()
    return correlation.dtype == torch.float64 and float((correlation - expected).abs().max()) <= ABSOLUTE[dtype]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_correlation_is_numpys_however_samples_are_split(dtype: torch.dtype, offset: float, seed: int) -> None:
    x = samples(dtype, offset)
    y = (samples(dtype, offset) + x.flip(0)).to(dtype)
    parts = list(zip(random_parts(x, seed), random_parts(y, seed), strict=True))
    merged = cross(*parts[0])
    for part in parts[1:]:
        merged = merged.merge(cross(*part))
    assert correlates_right(cross(x, y), x, y, dtype)
    assert correlates_right(merged, x, y, dtype)
    assert is_right(merged.a, x, dtype) and is_right(merged.b, y, dtype)
    assert not correlates_right(cross(*parts[0]), x, y, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_constant_units_correlate_with_nothing(value: float, dtype: torch.dtype) -> None:
    x, y = samples(dtype), samples(dtype)
    x[2] = value
    y[0] = value
    found = cross(x[:, :20], y[:, :20]).merge(cross(x[:, 20:], y[:, 20:])).correlation()
    assert not found[2].any() and not found[:, 0].any()
    assert found[[0, 1, 3, 4]][:, 1:].all()


def test_a_unit_correlates_fully_with_a_scaled_copy_of_itself() -> None:
    x = samples()
    diagonal = cross(x, -2 * x + 1).correlation().diagonal()
    assert float((diagonal + 1).abs().max()) <= ABSOLUTE[torch.float64]


def test_centring_leaves_the_activations_alone() -> None:
    x = samples(torch.float32, 5.0)
    before = x.clone()
    centred = Centred.of(x, None, 0)
    assert torch.equal(x, before)
    assert float(centred.samples.mean(1).abs().max()) <= RELATIVE[torch.float32] * float(x.abs().max())


def test_cross_moments_of_units_that_own_several_places() -> None:
    x, y = torch.randn(7, 6, 2, dtype=torch.float64), torch.randn(7, 3, 4, dtype=torch.float64)
    places = torch.tensor([[4, 0], [1, 5], [2, 3]])
    found = CrossMoments.of(Centred.of(x, places, 1), Centred.of(y, None, 1))
    rows = torch.stack([x[:, unit].movedim(1, 0).flatten() for unit in places])
    # one unit's places lie one after the other, and so do the samples that they are paired with
    assert correlates_right(found, rows, y.movedim(1, 0).flatten(1), torch.float64)


def hooked(model: torch.nn.Module, paths: list[str], x: Tensor) -> dict[str, Tensor]:
    """What chosen modules put out, copied at once."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen.__setitem__(path, out.clone())
        )
        for path in paths
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_a_survey_finds_what_hooks_find() -> None:
    models = [net("chain", seed) for seed in range(3)]
    traces = [surgery.trace(model, images(2)) for model in models]
    units = {"conv": Site("_0", 1), "fc": Site("_8", 1)}
    pairs = {"relu": (Site("_3", 1),), "hidden": (Site("_9", 1), Site("_8", 1))}
    batches = list(images(48).split([20, 10, 18]))
    with torch.no_grad():
        found = survey(traces, batches, pairs, units)
    outputs = [hooked(model, ["0", "8", "3", "9"], torch.cat(batches)) for model in models]
    assert found.images == 48
    for moments, output in zip(found.moments, outputs, strict=True):
        assert set(moments) == {"conv", "fc"}
        assert is_right(moments["conv"], output["0"].movedim(1, 0).flatten(1), torch.float32)
        assert is_right(moments["fc"], output["8"].T, torch.float32)
        # the ReLU after this layer overwrites its output: what is read is what was there before
        assert not is_right(moments["conv"], output["0"].relu().movedim(1, 0).flatten(1), torch.float32)
    for correlations, output in zip(found.correlations, outputs[1:], strict=True):
        assert set(correlations) == {"relu", "hidden"}
        x, y = (seen["3"].movedim(1, 0).flatten(1) for seen in (outputs[0], output))
        (relu,), (hidden, before) = correlations["relu"], correlations["hidden"]
        assert correlates_right(relu, x, y, torch.float32)
        assert correlates_right(hidden, outputs[0]["9"].T, output["9"].T, torch.float32)
        assert correlates_right(before, outputs[0]["8"].T, output["8"].T, torch.float32)
        assert not correlates_right(relu, y.flip(0), x, torch.float32)


def test_every_source_runs_once_on_every_batch() -> None:
    models = [net("chain", seed) for seed in range(3)]
    traces = [surgery.trace(model, images(2)) for model in models]
    calls: Counter[tuple[int, str]] = Counter()
    for number, model in enumerate(models):
        for path in ("0", "8", "10"):
            model.get_submodule(path).register_forward_hook(
                lambda *_, key=(number, path): calls.update([key])  # type: ignore[misc]
            )
    groups = groups_of(models[0])
    calls.clear()
    pairs = group_sites(traces[0], groups, torch.device("cpu"))
    with torch.no_grad():
        survey(traces, images(30).split(8), pairs, {"conv": Site("_0", 1), "again": Site("_0", 1)})
    assert calls == {(number, path): 4 for number in range(3) for path in ("0", "8", "10")}


def test_groups_are_read_after_their_non_linearity() -> None:
    model = net("chain")
    sites = group_sites(surgery.trace(model, images(2)), groups_of(model), torch.device("cpu"))
    assert {name: [(site.node, site.dim, site.places) for site in found] for name, found in sites.items()} == {
        "g0": [("_1", 1, None)],
        "g1": [("_3", 1, None)],
        "g2": [("_5", 1, None)],
        "g3": [("_9", 1, None)],
    }


def test_a_group_without_a_non_linearity_is_read_once_at_its_largest_and_latest_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1))
    sites = group_sites(surgery.trace(model, images(2)), groups_of(model), torch.device("cpu"))
    assert {name: [site.node for site in found] for name, found in sites.items()} == {"g0": ["_1"]}


def test_a_residual_stream_is_read_where_it_begins_and_where_it_ends() -> None:
    model = net("residual")
    graph_module = surgery.trace(model, images(2))
    sites = group_sites(graph_module, groups_of(model), torch.device("cpu"))
    relus = [node.name for node in graph_module.graph.nodes if "relu" in node.name]
    # in graph order: stem, inside block 1, after block 1, inside block 2, after block 2
    read = [[relus.index(site.node) for site in sites[f"g{number}"]] for number in range(4)]
    assert read == [[0, 2], [1], [3], [4]]


def test_channels_inside_groups_are_read_block_by_block_and_whole_groups_nowhere_else() -> None:
    model = net("grouped")
    groups = groups_of(model)
    sites = group_sites(surgery.trace(model, images(2)), groups, torch.device("cpu"))
    assert {(group.name, group.outer, group.blocks) for group in groups if group.outer} == {
        ("g1", "g0", 2),
        ("g2", "g0", 2),
    }
    assert "g0" not in sites  # wherever a group shows, its channels do
    assert [(site.node, site.places) for name in ("g1", "g2") for site in sites[name]] == [
        ("relu", None),
        ("relu_1", None),
    ]


def test_a_watcher_may_replace_a_value() -> None:
    graph_module = surgery.trace(net("chain"), images(2))
    with torch.no_grad():
        plain = Observer(graph_module, {}).run(images(4))
        nothing = Observer(graph_module, {"_3": lambda value: None}).run(images(4))
        doubled = Observer(graph_module, {"_10": lambda value: 2 * value}).run(images(4))
    assert torch.equal(nothing, plain)
    assert torch.equal(doubled, 2 * plain) and plain.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_come_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    assert image_dtype(net("chain").to(dtype)) == dtype


def test_images_for_a_module_without_parameters_are_float32() -> None:
    assert image_dtype(torch.nn.ReLU()) == torch.float32

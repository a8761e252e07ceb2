"""Closed-form REPAIR, the options of REPAIR and its like, and units that are dead or constant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from test_passes import TARGETS, aligned, close, operate, pair, unit_statistics
from tiny_nets import groups_of, images, lively, net, permuted, planted, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import TOLERANCE
from vfsurgery.errors import OptionError
from vfsurgery.groups import random_permutations
from vfsurgery.passes import Average, ClosedFormRepair, Fold, Pass, RemoveBiases, Repair, Rescale, Reshift
from vfsurgery.passes.producers import find_producers, in_stages
from vfsurgery.passes.renormalize import Renormalize, above_rounding
from vfsurgery.stats.moments import Moments
from vfsurgery.stats.prefix import Prefix

EXACT = 1e-6
"""Relative error of float32 sums of a few terms."""

STATISTICS = TOLERANCE[torch.float32]
"""Relative error of unit statistics that went through all layers in float32."""

LOOSE = 10 * STATISTICS
"""What is clearly no rounding error."""


class Counted:
    """Batches of images that count how often they were read to the end."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches, self.passes = list(batches), 0

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        self.passes += 1


def deviation(found: Tensor, goal: Tensor) -> float:
    """Largest difference relative to the largest goal."""
    return float((found - goal).abs().max() / goal.abs().max())


def goals(models: Sequence[nn.Module], paths: Sequence[str], x: Tensor, weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted means of the aligned sources' means and deviations, ``(2, units)`` by path."""
    each = [unit_statistics(model, paths, x) for model in models]
    return {
        path: sum(w * torch.stack(found[path]) for w, found in zip(weights, each, strict=True))  # type: ignore[misc]
        for path in paths
    }


# Sequential


@pytest.mark.parametrize("step", [Repair, Rescale, Reshift])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_sequential_corrections_meet_the_goals_over_all_batches(name: str, step: type[Repair]) -> None:
    a, b, orders = pair(name)
    x, weights, paths = images(48), (0.3, 0.7), TARGETS[name]
    expected = goals(aligned([a, b], orders), paths, x, weights)
    missed = []
    for sequential in (True, False):
        passes = [Average(), step(sequential=sequential), Fold()]
        merged, _, _ = operate(passes, [a, b], x.split(12), weights, orders)
        found = unit_statistics(merged, paths, x)
        sides = {"repair": (0, 1), "rescale": (1,), "reshift": (0,)}[step.name]
        missed.append(max(deviation(found[path][side], expected[path][side]) for path in paths for side in sides))
    assert missed[0] <= STATISTICS
    assert missed[1] > LOOSE  # batch by batch, later layers saw others than the final inputs


def test_sequential_reads_the_data_once_per_stage() -> None:
    a, b = net("chain", 1), net("chain", 2)
    for step, passes in ((Repair(), 1), (Repair(sequential=True), len(TARGETS["chain"]))):
        data = Counted(images(16).split(8))
        operate([Average(), step], [a, b], data)  # type: ignore[arg-type]
        assert data.passes == 1 + passes  # one over the sources


def test_layers_side_by_side_share_a_stage() -> None:
    model = net("residual")
    graph = surgery.trace(model, images(2))
    producers = [p for p in find_producers(graph, groups_of(model)) if p.is_norm]
    assert [[producer.path for producer in stage] for stage in in_stages(graph, producers)] == [
        *(["norm"], ["block1.bn1"], ["block1.bn2"], ["block2.bn1", "block2.down.1"], ["block2.bn2"])
    ]


def test_a_prefix_runs_up_to_the_last_watched_node() -> None:
    model = net("chain")
    ran: list[str] = []
    graph = surgery.trace(model, images(2))  # which leaves out hooks that look on
    for path in ("0", "2", "4", "8"):
        graph.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: ran.append(path))
    seen: list[Tensor] = []
    prefix = Prefix(graph, {"_0": lambda value: None, "_2": lambda value: seen.append(value.clone())})
    assert prefix.run(images(2)) is None
    assert ran == ["0", "2"]
    with torch.no_grad():
        assert torch.equal(seen[0], model[2](model[1](model[0](images(2)))))
    assert not prefix.env  # no activation outlives the run


# Closed form


def linear_net(seed: int) -> nn.Module:
    """Two linear layers with nothing between them, and a third as the output."""
    return lively(nn.Sequential(nn.Flatten(), nn.Linear(432, 9), nn.Linear(9, 7), nn.Linear(7, 5)), seed)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.2, 0.3, 0.5)])
def test_the_closed_form_is_repair_where_a_layer_reads_the_input(weights: tuple[float, ...]) -> None:
    models = [net("chain", seed) for seed in range(len(weights))]
    groups, x = groups_of(models[0]), images(32)
    orders = [{}, *(random_permutations(groups, torch.Generator().manual_seed(s)) for s in range(1, len(models)))]
    steps = (ClosedFormRepair(), Repair(sequential=True))
    found, expected = (operate([Average(), s, Fold()], models, x.split(8), weights, orders)[0] for s in steps)
    misaligned, _, _ = operate([Average(), steps[0], Fold()], models, x.split(8), weights)
    assert close(found[0].weight, expected[0].weight, STATISTICS)
    assert close(found[0].bias, expected[0].bias, STATISTICS)
    assert not close(found[2].weight, expected[2].weight, LOOSE)  # earlier layers lose what no formula sees
    assert not close(misaligned[0].weight, expected[0].weight, LOOSE)


def test_the_closed_form_is_repair_in_a_second_layer_whose_input_all_sources_share() -> None:
    a, b, other = linear_net(1), linear_net(2), linear_net(3)
    with torch.no_grad():
        b[1].weight.copy_(a[1].weight)
        b[1].bias.copy_(a[1].bias)
    x = images(64)
    for source, exact in ((b, True), (other, False)):
        merges = [
            operate([Average(), step, Fold()], [a, source], x.split(16))[0]
            for step in (ClosedFormRepair(), Repair(sequential=True))
        ]
        assert close(merges[0][2].weight, merges[1][2].weight, STATISTICS) == exact
        assert close(merges[0][2].bias, merges[1][2].bias, STATISTICS) == exact


def test_the_closed_form_is_the_papers_formula() -> None:
    a, b, orders = pair("chain")
    x, w = images(32), (0.3, 0.7)
    seen: list[Tensor] = []
    for model in aligned([a, b], orders):
        handle = model[2].register_forward_hook(
            lambda module, args, out: seen.append(out.double().movedim(1, 0).flatten(1))
        )
        with torch.no_grad():
            model(x)
        handle.remove()
    (mean_a, mean_b), (std_a, std_b) = ([s.mean(1) for s in seen], [s.std(1, correction=0) for s in seen])
    rho = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(*seen, strict=True)])
    merged_std = (
        (w[0] * std_a) ** 2 + (w[1] * std_b) ** 2 + 2 * w[0] * w[1] * rho * std_a * std_b
    ).sqrt()  # methods: sigma^
    scale = (w[0] * std_a + w[1] * std_b) / merged_std
    goal = w[0] * mean_a + w[1] * mean_b
    averaged, _, _ = operate([Average()], [a, b], None, w, orders)
    merged, _, context = operate([Average(), ClosedFormRepair(), Fold()], [a, b], x.split(8), w, orders)
    assert close(merged[2].weight, averaged[2].weight * scale.view(-1, 1, 1, 1), STATISTICS)
    assert close(merged[2].bias, averaged[2].bias * scale + goal - scale * goal, STATISTICS)
    assert float(rho.abs().max()) < 0.999
    assert context.notes == ["closed-form-repair: 4 layers"]


def test_the_closed_form_reads_the_data_once() -> None:
    data = Counted(images(16).split(8))
    operate([Average(), ClosedFormRepair(), Fold()], [net("chain", 1), net("chain", 2)], data)  # type: ignore[arg-type]
    assert data.passes == 1


@pytest.mark.parametrize("step", [ClosedFormRepair(), Repair(sequential=True), Repair(reference=0)])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_model_merged_with_itself_stays_itself(name: str, step: Pass) -> None:
    a = net(name, 1)
    groups = groups_of(a)
    b = planted(a, groups)
    truth = random_permutations(groups, torch.Generator().manual_seed(5))
    orders = [{}, {group: order.inverse() for group, order in truth.items()}]
    x = images(32)
    merged, _, _ = operate([Average(), step, Fold()], [a, b], x.split(16), orders=orders)
    misaligned, _, _ = operate([Average(), step, Fold()], [a, b], x.split(16))
    with torch.no_grad():
        if not isinstance(step, Repair) or step.sequential:
            assert close(merged(x), a(x), STATISTICS)
        else:  # each batch was normalized by itself
            assert close(merged(x), a(x), 0.2)
        assert not close(misaligned(x), a(x), 0.2)


# Options


@pytest.mark.parametrize("step", [Repair, Rescale, ClosedFormRepair])
def test_folding_changes_nothing_of_the_output(step: type[Repair]) -> None:
    a, b, orders = pair("chain")
    x = images(16)
    options = {"average": True, "factor": 1.5, "reference": 1}
    _, unfolded, _ = operate([Average(), step(**options)], [a, b], [x], orders=orders)
    merged, _, _ = operate([Average(), step(**options), Fold()], [a, b], [x], orders=orders)
    plain, _, _ = operate([Average(), step(), Fold()], [a, b], [x], orders=orders)
    with torch.no_grad():
        assert close(merged(x), unfolded(x), STATISTICS)
        assert not close(merged(x), plain(x), LOOSE)


@pytest.mark.parametrize(
    ("options", "source"), [({}, None), ({"factor": 2.0}, None), ({"reference": 0}, 0), ({"reference": 1}, 1)]
)
def test_goals_follow_the_options(options: dict[str, float], source: int | None) -> None:
    a, b, orders = pair("chain")
    x, weights, paths = images(32), (0.3, 0.7), TARGETS["chain"]
    merged, _, _ = operate([Average(), Repair(**options), Fold()], [a, b], [x], weights, orders)  # type: ignore[arg-type]
    found = unit_statistics(merged, paths, x)
    shares = weights if source is None else [float(number == source) for number in range(2)]
    expected = goals(aligned([a, b], orders), paths, x, shares)
    for path in paths:
        reached = torch.stack(found[path])
        assert deviation(reached, options.get("factor", 1) * expected[path]) <= STATISTICS
        if options:
            assert deviation(reached, goals(aligned([a, b], orders), paths, x, weights)[path]) > LOOSE


@pytest.mark.parametrize("step", [Repair, Rescale])
def test_an_average_goal_is_one_for_all_units_of_a_layer(step: type[Repair]) -> None:
    a, b, orders = pair("chain")
    x, paths = images(32), TARGETS["chain"]
    merged, _, _ = operate([Average(), step(average=True), Fold()], [a, b], [x], orders=orders)
    found, expected = unit_statistics(merged, paths, x), goals(aligned([a, b], orders), paths, x, (0.5, 0.5))
    for path in paths:
        mean, std = expected[path]
        assert deviation(found[path][1], std.mean().expand_as(std)) <= STATISTICS
        assert deviation(std, std.mean().expand_as(std)) > LOOSE
        if step is Repair:
            assert deviation(found[path][0], mean.sign() * mean.abs().mean()) <= STATISTICS


def test_the_factor_of_rescale_leaves_the_means_to_follow() -> None:
    a, b, orders = pair("chain")
    merges = [
        operate([Average(), Rescale(factor=factor), Fold()], [a, b], [images(16)], orders=orders)[0]
        for factor in (1.0, 3.0)
    ]
    assert close(merges[1][0].weight, 3 * merges[0][0].weight)
    assert close(merges[1][0].bias, 3 * merges[0][0].bias)
    means, deviations = zip(*(unit_statistics(model, ["2"], images(16))["2"] for model in merges), strict=True)
    assert close(deviations[1], 3 * deviations[0], STATISTICS)
    assert not close(means[1], 3 * means[0], LOOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.0}, r"factor must be a positive number but is 0\.0"),
        ({"factor": float("nan")}, "factor must be a positive number but is nan"),
        ({"reference": -1}, r"(?s)reference must be the number of a source but is -1.*0 is the first"),
    ],
)
def test_goals_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    for step in (Repair, Rescale, Reshift, ClosedFormRepair):
        with pytest.raises(OptionError, match=message):
            step(**options)  # type: ignore[arg-type]


def test_a_reference_that_is_no_source_is_refused() -> None:
    with pytest.raises(OptionError, match=r"(?s)repair has source 2 as its reference.*accepted  0 to 1"):
        operate([Average(), Repair(reference=2)], [net("chain", 1), net("chain", 2)], images(8))


def test_a_normalization_without_statistics_says_so() -> None:
    with pytest.raises(TypeError, match="Renormalize does not say how to find statistics"):
        Renormalize().statistics(None, None, [])  # type: ignore[arg-type]


def test_a_normalization_reads_weights_that_hold_what_the_one_before_corrected() -> None:
    a, b = net("chain", 1), net("chain", 2)
    x, paths = images(32), TARGETS["chain"]
    options = {"data": [x], "matching": "identity", "progress": False}
    merged = surgery.merge(a, b, renormalize=["rescale", "repair"], **options)
    alone = surgery.merge(a, b, renormalize="rescale", **options)
    expected = goals([a, b], paths, x, (0.5, 0.5))
    for model, reached in ((merged, True), (alone, False)):
        found = unit_statistics(model, paths, x)
        assert all((deviation(torch.stack(found[p]), expected[p]) <= STATISTICS) == reached for p in paths[1:])
    removed = surgery.merge(a, b, renormalize=["repair", RemoveBiases(layers=2)], **options)
    assert removed[4].bias.any() and not removed[8].bias.any() and not removed[10].bias.any()


# Dead and constant units

CORRECTIONS = [Repair(), Repair(sequential=True), Rescale(), ClosedFormRepair()]


def with_unit(seed: int, weight: float | Tensor, bias: float) -> nn.Module:
    """A chain whose fourth unit of the first layer has this weight and bias."""
    model = net("chain", seed)
    with torch.no_grad():
        model[0].weight[3] = weight
        model[0].bias[3] = bias
    return model


def all_finite(model: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("step", CORRECTIONS)
def test_a_unit_that_is_dead_in_one_source_gets_the_mean_of_nothing_and_the_others_deviation(step: Pass) -> None:
    a, b = with_unit(1, 0.0, -0.4), net("chain", 2)
    x = images(32)
    merged, _, _ = operate([Average(), step, Fold()], [a, b], [x])
    found, (mean, std) = unit_statistics(merged, ["0"], x)["0"], goals([a, b], ["0"], x, (0.5, 0.5))["0"]
    assert close(found[1], std, STATISTICS)
    assert close(std[3], unit_statistics(b, ["0"], x)["0"][1][3] / 2)
    assert isinstance(step, Rescale) or close(found[0], mean, STATISTICS)
    assert all_finite(merged)


@pytest.mark.parametrize("step", CORRECTIONS)
@pytest.mark.parametrize("bias", [-0.4, 1e4])
def test_a_unit_that_is_dead_in_both_sources_stays_dead(step: Pass, bias: float) -> None:
    a, b = with_unit(1, 0.0, bias), with_unit(2, 0.0, bias / 2)
    merged, _, _ = operate([Average(), step, Fold()], [a, b], images(32))
    assert not merged[0].weight[3].any()
    assert float(merged[0].bias[3].detach()) == pytest.approx(0.75 * bias)
    assert merged[0].weight[2].any() and all_finite(merged)


@pytest.mark.parametrize("step", CORRECTIONS)
def test_a_unit_that_is_dead_only_in_the_merge_is_not_blown_up(step: Pass) -> None:
    a, b = with_unit(1, 0.3, 0.7), with_unit(2, -0.3, 0.7)
    x = images(32)
    merged, _, _ = operate([Average(), step, Fold()], [a, b], [x])
    assert not merged[0].weight[3].any() and all_finite(merged)
    mean = goals([a, b], ["0"], x, (0.5, 0.5))["0"][0, 3]
    assert float(merged[0].bias[3].detach()) == pytest.approx(0.7 if isinstance(step, Rescale) else float(mean), 1e-5)


@pytest.mark.parametrize("step", CORRECTIONS)
@pytest.mark.parametrize(("left", "constant"), [(4e-4, True), (0.2, False)])
def test_a_unit_that_varies_no_more_than_its_large_mean_is_rounded_counts_as_constant(
    step: Pass, left: float, constant: bool
) -> None:
    weight = torch.randn(3, 3, 3) / 10
    a, b = with_unit(1, weight, 1e4), with_unit(2, -weight * (1 - left), 1e4)
    merged, _, _ = operate([Average(), step, Fold()], [a, b], images(32))
    scale = float((merged[0].weight[3].detach() / (left * weight / 2)).median())
    assert (scale == pytest.approx(1, abs=0.01)) == constant
    if not constant:
        assert scale == pytest.approx((2 - left) / left, rel=0.01)  # a true deviation is restored, however small
    assert all_finite(merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", CORRECTIONS)
def test_half_precision_models_get_statistics_in_full_precision(step: Pass, dtype: torch.dtype) -> None:
    models = [net("chain", seed).to(dtype) for seed in (1, 2)]
    x, eps = images(32).to(dtype), torch.finfo(dtype).eps
    with torch.no_grad():
        for model, sign in zip(models, (1, -1), strict=True):
            model[0].weight[3] = sign * torch.full((3, 3, 3), 0.3)
        models[1][0].weight[3].mul_(1 - eps)  # what is left of them in the merge is rounding
    merged, _, _ = operate([Average(), step, Fold()], models, [x])
    assert all(tensor.dtype == dtype for tensor in merged.state_dict().values()) and all_finite(merged)
    assert float(merged[0].weight[3].detach().abs().max()) <= 0.3 * eps
    paths = TARGETS["chain"][:1]
    found, expected = unit_statistics(merged, paths, x)["0"][1], goals(models, paths, x, (0.5, 0.5))["0"][1]
    assert close(found[[*range(3), *range(4, 8)]], expected[[*range(3), *range(4, 8)]], 2 * eps)


def test_moments_above_rounding_are_kept() -> None:
    moments = Moments(4, torch.tensor([0.0, 0.0, 1e4]).double(), torch.tensor([4.0, 4e-20, 4e-8]).double())
    found = above_rounding(moments, torch.ones(3).double(), torch.float32)
    assert found.squares.tolist() == [4.0, 0.0, 0.0]
    assert torch.equal(above_rounding(moments, torch.zeros(3).double(), torch.float64).squares, moments.squares)


def test_the_sources_stay_as_they_are() -> None:
    a, b, _ = pair("chain")
    before = [permuted(model, groups_of(a), {}).state_dict() for model in (a, b)]
    for step in ("bias-removal", "closed-form-repair"):
        merged = surgery.merge(a, b, data=[images(20)], renormalize=step, progress=False)
        assert not same_state(merged.state_dict(), before[0])
    assert all(same_state(model.state_dict(), state) for model, state in zip((a, b), before, strict=True))

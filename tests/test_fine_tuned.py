"""Merges of models that were fine-tuned from one checkpoint: by another method than the average, in place of it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_nets import images, net, planted, state_of
from torch import nn

import vfsurgery as surgery
from vfsurgery.combining import COMBINERS, TaskArithmetic, Ties, combine_states
from vfsurgery.combining.base import InMemory
from vfsurgery.combining.running import Combination, Listing
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.data import digits
from vfsurgery.errors import IncompatibleModelsError, InvalidWeightsError, OptionError
from vfsurgery.networks.demo import TinyResNet
from vfsurgery.passes.combine import Line
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.training import from_seed, train

NETS = ["chain", "residual", "grouped"]


def tuned(base: nn.Module, seed: int, spread: float = 0.1) -> nn.Module:
    """A copy whose parameters and running statistics have moved a little."""
    generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for tensor in canonical_state(moved).values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.mul_(1 + spread * noise.clamp(-3, 3))
    return moved


def family(name: str, count: int = 3) -> tuple[nn.Module, list[nn.Module]]:
    base = net(name, 1).double()
    return base, [tuned(base, seed) for seed in range(count)]


def combined(sources, base, combine="ties", **options) -> nn.Module:
    given = {"example_inputs": images(2, dtype=torch.float64), "renormalize": None, "progress": False}
    return surgery.merge(sources, base=base, combine=combine, **{**given, **options})


def same(mine: nn.Module | dict, theirs: nn.Module | dict, tolerance: float = 1e-12) -> bool:
    one, other = (each if isinstance(each, dict) else state_of(each) for each in (mine, theirs))
    return one.keys() == other.keys() and all(
        torch.allclose(one[key].double(), other[key].double(), rtol=tolerance, atol=tolerance) for key in one
    )


@pytest.mark.parametrize("name", NETS)
def test_task_arithmetic_of_scale_one_over_the_sources_is_their_mean(name):
    base, sources = family(name)
    mean = surgery.soup(sources, greedy=False, recalibrate=False, progress=False)
    assert same(combined(sources, base, "task-arithmetic", scale=1 / 3), mean)
    assert same(combined(sources, base, "mean"), mean)
    assert not same(combined(sources, base, "task-arithmetic", scale=0.5), mean)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["task-arithmetic", "wise-ft", Ties(density=1.0)], ids=str)
def test_one_source_at_scale_one_is_that_source(name, method):
    base, (source, *_) = family(name)
    assert same(combined([source], base, method, scale=1.0), source)
    assert not same(combined([source], base, method, scale=0.9), source)


@pytest.mark.parametrize("name", NETS)
def test_the_result_is_what_the_method_makes_of_the_state_dicts(name):
    base, sources = family(name)
    traits = traits_of_graph(surgery.trace(base, images(2, dtype=torch.float64)))
    expected = combine_states(
        [canonical_state(each) for each in sources], Ties(), base=canonical_state(base), traits=traits
    )
    found = canonical_state(combined(sources, base))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_sources_and_base_stay_as_they_are_and_the_result_is_of_their_class():
    base, sources = family("residual")
    before = [copy.deepcopy(each.state_dict()) for each in (base, *sources)]
    found = combined(sources, base)
    assert type(found) is type(base) and list(found.state_dict()) == list(base.state_dict())
    for model, state in zip((base, *sources), before, strict=True):
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    owned = {x.data_ptr() for model in (base, *sources) for x in model.state_dict().values()}
    assert owned.isdisjoint(x.data_ptr() for x in found.state_dict().values())


def test_running_statistics_are_no_part_of_task_vectors():
    base, sources = family("residual")
    found = state_of(combined(sources, base, "task-arithmetic", scale=5.0))
    for key in (key for key in found if "running" in key):
        assert torch.allclose(found[key], torch.stack([state_of(each)[key] for each in sources]).mean(0))
    away = state_of(combined(sources, base, "task-arithmetic", weights=[-9.0, 1.0, 1.0]))
    assert all((away[key] >= 0).all() for key in away if "running_var" in key)
    whole = {key: value for key, value in state_of(base).items() if "running_var" in key}
    far = [whole[key] - 9 * (state_of(sources[0])[key] - whole[key]) for key in whole]
    assert any((each < 0).any() for each in far)  # what the same sum would make of variances


def test_integers_are_those_of_the_base():
    base, sources = family("residual")
    for number, model in enumerate((base, *sources)):
        for key, tensor in canonical_state(model).items():
            if "num_batches" in key:
                tensor.fill_(7 + number)
    found = state_of(combined(sources, base))
    assert {int(found[key]) for key in found if "num_batches" in key} == {7}


def test_a_head_that_the_base_has_in_another_shape_is_the_mean_of_those_of_the_sources():
    base, sources = family("chain")
    last = [key for key in state_of(base) if key.startswith("11")] or [*state_of(base)][-2:]
    other = copy.deepcopy(base)
    layer = other[-1]
    other[-1] = nn.Linear(layer.in_features, layer.out_features + 3).double()
    found = state_of(combined(sources, other, "task-arithmetic", scale=2.0))
    for key in last:
        assert torch.allclose(found[key], torch.stack([state_of(each)[key] for each in sources]).mean(0))
    trunk = next(iter(found))
    expected = state_of(base)[trunk] + 2 * sum(state_of(each)[trunk] - state_of(base)[trunk] for each in sources)
    assert torch.allclose(found[trunk], expected)


def test_a_head_that_was_begun_anew_is_no_part_of_task_vectors():
    """``create_model(..., pretrained=True, num_classes=10)`` gives a base with a random head of the right shape."""
    base, sources = family("chain")
    with torch.no_grad():
        for tensor in base[-1].parameters():
            tensor.normal_(generator=torch.Generator().manual_seed(9))
    found = combined(sources, base, "task-arithmetic", scale=1.0)
    for key in ("weight", "bias"):
        mean = torch.stack([getattr(each[-1], key) for each in sources]).mean(0)
        assert torch.allclose(getattr(found[-1], key), mean)
    assert "10 was begun anew after the base" in str(surgery.report_of(found))
    near = combined(sources, family("chain")[0], "task-arithmetic", scale=1.0)
    assert "begun anew" not in str(surgery.report_of(near))
    assert not torch.allclose(near[-1].weight, torch.stack([each[-1].weight for each in sources]).mean(0))


def test_a_base_of_another_architecture_is_refused_with_the_tensor_that_shows_it():
    base, sources = family("chain")
    wide = copy.deepcopy(base)
    wide[0] = nn.Conv2d(3, 9, 3, padding=1).double()
    with pytest.raises(IncompatibleModelsError, match=r"differ in more than a head\n.*0\.weight\n.*\(9, 3, 3, 3\)"):
        combined(sources, wide)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_sources_in_other_orders_are_aligned_first(name, method):
    """Task vectors to the first source are those of models that were never permuted."""
    _, sources = family(name)
    straight = combined(sources, canonical_state(sources[0]), method)
    example = images(2, dtype=torch.float64)
    groups = surgery.find_groups(sources[0], example)
    shuffled = [sources[0], *(planted(each, groups, seed) for seed, each in enumerate(sources[1:]))]
    found = combined(shuffled, "first", method, matching="weights", symmetries="permutations")
    statistics = {key for key in state_of(found) if "running" in key}
    mine, theirs = ({k: v for k, v in state_of(m).items() if k not in statistics} for m in (found, straight))
    assert same(mine, theirs, 1e-9)
    assert not same(combined(shuffled, "first", method, matching="identity"), straight, 1e-3)


def test_without_a_base_it_is_the_mean_of_the_aligned_sources():
    _, sources = family("chain")
    found = combined(sources, None, "task-arithmetic", scale=1.0, matching="identity")
    assert same(found, surgery.soup(sources, greedy=False, recalibrate=False, progress=False), 1e-9)
    assert surgery.report_of(found).base == "the mean of the aligned sources"


def test_a_result_in_channels_last_is_the_same():
    base, sources = family("chain")
    sources[0] = sources[0].to(memory_format=torch.channels_last)
    straight = combined([copy.deepcopy(sources[0]).to(memory_format=torch.contiguous_format), *sources[1:]], base)
    assert same(combined(sources, base), straight)


def test_in_place_the_first_source_becomes_the_result():
    base, sources = family("residual")
    expected = combined(sources, base)
    places = {key: tensor.data_ptr() for key, tensor in sources[0].state_dict().items()}
    found = combined(sources, base, inplace=True)
    assert found is sources[0] and same(found, expected)
    assert places == {key: tensor.data_ptr() for key, tensor in found.state_dict().items()}


def test_half_precision_is_combined_in_float32():
    base, sources = family("chain")
    low = [copy.deepcopy(each).to(torch.bfloat16) for each in (base, *sources)]
    example = {"example_inputs": images(2, dtype=torch.bfloat16)}
    found = combined(low[1:], low[0], "task-arithmetic", scale=0.25, **example)
    expected = combined([each.float() for each in low[1:]], low[0].float(), "task-arithmetic", scale=0.25,
                        example_inputs=images(2))  # fmt: skip
    assert all(torch.equal(x, expected.to(torch.bfloat16).state_dict()[key]) for key, x in found.state_dict().items())


# The choice among methods and scales


def data(count: int = 400) -> torch.Tensor:
    return images(count, 3, dtype=torch.float64)


def test_several_scales_are_tried_and_the_nearest_to_the_sources_is_kept():
    base, sources = family("chain")
    found = combined(sources, base, TaskArithmetic(), scale=[-30.0, 1 / 3, 30.0], data=data())
    report = surgery.report_of(found)
    assert [trial.combine for trial in report.trials] == [f"task-arithmetic x{s}" for s in ("-30", "0.333333", "30")]
    assert report.combine == "task-arithmetic x0.333333" and [trial.kept for trial in report.trials] == [0, 1, 0]
    assert same(found, combined(sources, base, "mean"), 1e-9)


def test_several_scales_ask_a_method_once():
    base, sources = family("residual")
    asked: list[str] = []

    class Counting(Ties):
        def plan(self, problem):
            asked.append(str(self))
            return super().plan(problem)

    found = surgery.report_of(combined(sources, base, Counting(), scale=[0.4, 1.0, -0.7], data=data()))
    assert asked == ["ties x1", found.combine]  # and once more for the one that is kept, as it was asked for


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_scales_that_are_tried_are_what_the_method_gives_at_each(name):
    base, sources = family(name)
    states, start = [canonical_state(each) for each in sources], canonical_state(base)
    traits = traits_of_graph(surgery.trace(base, images(2, dtype=torch.float64)))
    shapes, dtypes = ({key: getattr(x, what) for key, x in start.items()} for what in ("shape", "dtype"))
    stores, line = [InMemory(state) for state in states], Line()
    for scale in (0.4, -0.7, 2.5):
        targets = {key: torch.zeros_like(x) for key, x in start.items()}
        listing = Listing(shapes, dtypes, traits)
        line.write(Combination(listing, stores, InMemory(start), Ties(scale=scale), (1.0,) * 3), [], targets)
        assert same(targets, combine_states(states, Ties(scale=scale), base=start, traits=traits))
        assert not same(targets, combine_states(states, Ties(scale=scale + 0.1), base=start, traits=traits))


def test_with_a_base_several_methods_are_tried_where_there_are_images():
    base, sources = family("residual")
    report = surgery.report_of(combined(sources, base, None, data=data(), renormalize="auto"))
    methods = {trial.combine.partition(" ")[0] for trial in report.trials}
    assert {"mean", "task-arithmetic", "ties"} <= methods
    assert {trial.renormalize for trial in report.trials} == {("reset",), ()}  # statistics anew only where it helps
    best = max(trial.agreement for trial in report.trials)
    assert next(trial.agreement for trial in report.trials if trial.kept) >= best - 0.1
    assert "nothing is renormalized" not in str(report)


def test_without_images_it_is_the_mean():
    base, sources = family("residual")
    found = combined(sources, base, None, renormalize="auto")
    assert same(found, combined(sources, base, "mean")) and surgery.report_of(found).combine == "mean x1"
    assert str(surgery.report_of(found)).splitlines()[1] == "  combined by mean x1, base the checkpoint that was given"


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "tie"}, "unknown combining method 'tie'\n.*did you mean 'ties'"),
        ({"combine": Ties}, "combine is no method but"),
        ({"combine": "ties", "matching": "weights"}, "matching='weights' and a base exclude each other"),
        ({"combine": "ties", "alpha": 0.3}, "alpha= is for the average"),
        ({"combine": "ties", "weights": [1.0]}, "one number for each of 3 sources"),
        ({"combine": "ties", "weights": {"0": [1, 1, 1]}}, "weights are one number for each source"),
        ({"combine": "ties", "weights": [1.0, 1.0, float("nan")]}, "one number for each of 3 sources"),
        ({"combine": "mean", "weights": [1.0, -1.0, 0.0]}, "sum other than zero"),
        ({"combine": "ties", "scale": [0.1, 0.2]}, "nothing to judge them by"),
        ({"combine": "ties", "scale": "big"}, "scale is one number or several, not 'big'"),
        ({"combine": "auto", "scale": 0.3}, "chooses a scale itself"),
        ({"combine": "wise-ft"}, "between one model and its base, and 3 models"),
        ({"combine": None, "base": None, "scale": 0.3}, "scale= is for combine="),
        ({"base": "frist"}, "unknown base 'frist'"),
    ],
)
def test_mistakes_are_named(options, message):
    base, sources = family("chain")
    with pytest.raises(OptionError, match=f"(?s){message}"):
        combined(sources, **{"base": base, **options})


def test_density_outside_of_its_range_is_refused():
    for density in (0.0, 1.1, -0.2):
        with pytest.raises(OptionError, match="density must lie in"):
            Ties(density=density)


def test_a_base_that_is_not_finite_is_refused():
    base, sources = family("chain")
    next(base.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(InvalidWeightsError, match="the base holds NaN"):
        combined(sources, base)


def test_one_source_without_a_base_is_refused():
    _, (source, *_) = family("chain")
    with pytest.raises(OptionError, match="at least two models"):
        combined([source], None)


def test_every_method_has_a_name_a_scale_and_a_source():
    for name in COMBINERS:
        method = COMBINERS[name]
        assert method.name == name and method.__doc__ and isinstance(method().scale, float)


# Images of each source


def test_each_source_judges_on_its_own_images():
    """Where tasks differ, the ensemble of all says nothing: each source is right on its own images alone."""
    base, sources = family("chain", 2)
    own = {number: images(300, 5 + number, dtype=torch.float64) + 3 * number for number in range(2)}
    report = surgery.report_of(combined(sources, base, "task-arithmetic", scale=[0.5, 40.0], data=own))
    assert report.trials[0].apart and report.trials[0].kept
    assert "agreement with each source on its own images" in str(report)
    # a model is judged by source 0 on images of source 0: source 0 alone agrees with itself there
    options = {"scale": [1.0, 40.0], "weights": [1.0, 0.0], "data": own}
    alone = surgery.report_of(combined(sources, base, "task-arithmetic", **options))
    by_source = [agreement(sources[0], each, own[number]) for number, each in enumerate(sources)]
    assert by_source[0] == 1.0 and by_source[1] < 1.0
    assert abs(alone.trials[0].agreement - (1 + by_source[1]) / 2) < 0.1


def agreement(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == other.eval()(x).argmax(1)).double().mean())


def test_statistics_are_of_the_images_of_all_sources_in_turn():
    base, sources = family("residual", 2)
    own = {0: images(100, 5, dtype=torch.float64), 1: images(100, 6, dtype=torch.float64) + 1}
    found = combined(sources, base, "mean", data=own, renormalize="reset")
    both = torch.stack([own[0], own[1]], 1).flatten(0, 1)
    expected = combined(sources, base, "mean", data=[both[:128], both[128:]], renormalize="reset")
    apart = combined(sources, base, "mean", data=own[0], renormalize="reset")
    assert same(found, expected, 0.1) and not same(found, apart, 0.1)


@pytest.mark.parametrize("numbers", [(0,), (0, 2), (0, 1, 2), ("a", "b"), ()])
def test_images_of_other_sources_than_there_are_are_refused(numbers):
    base, sources = family("chain", 2)
    with pytest.raises(OptionError, match="there are 2 sources"):
        combined(sources, base, data={number: images(8, dtype=torch.float64) for number in numbers})


# BatchNorm


def test_statistics_of_equal_sources_are_those_of_one():
    base, (source, *_) = family("residual")
    options = {"data": data(), "renormalize": "reset"}
    one = combined([source], base, "task-arithmetic", scale=1.0, **options)
    three = combined([copy.deepcopy(source) for _ in range(3)], base, "mean", **options)
    assert same(one, three, 1e-9)
    assert not same(combined([source], base, "task-arithmetic", scale=0.5, **options), three, 1e-3)


def test_statistics_measured_anew_leave_a_trained_network_as_good():
    """At scale 1 a single source comes back; what is measured anew are its statistics alone."""
    splits = digits()
    trained = train(from_seed(TinyResNet, 0), splits.train, epochs=3, lr=0.1, seed=0, progress=False)
    base = copy.deepcopy(trained)
    options = {"data": splits.train, "renormalize": "reset", "progress": False}
    found = surgery.merge(trained, base=base, combine="task-arithmetic", scale=1.0, **options)
    scores = [surgery.evaluate(each, splits.test, progress=False).accuracy for each in (trained, found)]
    assert abs(scores[0] - scores[1]) < 0.01 and scores[0] > 0.9
    norms = [[m.running_var for m in each.modules() if isinstance(m, nn.BatchNorm2d)] for each in (trained, found)]
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(*norms, strict=True))

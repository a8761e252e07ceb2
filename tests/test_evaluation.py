"""Scores are what sklearn computes on the whole set, barriers are what their formula says, and nothing is changed."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from vfsurgery.discovery.finding import find_groups
from vfsurgery.errors import CheckpointError, DataError, IncompatibleModelsError, OptionError
from vfsurgery.groups import permute_tensor, random_permutations
from vfsurgery.matching import Problem, WeightMatching
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.scoring.barriers import Barrier, Curve, barrier
from vfsurgery.scoring.evaluation import Score, compare, evaluate, evaluate_ensemble

CLASSES = 10
IMAGES = torch.randn(150, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(CLASSES, (150,), generator=torch.Generator().manual_seed(2))
EXAMPLE = IMAGES[:2]


def net(seed: int, factory: Callable[[], nn.Module] = TinyConvNet) -> nn.Module:
    torch.manual_seed(seed)
    return factory().eval()


def reference_score(logits: Tensor, labels: Tensor = LABELS) -> Score:
    """The score as sklearn computes it from all logits at once."""
    chances = logits.double().softmax(1).detach().numpy()
    loss = log_loss(labels.numpy(), chances, labels=range(CLASSES))
    return Score(accuracy_score(labels.numpy(), chances.argmax(1)), loss, len(labels))


def assert_scores_agree(found: Score, expected: Score) -> None:
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.count == expected.count


@pytest.mark.parametrize("batch_size", [3, 64, 150])
@pytest.mark.parametrize("factory", [TinyConvNet, TinyResNet])
def test_score_equals_sklearn_on_the_whole_set_for_any_batch_size(
    factory: Callable[[], nn.Module], batch_size: int
) -> None:
    model = net(0, factory)
    batches = list(zip(IMAGES.split(batch_size), LABELS.split(batch_size), strict=True))
    assert_scores_agree(evaluate(model, batches), reference_score(model(IMAGES)))


def test_a_model_is_right_on_its_own_answers_and_wrong_on_others() -> None:
    model = net(0)
    answers = model(IMAGES).argmax(1)
    assert evaluate(model, (IMAGES, answers)).accuracy == 1
    assert evaluate(model, (IMAGES, (answers + 1) % CLASSES)).accuracy == 0


def test_ensemble_is_the_weighted_mean_of_the_logits() -> None:
    a, b = net(0), net(1)
    mean = evaluate_ensemble([a, b], (IMAGES, LABELS))
    assert_scores_agree(mean, reference_score((a(IMAGES) + b(IMAGES)) / 2))
    weighted = evaluate_ensemble([a, b], (IMAGES, LABELS), weights=[0.9, 0.1])
    assert_scores_agree(weighted, reference_score(0.9 * a(IMAGES) + 0.1 * b(IMAGES)))
    assert weighted.loss != pytest.approx(mean.loss, rel=1e-5)


def test_ensemble_of_one_model_twice_is_the_model() -> None:
    model = net(0)
    assert_scores_agree(evaluate_ensemble([model, model], (IMAGES, LABELS)), evaluate(model, (IMAGES, LABELS)))


class Counted:
    """Batches that count how often they are read."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return zip(IMAGES.split(50), LABELS.split(50), strict=True)


def test_compare_gives_all_scores_in_one_pass() -> None:
    a, b, data = net(0), net(1), Counted()
    scores = compare({"a": a, "b": b}, data)
    assert data.passes == 1
    assert scores == {
        "a": evaluate(a, data),
        "b": evaluate(b, data),
        "ensemble": evaluate_ensemble([a, b], data),
    }


class Wrapped(nn.Module):
    """Returns its logits the way ``wrap`` packs them, as networks with auxiliary heads do."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net = net(0)
        self.wrap = wrap

    def forward(self, images: Tensor) -> object:
        return self.wrap(self.net(images))


Outputs = namedtuple("Outputs", "aux_logits logits")


@dataclass
class Result:
    """As libraries of language models return it."""

    loss: None
    logits: Tensor
    states: Tensor


WRAPS: dict[str, Callable[[Tensor], object]] = {
    "tuple": lambda logits: (logits, None),
    "list": lambda logits: [logits, -logits],
    "named tuple": lambda logits: Outputs(-logits, logits),
    "mapping": lambda logits: {"logits": logits},
    "mapping with others before": lambda logits: {"features": -logits[:, :1], "logits": logits},
    "mapping of another name": lambda logits: {"out": logits, "aux": -logits},
    "data class": lambda logits: Result(None, logits, -logits),
    "nested": lambda logits: ({"scores": [logits]}, -logits),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_the_logits_are_found_among_several_outputs(wrap: Callable[[Tensor], object]) -> None:
    assert evaluate(Wrapped(wrap), (IMAGES, LABELS)) == evaluate(net(0), (IMAGES, LABELS))


@pytest.mark.parametrize("wrap", [lambda logits: {}, lambda logits: logits[:, :, None], lambda logits: logits[:3]])
def test_a_model_without_logits_is_refused(wrap: Callable[[Tensor], object]) -> None:
    with pytest.raises(OptionError, match=r"Wrapped does not return logits\n  found .*\n  expected  \(128, classes\)"):
        evaluate(Wrapped(wrap), (IMAGES, LABELS))


def test_a_half_precision_model_is_scored_in_its_own_precision() -> None:
    model = net(0).to(torch.bfloat16)
    assert_scores_agree(evaluate(model, (IMAGES, LABELS)), reference_score(model(IMAGES.bfloat16()).float()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_elsewhere_is_copied_to_the_device_and_not_moved() -> None:
    model = net(0)
    score = evaluate(model, (IMAGES, LABELS), device="cuda")
    assert score.loss == pytest.approx(evaluate(model, (IMAGES, LABELS)).loss, rel=1e-3)
    assert not next(model.parameters()).is_cuda


def test_a_named_device_where_the_model_is_changes_nothing() -> None:
    assert evaluate(net(0), (IMAGES, LABELS), device="cpu") == evaluate(net(0), (IMAGES, LABELS))


def fingerprint(model: nn.Module) -> list[object]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return [[module.training for module in model.modules()], *(value.tolist() for value in state.values())]


FAILING = [(IMAGES[:100], LABELS[:100]), (IMAGES / 0, LABELS)]


@pytest.mark.parametrize("data", [[(IMAGES, LABELS)], FAILING], ids=["success", "error"])
def test_evaluation_leaves_models_modes_gradients_and_random_state_as_they_were(data: object) -> None:
    model = net(0, TinyResNet).train()
    model.bn.eval()
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)
    before, state = fingerprint(model), torch.get_rng_state()
    try:
        compare({"a": model}, loader)
    except DataError:
        assert data is FAILING
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert model(IMAGES).requires_grad


REFUSED = {
    "empty": ([], "the data is empty"),
    "unlabeled": (IMAGES, "batch 0 has no labels"),
    "label too large": (
        (IMAGES, LABELS + 2),
        r"\d+ of 150 labels are outside the model's 10 classes\n  expected  class indices from 0 to 9",
    ),
    "negative label": ((IMAGES, LABELS - 1), r"labels are outside the model's 10 classes"),
    "channels": (
        (IMAGES.expand(-1, 3, 8, 8), LABELS),
        r"the model cannot take these images\n  images  \(128, 3, 8, 8\)\n  cause .*channels",
    ),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_scored_is_refused(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(net(0), data)


@pytest.mark.parametrize(("count", "weights"), [(0, None), (2, [1.0]), (2, [0.5, 0.6]), (2, [])])
def test_weights_that_do_not_average_the_models_are_refused(count: int, weights: list[float] | None) -> None:
    with pytest.raises(OptionError, match=rf"weights .* do not average {count} models"):
        evaluate_ensemble([net(0)] * count, (IMAGES, LABELS), weights=weights)


def test_models_of_different_classes_have_no_ensemble() -> None:
    with pytest.raises(IncompatibleModelsError, match=r"different numbers of classes apart\n  classes  \[10, 7\]"):
        evaluate_ensemble([net(0), TinyConvNet(num_classes=7)], (IMAGES, LABELS))


def test_no_model_may_take_the_name_of_the_ensemble() -> None:
    with pytest.raises(OptionError, match="a model is named 'ensemble'"):
        compare({"ensemble": net(0)}, (IMAGES, LABELS))


def test_barriers_are_the_largest_distances_from_the_line_between_the_ends() -> None:
    curve = Curve(alphas=(0.0, 0.25, 0.5, 1.0), accuracy=(0.8, 0.5, 0.6, 0.4), loss=(1.0, 1.5, 2.5, 3.0))
    assert curve.accuracy_barrier == pytest.approx(0.75 * 0.8 + 0.25 * 0.4 - 0.5)
    assert curve.loss_barrier == pytest.approx(2.5 - (0.5 * 1.0 + 0.5 * 3.0))


def test_a_curve_on_the_good_side_of_its_line_has_no_barrier() -> None:
    curve = Curve(alphas=(0.0, 0.5, 1.0), accuracy=(0.5, 0.9, 0.5), loss=(1.0, 0.2, 1.0))
    assert (curve.accuracy_barrier, curve.loss_barrier) == (0, 0)


@pytest.mark.parametrize("place", [1, 2])
def test_a_loss_that_is_nan_makes_the_barrier_nan(place: int) -> None:
    loss = [1.0, 2.0, 3.0, 1.0]
    loss[place] = math.nan
    assert math.isnan(Curve((0.0, 0.4, 0.5, 1.0), (0.5,) * 4, tuple(loss)).loss_barrier)


def permuted(model: nn.Module, seed: int) -> nn.Module:
    """The same function with the units of every group in another order."""
    groups = find_groups(model, EXAMPLE)
    orders = random_permutations(groups, torch.Generator().manual_seed(seed))
    other = copy.deepcopy(model)
    state = {name: permute_tensor(name, value, groups, orders) for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    return other


def own_answers(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Data on which the model is always right."""
    return IMAGES, model(IMAGES).argmax(1)


def test_there_is_no_barrier_between_a_model_and_itself() -> None:
    model = net(0)
    found = barrier(model, copy.deepcopy(model), own_answers(model), alphas=5, matching="weights", renormalize=None)
    for curve in (found.naive, found.aligned):
        assert curve.accuracy == (1.0,) * 5
        assert curve.loss_barrier == pytest.approx(0, abs=1e-5)
    assert found.renormalized is None


def test_alignment_removes_the_barrier_to_a_permuted_copy_and_the_naive_average_has_one() -> None:
    model = net(0)
    found = barrier(model, permuted(model, 3), own_answers(model), alphas=3, matching="weights", renormalize=None)
    assert found.aligned.accuracy_barrier == 0
    assert found.aligned.loss_barrier == pytest.approx(0, abs=1e-5)
    assert found.naive.accuracy_barrier > 0.2


@pytest.mark.parametrize("factory", [TinyConvNet, TinyResNet])
def test_barrier_measures_every_curve_from_source_to_source(factory: Callable[[], nn.Module]) -> None:
    a, b, data = net(0, factory), net(1, factory), (IMAGES, LABELS)
    found = barrier(a, b, data, calibration=IMAGES[:64], alphas=(0, 0.5, 0.9, 1), progress=False)
    scores = compare({"a": a, "b": b}, data)
    assert (found.a, found.b, found.ensemble) == tuple(scores.values())
    assert list(found.curves) == ["naive", "aligned", "renormalized"]
    for curve in found.curves.values():
        assert curve.alphas == (0, 0.5, 0.9, 1)
        assert (curve.accuracy[0], curve.loss[0]) == (scores["a"].accuracy, scores["a"].loss)
        assert (curve.accuracy[-1], curve.loss[-1]) == (scores["b"].accuracy, scores["b"].loss)
    middles = {curve.loss[1] for curve in found.curves.values()}
    assert len(middles) == 3


def test_auto_is_chosen_once_at_the_midpoint(monkeypatch) -> None:
    from vfsurgery.scoring import barriers

    tried: list[object] = []
    merge = barriers.merge

    def counted(*models: nn.Module, **options: Any) -> nn.Module:
        tried.append(options["renormalize"])
        return merge(*models, **options)

    monkeypatch.setattr(barriers, "merge", counted)
    calibration = torch.cat([IMAGES] * (100 // len(IMAGES) + 1))
    barrier(net(0), net(1), (IMAGES, LABELS), calibration=calibration, alphas=(0, 0.3, 0.5, 1), progress=False)
    assert tried.count("auto") == 1
    assert sum(isinstance(choice, tuple) for choice in tried) == 1  # at 0.3; halfway lies what was chosen itself


def test_the_naive_curve_is_the_average_of_the_weights() -> None:
    a, b = net(0), net(1)
    found = barrier(a, b, (IMAGES, LABELS), alphas=(0, 0.3, 0.5, 1), matching="weights", renormalize=None)
    average = copy.deepcopy(a)
    average.load_state_dict({k: 0.7 * v + 0.3 * b.state_dict()[k] for k, v in a.state_dict().items()})
    expected = evaluate(average, (IMAGES, LABELS))
    assert found.naive.loss[1] == pytest.approx(expected.loss, rel=1e-6)
    assert found.naive.accuracy[1] == expected.accuracy


def test_barrier_matches_once_for_all_alphas(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    original = WeightMatching.match

    def counted(self: WeightMatching, problem: Problem) -> object:
        calls.append(problem)
        return original(self, problem)

    monkeypatch.setattr(WeightMatching, "match", counted)
    barrier(net(0), net(1), (IMAGES, LABELS), alphas=5, matching="weights", renormalize=None)
    assert len(calls) == 1


def test_barrier_leaves_the_sources_as_they_were() -> None:
    a, b = net(0, TinyResNet).train(), net(1, TinyResNet)
    before, state = [fingerprint(a), fingerprint(b)], torch.get_rng_state()
    barrier(a, b, (IMAGES, LABELS), calibration=IMAGES, alphas=3)
    assert [fingerprint(a), fingerprint(b)] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alphas", [0, 1, 2, 10, (), (0, 1), (0, 0.5), (1, 0.5, 0), (0, 0.5, 0.5, 1), (-1, 0, 0.5, 1)])
def test_alphas_that_miss_the_ends_or_the_midpoint_are_refused(alphas: int | tuple[float, ...]) -> None:
    with pytest.raises(
        OptionError, match=r"do not make a line from source a to source b\n  remedy  pass an odd number"
    ):
        barrier(net(0), net(1), (IMAGES, LABELS), alphas=alphas)


def example() -> Barrier:
    ends = Score(0.9, 0.5, 100), Score(0.7, 0.7, 100), Score(0.95, 0.4, 100)
    alphas = (0.0, 0.5, 1.0)
    curves = [Curve(alphas, (0.9, accuracy, 0.7), (0.5, loss, 0.7)) for accuracy, loss in ((0.1, 60.0), (0.4, 2.0))]
    return Barrier(*ends, *curves, renormalized=None)


def test_a_barrier_prints_one_line_per_alpha_and_the_barriers() -> None:
    lines = [line.split() for line in str(example()).splitlines()]
    assert ["ensemble", "95.00%,", "loss", "0.4000,", "100", "images"] in lines
    assert ["0.50", "10.00%", "60.0000", "40.00%", "2.0000"] in lines
    assert lines[-1] == ["barrier", "70.00%", "59.4000", "40.00%", "1.4000"]


def test_a_barrier_is_plain_json() -> None:
    found = json.loads(json.dumps(example().to_dict()))
    assert found["a"] == {"accuracy": 0.9, "loss": 0.5, "count": 100}
    assert found["curves"]["naive"]["accuracy"] == [0.9, 0.1, 0.7]
    assert found["curves"]["naive"]["accuracy_barrier"] == pytest.approx(0.7)
    assert list(found["curves"]) == ["naive", "aligned"]


def test_plot_writes_one_png_and_nothing_else(tmp_path: Path) -> None:
    path = example().plot(tmp_path / "deep" / "barrier.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


def test_plot_draws_losses_that_are_not_numbers(tmp_path: Path) -> None:
    found = example()
    broken = Curve(found.naive.alphas, found.naive.accuracy, (0.5, math.nan, 0.7))
    assert Barrier(found.a, found.b, found.ensemble, broken, broken, None).plot(tmp_path / "b.svg").exists()


def test_plot_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "barrier.png").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*barrier\.png"):
        example().plot(tmp_path / "barrier.png")
    assert [path.name for path in tmp_path.iterdir()] == ["barrier.png"]


def test_importing_evaluation_does_not_import_matplotlib_and_plotting_does_not_touch_pyplot(tmp_path: Path) -> None:
    script = f"""
import sys
from vfsurgery.scoring.barriers import Barrier, Curve
from vfsurgery.scoring.evaluation import Score
assert "matplotlib" not in sys.modules
score, curve = Score(0.5, 1.0, 2), Curve((0.0, 0.5, 1.0), (0.5,) * 3, (1.0,) * 3)
Barrier(score, score, score, curve, curve, None).plot({str(tmp_path / "b.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)

"""Imagined images in the place of data: asked for by a word, or unasked where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_nets import CLASSES, images, lively, net, same_state, state_of
from torch import nn

import vfsurgery as surgery
from vfsurgery.errors import DataError, ExampleInputError
from vfsurgery.stats.imagined import standing_in as module
from vfsurgery.stats.imagined.standing_in import stand_in

X = images(2)
NONE = "no real image was used"
QUIET: dict[str, Any] = {"example_inputs": X, "progress": False}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 120)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("images were imagined")

    monkeypatch.setattr(module, "imagine", refuse)


def pair(name: str = "residual") -> list[nn.Module]:
    return [net(name, seed) for seed in (1, 2)]


def notes(model: nn.Module) -> str:
    return str(surgery.report_of(model))


def test_a_merge_of_two_models_and_nothing_else_has_images() -> None:
    a, b = pair()
    before = [state_of(model) for model in (a, b)]
    random = torch.get_rng_state()
    merged = surgery.merge(a, b, **QUIET)
    assert NONE in notes(merged) and "120 imagined images of 3x12x12" in notes(merged)
    assert surgery.report_of(merged).trials  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(same_state(model.state_dict(), state) for model, state in zip((a, b), before, strict=True))
    again = surgery.merge(a, b, **QUIET)
    assert same_state(again.state_dict(), merged.state_dict())
    other = surgery.merge(a, b, seed=1, **QUIET)
    assert not same_state(other.state_dict(), merged.state_dict())


@pytest.mark.usefixtures("never")
def test_nothing_is_imagined_where_weights_do() -> None:
    a, b = pair()
    with pytest.warns(surgery.SurgeryWarning, match="BatchNorm"):
        alone = surgery.merge(a, b, imagine=False, **QUIET)
    assert NONE not in notes(alone) and surgery.report_of(alone).matching == "weights"  # type: ignore[attr-defined]
    surgery.merge(a, b, matching="weights", renormalize=None, **QUIET)
    surgery.merge(a, b, matching="identity", renormalize="closed-form-reset", **QUIET)
    surgery.match(a, b, matching="weights", **QUIET)
    surgery.merge(a, b, data=images(40), matching="weights", renormalize="reset", progress=False)
    with pytest.raises(DataError, match="needs data"):
        surgery.merge(a, b, matching="activations", imagine=False, **QUIET)


@pytest.mark.usefixtures("never")
def test_nothing_is_imagined_unasked_that_is_no_image_or_too_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (lively(nn.Sequential(nn.Flatten(), nn.Linear(432, 6), nn.ReLU(), nn.Linear(6, CLASSES)), s) for s in (1, 2))
    flat = surgery.merge(a, b, example_inputs=X.flatten(1), progress=False)
    assert surgery.report_of(flat).matching == "weights"  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "affordable_flops", lambda device: 1.0)
    dear = surgery.merge(a, b, **QUIET)
    assert surgery.report_of(dear).matching == "weights"  # type: ignore[attr-defined]


CALLS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "merge": lambda a, b: surgery.merge(a, b, data="imagined", matching="weights", renormalize="reset", **QUIET),
    "renormalize": lambda a, b: surgery.renormalize(surgery.prune(a, 0.5), reference=a, data="imagined", **QUIET),
    "renormalize, unasked": lambda a, b: surgery.renormalize(surgery.prune(a, 0.5), reference=a, **QUIET),
    "prune_units": lambda a, b: surgery.prune_units(a, 0.3, data="imagined", **QUIET),
    "run_passes": lambda a, b: surgery.run_passes(a, "reset", data="imagined", **QUIET),
}


@pytest.mark.parametrize("call", CALLS)
def test_everything_that_takes_images_takes_imagined_ones(call: str) -> None:
    a, b = pair()
    result = CALLS[call](a, b)
    assert bool(result(X).isfinite().all())
    if call in ("merge", "renormalize", "renormalize, unasked"):
        assert NONE in notes(result)


def test_models_that_name_their_size_need_no_example() -> None:
    a, b = pair()
    for model in (a, b):
        model.default_cfg = {"input_size": (3, 12, 12)}  # type: ignore[assignment]
    assert surgery.diagnose(a, b, "imagined", progress=False).layers
    sparse = surgery.prune(a, 0.5, method="wanda", data="imagined", progress=False)
    assert surgery.Masks.of(sparse).sparsity == pytest.approx(0.5, abs=0.02)
    found = surgery.match(a, b, data="imagined", matching="activations", progress=False)
    assert isinstance(found, dict) and found
    soup = surgery.soup([a, b], greedy=False, calibration="imagined", progress=False)
    assert bool(soup(X).isfinite().all())


def test_what_is_asked_for_and_cannot_be_is_refused() -> None:
    a, b = pair()
    with pytest.raises(ExampleInputError, match="does not say what input it takes"):
        surgery.merge(a, b, data="imagined", progress=False)
    with pytest.raises(DataError, match=r"data='photos/train' is no data\n.*'imagined'"):
        surgery.merge(a, b, data="photos/train", **QUIET)
    with pytest.raises(DataError, match="takes no images"):
        surgery.merge(a, b, data="imagined", example_inputs=X.flatten(1), progress=False)
    with pytest.raises(DataError, match="there are no labels"):
        surgery.soup([a, b], data="imagined", progress=False)


def test_data_is_left_alone() -> None:
    data = [images(8)]
    assert stand_in(pair(), data, X, unasked=True) is data
    assert stand_in(pair(), None, X) is None


def test_a_barrier_and_a_curve_use_one_set_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair("chain")
    made: list[int] = []
    original = module.imagine

    def counting(*args: Any, **options: Any) -> Any:
        made.append(1)
        return original(*args, **options)

    monkeypatch.setattr(module, "imagine", counting)
    labels = torch.arange(40) % CLASSES
    found = surgery.barrier(a, b, [(images(40), labels)], alphas=3, progress=False)
    assert len(made) == 1 and found.renormalized is not None
    surgery.preserve_curve(a, b, images(20), boundaries=[0, 2], progress=False)
    assert len(made) == 2

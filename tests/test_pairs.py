"""A slice of docs/benchmarks/pairs.py on really trained networks; the whole table takes that script."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import vfsurgery as surgery

pytestmark = [pytest.mark.pairs, pytest.mark.slow]
BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("pairs")


def test_alignment_and_rescale_bring_back_what_the_naive_average_of_a_norm_free_pair_loses(
    shared: Path, pairs: ModuleType
) -> None:
    a, b = pairs.load_pair(shared, "vgg11_half")
    images = pairs.load_images(shared, pairs.ROOT / "out" / "cache", calibration=1000, test=2000)
    options = {"data": images.calibration, "progress": False}
    naive = surgery.merge(a, b, matching="identity", renormalize=None, **options)
    rescaled = surgery.merge(a, b, matching="activations", renormalize="rescale", **options)
    scores = {name: surgery.evaluate(model, images.test) for name, model in (("a", a), ("naive", naive))}
    assert scores["a"].accuracy > 0.78
    assert scores["naive"].accuracy < 0.2
    assert surgery.evaluate(rescaled, images.test).accuracy > 0.65


def test_alignment_and_reset_bring_back_what_the_naive_average_of_a_residual_pair_loses(
    shared: Path, pairs: ModuleType
) -> None:
    a, b = pairs.load_pair(shared, "tv_resnet18")
    images = pairs.load_images(shared, pairs.ROOT / "out" / "cache", calibration=1000, test=2000)
    options = {"data": images.calibration, "progress": False}
    naive = surgery.merge(a, b, matching="identity", renormalize="reset", **options)
    aligned = surgery.merge(a, b, matching="activations", renormalize="reset", **options)
    assert surgery.evaluate(naive, images.test).accuracy < 0.45
    assert surgery.evaluate(aligned, images.test).accuracy > 0.6


def test_the_script_says_what_is_missing_and_stops(
    tmp_path: Path, pairs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs.main(["--shared", str(tmp_path / "nowhere")])
    assert "nowhere: nothing to measure. Name it with --shared." in capsys.readouterr().out

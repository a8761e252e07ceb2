"""How ``"auto"`` judges what it tried: by agreement with the ensemble, near-ties by cross-entropy to it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_nets import images, net
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.data import digits, progress
from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.holdout import every_for
from vfsurgery.hub.cards import Card, Network, Summary
from vfsurgery.hub.loading import Written
from vfsurgery.merging import choosing
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.passes.agreement import Judgement, best_of, judge
from vfsurgery.records.results import merge_report_of
from vfsurgery.training import from_seed, train

POINTS = 0.005


def judged(crossed: float, *misses: int, count: int = 100) -> Judgement:
    """One that agrees on all images but those, and is as sure everywhere."""
    hits = torch.ones(count, dtype=torch.float64)
    hits[list(misses)] = 0
    return Judgement(hits, torch.full((count,), crossed, dtype=torch.float64))


@pytest.mark.parametrize(
    ("judgements", "expected"),
    [
        ([judged(0.0827, count=59), judged(0.0288, count=59), judged(0.0454, count=59)], 1),  # all agree everywhere
        ([judged(0.5, 7), judged(0.6)], 0),  # one image is chance
        ([judged(0.5, 7, 8), judged(0.6)], 1),  # two of two are not
        ([judged(0.5, *range(10)), judged(0.6, *range(50, 58))], 0),  # two of 18 are
        ([judged(0.1, *range(50)), judged(2.0, *range(10))], 1),  # being sure of what is wrong helps nothing
        ([judged(0.3, 1), judged(0.3, 2)], 0),  # of equals the first
        ([judged(math.nan, 1), judged(0.3, 1)], 1),
        ([judged(math.nan, 1)], 0),
    ],
)
def test_agreement_decides_unless_chance_may_have_made_the_difference(judgements, expected):
    assert best_of(dict(enumerate(judgements))) == expected


@pytest.mark.parametrize(
    ("mapped", "reordered", "expected"),
    [
        (judged(0.3), judged(0.3), "reordered"),
        (judged(0.3), judged(0.3001), "reordered"),  # rounding, or as little
        (judged(0.3), judged(0.3, 7), "reordered"),  # one image is chance
        (judged(0.3), judged(0.31), "mapped"),
        (judged(0.3), judged(0.3, 7, 8), "mapped"),
    ],
)
def test_of_equals_one_that_is_certified_wins(mapped, reordered, expected):
    found = {"mapped": mapped, "reordered": reordered}
    assert best_of(found, unproven={"mapped"}) == expected
    assert best_of(found) == "mapped"
    assert best_of({"mapped": mapped}, unproven={"mapped"}) == "mapped"


@pytest.mark.parametrize(("ahead", "kept"), [(1e-5, "activations"), (0.1, "cca")])
def test_a_merge_by_maps_is_kept_only_where_it_is_better(monkeypatch, ahead, kept):
    """Of four ways only the one by CCA and REPAIR is ahead of the first."""
    verdicts = iter([judged(0.3), judged(0.5), judged(0.3 - ahead), *[judged(0.5)] * 9])
    monkeypatch.setattr(choosing, "judge", lambda *arguments: next(verdicts))
    data = [part.contiguous() for part in images(300).split(100)]
    merged = surgery.merge([net("chain", 1), net("chain", 2)], data=data, progress=False)
    report = merge_report_of(merged)
    assert report.matching == kept
    assert any(certificate.mapped for certificate in report.certificates) == (kept == "cca")


class Fixed(nn.Module):
    """Answers with the logits that it is given as images."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize("shape", [(40, 3), (40, 3, 2, 5)])
def test_both_numbers_are_means_over_images_and_places_to_the_weighted_ensemble(shape):
    batches = [part.contiguous() for part in torch.randn(*shape, dtype=torch.float64).split(16)]
    found = judge(Fixed(-0.5), [Fixed(1.0), Fixed(3.0)], (0.75, 0.25), batches)
    logits, ensemble = -0.5 * torch.cat(batches), 1.5 * torch.cat(batches)
    expected = nn.functional.cross_entropy(logits, ensemble.softmax(1))
    assert found is not None
    assert found.agreed.shape == (40,)
    assert found.cross_entropy == pytest.approx(float(expected))
    assert found.agreement == pytest.approx(float((logits.argmax(1) == ensemble.argmax(1)).double().mean()))


def test_classes_that_all_rule_out_do_not_spoil_the_cross_entropy():
    masked = torch.tensor([[1.0, -math.inf, 0.0], [0.5, -math.inf, 0.0]], dtype=torch.float64)
    found = judge(Fixed(), [Fixed()], (1.0,), [masked])
    assert found is not None and 0 < found.cross_entropy < 1
    broken = judge(Fixed(math.nan), [Fixed()], (1.0,), [masked])
    assert broken is not None and broken.cross_entropy == math.inf


def test_small_data_spares_more_images_but_never_too_many():
    for count in range(100, 1200, 7):
        every = every_for(Batches(torch.zeros(count, 1, 1, 1)))
        held_out = count // every
        assert every == 5 or held_out >= 200 or count - held_out >= 140


def test_a_way_that_was_let_go_and_proves_best_is_merged_again(monkeypatch):
    """b falls behind a by cross-entropy; c leaves a behind by agreement, and b is as good as c and surer."""
    a, b, c = judged(0.1, *range(10)), judged(0.2, *range(20, 27)), judged(0.3, *range(30, 35))
    assert [best_of(dict(enumerate(seen))) for seen in ([a], [a, b], [a, b, c])] == [0, 0, 1]
    verdicts = iter([a, b, c])
    monkeypatch.setattr(choosing, "judge", lambda *arguments: next(verdicts))
    models = net("chain", 1), net("chain", 2)
    data = [part.contiguous() for part in images(300).split(100)]
    options = {"data": data, "matching": "identity", "progress": False}
    found = surgery.merge(*models, **options)
    report = surgery.report_of(found)
    assert [trial.kept for trial in report.trials] == [False, True, False]
    assert report.renormalize == report.trials[1].renormalize == ("repair",)
    expected = surgery.merge(*models, renormalize="repair", **options)  # with all images, the held-out ones too
    for key, tensor in expected.state_dict().items():
        assert torch.allclose(tensor, found.state_dict()[key], rtol=1e-4, atol=1e-5), key


def best_and_chosen(
    a: nn.Module, b: nn.Module, calibration: Data, test: Data, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """The test accuracy of the best of all that ``"auto"`` tries, and of what it keeps."""
    tried: list[float] = []
    original: Callable[..., Judgement | None] = choosing.judge

    def recording(model: nn.Module, *arguments: object) -> Judgement | None:
        tried.append(surgery.evaluate(model, test, progress=False).accuracy)
        return original(model, *arguments)

    monkeypatch.setattr(choosing, "judge", recording)
    merged = surgery.merge(a, b, data=calibration, progress=False)
    assert len(tried) >= 2
    return max(tried), surgery.evaluate(merged, test, progress=False).accuracy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "seeds", "options"),
    [(TinyConvNet, (1, 2), {"epochs": 15, "lr": 0.03}), (TinyResNet, (0, 1), {"epochs": 12, "lr": 0.1})],
)
def test_the_choice_is_hardly_ever_behind_the_best_way_on_the_pairs_of_the_demo(build, seeds, options, monkeypatch):
    splits = digits(seed=0)
    a, b = (train(from_seed(build, seed), splits.train, seed=seed, progress=False, **options) for seed in seeds)
    best, chosen = best_and_chosen(a, b, splits.calibration, splits.test, monkeypatch)
    assert chosen >= best - POINTS


@pytest.mark.pairs
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vgg11_half", "tv_resnet18"])
def test_the_choice_is_hardly_ever_behind_the_best_way_on_trained_pairs(name, shared: Path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "docs" / "benchmarks")
    pairs = importlib.import_module("pairs")
    given = pairs.load_images(shared, pairs.ROOT / "out" / "cache", calibration=1000, test=2000)
    best, chosen = best_and_chosen(*pairs.load_pair(shared, name), given.calibration, given.test, monkeypatch)
    assert chosen >= best - POINTS


def test_both_numbers_stand_in_text_notebook_page_card_and_json(tmp_path):
    a, b = net("chain", 1), net("chain", 2)
    merged = surgery.merge(a, b, data=images(150), matching="identity", progress=False)
    report = merge_report_of(merged)
    page = surgery.diagnose(merged, [a, b], images(20), progress=False).page(tmp_path / "p.html", report=report)
    (tmp_path / "chain.safetensors").write_bytes(b"")
    network = Network(name="chain", written=Written(("chain.safetensors",), "mine:chain"), summary=Summary.of(report))
    card = Card(title="chain", summary="One.", networks=[network]).write(tmp_path).read_text()
    visible = {
        "text": str(report),
        "notebook": report._repr_html_().partition("the whole report")[0],
        "page": page.read_text().partition("The whole report")[0],
        "card": card.partition("The whole report")[0],
    }
    assert len(report.trials) == 3
    for trial, plain in zip(report.trials, json.loads(report.to_json())["trials"], strict=True):
        assert plain["agreement"] == trial.agreement and plain["cross_entropy"] == trial.cross_entropy
        assert plain["kept"] is trial.kept
        for where, text in visible.items():
            assert f"{trial.agreement:.2%}" in text and f"{trial.cross_entropy:.4f}" in text, where
    assert [text.count("kept") for text in visible.values()] == [1, 1, 1, 1]


def test_bars_name_the_way_that_is_tried(monkeypatch):
    shown: list[str] = []

    class Bar(progress.tqdm):
        def __init__(self, *arguments: object, **options: object) -> None:
            shown.append(str(options["desc"]))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(progress, "tqdm", Bar)
    surgery.merge(net("chain", 1), net("chain", 2), data=images(150), progress=False)
    regressions = {label for label in shown if label.endswith("+ regress: regression of the layers")}
    assert len(regressions) == 1  # behind the matcher that did best, and behind no other
    assert "trying 3 of 6: cca + repair: matching" in shown
    assert "trying 2 of 6: activations + repair: agreement with the ensemble" in shown
    shown.clear()
    surgery.merge(net("chain", 1), net("chain", 2), data=images(150), matching="identity", renormalize="repair",
                  progress=False)  # fmt: skip
    assert shown and not any("trying" in label for label in shown)

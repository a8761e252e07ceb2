"""Whatever is written, drawn or said of a file is measured on that file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import vfsurgery as surgery
from vfsurgery.checkpoints import load_into, load_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import OptionError
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.recipes.recipe import Recipe, RecipeRun
from vfsurgery.training import from_seed

IMAGES = torch.randn(150, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(10, (150,), generator=torch.Generator().manual_seed(2))

LAST = {
    "chosen": "{}",
    "nearer to a": "{matching: weights, renormalize: reset, alpha: 0.15}",
    "not renormalized": "{matching: weights, renormalize: none}",
}
"""The last way to merge, whose files are written."""


def pair(last: str) -> str:
    return f"""
name: pair
data: {{name: digits, seed: 0}}
threads: 1
sources: [{{model: "vfsurgery.networks.demo:TinyResNet", options: {{width: 4}}}}, {{}}]
stages:
  - train: {{epochs: 3, lr: 0.1}}
  - compare:
      ways:
        - first: {{merge: {{matching: weights, renormalize: reset}}}}
        - last: {{merge: {last}}}
      flips: true
  - barrier: {{alphas: 3}}
  - diagnose
"""


def accuracy_of(path: Path, model: nn.Module) -> float:
    """In percent, of the file, read anew and evaluated on the recipe's test images."""
    load_into(model, load_state_dict(path), path)
    return 100 * surgery.evaluate(model, digits(seed=0).test, progress=False).accuracy


def from_page(page: str, row: str) -> float:
    found = re.search(
        rf'<tr(?: class="own")?><td class="text">{row}(?: \(this network\))?</td><td[^>]*>([\d.]+)%</td>', page
    )
    assert found is not None
    return float(found[1])


def from_card(card: str, row: str) -> float:
    found = re.search(rf"^\| {row} \| ([\d.]+) \|", card, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("kind", LAST)
def test_page_card_plot_and_report_of_a_pair_have_the_figure_of_the_file(kind, tmp_path):
    alpha = 0.15 if kind == "nearer to a" else 0.5
    Recipe.from_yaml(pair(LAST[kind])).run(tmp_path, progress=False)
    expected = accuracy_of(tmp_path / "pair.safetensors", TinyResNet(width=4))
    steps = json.loads((tmp_path / "report.json").read_text())["runs"][0]["steps"]
    plain = {next(iter(step["stage"])): step["result"] for step in steps}
    assert 100 * plain["compare"]["scores"]["last"]["accuracy"] == pytest.approx(expected)
    card = (tmp_path / "README.md").read_text()
    assert from_card(card, "last") == pytest.approx(expected, abs=0.005)
    front = re.search(r"value: ([\d.]+)", card)
    assert front is not None and 100 * float(front[1]) == pytest.approx(expected)
    page = (tmp_path / "pair.html").read_text()
    assert from_page(page, "last") == pytest.approx(expected, abs=0.005)
    drawn = list(plain["barrier"]["curves"].values())[-1]
    share = plain["merge"]["weights"][1]
    assert share == alpha
    assert 100 * drawn["accuracy"][drawn["alphas"].index(share)] == pytest.approx(expected)
    wrong = 100 * sum(rates["new_wrong"] for rates in plain["compare"]["flips"]["rates"]) / 1000
    assert 100 - wrong == pytest.approx(expected)


def test_the_choice_of_a_pair_is_one_and_not_two(tmp_path, monkeypatch):
    """The plot goes by the matching and the steps that the file came to, not by a second choice."""
    from vfsurgery.scoring import barriers

    asked: list[object] = []
    original = barriers.merge

    def recording(*models: nn.Module, **options: object) -> nn.Module:
        asked.append((options["matching"], options["renormalize"]))
        return original(*models, **options)

    monkeypatch.setattr(barriers, "merge", recording)
    Recipe.from_yaml(pair(LAST["chosen"])).run(tmp_path, progress=False)
    assert asked and all("auto" not in choice for choice in asked)


def lines(merged: nn.Module, **options: object) -> surgery.Barrier:
    a, b = (from_seed(TinyConvNet, seed).eval() for seed in (1, 2))
    return surgery.barrier(a, b, (IMAGES, LABELS), alphas=3, through=merged, progress=False, **options)


@pytest.mark.parametrize(("alpha", "preserve"), [(0.5, 0), (0.3, 0), (0.0, 0), (0.3, 2)])
def test_a_line_goes_through_the_model_it_is_drawn_for(alpha, preserve):
    a, b = (from_seed(TinyConvNet, seed).eval() for seed in (1, 2))
    chosen = {"matching": "activations", "renormalize": "repair", "alpha": alpha, "preserve": preserve}
    merged = surgery.merge(a, b, data=IMAGES, progress=False, **chosen)
    own = surgery.evaluate(merged, (IMAGES, LABELS), progress=False)
    found = lines(merged, calibration=IMAGES).renormalized
    assert found is not None
    place = found.alphas.index(alpha)
    assert (found.accuracy[place], found.loss[place]) == (own.accuracy, own.loss)
    with torch.no_grad():
        [*merged.parameters()][-1].add_(
            torch.arange(10.0)
        )  # the point is measured on the very model, not on one made like it
    changed = lines(merged, calibration=IMAGES).renormalized
    assert changed is not None and changed.loss[place] != own.loss


def test_a_line_without_calibration_is_matched_as_the_model_was():
    a, b = (from_seed(TinyConvNet, seed).eval() for seed in (1, 2))
    merged = surgery.merge(a, b, data=IMAGES, matching="zipit", renormalize=None, progress=False)
    found = lines(merged)
    assert list(found.curves) == ["naive", "aligned"]
    assert found.aligned.loss[1] == surgery.evaluate(merged, (IMAGES, LABELS), progress=False).loss


def test_no_line_goes_through_models_of_other_origin():
    with pytest.raises(OptionError, match=r"was not made by merge\n  remedy  pass the very model that merge returned"):
        lines(TinyConvNet())
    a, b = (from_seed(TinyConvNet, seed).eval() for seed in (1, 2))
    layered = surgery.merge(a, b, example_inputs=IMAGES[:2], alpha=[0.2, 0.8], progress=False)
    with pytest.raises(OptionError, match="has shares by layer, and the line has one for all"):
        lines(layered)


STAGES = """
name: staged
data: {{name: digits, seed: 0}}
threads: 1
sources:
  - {{name: a, model: "vfsurgery.networks.demo:TinyConvNet", options: {{width: 4}}, seed: 1}}
  - {{name: b, model: "vfsurgery.networks.demo:TinyConvNet", options: {{width: 4}}, seed: 2}}
stages:
  - {{train: {{epochs: 4}}}}
  - {{merge: {{matching: weights, renormalize: [bias-calibration]}}}}
{stages}
"""


def staged(stages: str, folder: Path) -> RecipeRun:
    return Recipe.from_yaml(STAGES.format(stages=stages)).run(folder, progress=False)


def test_scores_of_a_network_that_was_changed_since_are_not_shown_beside_it(tmp_path):
    staged(
        "  - evaluate\n  - {export: before.safetensors}\n  - {apply: [{bias-removal: {layers: 3}}]}\n"
        "  - {diagnose: {page: after.html}}\n  - {export: after.safetensors}",
        tmp_path,
    )
    assert not re.search(r">merged( \(this network\))?</td>", (tmp_path / "after.html").read_text())
    before, after = (tmp_path / "README.md").read_text().split("## after.safetensors")
    own = accuracy_of(tmp_path / "before.safetensors", TinyConvNet(width=4))
    assert from_card(before, "merged") == pytest.approx(own, abs=0.005)
    assert "| a |" in after and "| merged |" not in after


def test_the_scores_of_the_last_evaluation_are_not_those_of_a_file_from_before(tmp_path):
    staged(
        "  - {export: before.safetensors}\n  - {apply: [{bias-removal: {layers: 3}}]}\n  - evaluate\n"
        "  - {diagnose: {page: after.html}}\n  - {export: after.safetensors}",
        tmp_path,
    )
    own = accuracy_of(tmp_path / "after.safetensors", TinyConvNet(width=4))
    assert from_page((tmp_path / "after.html").read_text(), "merged") == pytest.approx(own, abs=0.005)
    before, after = (tmp_path / "README.md").read_text().split("## after.safetensors")
    assert from_card(after, "merged") == pytest.approx(own, abs=0.005)
    assert "| a |" in before and "| merged |" not in before


def test_a_report_of_before_a_training_is_not_shown_as_of_the_trained_network(tmp_path):
    staged(
        "  - {train: {epochs: 2}}\n  - evaluate\n  - {diagnose: {page: after.html}}\n  - {export: [after.safetensors]}",
        tmp_path,
    )
    own = accuracy_of(tmp_path / "after.safetensors", TinyConvNet(width=4))
    page = (tmp_path / "after.html").read_text()
    assert from_page(page, "merged") == pytest.approx(own, abs=0.005)
    assert "merged by matching" not in page
    assert "then trained for 2 epochs, all that follows is of before" in (tmp_path / "README.md").read_text()


SWEEP = """
name: sweep
data: {name: digits, seed: 0}
threads: 1
sources: [{name: dense, model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}]
stages:
  - train: {epochs: 4}
  - compare:
      ways:
        - "magnitude {sparsity%}": {prune: {}}
        - "layer-wise {sparsity%}": {prune: {scope: layer}}
      grid: {prune.sparsity: [0.5, 0.8]}
      then: [renormalized: renormalize]
      columns: sparsity
      goes_on: gain
  - diagnose
"""


def test_page_card_and_report_of_a_sweep_have_the_figure_of_the_file(tmp_path):
    Recipe.from_yaml(SWEEP).run(tmp_path, progress=False)
    own = accuracy_of(tmp_path / "sweep.safetensors", TinyConvNet(width=4))
    steps = json.loads((tmp_path / "report.json").read_text())["runs"][0]["steps"]
    found = next(step["result"] for step in steps if "compare" in step["stage"])
    row = found["goes_on"]
    assert 100 * found["scores"][row]["accuracy"] == pytest.approx(own)
    assert from_page((tmp_path / "sweep.html").read_text(), row) == pytest.approx(own, abs=0.005)
    card = (tmp_path / "README.md").read_text()
    assert from_card(card, row) == pytest.approx(own, abs=0.005)
    front = re.search(r"value: ([\d.]+)", card)
    assert front is not None and 100 * float(front[1]) == pytest.approx(own)


def test_rows_of_a_comparison_are_not_those_of_the_network_that_was_changed_since(tmp_path):
    text = pair(LAST["not renormalized"]).replace("  - diagnose", "  - train: {epochs: 1}\n  - diagnose")
    Recipe.from_yaml(text).run(tmp_path, progress=False)
    page, card = (tmp_path / "pair.html").read_text(), (tmp_path / "README.md").read_text()
    assert ">first</td>" in page and not re.search(r">last( \(this network\))?</td>", page)
    assert "| first |" in card and "| last |" not in card and "| barrier naive |" not in card
    assert "value:" not in card

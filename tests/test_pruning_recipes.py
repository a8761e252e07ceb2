"""Recipes that prune: sweeps over sparsities, soups in phases, their tables, files and expectations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from vfsurgery import Masks, Recipe
from vfsurgery.checkpoints import load_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import RecipeError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.pruning.fisher import GradientPruner
from vfsurgery.recipes.recipe import RecipeRun
from vfsurgery.recipes.stages import comparing
from vfsurgery.scoring.evaluation import evaluate

ROOT = Path(__file__).resolve().parent.parent
RENEWED = " renormalized"

SWEEP = """
name: conv
data: {name: digits}
threads: 1
sources: [{name: dense, model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}]
stages:
  - train: {epochs: 3}
  - compare:
      ways:
        - "layer-wise {sparsity%}": {prune: {scope: layer}}
        - "wanda {sparsity%}": [prune: {method: wanda}]
      grid: {prune.sparsity: [0.6, 0.9]}
      then: [renormalized: renormalize]
      columns: sparsity
      goes_on: gain
      published: {layer-wise renormalized: [null, 12.5]}
      expect:
        - layer-wise 90% < dense
        - dense < layer-wise 90%
  - diagnose
reduced:
  stages.compare.grid: {prune.sparsity: [0.5]}
  stages.compare.published: {}
  stages.compare.expect: [layer-wise 50% < dense]
"""

SOUP = """
name: conv
data: {name: digits}
threads: 1
sources: [{model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 2}}]
stages:
  - train: {epochs: 1}
  - soup:
      sparsity: 0.75
      phases: 2
      copies: 2
      retraining: {epochs: 1}
      expect: ["0 < phase 2 soup", "a < 101"]
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RecipeRun:
    return Recipe.from_yaml(SWEEP).run(tmp_path_factory.mktemp("swept"), progress=False)


def test_a_sweep_has_every_network_before_and_after_renormalization(swept: RecipeRun) -> None:
    found = swept.findings[0].said("compare")
    rows = [f"{way} {share}%{then}" for way in ("layer-wise", "wanda") for share in (60, 90) for then in ("", RENEWED)]
    assert list(found.rows) == ["dense", *rows]
    assert len(set(found.rows.values())) > 3


def test_the_table_has_a_column_per_sparsity_and_what_is_published_below(swept: RecipeRun) -> None:
    lines = str(swept).splitlines()
    header, dense, pruned, renormalized, published, *_ = lines[lines.index("  2 compare") + 1 :]
    assert header.split() == ["60%", "90%"]
    assert dense.split()[0] == "dense" and pruned.split()[0] == "layer-wise"
    scores = swept.findings[0].said("compare").rows
    assert [float(cell) for cell in pruned.split()[1:]] == [scores[f"layer-wise {share}%"] for share in (60, 90)]
    assert renormalized.split()[:2] == ["layer-wise", "renormalized"]
    assert published.split() == ["layer-wise", "renormalized,", "published", "12.50"]


def test_pruning_is_scored_once_for_all_sparsities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    original = comparing.prune_each

    def each(model: nn.Module, sparsities: list[float], **options: Any) -> Iterator[nn.Module]:
        asked.append([*sparsities])
        return original(model, sparsities, **options)

    monkeypatch.setattr(comparing, "prune_each", each)
    together = Recipe.from_yaml(SWEEP).run(tmp_path / "together", progress=False).findings[0].said("compare")
    assert asked == [[0.6, 0.9], [0.6, 0.9]]
    monkeypatch.setattr(comparing.Shared, "pruned", lambda *_: None)
    alone = Recipe.from_yaml(SWEEP).run(tmp_path / "alone", progress=False).findings[0].said("compare")
    assert together.scores == alone.scores


def test_one_of_two_opposite_expectations_fails_and_is_named(swept: RecipeRun) -> None:
    assert len(swept.failures) == 1
    assert str(swept.failures[0]).startswith("FAILS  ")


def test_the_files_are_those_of_the_cell_in_which_renormalization_brings_most(swept: RecipeRun) -> None:
    found = swept.findings[0].said("compare")
    gains = {
        row: figure - found.rows[row.removesuffix(RENEWED)] for row, figure in found.rows.items() if RENEWED in row
    }
    best = max(gains, key=lambda row: gains[row])
    assert found.goes_on == best and list(gains.values()).count(gains[best]) == 1
    model = TinyConvNet(width=4)
    model.load_state_dict(load_state_dict(swept.output / "conv.safetensors"))
    assert 100 * evaluate(model, digits().test, progress=False).accuracy == found.rows[best]
    share = int(best.split()[1].removesuffix("%")) / 100
    assert Masks.of(model).sparsity == pytest.approx(share, abs=0.01)
    page = (swept.output / "conv.html").read_text()
    verdict = swept.findings[0].said("diagnose").lines[0].removeprefix("dense: ")
    assert "Accuracy over sparsity" in page and verdict.split(":")[0] in page
    rows = re.findall(r'<td class="text">([^<]*%[^<]*)</td>', page)
    assert rows == [f"{best} (this network)", best.removesuffix(RENEWED)]  # of its own cell, and none of the others
    assert (swept.output / "conv_sweep.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((swept.output / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["conv"]


def test_a_sweep_goes_through_yaml_and_has_a_reduced_form() -> None:
    recipe = Recipe.from_yaml(SWEEP)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    full, reduced = recipe.stages[1], Recipe.from_yaml(SWEEP, reduced=True).stages[1]
    assert [row.label for row in reduced.rows][:2] == ["layer-wise 50%", f"layer-wise 50%{RENEWED}"]
    assert not reduced.published and reduced.ways == full.ways


def test_soups_come_with_their_mask(tmp_path: Path) -> None:
    run = Recipe.from_yaml(SOUP).run(tmp_path, progress=False)
    assert not run.failures
    names = ("pruned", "soup", "copy 0", "copy 1", "one copy")
    assert list(run.findings[0].said("soup").rows) == ["a", *(f"phase {n} {name}" for n in (1, 2) for name in names)]
    masks = Masks.load(tmp_path / "conv_masks.safetensors")
    model = TinyConvNet(width=2)
    model.load_state_dict(load_state_dict(tmp_path / "conv.safetensors"))
    assert Masks.of(model) == masks and masks.sparsity == pytest.approx(0.75, abs=0.01)
    assert Masks.of(TinyConvNet(width=2)) != masks
    again = Recipe.from_yaml(SOUP).run(tmp_path, progress=False, resume=True)
    assert [step.taken_over for step in again.findings[0].steps] == [True, True, False]
    assert Masks.load(tmp_path / "conv_masks.safetensors") == masks and not again.failures


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: wanda", "method: wonda", r"unknown pruner 'wonda'; did you mean 'wanda'\?"),
        ("method: wanda", "method: wanda, options: {sampels: 3}", r"pruner 'wanda' has no option 'sampels'"),
        ("[0.6, 0.9]", "[0.6, 1.0]", r"in \[0, 1\) but is 1.0\n  remedy .*\n  at +stages\[1\].compare.ways\[0\]"),
        ("grid: {prune.", "grid: {prone.", "prone.sparsity leads nowhere: there is no single 'prone'"),
        ("grid: {prune.sparsity: [0.6, 0.9]}\n      ", "", "unknown axis 'sparsity'"),
        ("[null, 12.5]", "[12.5]", "published 'layer-wise renormalized' has 1 values for 2 of sparsity"),
        (
            "layer-wise renormalized: [",
            "layerwise renormalized: [",
            "unknown curve 'layerwise renormalized'; did you mean",
        ),
        ("- layer-wise 90% < dense", "- layer-wise 91% < dense", "unknown row 'layer-wise 91%'; did you mean"),
        ('"wanda {', '"layer-wise {', "two entries have the row name 'layer-wise 60%'"),
        (
            "then: [renormalized: renormalize]",
            "then: [renormalized: evaluate]",
            "evaluate looks at networks and makes none",
        ),
        ("[prune: {method: wanda}]", "[renormalize, prune: {}]", "renormalize stands behind prune"),
        ("columns: sparsity", "columns: alpha", "unknown axis 'alpha'; accepted: sparsity"),
        ("reduced:\n  stages.compare.grid", "reduced:\n  stages.compar.grid", "there is no single 'compar'"),
    ],
)
def test_a_wrong_sweep_is_explained(old: str, new: str, message: str) -> None:
    assert old in SWEEP
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(SWEEP.replace(old, new))


PRUNING = sorted((ROOT / "recipes/pruning").glob("*.yaml"))


@pytest.mark.parametrize("path", PRUNING, ids=lambda path: path.stem)
def test_recipes_on_digits_ask_for_no_more_gradients_than_there_are_images(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    recipe = Recipe.from_yaml(path, reduced=True) if recipe.reduced else recipe
    pruners = [part for stage in recipe.steps for part in stage.parts()]
    assert pruners
    asked = [pruner.samples * pruner.batch for pruner in pruners if isinstance(pruner, GradientPruner)]
    assert recipe.data.name != "digits" or max(asked, default=0) <= len(digits(seed=recipe.data.seed).calibration)

"""Recipes that prune: sweeps over sparsities, soups in phases, their tables, files and expectations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfsurgery import Masks, Recipe
from vfsurgery.checkpoints import load_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import RecipeError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.pruning.fisher import GradientPruner
from vfsurgery.recipes.experiments import SweepFinding
from vfsurgery.recipes.recipe import RecipeRun

ROOT = Path(__file__).resolve().parent.parent

SWEEP = """
name: tiny
threads: 1
sweeps:
  - name: conv
    model: vfsurgery.networks.demo:TinyConvNet
    options: {width: 4}
    training: {epochs: 3}
    sparsities: [0.6, 0.9]
    methods:
      - {label: layer-wise, method: magnitude, scope: layer}
      - {method: wanda}
    published: {layer-wise renormalized: [null, 12.5]}
    expect:
      - layer-wise 90% < dense
      - dense < layer-wise 90%
reduced:
  sweeps:
    - {name: conv, sparsities: [0.5], expect: [layer-wise 50% < dense]}
"""

SOUP = """
name: soup
threads: 1
soups:
  - name: conv
    model: vfsurgery.networks.demo:TinyConvNet
    options: {width: 2}
    training: {epochs: 1}
    sparsity: 0.75
    phases: 2
    copies: 2
    retraining: {epochs: 1}
    expect: ["0 < phase 2 soup"]
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RecipeRun:
    return Recipe.from_yaml(SWEEP).run(tmp_path_factory.mktemp("swept"), progress=False)


def test_a_sweep_has_every_network_before_and_after_renormalization(swept: RecipeRun) -> None:
    (found,) = swept.findings
    assert isinstance(found, SweepFinding)
    assert set(found.measured()) == set(swept.recipe.sweeps[0].rows)
    assert list(found.sweep.curves) == ["layer-wise", "wanda"]
    assert [cell.sparsity for cell in found.sweep.curves["wanda"]] == [0.6, 0.9]


def test_the_table_has_a_column_per_sparsity_and_what_is_published_below(swept: RecipeRun) -> None:
    header, dense, pruned, renormalized, published, *_ = str(swept).splitlines()[1:]
    assert header.split() == ["60%", "90%"]
    assert dense.split()[0] == "dense" and pruned.split()[0] == "layer-wise"
    assert renormalized.split()[:2] == ["layer-wise", "renormalized"]
    assert published.split() == ["layer-wise", "renormalized,", "published", "12.50"]


def test_one_of_two_opposite_expectations_fails_and_is_named(swept: RecipeRun) -> None:
    assert len(swept.failures) == 1
    assert str(swept.failures[0]).startswith("FAILS  ")


def test_the_files_are_those_of_the_cell_in_which_renormalization_brings_most(swept: RecipeRun) -> None:
    (found,) = swept.findings
    assert isinstance(found, SweepFinding)
    cells = [cell for cells in found.sweep.curves.values() for cell in cells]
    assert max(cell.gain for cell in cells) == next(
        cell.gain
        for cell in found.sweep.curves[found.sweep.example.method]
        if cell.sparsity == found.sweep.example.sparsity
    )
    model = TinyConvNet(width=4)
    model.load_state_dict(load_state_dict(swept.output / "conv.safetensors"))
    assert Masks.of(model).sparsity == pytest.approx(found.sweep.example.sparsity, abs=0.01)
    page = (swept.output / "conv.html").read_text()
    assert "Accuracy over sparsity" in page and found.sweep.example.after.verdict.split(":")[0] in page
    assert (swept.output / "conv_sweep.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((swept.output / "report.json").read_text())
    assert [sweep["name"] for sweep in report["sweeps"]] == ["conv"] and report["pairs"] == []


def test_a_sweep_goes_through_yaml_and_has_a_reduced_form() -> None:
    recipe = Recipe.from_yaml(SWEEP)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    reduced = recipe.in_reduced_form().sweeps[0]
    assert reduced.sparsities == (0.5,) and not reduced.published
    assert reduced.methods == recipe.sweeps[0].methods


def test_soups_come_with_their_mask(tmp_path: Path) -> None:
    run = Recipe.from_yaml(SOUP).run(tmp_path, progress=False)
    assert not run.failures
    assert set(run.findings[0].measured()) == set(run.recipe.soups[0].rows)
    masks = Masks.load(tmp_path / "conv_masks.safetensors")
    model = TinyConvNet(width=2)
    model.load_state_dict(load_state_dict(tmp_path / "conv.safetensors"))
    assert Masks.of(model) == masks and masks.sparsity == pytest.approx(0.75, abs=0.01)
    assert Masks.of(TinyConvNet(width=2)) != masks


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: wanda", "method: wonda", r"unknown pruner 'wonda'; did you mean 'wanda'\?"),
        ("method: wanda", "method: wanda, options: {sampels: 3}", r"unknown option of wanda 'sampels'"),
        ("sparsities: [0.6, 0.9]", "sparsities: [0.9, 0.6]", "sparsities rise from one to the next"),
        ("sparsities: [0.6, 0.9]", "sparsities: [0.6, 1.0]", r"at +sweeps\[0\].sparsities\[1\]"),
        ("[null, 12.5]", "[12.5]", "published 'layer-wise renormalized' has 1 values for 2 sparsities"),
        ("layer-wise renormalized:", "layerwise renormalized:", "unknown curve 'layerwise renormalized'; did you mean"),
        ("- layer-wise 90% < dense", "- layer-wise 91% < dense", "unknown row 'layer-wise 91%'; did you mean"),
        ("- {method: wanda}", "- {method: magnitude, label: layer-wise}", "two entries have the method name"),
        ("    - {name: conv,", "    - {name: cone,", "unknown reduced sweep 'cone'; did you mean 'conv'"),
        ("training: {epochs: 3}", "trainings: {epochs: 3}", "unknown key 'trainings'"),
    ],
)
def test_a_wrong_sweep_is_explained(old: str, new: str, message: str) -> None:
    assert old in SWEEP
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(SWEEP.replace(old, new))


def test_a_recipe_without_experiments_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to do: a recipe has sources and stages, or pairs, sweeps or soups"):
        Recipe.from_yaml("name: nothing\n")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/pruning").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_pruning_are_valid_in_both_forms(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert recipe.sweeps or recipe.soups
    if recipe.reduced is not None:
        assert recipe.in_reduced_form().name == f"{recipe.name}-reduced"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/pruning").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_on_digits_ask_for_no_more_gradients_than_there_are_images(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    recipe = recipe.in_reduced_form() if recipe.reduced is not None else recipe
    pruners = [method.arguments()["method"] for sweep in recipe.sweeps for method in sweep.methods]
    asked = [pruner.samples * pruner.batch for pruner in pruners if isinstance(pruner, GradientPruner)]
    assert recipe.data.name != "digits" or max(asked, default=0) <= len(digits(seed=recipe.data.seed).calibration)

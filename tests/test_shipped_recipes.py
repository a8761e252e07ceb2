"""The recipes that take no more than a minute run, and what they expect of their tables holds."""

from pathlib import Path

import pytest

from vfsurgery import Recipe

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = ["digits", "stages", pytest.param("pruning/digits", marks=pytest.mark.thorough)]
QUICK_REDUCED = ["pruning/resnet20_cifar10", "pruning/vgg16_bn_cifar10"]


@pytest.mark.parametrize("name", QUICK)
def test_quick_recipes_run(name, tmp_path):
    run = Recipe.from_yaml(RECIPES / f"{name}.yaml").run(tmp_path, progress=False)
    assert run.outcomes() and run.failures == ()
    assert {"README.md", "report.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.thorough
@pytest.mark.parametrize("name", QUICK_REDUCED)
def test_reduced_recipes_run(name, tmp_path):
    run = Recipe.from_yaml(RECIPES / f"{name}.yaml", reduced=True).run(tmp_path, progress=False)
    assert run.outcomes() and run.failures == ()

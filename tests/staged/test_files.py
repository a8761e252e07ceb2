"""The plan of a recipe names every file that its run writes, and none else."""

import pytest

from vfsurgery.recipes.planning import plan
from vfsurgery.recipes.recipe import Recipe

MODEL = "vfsurgery.networks.demo:TinyConvNet"
RECIPES = {
    "pair": f"pairs: [{{name: p, model: '{MODEL}', alphas: 3, training: {{epochs: 1}}}}]",
    "sweep": f"sweeps: [{{name: s, model: '{MODEL}', sparsities: [0.5], training: {{epochs: 1}}}}]",
    "soup": f"soups: [{{name: s, model: '{MODEL}', phases: 1, copies: 2, training: {{epochs: 1}}, "
    "retraining: {epochs: 1}}]",
    "stages": f"sources: ['{MODEL}', {{}}]\nstages: [merge, diagnose, {{export: [m.safetensors, m.pt2]}}]",
    "stages of timm": "sources: [{model: 'timm:test_resnet', options: {in_chans: 1, num_classes: 10}}]\n"
    "stages: [{prune: {sparsity: 0.5}}]",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_plan_names_every_file(tmp_path, kind):
    recipe = Recipe.from_yaml(f"name: r\ndata: {{name: digits, size: 32}}\n{RECIPES[kind]}")
    recipe.run(tmp_path / "out", progress=False)
    written = {f"{path.name}/" if path.is_dir() else path.name for path in (tmp_path / "out").iterdir()}
    assert sorted(plan(recipe).writes) == sorted(written)

"""The plan of a recipe names every file that its run writes, and none else."""

import pytest

from vfsurgery.recipes.planning import plan
from vfsurgery.recipes.recipe import Recipe

MODEL = "vfsurgery.networks.demo:TinyConvNet"
TRAIN = "{train: {epochs: 1}}"
WAYS = "ways: [x: {merge: {matching: identity, renormalize: none}}]"
CUT = "ways: ['{sparsity}': {prune: {}}], grid: {prune.sparsity: [0.5]}, columns: sparsity"
RECIPES = {
    "pair": f"sources: ['{MODEL}', {{}}]\n"
    f"stages: [{TRAIN}, {{compare: {{{WAYS}}}}}, {{barrier: {{alphas: 3}}}}, diagnose]",
    "sweep": f"sources: ['{MODEL}']\nstages: [{TRAIN}, {{compare: {{{CUT}}}}}, diagnose]",
    "soup": f"sources: ['{MODEL}']\nstages: [{TRAIN}, {{soup: {{phases: 1, copies: 2, retraining: {{epochs: 1}}}}}}]",
    "files": f"sources: ['{MODEL}', {{}}]\nstages: [merge, diagnose, {{export: [m.safetensors, m.pt2]}}]",
    "preserved": f"sources: ['{MODEL}', {{}}]\nstages: [{{merge: {{preserve: 2}}}}]",
    "runs": f"runs: [{{name: p, sources: ['{MODEL}', {{}}], stages: [merge, diagnose]}}, "
    f"{{name: q, sources: ['{MODEL}', {{}}], stages: [fold]}}]",
    "of timm": "sources: [{model: 'timm:test_resnet', options: {in_chans: 1, num_classes: 10}}]\n"
    "stages: [{prune: {sparsity: 0.5}}]",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_plan_names_every_file(tmp_path, kind):
    recipe = Recipe.from_yaml(f"name: r\ndata: {{name: digits, size: 32}}\n{RECIPES[kind]}")
    recipe.run(tmp_path / "out", progress=False)
    written = {f"{path.name}/" if path.is_dir() else path.name for path in (tmp_path / "out").iterdir()}
    assert sorted(plan(recipe).writes) == sorted(written)

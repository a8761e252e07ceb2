"""Recipes with stages as text: read, refused with the line, written again, and described to editors."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest
import yaml
from small import RECIPE, ROOT, staged

import vfsurgery as surgery
from vfsurgery.errors import RecipeError

GRID = {"merge.alpha": [0.25, 0.5]}


@pytest.mark.parametrize(
    "stage",
    [
        "train",
        {"train": {"epochs": 3, "milestones": [1, 2]}},
        {"prune": {"sparsity": {"convs.0": 0.0, "*": 0.5}, "scope": "global"}},
        {"prune": {"pattern": "2:4", "method": "wanda"}},
        {"merge": {"renormalize": None}},
        {"merge": {"renormalize": [{"repair": {"factor": 0.9}}, "rescale"]}},
        {"merge": {"alpha": {"convs.*": [0.1, 0.9], "fc": 0.3}}},
        {"merge": {"weights": {"fc": [[0.5, 0.5], [1.0, 0.0]]}, "pins": ["fc"]}},
        {"merge": {"preserve": {"flops": 1.5}}},
        {"merge": {"matching": {"cca": {"gamma": 0.3}}}},
        {"fold": None},
        {"compare": {"ways": [{"x": "merge"}, {"y {alpha}": [{"merge": {"matching": "weights"}}]}], "grid": GRID}},
        {"compare": {"ways": [{"x": "merge"}], "published": {"x": 3, "ratio x": 0.5}, "expect": ["a < x < 99"]}},
        {"export": ["a.safetensors", "b.onnx"]},
        {"evaluate": {"data": "train", "expect": ["a < b"]}},
    ],
    ids=str,
)
def test_what_is_written_is_read_again(stage):
    recipe = surgery.Recipe.from_yaml(staged(stage))
    again = surgery.Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe) and again.to_yaml() == recipe.to_yaml()
    assert recipe != surgery.Recipe.from_yaml(RECIPE)


MERGE = {"merge": {}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["trian"], "unknown stage 'trian'; did you mean 'train'?"),
        ([{"train": {"epoch": 3}}], "unknown key 'epoch' at stages[0].train.epoch remedy did you mean 'epochs'?"),
        ([{"train": {}, "merge": {}}], "a stage is its name, or one key with its options"),
        (["apply"], "the stage 'apply' needs a value at stages[0].apply"),
        ([MERGE, "evaluate", MERGE], "there is one network left, and nothing to merge it with at stages[2].merge"),
        ([{"renormalize": "auto"}], "renormalize stands behind prune: else nothing says to what"),
        ([{"prune": {"sparsity": 0.5}}, {"renormalize": "none"}], "renormalize none changes nothing: leave it out"),
        (
            [MERGE, "evaluate", {"repair": {"factor": 0.9}}],
            "repair compares with the sources of a merge: write it into",
        ),
        ([{"apply": ["fold", "average"]}], "average compares with the sources of a merge"),
        (["diagnose"], "diagnose compares a network with what it was made from"),
        ([{"merge": {"matching": "weight"}}], "unknown matcher 'weight'; did you mean 'weights'?"),
        ([{"merge": {"matching": {"cca": {"gama": 1.0}}}}], "matcher 'cca' has no option 'gama'"),
        ([{"merge": {"alpha": 1.5}}], "alpha must lie in [0, 1] but is 1.5"),
        ([{"merge": {"alpha": "half"}}], "'half' is no share accepted numbers, lists of numbers along the depth, or"),
        ([{"merge": {"alpha": True}}], "True is no share"),
        ([{"merge": {"weights": "half"}}], "at stages[0].merge.weights"),
        ([{"merge": {"weights": [0.2, 0.3, 0.5]}}], "3 weights were given for 2 models at stages[0].merge"),
        (
            [{"merge": {"weights": 0.5}}],
            "weights are one number for each of 2 sources, not 0.5 at stages[0].merge.wei",
        ),
        ([{"merge": {"weights": {"fc": 0.5}}}], "weights are one number for each of 2 sources, not 0.5"),
        ([{"merge": {"weights": [[0.5, 0.5], 0.3]}}], "weights are one number for each of 2 sources, not 0.3"),
        ([{"merge": {"alpha": [0.5, [0.3]]}}], "[0.3] is no share"),
        ([{"merge": {"masks": "kept"}}], "unknown choice of masks 'kept'; did you mean 'keep'?"),
        ([{"merge": {"renormalize": ["repiar"]}}], "unknown renormalization 'repiar'; did you mean 'repair'?"),
        ([{"merge": {"renormalize": {"repair": {"factor": "x"}}}}], "pass 'repair': factor must be float but is 'x'"),
        ([{"apply": "fould"}], "unknown pass 'fould'; did you mean 'fold'?"),
        ([{"merge": {"preserve": -1}}], "write a number of layers, a module path, or a budget"),
        ([{"merge": {"preserve": {"flop": 2}}}], "unknown budget 'flop'; did you mean 'flops'?"),
        ([{"merge": {"preserve": {1: 2}}}], "unknown budget '1'"),
        ([{"merge": {"preserve": {}}}], "a budget says flops, params or both"),
        ([{"merge": {"preserve": ""}}], "write a number of layers, a module path, or a budget"),
        ([{"merge": {"preserve": {"flops": 0.5}}}], "max_flops=0.5 is no budget"),
        ([{"merge": {"preserve": 2}}, {"export": "x.safetensors"}], "write x.safetensors as .pt2 or .onnx"),
        ([{"export": "../x.onnx"}], "'../x.onnx' is no plain file name"),
        ([{"export": "x.pkl"}], "networks are written into files that end in .safetensors, .pt2, .onnx"),
        ([{"prune": {"method": "magnitude"}}], "write sparsity, as in 0.9, or pattern"),
        ([{"prune": {"sparsity": 9}}], "sparsity must be a number in [0, 1) but is 9"),
        ([{"prune": {"sparsity": {"fc": 1.0}}}], "sparsity for 'fc' must be a number in [0, 1) but is 1.0"),
        ([{"prune": {"sparsity": {}}}], "sparsity has no pattern"),
        ([{"merge": {"matching": {"cca": []}}}], "a matcher is written as its name, or as {name: {option: value}}"),
        ([{"prune": {"pattern": "4:2"}}], "pattern='4:2' is not N:M"),
        ([{"prune": {"pattern": "2:4", "scope": "layer"}}], "scope='layer' and pattern='2:4' exclude each other"),
        ([{"prune": {"sparsity": 0.5, "method": "wanda", "options": {"x": 3}}}], "pruner 'wanda' has no option 'x'"),
        ([{"prune": {"sparsity": 0.5, "options": {"block": 3}}}], "pruner 'magnitude' has no option 'block'"),
        ([MERGE, {"evaluate": {"expect": ["merge < a"]}}], "unknown row 'merge'; did you mean 'merged'?"),
        (
            [{"evaluate": {"expect": ["a within 2 of published"]}}],
            "nothing is published for 'a', so it can be in no band around it",
        ),
        ([{"evaluate": {"flips": True}}], "flips are counted between sources and what they were merged into"),
        ([{"export": "x.pt2"}, "train", {"export": "x.pt2"}], "x_a.pt2 would be written twice: give one of"),
        ([{"export": "x.pt2"}, MERGE, {"export": "x_b.pt2"}], "x_b.pt2 would be written twice: give one of"),
        ([{"prune": {"sparsity": 0.5}}, "diagnose", "diagnose"], "small_a.html would be written twice"),
        ([{"diagnose": {"page": "/tmp/x.html"}}], "String should match pattern"),
    ],
    ids=str,
)
def test_wrong_stages_are_explained(stages, message):
    with pytest.raises(RecipeError) as caught:
        surgery.Recipe.from_yaml(staged(*stages))
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": None}, "sources and stages come together"),
        ({"data": None}, "evaluate needs data at stages[0]"),
        ({"sources": ["timm:resnet18", {"name": "a"}]}, "two entries have the source name 'a'"),
        ({"sources": ["m:n", {"name": "merged"}]}, "no source may be called 'merged'"),
        ({"sources": ["m:n", {"name": "ensemble"}]}, "no source may be called 'ensemble'"),
        ({"sources": [{"model": "m:n", "checkpoint": "a.pt", "pretrained": True}]}, "leave one of the two out"),
        ({"sources": [{"checkpoint": "a.pt"}]}, "a required key is missing at sources[0].model"),
        ({"dtype": "int8"}, "Input should be 'float32', 'float64', 'float16' or 'bfloat16'"),
    ],
    ids=str,
)
def test_wrong_recipes_with_stages_are_explained(changes, message):
    with pytest.raises(RecipeError) as caught:
        surgery.Recipe.from_yaml(staged("evaluate", **changes))
    assert message in " ".join(str(caught.value).split())


def test_errors_name_the_file_and_the_line(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(RECIPE.replace("alpha: 0.4", "alfa: 0.4"))
    with pytest.raises(RecipeError, match=r"wrong\.yaml:9: unknown key 'alfa'\n  at      stages\[1\]\.merge\.alfa"):
        surgery.Recipe.from_yaml(path)
    path.write_text(RECIPE.replace("  - evaluate\n", "  - diagnose\n  - prune: {sparsity: 0.5}\n  - merge\n"))
    with pytest.raises(RecipeError, match=r"wrong\.yaml:12: there is one network left"):
        surgery.Recipe.from_yaml(path)


def test_values_may_be_changed_by_their_path():
    changes = {"stages.train.epochs": 5, "stages.1.merge.alpha": 0.1, "sources.0.options.width": 6, "seed": 3}
    recipe = surgery.Recipe.from_yaml(RECIPE, changes)
    assert recipe == surgery.Recipe.from_yaml(
        RECIPE.replace("epochs: 2", "epochs: 5").replace("0.4", "0.1").replace("width: 4", "width: 6") + "seed: 3\n"
    )
    for path, message in (
        ("stages.tran.epochs", "there is no single 'tran'\n  remedy  did you mean 'train'?"),
        ("stages.9.train", "there is no single '9'"),
        ("name.first", "name is 'small'\n  remedy   write name=VALUE"),
        ("stages.2.data", "stages.2 is 'evaluate'\n  remedy   write stages.2=VALUE"),
        (".".join("a" * 5000), "a path of 5000 keys leads nowhere"),
        ("stages.train.epoch", "unknown key 'epoch'"),
    ):
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            surgery.Recipe.from_yaml(RECIPE, {path: 1})


@pytest.fixture(scope="module")
def schema():
    command = [sys.executable, "-m", "vfsurgery", "schema"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_the_committed_schema_is_that_of_the_code(schema):
    committed = json.loads((ROOT / "docs/recipe.schema.json").read_text())
    assert committed == schema, "vfsurgery schema > docs/recipe.schema.json"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema(schema, path):
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema)
    jsonschema.validate(yaml.safe_load(surgery.Recipe.from_yaml(path).to_yaml()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "nmae": "x"}, schema)


@pytest.mark.parametrize(
    "stage", [{"train": {"epoch": 1}}, "trian", {"train": {}, "merge": {}}, {"fold": {"x": 1}}, {"repair": {}}]
)
def test_the_schema_refuses_wrong_stages(schema, stage):
    content = yaml.safe_load(RECIPE)
    jsonschema.validate({**content, "stages": ["train", "fold", {"reset": {}}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "stages": [stage]}, schema)

"""Recipes as lists of stages: the same weights as from Python, step by step, and again after a break."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

import vfsurgery as surgery
from vfsurgery.checkpoints import file_hash, load_into, load_state_dict, save_state_dict
from vfsurgery.data import digits
from vfsurgery.data.datasets import DATA
from vfsurgery.demo import TinyConvNet, TinyResNet
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, RecipeError, SurgeryError
from vfsurgery.matching import MATCHERS, Matching
from vfsurgery.passes import PASSES
from vfsurgery.pruning import PRUNERS, Masks
from vfsurgery.recipes.stages import bench as bench_module
from vfsurgery.recipes.stages import running as running_module
from vfsurgery.training import from_seed, train

ROOT = Path(__file__).parent.parent

RECIPE = """\
name: small
threads: 1
data: {name: digits}
sources:
  - {model: "vfsurgery.demo:TinyConvNet", options: {width: 4}}
  - {seed: 7}
stages:
  - train: {epochs: 2}
  - match: activations
  - merge: {alpha: 0.4}
  - renormalize: [rescale]
  - evaluate
"""


def staged(*stages: object, **keys: object) -> str:
    """The recipe with other stages, and with other keys."""
    content = yaml.safe_load(RECIPE) | {"stages": list(stages)} | keys
    return yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)


def small(seed: int, epochs: int = 2) -> TinyConvNet:
    model = from_seed(lambda: TinyConvNet(width=4), seed)
    if epochs:
        options = {"lr": 0.05, "seed": seed, "progress": False}
        train(model, digits().train, epochs=epochs, **options)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return surgery.Recipe.from_yaml(RECIPE).run(tmp_path_factory.mktemp("ran") / "out", progress=False)


def assert_same(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


# what stages do


def test_yaml_and_python_give_the_same_weights(ran):
    a, b = small(0), small(7)
    data = digits().calibration
    options = {"data": data, "matching": "activations", "renormalize": ["rescale"], "progress": False}
    expected = surgery.merge(a, b, alpha=0.4, **options)
    written = load_state_dict(ran.output / "small.safetensors")
    assert_same(written, expected.state_dict())
    other = surgery.merge(a, b, alpha=0.5, **options)
    assert not torch.equal(written["fc.weight"], other.state_dict()["fc.weight"])


@pytest.mark.parametrize("data", [{"name": "digits"}, None])
def test_merge_alone_is_the_one_line(tmp_path, data):
    recipe = surgery.Recipe.from_yaml(staged("merge", data=data))
    if data is None:
        recipe = surgery.Recipe.from_yaml(staged("merge", data=None), {"sources.0.input_size": [1, 8, 8]})
    recipe.run(tmp_path, progress=False)
    given = {"example_inputs": torch.randn(2, 1, 8, 8)} if data is None else {"data": digits().calibration}
    expected = surgery.merge(small(0, 0), small(7, 0), **given, progress=False)
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())


def test_shares_by_layer(tmp_path):
    shares = {"convs.0": 0.0, "convs.1": 1.0, "*": [0.2, 0.8]}
    stages = {"match": "identity"}, {"merge": {"alpha": shares}}, {"renormalize": None}
    surgery.Recipe.from_yaml(staged(*stages)).run(tmp_path, progress=False)
    found = load_state_dict(tmp_path / "small.safetensors")
    a, b = small(0, 0).state_dict(), small(7, 0).state_dict()
    assert torch.equal(found["convs.0.weight"], a["convs.0.weight"])
    assert torch.equal(found["convs.1.weight"], b["convs.1.weight"])
    assert torch.allclose(found["fc.weight"], torch.lerp(a["fc.weight"], b["fc.weight"], 0.8))


def test_three_sources(tmp_path):
    sources = [{"model": "vfsurgery.demo:TinyConvNet", "options": {"width": 4}}, {}, {"name": "third"}]
    text = staged({"match": "weights"}, {"merge": {"weights": [0.5, 0.3, 0.2]}}, "evaluate", sources=sources)
    run = surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert [line.split()[0] for line in run.findings[0].told[-1].lines] == ["a", "b", "third", "ensemble", "merged"]
    expected = surgery.merge(
        [small(seed, 0) for seed in range(3)],
        weights=[0.5, 0.3, 0.2],
        matching="weights",
        data=digits().calibration,
        progress=False,
    )
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())


def test_pruned_networks_keep_their_zeros_through_training_and_merge(tmp_path):
    stages = (
        {"train": {"epochs": 1}},
        {"prune": {"sparsity": 0.6, "method": "random"}},
        {"train": {"epochs": 1}},
        {"export": "pruned.safetensors"},
        {"merge": {"masks": "keep"}},
        "diagnose",
    )
    surgery.Recipe.from_yaml(staged(*stages, outputs=["small.safetensors"])).run(tmp_path, progress=False)
    models = [TinyConvNet(width=4) for _ in range(3)]
    for model, file in zip(models, ("pruned_a", "pruned_b", "small"), strict=True):
        load_into(model, load_state_dict(tmp_path / f"{file}.safetensors"), file)
    masks = [Masks.of(model) for model in models]
    assert masks[0] == masks[1] == masks[2] and round(masks[0].sparsity, 2) == 0.6
    assert not torch.equal(models[0].fc.weight, models[1].fc.weight)


@pytest.mark.parametrize("kept", [True, False])
def test_zeros_stay_in_a_training_behind_the_merge(tmp_path, kept):
    first = [{"prune": {"sparsity": 0.6, "method": "random"}}] if kept else []
    stages = *first, {"match": "identity"}, "merge", {"train": {"epochs": 1}}, {"prune": {"sparsity": 0.7}}, "diagnose"
    run = surgery.Recipe.from_yaml(staged(*stages)).run(tmp_path, progress=False)
    bench = run.findings[0].bench
    dense, pruned = bench.origins["merged"][0], bench.networks["merged"]
    assert round(Masks.of(dense).sparsity, 2) == (0.6 if kept else 0.0)
    assert round(Masks.of(pruned).sparsity, 2) == 0.7 and len(bench.origins["merged"]) == 1


def test_a_pruned_network_is_repaired_by_what_it_was(tmp_path):
    source = {"model": "vfsurgery.demo:TinyConvNet", "options": {"width": 4}}
    stages = {"train": {"epochs": 2}}, {"prune": {"sparsity": 0.8}}, {"renormalize": "auto"}, "diagnose", "evaluate"
    surgery.Recipe.from_yaml(staged(*stages, sources=[source])).run(tmp_path, progress=False)
    dense = small(0)
    pruned = surgery.prune(dense, 0.8)
    expected = surgery.renormalize(pruned, reference=dense, data=digits().calibration, progress=False)
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())
    assert "<html" in (tmp_path / "diagnosis.html").read_text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(surgery.Pass):
    """Multiply all weights."""

    factor: float = 0.5

    def run(self, graph_module, context):
        """Multiply."""
        for parameter in graph_module.parameters():
            parameter.mul_(self.factor)
        return graph_module


@pytest.fixture
def shrink(monkeypatch):
    monkeypatch.setattr(PASSES, "_entries", dict(PASSES._entries))
    return surgery.register_pass(name="shrink")(Shrink)


def test_passes_of_your_own_are_stages(tmp_path, shrink):
    source = {"model": "vfsurgery.demo:TinyConvNet", "options": {"width": 4}}
    recipe = surgery.Recipe.from_yaml(staged({"shrink": {"factor": 0.25}}, {"apply": ["shrink"]}, sources=[source]))
    assert recipe.stages[0].kind == "apply" and surgery.Recipe.from_yaml(recipe.to_yaml()) == recipe
    recipe.run(tmp_path, progress=False)
    found = load_state_dict(tmp_path / "small.safetensors")
    assert torch.equal(found["fc.weight"], small(0, 0).fc.weight * 0.125)


def test_preserved_layers_are_written_whole(tmp_path):
    text = staged({"match": "weights"}, "merge", {"preserve": 3})
    run = surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert run.recipe.files == ("small.pt2",)
    program = torch.export.load(tmp_path / "small.pt2").module()
    expected = surgery.merge(
        small(0, 0), small(7, 0), matching="weights", preserve=3, data=digits().calibration, progress=False
    )
    images = torch.randn(4, 1, 8, 8)
    assert torch.allclose(program(images), expected(images), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_precision(tmp_path, dtype):
    text = staged("merge", {"renormalize": ["repair"]}, {"evaluate": {"flips": True}}, "diagnose", dtype=dtype)
    surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert load_state_dict(tmp_path / "small.safetensors")["fc.weight"].dtype == getattr(torch, dtype)


def test_sources_from_files(tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt")]
    save_state_dict(small(0, 0).state_dict(), paths[0])
    torch.save({"state_dict": small(1, 0).state_dict(), "state_dict_ema": small(2, 0).state_dict()}, paths[1])
    first = {"model": "vfsurgery.demo:TinyConvNet", "options": {"width": 4}, "checkpoint": str(paths[0])}
    for ema, seed in ((True, 2), (False, 1)):
        sources = [first, {"checkpoint": str(paths[1]), "ema": ema}]
        text = staged({"match": "identity"}, {"merge": {"alpha": 1.0}}, {"renormalize": None}, sources=sources)
        surgery.Recipe.from_yaml(text).run(tmp_path / "out", progress=False)
        assert_same(load_state_dict(tmp_path / "out/small.safetensors"), small(seed, 0).state_dict())


def test_text_among_sources_is_a_file_or_a_model():
    text = staged("merge", sources=["timm:resnet18", "b.safetensors", {"name": "c", "seed": 9}], data=None)
    sources = surgery.Recipe.from_yaml(text).sources
    assert [(each.name, each.model, each.checkpoint, each.seed) for each in sources] == [
        ("a", "timm:resnet18", None, 0),
        ("b", "timm:resnet18", "b.safetensors", 1),
        ("c", "timm:resnet18", None, 9),
    ]


def test_what_is_expected(tmp_path):
    evaluate = {"evaluate": {"expect": ["1 < merged", "merged < a"]}}
    run = surgery.Recipe.from_yaml(staged({"merge": {"alpha": 0.0}}, evaluate)).run(tmp_path, progress=False)
    assert [outcome.holds for outcome in run.findings[0].outcomes()] == [True, False]
    assert [failure.text for failure in run.failures] == ["merged < a"]


def test_the_report_has_every_step(ran):
    report = json.loads((ran.output / "report.json").read_text())
    steps = report["runs"][0]["steps"]
    assert [next(iter(stage)) for step in steps for stage in step["stages"]] == [
        *("train", "match", "merge", "renormalize", "evaluate")
    ]
    assert steps[1]["result"]["certificates"] and set(steps[2]["result"]["scores"]) == {"a", "b", "ensemble", "merged"}


# recipes as text


@pytest.mark.parametrize(
    "stage",
    [
        "train",
        {"train": {"epochs": 3, "milestones": [1, 2]}},
        {"prune": {"sparsity": {"convs.0": 0.0, "*": 0.5}, "scope": "global"}},
        {"prune": {"pattern": "2:4", "method": "wanda"}},
        {"renormalize": None},
        {"renormalize": [{"repair": {"factor": 0.9}}, "rescale"]},
        {"merge": {"alpha": {"convs.*": [0.1, 0.9], "fc": 0.3}}},
        {"merge": {"weights": {"fc": [[0.5, 0.5], [1.0, 0.0]]}, "pins": ["fc"]}},
        {"preserve": {"flops": 1.5}},
        {"match": {"cca": {"gamma": 0.3}}},
        {"fold": None},
        {"export": ["a.safetensors", "b.onnx"]},
        {"evaluate": {"data": "train", "expect": ["a < b"]}},
    ],
    ids=str,
)
def test_what_is_written_is_read_again(stage):
    kind = stage if isinstance(stage, str) else next(iter(stage))
    before = [{"merge": {}}] if kind == "renormalize" else []
    after = [{"merge": {}}] if kind in ("preserve", "match") else []
    recipe = surgery.Recipe.from_yaml(staged(*before, stage, *after))
    again = surgery.Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe) and again.to_yaml() == recipe.to_yaml()
    assert recipe != surgery.Recipe.from_yaml(RECIPE)


MERGE = {"merge": {}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["trian"], "unknown key 'trian' at stages[0].trian remedy did you mean 'train'?"),
        ([{"train": {"epoch": 3}}], "unknown key 'epoch' at stages[0].train.epoch remedy did you mean 'epochs'?"),
        ([{"train": {}, "merge": {}}], "a stage is its name, or one key with its options"),
        (["match"], "the stage 'match' needs a value"),
        ([{"match": "weights"}], "match says how to merge, but no merge stands beside it at stages[0]"),
        ([MERGE, {"match": "weights"}, {"match": "cca"}], "match stands twice around one merge"),
        ([MERGE, "evaluate", MERGE], "there is one network left, and nothing to merge it with at stages[2]"),
        ([{"renormalize": "auto"}], "renormalize stands behind a merge, or behind prune"),
        ([{"prune": {"sparsity": 0.5}}, {"renormalize": None}], "behind prune, renormalize none changes nothing"),
        ([MERGE, "evaluate", {"repair": {"factor": 0.9}}], "repair goes by the sources: such passes stand in"),
        ([{"apply": ["fold", "average"]}], "average goes by the sources"),
        (["diagnose"], "diagnose compares a network with what it was made from"),
        ([{"match": "weight"}, MERGE], "unknown matcher 'weight'; did you mean 'weights'?"),
        ([{"match": {"cca": {"gama": 1.0}}}, MERGE], "matcher 'cca' has no option 'gama'"),
        ([{"merge": {"alpha": 1.5}}], "alpha must lie in [0, 1] but is 1.5"),
        ([{"merge": {"alpha": "half"}}], "shares are numbers"),
        ([{"merge": {"weights": [0.2, 0.3, 0.5]}}], "3 weights were given for 2 models at stages[0]"),
        ([{"merge": {"weights": 0.5}}], "weights are one number for each of 2 sources, not 0.5 at stages[0]"),
        ([{"merge": {"weights": {"fc": 0.5}}}], "weights are one number for each of 2 sources, not 0.5"),
        ([{"merge": {"weights": [[0.5, 0.5], 0.3]}}], "weights are one number for each of 2 sources, not 0.3"),
        ([{"merge": {"alpha": [0.5, [0.3]]}}], "[0.3] is no share"),
        ([{"merge": {"masks": "kept"}}], "unknown choice of masks 'kept'; did you mean 'keep'?"),
        ([MERGE, {"renormalize": ["repiar"]}], "unknown renormalization 'repiar'; did you mean 'repair'?"),
        ([MERGE, {"renormalize": {"repair": {"factor": "x"}}}], "pass 'repair': factor must be float but is 'x'"),
        ([{"apply": "fould"}], "unknown pass 'fould'; did you mean 'fold'?"),
        ([MERGE, {"preserve": -1}], "write a number of layers, a module path, or a budget"),
        ([MERGE, {"preserve": {"flop": 2}}], "unknown budget 'flop'; did you mean 'flops'?"),
        ([MERGE, {"preserve": {1: 2}}], "unknown budget '1'"),
        ([MERGE, {"preserve": {}}], "a budget says flops, params or both"),
        ([MERGE, {"preserve": ""}], "write a number of layers, a module path, or a budget"),
        ([MERGE, {"preserve": {"flops": 0.5}}], "max_flops=0.5 is no budget"),
        ([MERGE, {"preserve": 2}, {"export": "x.safetensors"}], "write x.safetensors as .pt2 or .onnx"),
        ([{"export": "../x.onnx"}], "'../x.onnx' is no plain file name"),
        ([{"export": "x.pkl"}], "networks are written into files that end in .safetensors, .pt2, .onnx"),
        ([{"prune": {"method": "magnitude"}}], "write sparsity, as in 0.9, or pattern"),
        ([{"prune": {"sparsity": 9}}], "sparsity must be a number in [0, 1) but is 9"),
        ([{"prune": {"sparsity": {"fc": 1.0}}}], "sparsity for 'fc' must be a number in [0, 1) but is 1.0"),
        ([{"prune": {"sparsity": {}}}], "sparsity has no pattern"),
        ([{"prune": {"pattern": "4:2"}}], "pattern='4:2' is not N:M"),
        ([{"prune": {"pattern": "2:4", "scope": "layer"}}], "scope='layer' and pattern='2:4' exclude each other"),
        ([{"prune": {"sparsity": 0.5, "method": "wanda", "options": {"x": 3}}}], "unknown option of wanda 'x'"),
        ([{"prune": {"sparsity": 0.5, "options": {"block": 3}}}], "unknown option of magnitude 'block'"),
        ([MERGE, {"evaluate": {"expect": ["merge < a"]}}], "unknown row in stages[1] 'merge'; did you mean 'merged'?"),
        ([{"evaluate": {"expect": ["a within 2 of published"]}}], "nothing is published for stages"),
        ([{"evaluate": {"flips": True}}], "flips are counted between sources and what they were merged into"),
        ([{"export": "x.pt2"}, "train", {"export": "x.pt2"}], "x_a.pt2 would be written twice: give one of"),
        ([{"export": "x.pt2"}, MERGE, {"export": "x_b.pt2"}], "x_b.pt2 would be written twice: give one of"),
        ([{"prune": {"sparsity": 0.5}}, "diagnose", "diagnose"], "diagnosis_a.html would be written twice"),
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
        ({"pairs": [{"name": "p", "model": "m:n"}]}, "a recipe has stages, or else pairs, sweeps and soups"),
        ({"data": None}, "evaluate needs data at stages[0]"),
        ({"sources": ["timm:resnet18", {"name": "a"}]}, "two entries have the source name 'a'"),
        ({"sources": ["m:n", {"name": "merged"}]}, "no source may be called 'merged'"),
        ({"sources": ["m:n", {"name": "ensemble"}]}, "no source may be called 'ensemble'"),
        ({"outputs": ["x.onnx", "x.onnx"]}, "x_a.onnx would be written twice"),
        ({"sources": [{"model": "m:n", "checkpoint": "a.pt", "pretrained": True}]}, "leave one of the two out"),
        ({"sources": [{"checkpoint": "a.pt"}]}, "a required key is missing at sources[0].model"),
        ({"alpha": 0.3}, "alpha stands in the stage: write merge: {alpha: ...}"),
        ({"resume": "kept"}, "resume is for pairs, sweeps and soups: stages go on with --resume"),
        ({"dtype": "int8"}, "Input should be 'float32', 'float64', 'float16' or 'bfloat16'"),
        ({"outputs": ["a/b.onnx"]}, "'a/b.onnx' is no plain file name"),
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
    with pytest.raises(RecipeError, match=r"wrong\.yaml:10: unknown key 'alfa'\n  at      stages\[2\]\.merge\.alfa"):
        surgery.Recipe.from_yaml(path)
    path.write_text(RECIPE.replace("  - merge: {alpha: 0.4}\n", ""))
    with pytest.raises(RecipeError, match=r"wrong\.yaml:9: match says how to merge"):
        surgery.Recipe.from_yaml(path)


def test_values_may_be_changed_by_their_path():
    changes = {"stages.train.epochs": 5, "stages.2.merge.alpha": 0.1, "sources.0.options.width": 6, "seed": 3}
    recipe = surgery.Recipe.from_yaml(RECIPE, changes)
    assert recipe == surgery.Recipe.from_yaml(
        RECIPE.replace("epochs: 2", "epochs: 5").replace("0.4", "0.1").replace("width: 4", "width: 6") + "seed: 3\n"
    )
    for path, message in (
        ("stages.tran.epochs", "there is no single 'tran'\n  remedy  did you mean 'train'?"),
        ("stages.9.train", "there is no single '9'"),
        ("name.first", "name is 'small'\n  remedy   write name=VALUE"),
        ("stages.4.data", "stages.4 is 'evaluate'\n  remedy   write stages.4=VALUE"),
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


# going on after a break


def counted(monkeypatch) -> list[str]:
    """What the bench calls, by name, as it happens."""
    calls: list[str] = []
    for name in ("train", "merge", "evaluate", "diagnose", "prune"):
        original = getattr(bench_module, name)

        def call(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(bench_module, name, call)
    return calls


def test_a_second_run_takes_over_what_is_the_same(tmp_path, monkeypatch, ran):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    recipe.run(tmp_path, progress=False)
    calls = counted(monkeypatch)
    again = recipe.run(tmp_path, progress=False, resume=True)
    assert calls == [] and again.findings[0].taken_over == (True, True, True)
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert [told.lines for told in again.findings[0].told][2] == [told.lines for told in ran.findings[0].told][2]
    surgery.Recipe.from_yaml(RECIPE, {"stages.merge.alpha": 0.3}).run(tmp_path, progress=False, resume=True)
    assert calls == ["merge", "evaluate"]
    calls.clear()
    surgery.Recipe.from_yaml(RECIPE, {"sources.1.seed": 8}).run(tmp_path, progress=False, resume=True)
    assert calls == ["train", "train", "merge", "evaluate"]
    calls.clear()
    recipe.run(tmp_path, progress=False)
    assert calls == ["train", "train", "merge", "evaluate"]


def test_damaged_steps_are_made_anew(tmp_path, monkeypatch, ran):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    recipe.run(tmp_path, progress=False)
    (merged,) = (tmp_path / ".stages").rglob("merged.safetensors")
    content = bytearray(merged.read_bytes())
    merged.write_bytes(content[:-100])
    calls = counted(monkeypatch)
    recipe.run(tmp_path, progress=False, resume=True)
    assert calls == ["merge"]
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")


DAMAGES = {
    "no object": lambda record: [],
    "a number": lambda record: 3,
    "a key less": lambda record: {key: value for key, value in record.items() if key != "lines"},
    "lines that are none": lambda record: record | {"lines": 3},
    "values that are none": lambda record: record | {"values": ["x"]},
    "metadata that is none": lambda record: record | {"metadata": "x"},
    "a summary of other keys": lambda record: record | {"summaries": {"merged": {"x": 1}}},
    "scores that are none": lambda record: record | {"scores": 3},
    "a score of text": lambda record: record | {"scores": {"a": {"accuracy": "x", "loss": 0.0, "count": 1}}},
    "rows that are not there": lambda record: record | {"scores": {}},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_records_of_another_shape_are_made_anew(tmp_path, ran, damage):
    shutil.copytree(ran.output, tmp_path / "out")
    records = [*(tmp_path / "out/.stages").glob("*/record.json")]
    assert len(records) == 3
    for path in records:
        path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    again = ran.recipe.run(tmp_path / "out", progress=False, resume=True)
    assert not all(again.findings[0].taken_over)
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert again.findings[0].bench.scores == ran.findings[0].bench.scores
    assert ran.recipe.run(tmp_path / "out", progress=False, resume=True).findings[0].taken_over == (True, True, True)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("planted", ["pipe", "link", "deep", "folder", "loop", "no text"])
def test_planted_files_are_not_followed(tmp_path, ran, planted):
    shutil.copytree(ran.output, tmp_path / "out")
    (merged,) = (tmp_path / "out/.stages").glob("*/merged.safetensors")
    record = merged.parent / "record.json"
    record.unlink()
    if planted == "pipe":
        os.mkfifo(record)
    elif planted == "link":
        record.symlink_to("/dev/zero")
    elif planted == "loop":
        record.symlink_to(record.name)
    elif planted == "folder":
        record.mkdir()
    else:
        record.write_bytes(b"[" * 200_000 if planted == "deep" else b"\xff\xfe")
    again = ran.recipe.run(tmp_path / "out", progress=False, resume=True)
    assert again.findings[0].taken_over == (True, False, True)
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")


def test_a_link_in_the_place_of_kept_steps_is_refused(tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "x.partial").mkdir()
    (kept / "letter.txt").write_text("dear")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.stages").symlink_to(kept)
    recipe = surgery.Recipe.from_yaml(staged("evaluate"))
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"cannot keep steps in .*stages"):
            recipe.run(tmp_path / "out", progress=False, resume=resume)
    assert {path.name for path in kept.iterdir()} == {"letter.txt", "x.partial"}


def test_a_recipe_that_cannot_begin_leaves_what_is_kept(tmp_path, ran):
    shutil.copytree(ran.output, tmp_path / "out")
    before = sorted((tmp_path / "out/.stages").rglob("*"))
    for changes in ({"sources.1.checkpoint": "none.pt"}, {"sources.0.model": "vfsurgery.demo:Tiny"}):
        with pytest.raises(SurgeryError):
            surgery.Recipe.from_yaml(RECIPE, changes).run(tmp_path / "out", progress=False)
    assert sorted((tmp_path / "out/.stages").rglob("*")) == before


def test_a_page_that_is_asked_for_later_has_the_merge_s_report(tmp_path, monkeypatch):
    surgery.Recipe.from_yaml(RECIPE).run(tmp_path, progress=False)
    first = file_hash(tmp_path / "small.safetensors")
    text = RECIPE + "  - diagnose\n"
    calls = counted(monkeypatch)
    surgery.Recipe.from_yaml(text).run(tmp_path, progress=False, resume=True)
    assert calls == ["merge", "diagnose"]
    assert "certificate" in (tmp_path / "diagnosis.html").read_text().lower()
    assert load_state_dict(tmp_path / "small.safetensors")["fc.weight"].shape == (10, 16)
    assert file_hash(tmp_path / "small.safetensors") != first  # its header has the other recipe


def test_a_training_goes_on_at_its_epoch(tmp_path, ran, monkeypatch):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    from vfsurgery.training import resuming

    original, saved = resuming.Progress.save, []

    def save(self, path, epoch):
        original(self, path, epoch)
        saved.append(epoch)
        if len(saved) == 3:  # in the second network, after its first epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming.Progress, "save", save)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(tmp_path, progress=False)
    assert not (tmp_path / "small.safetensors").exists()
    recipe.run(tmp_path, progress=False, resume=True)
    assert saved == [1, 2, 1, 2]
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert not [*(tmp_path / ".stages").glob("*.pt")]


@pytest.mark.parametrize("moment", ["*.training.pt", "*/a.safetensors", "*/merged.safetensors"])
def test_a_run_that_is_killed_goes_on_to_the_same_file(tmp_path, ran, moment):
    (tmp_path / "small.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "vfsurgery", "run", "small.yaml", "--output", "out", "--quiet", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not [*(tmp_path / "out/.stages").glob(moment)]:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")


class Backwards:
    """A matcher of somebody else."""

    name, needs_data = "backwards", False

    def match(self, problem):
        return [Matching({group.name: group.identity() for group in problem.groups}) for _ in problem.states[1:]]


@dataclasses.dataclass(frozen=True)
class Same(surgery.Pruner):
    """A pruner of somebody else."""

    name = "same"

    def score(self, work):
        yield from work.weights.items()


def squares(seed: int = 0):
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.TensorDataset(images, torch.arange(40) % 10)


@pytest.mark.parametrize(
    ("stages", "taken_over"),
    [
        ([{"shrink": {"factor": 0.25}}], (False,)),
        ([{"prune": {"sparsity": 0.5, "method": "same"}}], (False,)),
        ([{"fold": {}}, {"match": "backwards"}, "merge"], (True, False)),
        ([{"fold": {}}, {"match": "weights"}, "merge"], (True, True)),
    ],
    ids=["pass", "pruner", "matcher", "ours"],
)
def test_another_code_of_yours_is_another_step(tmp_path, shrink, monkeypatch, stages, taken_over):
    for registry, one in ((MATCHERS, Backwards), (PRUNERS, Same)):
        monkeypatch.setattr(registry, "_entries", {**registry._entries, one.name: one})
    recipe = surgery.Recipe.from_yaml(staged(*stages))
    recipe.run(tmp_path, progress=False)
    assert all(recipe.run(tmp_path, progress=False, resume=True).findings[0].taken_over)
    monkeypatch.setattr(running_module, "file_hash", lambda path: "another")
    assert recipe.run(tmp_path, progress=False, resume=True).findings[0].taken_over == taken_over


def test_another_code_of_data_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(DATA, "_entries", {**DATA._entries, "squares": squares})
    recipe = surgery.Recipe.from_yaml(staged({"prune": {"sparsity": 0.5}}, data={"name": "squares"}))
    recipe.run(tmp_path, progress=False)
    assert recipe.run(tmp_path, progress=False, resume=True).findings[0].taken_over == (True,)
    monkeypatch.setattr(running_module, "file_hash", lambda path: "another")
    assert recipe.run(tmp_path, progress=False, resume=True).findings[0].taken_over == (False,)


@pytest.mark.parametrize("module", ["typed", "__main__"])
def test_passes_typed_into_an_interpreter_have_no_file(tmp_path, shrink, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(Shrink, "__module__", module)
    run = surgery.Recipe.from_yaml(staged({"shrink": {"factor": 0.25}})).run(tmp_path, progress=False)
    assert run.findings[0].taken_over == (False,)


def test_nothing_is_written_when_a_step_fails(tmp_path):
    text = staged({"export": "early.safetensors"}, {"merge": {"pins": ["nothing"]}})
    with pytest.raises(SurgeryError, match="nothing"):
        surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {".stages"}


# plans


def test_a_plan_says_what_would_happen_and_makes_no_weights(monkeypatch):
    from torch import nn

    made: list[str] = []
    original = nn.Parameter.__new__

    def new(cls, data=None, requires_grad=True):
        made.append(data.device.type)
        return original(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", new)
    text = staged(
        "merge",
        {"preserve": {"flops": 1.5}},
        "diagnose",
        sources=["timm:resnet18", {}],
        data={"name": "cifar10", "path": "none"},
    )
    found = surgery.plan(surgery.Recipe.from_yaml(text))
    assert set(made) == {"meta"}
    network = found.networks[0]
    assert (network.parameters, network.image, network.groups) == (11689512, (3, 32, 32), 12)
    assert network.networks == ("a", "b")
    assert "flops x1." in found.steps[0].notes[0] and found.writes == ("diagnosis.html", "small.pt2", "report.json")
    assert json.loads(json.dumps(found.to_dict()))["memory"] > 2 * network.megabytes


def test_a_plan_agrees_with_the_run(ran):
    found = surgery.plan(ran.recipe)
    report = json.loads((ran.output / "report.json").read_text())["runs"][0]["steps"][1]["result"]
    assert found.networks[0].groups == len(report["groups"]) and found.networks[0].coverage == report["coverage"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": ["timm:resnet18", {"model": "timm:resnet34"}]}, IncompatibleModelsError, "not the same archit"),
        ({"sources": ["timm:resnet18", "none.safetensors"]}, CheckpointError, "there is no checkpoint none.safet"),
        ({"sources": ["timm:resnt18", {}]}, SurgeryError, "nearest names: .*resnet18"),
    ],
    ids=str,
)
def test_a_plan_finds_what_cannot_run(changes, error, message):
    with pytest.raises(error, match=message):
        surgery.plan(surgery.Recipe.from_yaml(staged("merge", data=None, **changes)))


def test_a_plan_compares_headers_of_checkpoints(tmp_path):
    save_state_dict(TinyConvNet(width=4).state_dict(), tmp_path / "a.safetensors")
    save_state_dict(TinyResNet().state_dict(), tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    first = {"model": "vfsurgery.demo:TinyConvNet", "options": {"width": 4}}
    for file, message in (("a", None), ("b", "does not fit TinyConvNet: convs.0.weight differs"), ("c", "cannot read")):
        recipe = surgery.Recipe.from_yaml(
            staged("merge", sources=[first, {"checkpoint": str(tmp_path / f"{file}.safetensors")}])
        )
        if message is None:
            surgery.plan(recipe)
            continue
        with pytest.raises(CheckpointError, match=message):
            surgery.plan(recipe)


def test_the_command_line(tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)

    def vfsurgery(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vfsurgery", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    planned = vfsurgery("plan", "small.yaml", "--set", "sources.0.options.width=8", "--seed", "3")
    assert "18,370 parameters" in planned.stdout, planned.stderr
    assert json.loads(vfsurgery("plan", "small.yaml", "--json").stdout)["name"] == "small"
    assert vfsurgery("check", "small.yaml").stdout == "small.yaml can run: 3 steps on 1 architectures\n"
    wrong = vfsurgery("check", "small.yaml", "--set", "stages.merge.alpha=2")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: small.yaml:10: alpha must lie in [0, 1] but is 2")
    assert not (tmp_path / "out").exists()
    done = vfsurgery("run", "small.yaml", "--dtype", "float64", "--quiet", "--set", "stages.train.epochs=1")
    assert "match + merge + renormalize" in done.stdout, done.stderr
    assert load_state_dict(tmp_path / "out/small/small.safetensors")["fc.bias"].dtype == torch.float64

"""A recipe says exactly what it does, is refused with the way out, and writes all of its results or none."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from vfsurgery.checkpoints import load_into, load_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import CheckpointError, OptionError, RecipeError, SurgeryError
from vfsurgery.merging.merge import merge
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.training import from_seed, train

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

TINY = """\
name: tiny
threads: 1
data: {name: digits}
sources:
  - {model: "tinynets:conv", seed: 3}
  - {seed: 4}
stages:
  - train: {epochs: 1}
  - compare:
      ways:
        - naive: {merge: {matching: identity, renormalize: none}}
        - weights + repair: [merge: {matching: weights, renormalize: repair}]
      flips: true
  - barrier: {alphas: 3}
  - diagnose
"""


@pytest.fixture(scope="module")
def tinynets(tmp_path_factory):
    """A module of factories, importable as ``tinynets``."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "tinynets.py").write_text(
        "from vfsurgery.networks.demo import TinyConvNet\ndef conv(): return TinyConvNet(4)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("tinynets", None)


@pytest.fixture(scope="module")
def ran(tinynets, tmp_path_factory):
    """The tiny recipe, run once."""
    return Recipe.from_yaml(TINY).run(tmp_path_factory.mktemp("tiny") / "results", progress=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.name == path.stem
    assert f"vfsurgery run recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("source", [TINY, *RECIPES], ids=["tiny", *(path.stem for path in RECIPES)])
def test_round_trip(source):
    recipe = Recipe.from_yaml(source)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(Recipe.from_yaml(recipe.to_yaml())) == hash(recipe)


def test_round_trip_keeps_what_is_not_default():
    text = TINY.replace("renormalize: repair", "renormalize: [reset, repair]").replace("threads: 1", "seed: 5")
    again = Recipe.from_yaml(Recipe.from_yaml(text).to_yaml())
    assert again.stages[1].rows[1].stages[0].renormalize == ["reset", "repair"]
    assert (again.seed, again.threads) == (5, None)


def test_path_as_text(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert Recipe.from_yaml(str(tmp_path / "tiny.yaml")) == Recipe.from_yaml(TINY)


def test_recipe_is_frozen():
    recipe = Recipe.from_yaml(TINY)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


MERGE = "ways[1].weights + repair[0].merge"
WRONG = [
    (
        "name: tiny",
        "nam: tiny",
        "unknown key 'nam' at nam remedy did you mean 'name'? accepted: data, device",
    ),
    ("data: {name", "data: {nam", "unknown key 'nam' at data.nam remedy did you mean 'name'?"),
    ("epochs", "epoch", "unknown key 'epoch' at stages[0].train.epoch remedy did you mean 'epochs'?"),
    ("matching: w", "maching: w", f"'maching' at stages[1].compare.{MERGE}.maching remedy did you mean 'matching'?"),
    ("epochs: 1", "epochs: many", "a valid integer, found 'many' at stages[0].train.epochs"),
    ("epochs: 1", "epochs: 0", "greater than or equal to 1, found 0 at stages[0].train.epochs"),
    ("epochs: 1", "lr: 1e-3", "found '1e-3' at stages[0].train.lr remedy YAML reads 1e-3 as text: write 1.0e-3"),
    ("epochs: 1", "lr: fast", "a valid number, found 'fast' at stages[0].train.lr"),
    ("train: {", "trian: {", "unknown stage 'trian'; did you mean 'train'? accepted: apply, barrier"),
    ("      flips: true", "      ways: []", "not valid YAML cause the key 'ways' stands twice at line 13, column 7"),
    ('{model: "tinynets:conv", seed: 3}', "{seed: 3}", "a required key is missing at sources[0].model"),
    ("seed: 4", "name: ../up", "found '../up' at sources[1].name"),
    ("renormalize: repair", "alpha: 1.5", f"gives model b at stages[1].compare.{MERGE}.alpha"),
    (
        "{name: digits}",
        "{name: cifar}",
        "unknown data set 'cifar'; did you mean 'cifar10'? accepted: cifar10, cifar100",
    ),
    ("matching: weights", "matching: weigths", "unknown matcher 'weigths'; did you mean 'weights'? accepted: act"),
    ("renormalize: repair", "renormalize: repiar", "unknown renormalization 'repiar'; did you mean 'repair'? accepted"),
    ("renormalize: repair", "renormalize: [reset, auto]", "unknown renormalization 'auto'; accepted: bias-calibration"),
    ("renormalize: repair", "renormalize: [reset, 3]", f"at stages[1].compare.{MERGE}.renormalize"),
    ("- weights + repair:", "- naive:", "two entries have the row name 'naive' at stages[1].compare"),
    ("- weights + repair:", "- b:", "two entries have the row name 'b' at stages[1].compare"),
    ("- naive:", "- 3:", "a way is its label with stages, as in '- repaired: [merge: {renormalize: repair}]'"),
    ("- naive: {merge: {", "- {merge: {", "every stage has a dash of its own"),
    ("ways:", "ways: []\n      then:", "at least 1 item after validation, not 0, found [] at stages[1].compare.ways"),
    (
        "alphas: 3",
        "alphas: 4",
        "alphas is 4: only odd numbers of points have the midpoint among them at stages[2].barrier",
    ),
    (
        "[merge: {m",
        "[evaluate, merge: {m",
        "evaluate looks at networks and makes none: put it behind compare at stages[1]",
    ),
    ("[merge: {matching: weights, renormalize: repair}]", "train", "it leaves 2 networks: a way ends in one"),
    ("flips: true", "goes_on: nave", "unknown row 'nave'; did you mean 'naive'?"),
    ("flips: true", "goes_on: gain", "goes_on: gain chooses by what then brings, and there is no then"),
    ("flips: true", "columns: alpha", "unknown axis 'alpha'"),
    ("- naive:", "- naive {alpha}:", "unknown axis 'alpha'"),
    ("flips: true", "grid: {merge.alpha: 3}", "the grid has lists of values, or values by the text"),
    ("name: tiny", "name: [tiny", "the recipe is not valid YAML cause"),
]

MOVED = [
    ("pairs: []", "there is no key 'pairs' any more at pairs remedy write sources, and stages: [train: ..., compare"),
    (
        "sweeps: []",
        "there is no key 'sweeps' any more at sweeps remedy write sources, and stages: [train: ..., compare",
    ),
    (
        "soups: []",
        "there is no key 'soups' any more at soups remedy write sources, and stages: [train: ..., soup: ...]",
    ),
    ("alpha: 0.3", "there is no key 'alpha' any more at alpha remedy it stands in the stage: write merge: {alpha"),
    ("outputs: [x.onnx]", "there is no key 'outputs' any more at outputs remedy write a last stage: export: [...]"),
]


@pytest.mark.parametrize(("line", "message"), MOVED, ids=[line for line, _ in MOVED])
def test_keys_that_there_were_say_the_new_ones_with_their_line(tmp_path, line, message):
    (tmp_path / "old.yaml").write_text(f"{TINY}{line}\n")
    with pytest.raises(RecipeError, match=rf"old\.yaml:{TINY.count(chr(10)) + 1}: there is no key") as caught:
        Recipe.from_yaml(tmp_path / "old.yaml")
    assert message in " ".join(str(caught.value).split())


OLD_STAGES = [
    ("match: weights", "there is no stage 'match' any more: it is an option of merge now: write merge: {matching"),
    ("preserve: 3", "there is no stage 'preserve' any more: it is an option of merge now: write merge: {preserve"),
    ("renormalize: repair", "behind a merge, it is an option of the merge now: write merge: {renormalize"),
]


@pytest.mark.parametrize(("stage", "message"), OLD_STAGES, ids=[stage for stage, _ in OLD_STAGES])
def test_stages_that_there_were_say_the_new_ones_with_their_line(stage, message):
    text = TINY[: TINY.index("  - compare")] + f"  - merge\n  - {stage}\n"
    with pytest.raises(RecipeError, match=r"^the recipe:10: ") as caught:
        Recipe.from_yaml(text)
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[new for _, new, _ in WRONG])
def test_wrong_recipe_is_explained(old, new, message):
    assert old in TINY
    with pytest.raises(RecipeError, match=r"^the recipe(:| is not valid YAML)") as caught:
        Recipe.from_yaml(TINY.replace(old, new))
    assert message in " ".join(str(caught.value).split())
    assert isinstance(caught.value, OptionError)


def test_every_problem_is_located():
    with pytest.raises(RecipeError, match=r"unknown key|valid integer") as caught:
        Recipe.from_yaml(TINY.replace("epochs: 1", "epochs: x").replace("threads: 1", "speed: 3"))
    assert "speed" in str(caught.value) and "stages[0].train.epochs" in str(caught.value)


RUN = '{name: one, sources: ["vfsurgery.networks.demo:TinyConvNet"], stages: [{prune: {sparsity: 0.5}}]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"runs: [{RUN}, {RUN}]", "two entries have the run name 'one'"),
        (f"runs: [{RUN}]\nstages: [fold]", "sources and stages stand in the runs, where a recipe has several"),
        (f"runs: [{RUN}, {RUN.replace('name: one', 'name: two').replace('prune', 'prone')}]", "unknown stage 'prone'"),
        (
            f"runs: [{RUN}, {RUN.replace('name: one', 'name: two').replace(']}', ', export: one.safetensors]}')}]",
            "one.safetensors would be written twice: give one of them another name at runs[1].stages[1].export",
        ),
        ("sources: [a.pt]", "a required key is missing at sources[0].model"),
        ("sources: ['m:n']", "sources and stages come together: networks, and what is done to them"),
        ("seed: 3", "there is nothing to do: a recipe has sources and stages, or several runs of them"),
    ],
    ids=["same name", "both", "stage", "file", "no model", "no stages", "nothing"],
)
def test_wrong_runs_are_explained(text, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(f"name: r\n{text}\n")
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "a list"), ("\n", "a NoneType"), ("text\nmore\n", "a str")])
def test_recipe_that_is_no_mapping(text, found):
    with pytest.raises(RecipeError, match=rf"is no mapping of keys to values\n  found     {found}\n  accepted  name"):
        Recipe.from_yaml(text)


def test_file_is_named(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("name: tiny", "nam: tiny"))
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(tmp_path))}/tiny\.yaml:1: unknown key 'nam'"):
        Recipe.from_yaml(tmp_path / "tiny.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*tiny\.yaml\n  cause  .*No such file"):
        Recipe.from_yaml(tmp_path / "tiny.yaml")


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "tiny.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*tiny\.yaml\n  cause  "):
        Recipe.from_yaml(tmp_path / "tiny.yaml")


def test_yaml_makes_plain_values_only(tmp_path):
    with pytest.raises(RecipeError, match=r"not valid YAML\n  cause  could not determine a constructor .*os\.system"):
        Recipe.from_yaml(f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    assert not list(tmp_path.iterdir())


def test_results_are_written(ran):
    assert sorted(path.name for path in ran.output.iterdir()) == [
        ".stages",
        "README.md",
        "report.json",
        "tiny.html",
        "tiny.safetensors",
        "tiny_barrier.png",
    ]
    report = json.loads((ran.output / "report.json").read_text())
    assert report == json.loads(json.dumps(ran.to_dict()))
    assert [source["seed"] for source in report["recipe"]["sources"]] == [3, 4]
    found = next(step["result"] for step in report["runs"][0]["steps"] if "compare" in step["stage"])
    assert list(found["scores"]) == ["a", "b", "ensemble", "naive", "weights + repair"]
    assert found["goes_on"] == "weights + repair"
    assert (ran.output / "tiny_barrier.png").read_bytes().startswith(b"\x89PNG")
    verdict = ran.findings[0].said("diagnose").lines[0].removeprefix("merged: ")
    assert verdict.split(":")[0] in (ran.output / "tiny.html").read_text()
    assert [rates["old"] for rates in found["flips"]["rates"]] == ["a", "b"]


def test_written_weights_are_those_of_the_last_merge(ran):
    merged = TinyConvNet(4)
    path = ran.output / "tiny.safetensors"
    load_into(merged, load_state_dict(path), path)
    score = evaluate(merged, digits().test, progress=False)
    assert score.accuracy == ran.findings[0].said("compare").scores["weights + repair"].accuracy


def test_rows_are_the_merges_of_the_trained_sources(ran):
    def source(seed: int) -> nn.Module:
        model = from_seed(lambda: TinyConvNet(4), seed)
        return train(model, digits().train, epochs=1, lr=0.05, seed=seed, progress=False)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the recipe says
    try:
        a, b = source(3), source(4)
    finally:
        torch.set_num_threads(threads)
    options = {"matching": "weights", "renormalize": "repair", "data": digits().calibration}
    scores = ran.findings[0].said("compare").scores
    assert evaluate(a, digits().test, progress=False).accuracy == scores["a"].accuracy
    assert evaluate(b, digits().test, progress=False).accuracy == scores["b"].accuracy
    merged = merge(a, b, progress=False, **options)
    assert evaluate(merged, digits().test, progress=False).loss == pytest.approx(
        scores["weights + repair"].loss, rel=1e-4
    )


def test_run_gives_back_threads_and_random_state(tinynets, tmp_path):
    torch.set_num_threads(2)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    Recipe.from_yaml(TINY).run(tmp_path / "results", progress=False)
    assert torch.get_num_threads() == threads == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_table(ran):
    lines = str(ran).splitlines()
    assert lines[0] == "tiny"
    head = lines.index("  2 compare") + 1
    assert lines[head].split() == ["accuracy", "to", "sources", "loss", "(500", "images)"]
    a, b = (ran.findings[0].said("compare").scores[source] for source in "ab")
    assert lines[head + 1].split() == [
        "a",
        f"{a.accuracy:.2%}",
        f"{50 * (a.accuracy - b.accuracy):+.2f}",
        f"{a.loss:.4f}",
    ]
    assert lines[-1].startswith(f"written to {ran.output} after ")


def test_default_folder_is_named_after_the_recipe(tinynets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.from_yaml(TINY).run(progress=False).output == Path("out/tiny")
    assert (tmp_path / "out" / "tiny" / "report.json").exists()


@pytest.mark.parametrize("spec", ["tinynets:covn", "nowhere:conv", "timm:resnt18"])
def test_model_that_cannot_be_built_stops_before_training(tinynets, tmp_path, monkeypatch, spec):
    monkeypatch.setattr("vfsurgery.recipes.stages.surgery.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(OptionError, match=spec.partition(":")[0]):
        Recipe.from_yaml(TINY.replace("tinynets:conv", spec)).run(tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["file", "file/deeper"])
def test_folder_that_cannot_be_made_stops_before_training(tinynets, tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    monkeypatch.setattr("vfsurgery.recipes.stages.surgery.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*\n  cause  .*file is no folder"):
        Recipe.from_yaml(TINY).run(tmp_path / folder)


def test_folder_without_permission_stops_before_training(tinynets, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so permissions cannot be used
    with pytest.raises(CheckpointError, match=rf"\n  cause  {re.escape(str(tmp_path))} may not be written to"):
        Recipe.from_yaml(TINY).run(tmp_path / "results")


def test_failed_merge_writes_nothing(tinynets, tmp_path):
    text = TINY.replace("epochs: 1", "epochs: 1, lr: 1.0e+30")
    with pytest.raises(SurgeryError, match="NaN"):
        Recipe.from_yaml(text).run(tmp_path / "results", progress=False)
    assert [path.name for path in (tmp_path / "results").iterdir()] == [".stages"]


def test_a_way_may_preserve_layers_and_what_goes_on_is_then_a_program(tinynets, tmp_path):
    way = "        - kept: [merge: {matching: weights, renormalize: none, preserve: 7}]\n"
    kept = TINY.replace("      flips: true\n", f"{way}      goes_on: naive\n")
    run = Recipe.from_yaml(kept).run(tmp_path / "results", progress=False)
    scores = run.findings[0].said("compare").scores
    assert scores["kept"].loss == pytest.approx(scores["ensemble"].loss, rel=1e-5)
    assert scores["naive"].loss != pytest.approx(scores["ensemble"].loss, rel=1e-5)
    assert list(run.recipe.follow())[-1][-1].files[-1] == "tiny.safetensors"
    assert list(Recipe.from_yaml(kept, {"stages.compare.goes_on": "last"}).follow())[-1][-1].files[-1] == "tiny.pt2"


def test_the_way_that_goes_on_is_the_one_that_is_written(tinynets, tmp_path):
    run = Recipe.from_yaml(TINY, {"stages.compare.goes_on": "naive"}).run(tmp_path / "results", progress=False)
    merged = TinyConvNet(4)
    path = tmp_path / "results" / "tiny.safetensors"
    load_into(merged, load_state_dict(path), path)
    scores = run.findings[0].said("compare").scores
    assert evaluate(merged, digits().test, progress=False) == scores["naive"] != scores["weights + repair"]


def test_a_grid_runs_the_ways_that_name_its_axis_once_for_each_value():
    grid = "grid: {merge.alpha: [0.25, 0.5], merge.matching: {WM: weights, direct: identity}}"
    text = TINY.replace("- naive:", "- '{matching} at {alpha%}':").replace("flips: true", grid)
    rows = Recipe.from_yaml(text).stages[1].rows
    assert [row.label for row in rows] == [
        *("WM at 25%", "WM at 50%", "direct at 25%", "direct at 50%", "weights + repair")
    ]
    assert [(row.stages[0].matching, row.stages[0].alpha) for row in rows[1:3]] == [
        ("weights", 0.5),
        ("identity", 0.25),
    ]
    with pytest.raises(
        RecipeError, match=r"grid: there is no single 'marge'|merge.alpha leads nowhere|no single 'marge'"
    ):
        Recipe.from_yaml(text.replace("merge.alpha", "marge.alpha"))
    with pytest.raises(RecipeError, match="alpha must lie in"):
        Recipe.from_yaml(text.replace("0.25", "1.25"))

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
from vfsurgery.errors import OptionError, RecipeError, SurgeryError
from vfsurgery.merging.merge import merge
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.training import from_seed, train

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

TINY = """\
name: tiny
threads: 1
pairs:
  - name: conv
    model: tinynets:conv
    seeds: [3, 4]
    training: {epochs: 1}
    merges:
      - {label: naive, matching: identity, renormalize: null}
      - {matching: weights, renormalize: repair}
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
    changed = Recipe.from_yaml(TINY.replace("repair", "[reset, repair]").replace("threads: 1", "alpha: 0.25"))
    again = Recipe.from_yaml(changed.to_yaml())
    assert again.pairs[0].merges[1].renormalize == ("reset", "repair")
    assert (again.alpha, again.threads) == (0.25, None)


def test_path_as_text(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert Recipe.from_yaml(str(tmp_path / "tiny.yaml")) == Recipe.from_yaml(TINY)


def test_recipe_is_frozen():
    recipe = Recipe.from_yaml(TINY)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


WRONG = [
    (
        "name: tiny",
        "nam: tiny",
        "unknown key 'nam' at nam remedy did you mean 'name'? accepted: alpha, data, device",
    ),
    ("threads: 1", "data: {nam: digits}", "unknown key 'nam' at data.nam remedy did you mean 'name'?"),
    ("epochs", "epoch", "unknown key 'epoch' at pairs[0].training.epoch remedy did you mean 'epochs'?"),
    ("matching: w", "maching: w", "'maching' at pairs[0].merges[1].maching remedy did you mean 'matching'?"),
    ("epochs: 1", "epochs: many", "a valid integer, found 'many' at pairs[0].training.epochs"),
    ("epochs: 1", "epochs: 0", "greater than or equal to 1, found 0 at pairs[0].training.epochs"),
    ("epochs: 1", "lr: 1e-3", "found '1e-3' at pairs[0].training.lr remedy YAML reads 1e-3 as text: write 1.0e-3"),
    ("epochs: 1", "lr: fast", "a valid number, found 'fast' at pairs[0].training.lr"),
    ("[3, 4]", "[3]", "a required key is missing at pairs[0].seeds[1]"),
    ("model: tinynets:conv", "seeds: [1, 2]", "not valid YAML cause the key 'seeds' stands twice at line 6, column 5"),
    ("    model: tinynets:conv\n", "", "a required key is missing at pairs[0].model"),
    ("name: conv", "name: ../up", "found '../up' at pairs[0].name"),
    ("threads: 1", "alpha: 1.5", "less than or equal to 1, found 1.5 at alpha"),
    (
        "threads: 1",
        "data: {name: cifar}",
        "unknown data set 'cifar'; did you mean 'cifar10'? accepted: cifar10, cifar100, digits",
    ),
    ("matching: weights", "matching: weigths", "unknown matching 'weigths'; did you mean 'weights'? accepted: act"),
    ("repair", "repiar", "unknown renormalization 'repiar'; did you mean 'repair'? accepted: auto, bias-calibration"),
    ("repair", "[reset, auto]", "unknown renormalization 'auto'; accepted: bias-calibration, bias-removal, cl"),
    ("repair", "[reset, 3]", "at pairs[0].merges[1].renormalize"),
    ("{matching: weights, renormalize: repair}", "{label: naive}", "two entries have the merge name 'naive' at pairs"),
    ("name: tiny", "name: [tiny", "the recipe is not valid YAML cause"),
]


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
    assert "speed" in str(caught.value) and "pairs[0].training.epochs" in str(caught.value)


def test_pair_names_differ():
    pair = TINY[TINY.index("  - name: conv") :]
    with pytest.raises(RecipeError, match=r"two entries have the experiment name 'conv'"):
        Recipe.from_yaml(TINY + pair)


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
        "README.md",
        "conv.html",
        "conv.safetensors",
        "conv_barrier.png",
        "report.json",
    ]
    report = json.loads((ran.output / "report.json").read_text())
    assert report == json.loads(json.dumps(ran.to_dict()))
    assert report["recipe"]["pairs"][0]["seeds"] == [3, 4]
    assert list(report["pairs"][0]["scores"]) == ["source a", "source b", "ensemble", "naive", "weights + repair"]
    assert (ran.output / "conv_barrier.png").read_bytes().startswith(b"\x89PNG")
    assert ran.comparisons[0].diagnosis.verdict.split(":")[0] in (ran.output / "conv.html").read_text()
    assert [rates["old"] for rates in report["pairs"][0]["flips"]["rates"]] == ["source a", "source b"]


def test_written_weights_are_those_of_the_last_merge(ran):
    merged = TinyConvNet(4)
    path = ran.output / "conv.safetensors"
    load_into(merged, load_state_dict(path), path)
    score = evaluate(merged, digits().test, progress=False)
    assert score.accuracy == ran.comparisons[0].scores["weights + repair"].accuracy


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
    scores = ran.comparisons[0].scores
    assert evaluate(a, digits().test, progress=False).accuracy == scores["source a"].accuracy
    assert evaluate(b, digits().test, progress=False).accuracy == scores["source b"].accuracy
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
    assert lines[0] == "conv"
    assert lines[1].split() == ["accuracy", "to", "sources", "loss"]
    a, b = (ran.comparisons[0].scores[source].accuracy for source in ("source a", "source b"))
    assert lines[2].split() == ["source", "a", f"{a:.2%}", f"{50 * (a - b):+.2f}", lines[2].split()[-1]]
    assert lines[-1].startswith(f"written to {ran.output} after ")


def test_default_folder_is_named_after_the_recipe(tinynets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.from_yaml(TINY).run(progress=False).output == Path("out/tiny")
    assert (tmp_path / "out" / "tiny" / "report.json").exists()


@pytest.mark.parametrize("spec", ["tinynets:covn", "nowhere:conv", "timm:resnt18"])
def test_model_that_cannot_be_built_stops_before_training(tinynets, tmp_path, monkeypatch, spec):
    monkeypatch.setattr("vfsurgery.recipes.experiments.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(OptionError, match=spec.partition(":")[0]):
        Recipe.from_yaml(TINY.replace("tinynets:conv", spec)).run(tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["file", "file/deeper"])
def test_folder_that_cannot_be_made_stops_before_training(tinynets, tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    monkeypatch.setattr("vfsurgery.recipes.experiments.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(RecipeError, match=r"cannot write results into .*file.*\n  cause   .*file is a file\n  remedy"):
        Recipe.from_yaml(TINY).run(tmp_path / folder)


def test_folder_without_permission_stops_before_training(tinynets, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so permissions cannot be used
    with pytest.raises(RecipeError, match=rf"\n  cause   {re.escape(str(tmp_path))} is not writable\n"):
        Recipe.from_yaml(TINY).run(tmp_path / "results")


def test_failed_merge_writes_nothing(tinynets, tmp_path):
    text = TINY.replace("name: conv", "name: bad").replace("epochs: 1", "epochs: 1, lr: 1.0e+30")
    with pytest.raises(SurgeryError, match="NaN"):
        Recipe.from_yaml(text).run(tmp_path / "results", progress=False)
    assert not (tmp_path / "results").exists()


def test_a_merge_may_preserve_layers_but_not_the_last_one(tinynets, tmp_path):
    kept = TINY.replace(
        "      - {matching: weights",
        "      - {matching: weights, renormalize: null, preserve: 7}\n      - {matching: weights",
    )
    run = Recipe.from_yaml(kept).run(tmp_path / "results", progress=False)
    scores = run.comparisons[0].scores
    assert scores["weights + preserve 7"].loss == pytest.approx(scores["ensemble"].loss, rel=1e-5)
    assert scores["naive"].loss != pytest.approx(scores["ensemble"].loss, rel=1e-5)
    with pytest.raises(RecipeError, match=r"the last merge has preserve, but its weights are written: put one"):
        Recipe.from_yaml(TINY.replace("renormalize: repair", "renormalize: repair, preserve: 2"))

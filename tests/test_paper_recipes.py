"""The paper's recipes are runnable, their networks are the paper's, and what a recipe expects decides its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from vfsurgery.__main__ import main
from vfsurgery.checkpoints import save_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import CheckpointError, OptionError, RecipeError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.networks.paper_networks import VGG16, ResNet20, vision_transformer
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.recipes.stages import comparing
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.scoring.expectations import Expectation
from vfsurgery.training import from_seed

RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "paper").glob("*.yaml"))

TINY = """\
name: tiny
source: a table
data: {name: cifar10, path: /nowhere}
threads: 1
sources:
  - {model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 64}}
  - {}
stages:
  - train: {epochs: 100, milestones: [32000, 48000], warmup: 1, augment: true}
  - compare:
      ways:
        - direct: {merge: {matching: identity, renormalize: none}}
        - k=7: {merge: {matching: weights, renormalize: none, preserve: 7}}
        - matched: {merge: {matching: weights, renormalize: none, alpha: 0.3}}
        - repaired: {merge: {matching: weights, renormalize: repair}}
      published: {a: 93.5, direct: 10}
      expect: [direct < a, a within 0.5 of published]
  - barrier: {published: {barrier aligned: 70.0}}
reduced:
  data: {name: digits}
  sources.0.options.width: 4
  stages.train: {epochs: 2}
  stages.barrier.alphas: 3
  stages.compare.expect: [direct < a]
"""


def run(folder: Path, text: str, *options: object):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(text)
    arguments = ["run", folder / "tiny.yaml", "-o", folder / "results", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the tiny recipe's reduced form, run once with one expectation that cannot hold, and the result."""
    folder = tmp_path_factory.mktemp("paper")
    return folder, run(folder, TINY.replace("expect: [direct < a]", "expect: [a < direct, direct < a]"), "--reduced")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_paper_are_valid_in_both_forms(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.name == path.stem and recipe.source is not None
    assert f"vfsurgery run recipes/paper/{path.name} --reduced" in path.read_text()
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe and hash(recipe)
    reduced = Recipe.from_yaml(path, reduced=True)
    assert reduced.data.name == "digits" and not reduced.reduced and reduced.name == f"{recipe.name}-reduced"
    tables = [next(stage for stage in each.stages if stage.name == "compare") for each in (recipe, reduced)]
    assert tables[0].published and any(expected.points for expected in tables[0].expectations)
    assert tables[1].expectations and not any(expected.points for expected in tables[1].expectations)
    for full, small in zip(recipe.sources, reduced.sources, strict=True):
        counts = [sum(tensor.numel() for tensor in source.build().parameters()) for source in (full, small)]
        assert counts[1] < counts[0]


def test_there_is_a_recipe_for_each_table():
    assert len(RECIPES) == 7


@pytest.mark.parametrize(
    ("build", "count"), [(VGG16, 14719818), (lambda: VGG16(batch_norm=True), 14728266), (ResNet20, 272474)]
)
def test_networks_have_as_many_parameters_as_the_paper_counts(build, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == count


def test_vision_transformer_has_the_counts_of_the_table():
    """In millions, of layers' own tensors; preserving also costs a map of the residual stream and the patches."""
    with torch.device("meta"):
        model = vision_transformer()
    layers = [module for module in model.modules() if not list(module.children())]
    parameters = sum(tensor.numel() for layer in layers for tensor in layer.parameters(recurse=False))
    patches = sum(tensor.numel() for tensor in model.patch_embed.parameters())
    block = sum(tensor.numel() for tensor in model.blocks[0].parameters())
    stream = 384 * 384
    counts = [parameters, *(parameters + patches + stream + k * block for k in (3, 4, 5, 6))]
    assert [round(count / 1e6, 2) for count in counts] == [12.44, 17.93, 19.71, 21.48, 23.26]
    # the published FLOPs: patches at each of their 64 places, every linear layer once and without its bias
    flops = 64 * patches + sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    of_block = sum(layer.weight.numel() for layer in model.blocks[0].modules() if isinstance(layer, nn.Linear))
    counts = [flops, *(flops + 64 * patches + stream + k * of_block for k in (3, 4, 5, 6))]
    assert [round(count / 1e6, 2) for count in counts] == [13.59, 20.25, 22.02, 23.79, 25.56]


def test_layers_of_a_network_are_its_own():
    model = VGG16(width=2, batch_norm=True)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 13 and kinds.count(nn.MaxPool2d) == 4


def test_reduced_form_changes_what_it_says_and_nothing_else():
    recipe, reduced = Recipe.from_yaml(TINY), Recipe.from_yaml(TINY, reduced=True)
    assert (reduced.name, reduced.data.name, reduced.threads) == ("tiny-reduced", "digits", 1)
    train, compare, line = reduced.stages
    assert [source.options for source in reduced.sources] == [{"width": 4}] * 2  # the second has those of the first
    assert (line.alphas, line.published, train.epochs) == (3, {"barrier aligned": 70.0}, 2)
    assert train.milestones is None  # what is named is replaced as a whole
    assert (compare.ways, compare.published) == (recipe.stages[1].ways, recipe.stages[1].published)
    assert compare.expect == ("direct < a",)
    other = Recipe.from_yaml(TINY, {"stages.train.epochs": 3}, reduced=True)  # --set has the last word
    assert other.stages[0].epochs == 3 and other.stages[2].alphas == 3


def test_what_is_wrong_in_the_reduced_form_has_its_line():
    line = TINY[: TINY.index("  stages.train: {epochs: 2}")].count("\n") + 1
    with pytest.raises(RecipeError, match=rf"^the recipe:{line}: in the reduced form, unknown key 'epoch'"):
        Recipe.from_yaml(TINY.replace("{epochs: 2}", "{epoch: 2}"))


def test_recipe_without_a_reduced_form():
    with pytest.raises(RecipeError, match=r"tiny has no reduced form\n  remedy  leave --reduced out"):
        Recipe.from_yaml(TINY[: TINY.index("reduced:")], reduced=True)


WRONG = [
    ("direct < a,", "dirct < a,", "unknown row 'dirct'; did you mean 'direct'? accepted: a, b, direct"),
    ("direct < a,", "direct > a,", "'direct > a' expects nothing: write LABEL < LABEL, or LABEL wi"),
    ("direct < a,", "direct < ,", "'direct <' expects nothing"),
    ("a within", "repaired within", "nothing is published for 'repaired', so it can be in no band around it"),
    ("direct: 10", "dirct: 10", "unknown row 'dirct'; did you mean 'direct'?"),
    ("direct: 10", "direct: ten", "a valid number, found 'ten' at stages[1].compare.published.direct"),
    ("aligned: 70.0", "alined: 70.0", "unknown row 'barrier alined'; did you mean 'barrier aligned'?"),
    ("path: /nowhere", "seed: 1", "cifar10 needs path, the folder that holds it at data"),
    (
        "path: /nowhere",
        "path: /nowhere, size: 16",
        "cifar10 has no size; accepted: calibration, mean, name, path, seed, std, tes",
    ),
    ("{name: digits}", "{name: digits, train: 5}", "in the reduced form, digits has no train; accepted: name, seed, s"),
    ("milestones: [32000, 48000], ", "", "warmup comes with milestones: a learning-rate cycle rises by itself"),
    ("{epochs: 2}", "{epoch: 2}", "in the reduced form, unknown key 'epoch' at stages[0].train.epoch remedy did you m"),
    ("stages.train: ", "stages.trian: ", "stages.trian leads nowhere: there is no single 'trian'"),
    ("alphas: 3", "alphas: 4", "in the reduced form, alphas is 4: only odd numbers of points"),
    ("expect: [direct < a]", "ways: [x: merge]", "in the reduced form, unknown row 'direct'"),
    ("threads: 1", "device: gpu", "unknown device 'gpu'; accepted: auto, cpu, cuda, cuda:N at device"),
    ("reduced:", "reduced: 3\nrest:", "unknown key 'rest'"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[new for _, new, _ in WRONG])
def test_wrong_recipe_is_explained(old, new, message):
    assert old in TINY
    with pytest.raises(RecipeError, match=r"^the recipe:") as caught:
        Recipe.from_yaml(TINY.replace(old, new))
    assert message in " ".join(str(caught.value).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"cannot compute on device 'cuda'\n  cause .*\n  remedy  auto takes CUDA"):
        Recipe.from_yaml(TINY.replace("threads: 1", "device: cuda")).run(tmp_path, progress=False)


def test_missing_data_says_where_and_how_to_get_it(tmp_path):
    result = run(tmp_path, TINY)
    assert result.exit_code == 1
    assert "there is no cifar10 in /nowhere" in result.stderr and "download=True" in result.stderr


def test_a_failing_expectation_is_exit_code_1_and_named(ran):
    _, result = ran
    assert result.exit_code == 1
    assert "FAILS  a < direct  (" in result.stderr and "holds" not in result.stderr
    assert "holds  direct < a  (" in result.stdout


def test_published_stands_beside_measured(ran):
    lines = ran[1].stdout.splitlines()
    assert lines[lines.index("  2 compare") + 1].split()[:5] == ["accuracy", "published", "to", "sources", "loss"]
    row = next(line for line in lines if line.startswith("    direct "))
    assert row.split()[2] == "10.00%"
    assert next(line for line in lines if "barrier aligned" in line).split()[-1] == "70.00%"


def test_report_holds_the_expectations(ran):
    report = json.loads((ran[0] / "results" / "report.json").read_text())
    run = report["runs"][0]
    steps = {next(iter(step["stage"])): step["result"] for step in run["steps"]}
    assert [(found["text"], found["holds"]) for found in run["expectations"]] == [
        ("a < direct", False),
        ("direct < a", True),
    ]
    scores = steps["compare"]["scores"]
    assert run["expectations"][0]["found"] == [100 * scores[row]["accuracy"] for row in ("a", "direct")]
    assert report["recipe"]["stages"][1]["compare"]["published"]["direct"] == 10
    assert len(steps["barrier"]["curves"]["aligned"]["alphas"]) == 3


def test_given_checkpoints_are_merged_instead_of_trained_ones(ran, tmp_path, monkeypatch):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        save_state_dict(from_seed(lambda: TinyConvNet(4), 7 + seed).state_dict(), file)
    monkeypatch.setattr("vfsurgery.recipes.stages.surgery.train", lambda *args, **kwargs: pytest.fail("trained"))
    text = f"""\
name: given
data: {{}}
sources:
  - {{model: "vfsurgery.networks.demo:TinyConvNet", options: {{width: 4}}, checkpoint: {files[0]}}}
  - {files[1]}
stages:
  - compare: {{ways: [naive: {{merge: {{matching: identity, renormalize: none}}}}]}}
"""
    scores = Recipe.from_yaml(text).run(tmp_path / "results", progress=False).findings[0].said("compare").scores
    for seed, row in enumerate("ab"):
        expected = evaluate(from_seed(lambda: TinyConvNet(4), 7 + seed), digits().test, progress=False)
        assert scores[row] == expected
    with pytest.raises(CheckpointError, match=r"does not fit TinyConvNet"):
        Recipe.from_yaml(text.replace("width: 4", "width: 5")).run(tmp_path / "other", progress=False)


def compared(folder: Path, **ways: dict) -> dict:
    """The scores of ways to merge two untrained networks."""
    content = {
        "name": "x",
        "data": {},
        "sources": [{"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}}, {}],
        "stages": [{"compare": {"ways": [{label: {"merge": options}} for label, options in ways.items()]}}],
    }
    return Recipe.from_yaml(yaml.safe_dump(content)).run(folder, progress=False).findings[0].said("compare").scores


def test_a_matching_found_once_gives_the_rows_of_one_found_every_time(tmp_path, monkeypatch):
    kept = {"matching": "zipit", "renormalize": None, "preserve": 2}
    merged = {"matching": "zipit", "renormalize": "rescale"}
    found: list[object] = []
    original = comparing.match
    monkeypatch.setattr(
        comparing, "match", lambda *models, **options: found.append(options) or original(*models, **options)
    )
    together = compared(tmp_path / "together", kept=kept, merged=merged, last=merged)
    assert len(found) == 1
    alone = compared(tmp_path / "alone", kept=kept, last=merged)
    assert len(found) == 1
    assert together["kept"].loss == pytest.approx(alone["kept"].loss, rel=1e-5)
    assert together["merged"].loss == pytest.approx(together["last"].loss, rel=1e-5)
    assert together["kept"].loss != pytest.approx(together["last"].loss, rel=1e-3)


def test_a_row_may_have_an_alpha_of_its_own(tmp_path):
    plain = {"matching": "identity", "renormalize": None}
    scores = compared(tmp_path, first={**plain, "alpha": 0.0}, second={**plain, "alpha": 1.0}, middle=plain)
    assert scores["first"].loss == pytest.approx(scores["a"].loss, rel=1e-6)
    assert scores["second"].loss == pytest.approx(scores["b"].loss, rel=1e-6)
    assert scores["middle"].loss != pytest.approx(scores["a"].loss, rel=1e-3)


def test_expectations_are_strict_and_nan_meets_none():
    assert not Expectation.parse("a < b").check({"a": 1.0, "b": 1.0}).holds
    assert not Expectation.parse("a < b").check({"a": 1.0, "b": float("nan")}).holds
    band = Expectation.parse("a within 1.5 of published")
    assert band.check({"a": 11.5}, {"a": 10.0}).holds
    assert not band.check({"a": 11.6}, {"a": 10.0}).holds
    assert not band.check({"a": float("nan")}, {"a": 10.0}).holds

"""The paper's recipes are runnable, their networks are the paper's, and what a recipe expects decides its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from vfsurgery.__main__ import main
from vfsurgery.checkpoints import save_state_dict
from vfsurgery.data import digits
from vfsurgery.errors import CheckpointError, RecipeError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.networks.paper_networks import VGG16, ResNet20, vision_transformer
from vfsurgery.recipes.comparison import compare_merges
from vfsurgery.recipes.expectations import Expectation
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.training import from_seed

RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "paper").glob("*.yaml"))

TINY = """\
name: tiny
source: a table
data: {name: cifar10, path: /nowhere}
threads: 1
pairs:
  - name: net
    model: vfsurgery.networks.demo:TinyConvNet
    options: {width: 64}
    training: {epochs: 100, milestones: [32000, 48000], warmup: 1, augment: true}
    merges:
      - {label: direct, matching: identity, renormalize: null}
      - {label: k=7, matching: weights, renormalize: null, preserve: 7}
      - {label: matched, matching: weights, renormalize: null, alpha: 0.3}
      - {label: repaired, matching: weights, renormalize: repair}
    published: {source a: 93.5, direct: 10, barrier aligned: 70.0}
    expect: [direct < source a, source a within 0.5 of published]
reduced:
  data: {}
  pairs:
    - {name: net, options: {width: 4}, training: {epochs: 2}, alphas: 3}
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
    return folder, run(folder, TINY.replace("expect: [", "expect: [source a < direct, "), "--reduced")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_paper_are_valid_in_both_forms(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.name == path.stem and recipe.source is not None
    assert f"vfsurgery run recipes/paper/{path.name} --reduced" in path.read_text()
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe and hash(recipe)
    reduced = recipe.in_reduced_form()
    assert reduced.data.name == "digits" and reduced.reduced is None
    for full, small in zip(recipe.pairs, reduced.pairs, strict=True):
        assert full.published and any(expected.points for expected in full.expectations)
        assert small.expectations and not any(expected.points for expected in small.expectations)
        counts = [sum(tensor.numel() for tensor in pair.build().parameters()) for pair in (full, small)]
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
    recipe = Recipe.from_yaml(TINY)
    reduced = recipe.in_reduced_form()
    assert (reduced.name, reduced.data.name, reduced.threads) == ("tiny-reduced", "digits", 1)
    pair, full = reduced.pairs[0], recipe.pairs[0]
    assert (pair.options, pair.alphas, pair.training.epochs) == ({"width": 4}, 3, 2)
    assert pair.training.milestones is None  # training is replaced as a whole
    assert (pair.merges, pair.published, pair.seeds) == (full.merges, full.published, full.seeds)
    assert pair.expect == ("direct < source a",)  # bands belong to the full form


def test_reduced_merges_keep_the_published_rows_that_are_left():
    merges = "merges: [{label: direct, matching: identity, renormalize: null}]"
    pair = Recipe.from_yaml(TINY.replace("alphas: 3}", f"alphas: 3, {merges}}}")).in_reduced_form().pairs[0]
    assert pair.merges[0].renormalize is None
    assert pair.published == {"source a": 93.5, "direct": 10, "barrier aligned": 70.0}
    with pytest.raises(RecipeError, match=r"in the reduced form, at pairs\[0\]: .*unknown row 'direct'"):
        Recipe.from_yaml(TINY.replace("alphas: 3}", "alphas: 3, merges: [{label: one}]}"))


def test_recipe_without_a_reduced_form():
    with pytest.raises(RecipeError, match=r"tiny has no reduced form\n  remedy  leave --reduced out"):
        Recipe.from_yaml(TINY[: TINY.index("reduced:")]).in_reduced_form()


WRONG = [
    ("direct < source a", "dirct < source a", "unknown row 'dirct'; did you mean 'direct'? accepted: barrier aligned"),
    ("direct < source a", "direct > source a", "'direct > source a' expects nothing: write LABEL < LABEL, or LABEL wi"),
    ("direct < source a", "direct < ", "'direct <' expects nothing"),
    ("source a within", "repaired within", "nothing is published for 'repaired', so it can be in no band around it"),
    ("direct: 10", "dirct: 10", "unknown row 'dirct'; did you mean 'direct'?"),
    ("direct: 10", "direct: ten", "a valid number, found 'ten' at pairs[0].published.direct"),
    ("path: /nowhere", "seed: 1", "cifar10 needs path, the folder that holds it at data"),
    (
        "path: /nowhere",
        "path: /nowhere, size: 16",
        "cifar10 has no size; accepted: calibration, mean, name, path, seed, std, tes",
    ),
    ("data: {}", "data: {train: 5}", "digits has no train; accepted: name, seed, size at reduced.data"),
    ("milestones: [32000, 48000], ", "", "warmup comes with milestones: a learning-rate cycle rises by itself"),
    ("training: {epochs: 2}", "training: {epoch: 2}", "'epoch' at reduced.pairs[0].training.epoch remedy did you mea"),
    ("{name: net, options", "{name: ent, options", "unknown reduced pair 'ent'; did you mean 'net'?"),
    ("alphas: 3", "alphas: 4", "in the reduced form, at pairs[0].alphas: Value error, alphas is 4: only odd"),
    ("renormalize: repair", "renormalize: repair, alpha: 0.3", "the last merge has alpha, but the line is measured"),
    ("threads: 1", "device: gpu", "unknown device 'gpu'; accepted: auto, cpu, cuda, cuda:N at device"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[new for _, new, _ in WRONG])
def test_wrong_recipe_is_explained(old, new, message):
    assert old in TINY
    with pytest.raises(RecipeError, match=r"^the recipe:") as caught:
        Recipe.from_yaml(TINY.replace(old, new))
    assert message in " ".join(str(caught.value).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no device cuda\n  remedy  write device: auto"):
        Recipe.from_yaml(TINY.replace("threads: 1", "device: cuda")).run(tmp_path, progress=False)


def test_missing_data_says_where_and_how_to_get_it(tmp_path):
    result = run(tmp_path, TINY)
    assert result.exit_code == 1
    assert "there is no cifar10 in /nowhere" in result.stderr and "download=True" in result.stderr


def test_a_failing_expectation_is_exit_code_1_and_named(ran):
    _, result = ran
    assert result.exit_code == 1
    assert "FAILS  source a < direct  (" in result.stderr and "holds" not in result.stderr
    assert "holds  direct < source a  (" in result.stdout


def test_published_stands_beside_measured(ran):
    lines = ran[1].stdout.splitlines()
    assert lines[1].split() == ["accuracy", "published", "to", "sources", "loss"]
    row = next(line for line in lines if line.startswith("  direct "))
    assert row.split()[2] == "10.00%"
    assert next(line for line in lines if "barrier aligned" in line).split()[-1] == "70.00%"


def test_report_holds_the_expectations(ran):
    report = json.loads((ran[0] / "results" / "report.json").read_text())
    pair = report["pairs"][0]
    assert [(found["text"], found["holds"]) for found in pair["expectations"]] == [
        ("source a < direct", False),
        ("direct < source a", True),
    ]
    assert pair["expectations"][0]["found"] == [100 * pair["scores"][row]["accuracy"] for row in ("source a", "direct")]
    assert report["recipe"]["pairs"][0]["published"]["direct"] == 10
    assert len(pair["barrier"]["curves"]["aligned"]["alphas"]) == 3


def test_given_checkpoints_are_merged_instead_of_trained_ones(ran, tmp_path, monkeypatch):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        save_state_dict(from_seed(lambda: TinyConvNet(4), 7 + seed).state_dict(), file)
    monkeypatch.setattr("vfsurgery.recipes.experiments.train", lambda *args, **kwargs: pytest.fail("trained"))
    text = f"""\
name: given
pairs:
  - name: net
    model: vfsurgery.networks.demo:TinyConvNet
    options: {{width: 4}}
    checkpoints: [{files[0]}, {files[1]}]
    alphas: 3
    merges: [{{matching: identity, renormalize: null}}]
"""
    scores = Recipe.from_yaml(text).run(tmp_path / "results", progress=False).comparisons[0].scores
    for seed, row in enumerate(["source a", "source b"]):
        expected = evaluate(from_seed(lambda: TinyConvNet(4), 7 + seed), digits().test, progress=False)
        assert scores[row] == expected
    with pytest.raises(CheckpointError, match=r"does not fit TinyConvNet"):
        Recipe.from_yaml(text.replace("width: 4", "width: 5")).run(tmp_path / "other", progress=False)


def test_a_matching_found_once_gives_the_rows_of_one_found_every_time():
    a, b = (from_seed(lambda: TinyConvNet(4), seed) for seed in (0, 1))
    kept = {"matching": "zipit", "renormalize": None, "preserve": 2}
    merged = {"matching": "zipit", "renormalize": "rescale"}
    images, test = digits().calibration, digits().test
    options = {"calibration": images, "test": test, "alphas": 3, "progress": False}
    together = compare_merges("x", a, b, {"kept": kept, "merged": merged, "last": merged}, **options)
    alone = compare_merges("x", a, b, {"kept": kept, "last": merged}, **options)
    assert together.scores["kept"].loss == pytest.approx(alone.scores["kept"].loss, rel=1e-5)
    assert together.scores["merged"].loss == pytest.approx(together.scores["last"].loss, rel=1e-5)
    assert together.scores["kept"].loss != pytest.approx(together.scores["last"].loss, rel=1e-3)


def test_a_row_may_have_an_alpha_of_its_own():
    a, b = (from_seed(lambda: TinyConvNet(4), seed) for seed in (0, 1))
    plain = {"matching": "identity", "renormalize": None}
    rows = {"a": {**plain, "alpha": 0.0}, "b": {**plain, "alpha": 1.0}, "middle": plain}
    options = {"calibration": digits().calibration, "test": digits().test, "alphas": 3, "progress": False}
    scores = compare_merges("x", a, b, rows, **options).scores
    assert scores["a"].loss == pytest.approx(scores["source a"].loss, rel=1e-6)
    assert scores["b"].loss == pytest.approx(scores["source b"].loss, rel=1e-6)
    assert scores["middle"].loss != pytest.approx(scores["source a"].loss, rel=1e-3)


def test_expectations_are_strict_and_nan_meets_none():
    assert not Expectation.parse("a < b").check({"a": 1.0, "b": 1.0}).holds
    assert not Expectation.parse("a < b").check({"a": 1.0, "b": float("nan")}).holds
    band = Expectation.parse("a within 1.5 of published")
    assert band.check({"a": 11.5}, {"a": 10.0}).holds
    assert not band.check({"a": 11.6}, {"a": 10.0}).holds
    assert not band.check({"a": float("nan")}, {"a": 10.0}).holds

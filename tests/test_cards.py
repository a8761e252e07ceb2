"""A card says what is known about a network and how to load it, and never more than that."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from quick_cli import call
from torch import nn

import vfsurgery as surgery
from vfsurgery.checkpoints import file_hash, save_sharded, save_state_dict
from vfsurgery.errors import CheckpointError, OptionError
from vfsurgery.hub.cards import CARD, Card, Network, Summary, base_models, escape_markdown, is_card
from vfsurgery.hub.loading import Written, write_config
from vfsurgery.networks.architectures import build_model
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.pruning import PrunedLayer, PruneReport
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.training import from_seed

DEMO = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8", "--quiet"]
SMALL = ["--model", "timm:test_resnet", "--num-classes", "5", "--input-size", "3x32x32", "--quiet"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

RECIPE = """\
name: tiny
threads: 1
data: {name: digits}
sources: [{model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}, {}]
stages:
  - train: {epochs: 1}
  - compare: {ways: ["naive | <b>": {merge: {matching: identity, renormalize: none}}]}
  - barrier: {alphas: 3}
  - export: [conv.safetensors]
"""


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def report(model: str = "Net") -> PruneReport:
    layers = (PrunedLayer("fc.weight", 10, 5),)
    return PruneReport(model, "magnitude", "global", 0.5, layers, 12, seed=0, seconds=0.1)


def card(written: Written, **options) -> Card:
    network = Network(name="net", written=written, summary=Summary.of(report()), **options)
    return Card(title="net", summary="A net.", networks=[network])


def load_as_the_card_says(folder: Path, monkeypatch) -> nn.Module:
    """Run the code of the first block."""
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)\n```", (folder / CARD).read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, nn.Module] = {}
    exec(code[1], names)
    return names["model"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "models" / "a.safetensors", tmp_path / "models" / "b.safetensors"
    for seed, path in enumerate(paths):
        save_state_dict(from_seed(TinyConvNet, seed).state_dict(), path)
    return paths


@pytest.fixture
def timm_pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "models" / "a.safetensors", tmp_path / "models" / "b.safetensors"
    for seed, path in enumerate(paths):
        net = from_seed(lambda: build_model("timm:test_resnet", 5), seed)
        save_state_dict(net.state_dict(), path)
    return paths


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    return Recipe.from_yaml(RECIPE).run(tmp_path_factory.mktemp("run") / "tiny", progress=False).output


def test_the_card_of_a_run_is_one_that_the_hub_reads(ran):
    data = ModelCard.load(ran / CARD).data
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["vfsurgery", "merge"]
    assert (data.license, data.base_model, data.library_name) == (None, None, None)
    result = data.eval_results[0]
    assert (result.dataset_name, result.metric_type) == ("digits", "accuracy")


def test_the_card_of_a_run_has_everything_that_is_known(ran):
    text = (ran / CARD).read_text()
    assert "vfsurgery.networks.demo:TinyConvNet, from seed 0" in text
    assert "of 297 calibration images of digits" in text
    assert "aligned source 1 == source 1: holds" in text
    assert "(tiny_barrier.png)" in text
    assert file_hash(ran / "conv.safetensors") in text
    recipe = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert recipe is not None
    assert Recipe.from_yaml(recipe[1]) == Recipe.from_yaml(RECIPE)


def test_hub_models_are_the_base():
    assert base_models(["timm:hf-hub:ada/a@main", "timm:resnet18", "timm:hf-hub:ada/a"]) == ["ada/a"]
    assert base_models(["vfsurgery.networks.demo:TinyConvNet"]) == []


def test_labels_stay_in_their_cells(ran):
    assert re.search(r"^\| naive \\\| &lt;b&gt; \| [\d.]+ \|$", (ran / CARD).read_text(), re.MULTILINE)


def test_a_run_loads_as_its_card_says(ran, monkeypatch):
    loaded = load_as_the_card_says(ran, monkeypatch)
    assert isinstance(loaded, TinyConvNet)
    assert not loaded.training


def test_the_only_network_of_a_run_is_one_that_timm_loads(tmp_path, monkeypatch):
    options = "{num_classes: 10, in_chans: 1}"
    recipe = RECIPE.replace("vfsurgery.networks.demo:TinyConvNet", "timm:test_resnet").replace("{width: 4}", options)
    done = Recipe.from_yaml(recipe).run(tmp_path / "tiny", progress=False)
    loaded = load_as_the_card_says(done.output, monkeypatch)
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    torch.testing.assert_close(loaded(images), done.findings[0].bench.networks["merged"].model(images))
    config = json.loads((done.output / "config.json").read_text())
    assert config["pretrained_cfg"]["hf_hub_filename"] == "conv.safetensors"  # what timm takes from the Hub
    assert ModelCard.load(done.output / CARD).data.library_name == "timm"


def test_another_readme_stops_a_run_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("vfsurgery.recipes.recipe.Images.load", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / CARD).write_text("# My project\n\nuses vfsurgery\n")
    with pytest.raises(CheckpointError, match=r"README\.md is there and no card of vfsurgery\n  remedy  name a folder"):
        Recipe.from_yaml(RECIPE).run(tmp_path, progress=False)
    assert (tmp_path / CARD).read_text().startswith("# My project")


def test_an_edited_card_is_still_one(ran, tmp_path):
    (tmp_path / CARD).write_text((ran / CARD).read_text().replace("tags:", "license: mit\ntags:") + "\nMine.\n")
    assert is_card(tmp_path / CARD)
    (tmp_path / CARD).write_text((ran / CARD).read_text().replace("- vfsurgery\n", "", 1))
    assert not is_card(tmp_path / CARD)


def test_a_merge_with_a_card_is_a_folder_that_timm_loads(timm_pair, tmp_path, monkeypatch):
    done("merge", *timm_pair, *SMALL, "--alpha", "0.3", "--card", "-o", tmp_path / "ab" / "model.safetensors")
    folder = tmp_path / "ab"
    names = {"README.md", "config.json", "model.safetensors", "model.report.json"}
    assert {path.name for path in folder.iterdir()} == names
    text = (folder / CARD).read_text()
    data = ModelCard.load(folder / CARD).data
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-classification")
    assert [f"{path.name}, SHA-256 {file_hash(path)}" in text for path in timm_pair] == [True, True]
    assert "vfsurgery merge a.safetensors b.safetensors --model timm:test_resnet --num-classes 5" in text
    assert "--input-size 3x32x32 --alpha 0.3" in text
    assert str(tmp_path) not in text  # nobody needs to know where it lay
    expected = build_model("timm:test_resnet", 5)
    expected.load_state_dict(surgery.checkpoints.load_state_dict(folder / "model.safetensors"))
    loaded = load_as_the_card_says(folder, monkeypatch)
    torch.testing.assert_close(loaded(IMAGES), expected.eval()(IMAGES))


def test_a_merge_under_another_name_is_loaded_by_that(timm_pair, tmp_path, monkeypatch):
    done("merge", *timm_pair, *SMALL, "--card", "-o", tmp_path / "ab" / "ab.safetensors")
    assert not (tmp_path / "ab" / "config.json").exists()
    assert load_as_the_card_says(tmp_path / "ab", monkeypatch).num_classes == 5


@pytest.mark.parametrize(
    ("name", "options"),
    [("ab.safetensors", ["--max-shard-size", "200KB"]), ("ab.pt2", ["--preserve", "2"])],
    ids=["shards", "program"],
)
def test_other_forms_load_as_the_card_says(pair, tmp_path, monkeypatch, name, options):
    done("merge", *pair, *DEMO, *options, "--card", "-o", tmp_path / "ab" / name)
    loaded = load_as_the_card_says(tmp_path / "ab", monkeypatch)
    assert loaded(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_merge_without_card_writes_none(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab" / "ab.safetensors")
    assert not (tmp_path / "ab" / CARD).exists()


def test_a_card_changes_no_weights_and_replays(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "plain" / "ab.safetensors")
    done("merge", *pair, *DEMO, "--card", "-o", tmp_path / "card" / "ab.safetensors")
    assert file_hash(tmp_path / "plain" / "ab.safetensors") == file_hash(tmp_path / "card" / "ab.safetensors")
    done("replay", tmp_path / "card" / "ab.report.json", "--quiet")


def test_prune_and_renormalize_write_cards(pair, tmp_path, monkeypatch):
    pruned = tmp_path / "pruned" / "model.safetensors"
    done(
        "prune", pair[0], *DEMO, "--sparsity", "0.5", "--exclude", "fc", "--exclude", "convs.0", "--card", "-o", pruned
    )
    text = (pruned.parent / CARD).read_text()
    assert "--exclude fc --exclude convs.0 --input-size 1x8x8 --card" in text
    assert "| statistics | none: the weights alone |" in text
    assert ModelCard.load(pruned.parent / CARD).data.tags == ["vfsurgery", "pruned"]
    assert text.split("\n# ")[1].startswith("pruned\n")  # the folder's name
    repaired = tmp_path / "repaired" / "r.safetensors"
    done("renormalize", pruned, pair[0], *DEMO, "--data", "digits", "--limit", "64", "--card", "-o", repaired)
    assert ModelCard.load(repaired.parent / CARD).data.tags == ["vfsurgery", "renormalized"]
    assert "of at most 64 images of digits" in (repaired.parent / CARD).read_text()
    assert isinstance(load_as_the_card_says(repaired.parent, monkeypatch), TinyConvNet)


def test_what_is_known_only_to_the_user_is_said_when_told(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"")
    told = Card(
        title="net",
        summary="A net.",
        networks=card(Written(("net.safetensors",), "torchvision:resnet18")).networks,
        license="mit",
        base_models=["ada/a", "ada/b"],
    )
    data = ModelCard.load(told.write(tmp_path)).data
    assert (data.license, data.base_model) == ("mit", ["ada/a", "ada/b"])
    assert "base_model_relation" not in data.to_dict()  # it is pruned, not merged


def test_a_card_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*net\.safetensors"):
        card(Written(("net.safetensors",), "torchvision:resnet18")).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_cannot_leave_its_block(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"")
    told = card(Written(("net.safetensors",), "torchvision:resnet18"))
    evil = Card(title="</title>\n# second", summary="s", networks=told.networks, recipe="a: |\n  ```\n  # out\n")
    text = evil.write(tmp_path).read_text()
    assert "````yaml\na: |\n  ```\n  # out\n````" in text
    assert "# &lt;/title&gt; \\# second\n" in text


def test_numbers_and_missing_ones(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"")
    results = {"a": 97.2222, "b": math.nan}
    told = card(Written(("net.safetensors",), "torchvision:resnet18"), results=results, published={"a": 98.0})
    text = told.write(tmp_path).read_text()
    assert "| | measured | published |\n|---|--:|--:|\n| a | 97.22 | 98 |\n| b | – | – |\n" in text


@pytest.mark.parametrize("text", ["a_b", "<img src=x>", "`x` | y", "[a](b)", "#1 ~x~", "back\\slash"])
def test_markdown_is_escaped(text):
    escaped = escape_markdown(text)
    assert html.unescape(re.sub(r"\\([^\w\s]|_)", r"\1", escaped)) == text
    assert escaped != text


def test_shards_are_listed_with_their_index(tmp_path):
    files = save_sharded({"a": torch.zeros(100), "b": torch.ones(100)}, tmp_path / "net.safetensors", "0.5KB")
    text = card(Written(tuple(path.name for path in files), "mynets:small")).write(tmp_path).read_text()
    assert 'load_state_dict("net.safetensors.index.json")' in text
    assert all(file_hash(path) in text for path in files)


def test_config_is_written_where_timm_would_load_these_weights(tmp_path):
    net = from_seed(lambda: timm.create_model("test_resnet", num_classes=5), 0)
    save_state_dict(net.state_dict(), tmp_path / "pair.safetensors")
    assert write_config(net, tmp_path, "pair.safetensors")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(loaded.eval()(IMAGES), net.eval()(IMAGES))
    save_state_dict(net.state_dict(), tmp_path / "other.safetensors")  # timm would take this one
    assert not write_config(net, tmp_path, "pair.safetensors")
    assert not write_config(nn.Linear(1, 1), tmp_path, "other.safetensors")


def test_a_folder_of_ones_own(tmp_path):
    a, b = (from_seed(lambda: timm.create_model("test_resnet", num_classes=5), seed) for seed in (0, 1))
    merged = surgery.merge(a, b, example_inputs=IMAGES, renormalize=None)
    source = tmp_path / "a.safetensors"
    save_state_dict(a.state_dict(), source)
    options = {"license": "mit", "base_models": ["ada/a", "ada/b"]}
    folder = surgery.save_folder(merged, tmp_path / "ab", sources=[source, "b, trained elsewhere"], **options)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(loaded.eval()(IMAGES), merged.eval()(IMAGES))
    data, text = ModelCard.load(folder / CARD).data, (folder / CARD).read_text()
    assert (data.license, data.base_model) == ("mit", ["ada/a", "ada/b"])
    assert data.to_dict()["base_model_relation"] == "merge"
    assert f"- a.safetensors, SHA-256 {file_hash(source)}\n- b, trained elsewhere\n" in text


def test_a_graph_module_is_no_folder(tmp_path):
    a, b = from_seed(TinyConvNet, 0), from_seed(TinyConvNet, 1)
    merged = surgery.merge(a, b, example_inputs=torch.zeros(2, 1, 8, 8), preserve=2)
    with pytest.raises(OptionError, match=r"a graph module has no architecture.*\n  remedy  .*save_program"):
        surgery.save_folder(merged, tmp_path / "ab")
    with pytest.raises(OptionError, match="has no report"):
        surgery.save_folder(a, tmp_path / "ab")
    assert not (tmp_path / "ab").exists()

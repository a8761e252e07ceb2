"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from vfsurgery import merge
from vfsurgery.__main__ import main
from vfsurgery.checkpoints import load_into, load_state_dict, save_state_dict
from vfsurgery.data import digits, loader, preprocessing
from vfsurgery.data.datasets import load_data
from vfsurgery.errors import OptionError
from vfsurgery.networks.architectures import build_model
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.passes import NORMALIZATIONS
from vfsurgery.pruning import prune
from vfsurgery.training import from_seed

DEMO = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8"]
SMALL = ["--model", "timm:test_resnet", "--num-classes", "5", "--input-size", "3x32x32"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two untrained TinyConvNets on disk, a as .safetensors and b as .pt."""
    save_state_dict(from_seed(TinyConvNet, 0).state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": from_seed(TinyConvNet, 1).state_dict()}, tmp_path / "b.pt")
    return tmp_path / "a.safetensors", tmp_path / "b.pt"


def merged_in_python(**options) -> dict[str, torch.Tensor]:
    return merge(from_seed(TinyConvNet, 0), from_seed(TinyConvNet, 1), progress=False, **options).state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize("command", [[], ["run"], ["merge"], ["prune"], ["renormalize"], ["diagnose"], ["groups"]])
def test_every_help_teaches_by_example(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"^ +vfsurgery {' '.join(command)}", result.output, re.MULTILINE)
    assert "docs/cli.md" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_version():
    try:
        expected = version("vfsurgery")
    except PackageNotFoundError:
        pytest.skip("vfsurgery is imported from its folder, not installed")
    assert call("--version").output == f"vfsurgery, version {expected}\n"


@pytest.mark.parametrize("options", [["--preserve", "2"], ["--preserve", "convs.1"], ["--max-flops", "1.3"]])
def test_a_network_with_preserved_prefixes_is_written_whole(pair, tmp_path, options):
    target = tmp_path / "ab.pt2"
    result = call("merge", *pair, *DEMO, *options, "-o", target)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "ab.report.json").read_text())["preserved"]
    assert told["layers"] == 2 and "preserved 2 of" in result.output
    images = torch.randn(5, 1, 8, 8)
    expected = merge(from_seed(TinyConvNet, 0), from_seed(TinyConvNet, 1), progress=False, preserve=2,
                     example_inputs=images[:2]).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(target).module()(images), expected(images))


def test_a_network_with_preserved_prefixes_is_no_file_of_weights(pair, tmp_path):
    result = call("merge", *pair, *DEMO, "--preserve", "2", "-o", tmp_path / "ab.safetensors")
    assert result.exit_code == 1
    assert "a network with preserved prefixes is written as ab.pt2" in result.output
    assert not (tmp_path / "ab.safetensors").exists()


def test_groups_prints_the_table():
    result = call("groups", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("6 permutation groups, 448 units")
    assert (
        "g0 (convs.0, 32 units)\n    convs.0.weight[0]\n    convs.0.bias[0]\n    convs.1.weight[1]\n" in result.output
    )


def test_groups_as_json():
    result = call("groups", "timm:test_resnet", "--num-classes", "7", "--json")
    found = json.loads(result.output)
    assert found["groups"][0]["members"][0]["parameter"] == "conv1.0.weight"
    assert {"parameter": "fc.weight", "dim": 0, "count": 7}.items() <= next(
        pin for pin in found["pinned"] if pin["parameter"] == "fc.weight"
    ).items()


def test_model_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "nets_of_cwd.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(1, 2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))  # the command adds to it
    result = call("groups", "nets_of_cwd:net", "--input-size", "1x8x8")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("0 permutation groups")


def test_merge_without_data(pair, tmp_path):
    example = torch.randn(1, 1, 8, 8)
    result = call("merge", *pair, *DEMO, "-o", tmp_path / "imagined.safetensors")
    assert result.exit_code == 0 and "no real image was used" in result.output
    assert_same(load_state_dict(tmp_path / "imagined.safetensors"), merged_in_python(example_inputs=example))
    result = call("merge", *pair, *DEMO, "--no-imagine", "-o", tmp_path / "merged.safetensors")
    assert result.exit_code == 0, result.output
    expected = merged_in_python(example_inputs=example, imagine=False)
    assert_same(load_state_dict(tmp_path / "merged.safetensors"), expected)
    report = json.loads((tmp_path / "merged.report.json").read_text())
    assert (report["matching"], report["renormalize"]) == ("weights", ["bias-calibration"])
    assert f"written to {tmp_path / 'merged.safetensors'} and {tmp_path / 'merged.report.json'}" in result.output
    assert "aligned source 1 == source 1: holds" in result.output


def test_merge_options_reach_the_merge(pair, tmp_path):
    options = ["--data", "digits", "--limit", 100, "--batch-size", 50, "--alpha", 0.25, "--seed", 3]
    steps = ["--matching", "weights", "--renormalize", "rescale,repair"]
    result = call("merge", *pair, *DEMO, *options, *steps, "-o", tmp_path / "merged.safetensors")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "merged.report.json").read_text())
    assert report["weights"] == [0.75, 0.25]
    assert (report["matching"], report["renormalize"], report["seed"]) == ("weights", ["rescale", "repair"], 3)
    assert any("100 images" in note for note in report["notes"])


def test_merge_runs_and_lists_every_normalization(pair, tmp_path):
    steps = [name for name in NORMALIZATIONS if name not in ("reset", "closed-form-reset")]  # the demo has no BatchNorm
    options = ["--data", "digits", "--limit", 100, "--renormalize", ",".join(steps)]
    result = call("merge", *pair, *DEMO, *options, "-o", tmp_path / "merged.safetensors")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "merged.report.json").read_text())
    assert report["renormalize"] == steps
    assert any("80 images" in note for note in report["notes"])  # a fifth is held out for bias removal
    listed = " ".join(call("merge", "--help").output.split())
    assert all(name in listed for name in NORMALIZATIONS)


def test_merge_with_digits(pair, tmp_path):
    result = call("merge", *pair, *DEMO, "--data", "digits", "--renormalize", "none", "-o", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    data = loader(digits(seed=0).calibration)
    assert_same(load_state_dict(tmp_path / "m.safetensors"), merged_in_python(data=data, renormalize=None))


def test_merge_with_a_folder_of_images(tmp_path):
    for index in range(6):
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 10 * index + 10).convert("RGB").save(folder / f"{index}.png")
    a, b = (from_seed(lambda: build_model("timm:test_resnet", 5), seed) for seed in (0, 1))
    save_state_dict(a.state_dict(), tmp_path / "a.safetensors")
    save_state_dict(b.state_dict(), tmp_path / "b.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    data = f"imagefolder:{tmp_path / 'photos'}"
    result = call("merge", *paths, *SMALL, "--data", data, "--mean", "0.5,0.4,0.3", "-o", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    transform = preprocessing("timm:test_resnet", a, size=32, mean=(0.5, 0.4, 0.3))
    images = load_data("imagefolder", {"path": tmp_path / "photos"}, transform).calibration
    assert len(images) == 5  # a fifth is for the test, as in recipes
    expected = merge(a, b, data=loader(images), progress=False)
    assert_same(load_state_dict(tmp_path / "m.safetensors"), expected.state_dict())
    reloaded = build_model("timm:test_resnet", 5)
    load_into(reloaded, load_state_dict(tmp_path / "m.safetensors"), "m.safetensors")


def test_output_may_replace_an_older_merge(pair, tmp_path):
    for alpha in (0.0, 1.0):
        call("merge", *pair, *DEMO, "--alpha", alpha, "--renormalize", "none", "-o", tmp_path / "m.safetensors")
    assert json.loads((tmp_path / "m.report.json").read_text())["weights"] == [0.0, 1.0]


@pytest.mark.parametrize("link", [False, True])
def test_inputs_are_not_overwritten(pair, tmp_path, link):
    before = pair[0].read_bytes()
    output = pair[0]
    if link:
        output = tmp_path / "link.safetensors"
        output.symlink_to(pair[0])
    result = call("merge", *pair, *DEMO, "-o", output)
    assert result.exit_code == 1
    assert "a.safetensors would be overwritten" in result.stderr
    assert pair[0].read_bytes() == before


def test_report_does_not_overwrite_an_input(pair, tmp_path):
    odd = tmp_path / "m.report.json"
    shutil.copy(pair[1], odd)
    result = call("merge", pair[0], odd, *DEMO, "-o", tmp_path / "m.safetensors")
    assert "m.report.json would be overwritten" in result.stderr


WRONG = [
    (["-o", "m.pt"], 1, "error: cannot write m.pt remedy weights are written as m.safetensors"),
    (
        ["--data", "imagenet"],
        2,
        "error: unknown data 'imagenet' remedy accepted: cifar100:PATH, cifar10:PATH, digits, imagefolder:PATH",
    ),
    (["--data", "imagefolder:"], 2, "error: unknown data 'imagefolder:'"),
    (["--data", "digits:here"], 2, "error: unknown data 'digits:here'"),
    (["--data", "digits", "--std", "2"], 2, "error: digits has no --std"),
    (["--limit", "-3"], 2, "Invalid value for '--limit': -3 is not in the range"),
    (["--data", "imagefolder:nowhere", "--mean", "0", "--std", "1"], 1, "error: there is no image folder nowhere"),
    (["--data", "imagefolder:.", "--input-size", "3x8x9"], 2, "error: images from a folder are square found 3x8x9"),
    (
        ["--data", "imagefolder:."],
        1,
        "error: no preprocessing is known for vfsurgery.networks.demo:TinyConvNet missing mean, std",
    ),
    (["--matching", "wieghts"], 2, "error: unknown matching 'wieghts' remedy did you mean 'weights'?"),
    (["--renormalize", "reset,rescal"], 2, "error: unknown renormalization 'rescal' remedy did you mean 'rescale'?"),
    (["--alpha", "1.5"], 2, "error: alpha must lie in [0, 1] but is 1.5"),
    (["--device", "abacus"], 2, "error: cannot compute on device 'abacus' cause"),
    (["--model", "timm:resnt18"], 2, "error: timm has no model 'resnt18'"),
    (
        ["--num-classes", "3"],
        1,
        "a.safetensors does not fit TinyConvNet: fc.weight differs model (3, 128)",
    ),
    (["--input-size", "8"], 2, "Invalid value for '--input-size': '8' is no shape; write channels x height x width"),
    (["--mean", "red"], 2, "Invalid value for '--mean': 'red' is no list of numbers; write one per channel"),
    (["--no-such-option"], 2, "No such option"),
]


@pytest.mark.parametrize(("options", "code", "message"), WRONG, ids=[" ".join(options) for options, _, _ in WRONG])
def test_wrong_merge_is_explained_and_writes_nothing(pair, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call("merge", *pair, *DEMO, "-o", "m.safetensors", *options)
    assert message in flat(result.stderr)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_diagnose_prints_the_verdict_and_writes_a_page(pair, tmp_path):
    page = tmp_path / "page.html"
    result = call("diagnose", pair[0], *pair, *DEMO, "--data", "digits", "--limit", "64", "--quiet", "-o", page)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("TinyConvNet beside 2 sources, 64 images\n  Nothing vanishes")
    assert "Nothing vanishes" in page.read_text()
    result = call("diagnose", pair[0], pair[0], *DEMO, "--data", "digits", "--limit", "64", "--quiet", "--json")
    assert json.loads(result.output)["curves"]["ratio"] == [1.0] * 20


def test_diagnose_needs_images_and_overwrites_no_input(pair):
    result = call("diagnose", *pair, *DEMO)
    assert (result.exit_code, result.output.splitlines()[0]) == (2, "error: a diagnosis needs images")
    result = call("diagnose", *pair, *DEMO, "--data", "digits", "-o", pair[1])
    assert result.exit_code == 1
    assert "would be overwritten by the page" in result.output


def test_missing_checkpoint(pair, tmp_path):
    result = call("merge", pair[0], tmp_path / "c.pt", *DEMO, "-o", tmp_path / "m.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: there is no checkpoint {tmp_path}/c.pt")


def test_model_without_known_input_size(pair, tmp_path):
    result = call("merge", *pair, *DEMO[:2], "-o", tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "TinyConvNet does not say what input it takes" in result.stderr
    assert "remedy  pass --input-size 3x224x224, or of the shape that it takes; or --data" in result.stderr


def test_traceback_on_demand(pair, monkeypatch):
    monkeypatch.setenv("VFSURGERY_TRACEBACK", "1")
    result = call("groups", "timm:resnt18")
    assert isinstance(result.exception, OptionError)


def test_run_prints_tables_and_writes(tmp_path, monkeypatch):
    (tmp_path / "nets_to_run.py").write_text(
        "from vfsurgery.networks.demo import TinyResNet\ndef net(): return TinyResNet(width=2)\n"
    )
    (tmp_path / "small.yaml").write_text(
        "name: net\nthreads: 1\ndata: {name: digits}\nsources: [nets_to_run:net, {}]\n"
        "stages: [train: {epochs: 1}, merge, evaluate]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = call("run", "small.yaml", "--output", "results")
    assert result.exit_code == 0, result.output
    assert re.search(r"accuracy +to sources +loss .*\n +a .*\n +b .*\n +ensemble .*\n +merged ", result.stdout)
    assert (tmp_path / "results" / "net.safetensors").exists()


def test_wrong_recipe_is_wrong_usage(tmp_path):
    (tmp_path / "small.yaml").write_text("name: small\nsoruces: []\n")
    result = call("run", tmp_path / "small.yaml", "--output", tmp_path / "results")
    assert result.exit_code == 2
    assert "small.yaml:2: unknown key 'soruces' at soruces remedy did you mean 'sources'?" in flat(result.stderr)
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_is_pruned_as_in_python_and_repaired_in_one_go_or_in_two(pair, tmp_path):
    options = [*DEMO, "--data", "digits", "--limit", "64", "--quiet"]
    sparse, repaired, again = (tmp_path / f"{name}.safetensors" for name in ("sparse", "repaired", "again"))
    pruning = ["--sparsity", "0.7", "--scope", "layer"]
    result = call("prune", pair[0], *options, *pruning, "-o", sparse)
    assert result.exit_code == 0, result.output
    expected = prune(from_seed(TinyConvNet, 0), 0.7, scope="layer", progress=False)
    assert_same(load_state_dict(sparse), expected.state_dict())
    assert json.loads(sparse.with_suffix(".report.json").read_text())["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert call("renormalize", sparse, pair[0], *options, "-o", repaired).exit_code == 0
    assert call("prune", pair[0], *options, *pruning, "--renormalize", "auto", "-o", again).exit_code == 0
    assert_same(load_state_dict(again), load_state_dict(repaired))
    with pytest.raises(AssertionError):
        assert_same(load_state_dict(repaired), load_state_dict(sparse))


def test_wrong_options_of_prune_are_explained_and_nothing_is_written(pair, tmp_path):
    output = tmp_path / "sparse.safetensors"
    wrong = {
        (): "neither a sparsity nor a pattern is given",
        ("--sparsity", "80"): "it is a share and not a percentage: 80 % is 0.8",
        ("--sparsity", "0.5", "--method", "magnitud"): "did you mean 'magnitude'",
        ("--sparsity", "0.5", "--method", "wanda"): "--method wanda needs images remedy --data imagefolder:PATH",
        ("--sparsity", "0.5", "--exclude", "nothing"): "matches no convolution",
        (
            "--sparsity",
            "0.5",
            "--renormalize",
            "auto",
        ): "--renormalize auto needs images remedy --data imagefolder:PATH",
        ("--sparsity", "0.5", "--data", "digits", "--renormalize", "rescal"): "did you mean 'rescale'?",
    }
    for options, message in wrong.items():
        result = call("prune", pair[0], *DEMO, *options, "--quiet", "-o", output)
        assert (result.exit_code, result.stdout) == (2, "")  # nothing is pruned before all is known to be right
        assert message in flat(result.stderr)
        assert not output.exists()
    assert call("prune", pair[0], *DEMO, "--sparsity", "0.5", "-o", pair[0]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits", "--renormalize", "none"], "--renormalize none leaves nothing to do"),
        (["--data", "digits", "--renormalize", "repiar"], "did you mean 'repair'?"),
    ],
)
def test_wrong_options_of_renormalize_are_explained_and_nothing_is_written(pair, tmp_path, options, message):
    output = tmp_path / "repaired.safetensors"
    result = call("renormalize", *pair, *DEMO, *options, "--quiet", "-o", output)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in flat(result.stderr)
    assert not output.exists()


def test_a_reference_sparser_than_what_it_is_to_repair_is_noted(pair, tmp_path):
    sparse, options = tmp_path / "sparse.safetensors", [*DEMO, "--data", "digits", "--limit", "64"]
    assert call("prune", pair[0], *DEMO, "--sparsity", "0.5", "--quiet", "-o", sparse).exit_code == 0
    found = {
        paths: call("renormalize", *paths, *options, "-o", tmp_path / "repaired.safetensors").stdout
        for paths in ((pair[0], sparse), (sparse, pair[0]))
    }
    assert ["are the two swapped?" in output for output in found.values()] == [True, False]

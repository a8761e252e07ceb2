"""What a new user gets wrong on the command line: told in its words, with exit code and without a file."""

import click
import pytest
import torch
from click.testing import CliRunner

from vfsurgery.__main__ import main
from vfsurgery.checkpoints import load_state_dict
from vfsurgery.cli.words import in_options
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.training import from_seed

DEMO = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8"]


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def flat(text):
    return " ".join(text.split())


def recipe(body):
    return f"name: r\nsources: [{{model: 'vfsurgery.networks.demo:TinyConvNet', {body}}}, {{}}]\nstages: [merge]\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.save(from_seed(TinyConvNet, seed).state_dict(), f"{name}.pt")
    torch.save(from_seed(lambda: TinyConvNet(num_classes=7), 2).state_dict(), "seven.pt")
    torch.save(
        {"teacher": from_seed(TinyConvNet, 0).state_dict(), "student": from_seed(TinyConvNet, 3).state_dict()}, "two.pt"
    )
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "photos" / "cat" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "tabs.yaml").write_text("name: x\nsources:\n\t- a.pt\n")
    (tmp_path / "option.yaml").write_text(recipe("options: {num_clases: 3}"))
    (tmp_path / "data.yaml").write_text(
        "data: {name: imagefolder, path: nowhere, size: 8, mean: [0.5], std: [0.5]}\n" + recipe("input_size: [1, 8, 8]")
    )
    (tmp_path / "heads.yaml").write_text(
        "name: r\nsources: [{model: 'vfsurgery.networks.demo:TinyConvNet', checkpoint: a.pt}, {checkpoint: seven.pt}]\n"
        "stages: [merge]\n"
    )
    (tmp_path / "empty").mkdir()


MERGE, OUT = ["merge", "a.pt", "b.pt", *DEMO], ["-o", "m.safetensors"]
IMAGES = ["--mean", "0.5", "--std", "0.5", "--input-size", "3x8x8"]
MISTAKES = [
    (
        ["merge", "a.pt", "seven.pt", *DEMO, *OUT],
        1,
        "a.pt and seven.pt are not the same architecture remedy only fc differs, with 10 and 7",
    ),
    (
        ["merge", "a.pt", "seven.pt", *DEMO, "--num-classes", 7, *OUT],
        1,
        "only fc differs, with 10 and 7 outputs: trained on",
    ),
    (
        ["merge", "a.pt", "b.pt", *DEMO, "--num-classes", 7, *OUT],
        1,
        "remedy only the class count differs: build the model with --num-classes 10",
    ),
    (
        ["merge", "a.pt", "lfs.pt", *DEMO, *OUT],
        1,
        "it is a pointer of Git LFS, not the file it points to remedy run git lfs pull",
    ),
    (
        ["merge", "a.pt", "two.pt", *DEMO, *OUT],
        1,
        "two.pt holds 2 networks under teacher, student remedy say which one, as in --key teacher",
    ),
    (["merge", "a.pt", "photos", *DEMO, *OUT], 1, "photos is a folder"),
    (
        [*MERGE, *OUT, "--matching", "activations", "--no-imagine"],
        1,
        "--matching activations needs data remedy pass --data, or --data imagined, or --matching weights",
    ),
    (
        [*MERGE, *OUT, "--renormalize", "reset", "--no-imagine"],
        1,
        "--renormalize reset needs data remedy pass --data, or --data imagined, or --renormalize auto",
    ),
    (
        [*MERGE, *OUT, "--data", "imagine"],
        2,
        "unknown data 'imagine' remedy did you mean 'imagined'?",
    ),
    (
        [*MERGE, *OUT, "--data", "imagined", "--mean", "0.5"],
        2,
        "imagined images are made as the network expects them remedy no --mean, no --std",
    ),
    (
        [*MERGE, *OUT, "--data", "photos"],
        2,
        "unknown data 'photos' remedy imagefolder:photos, for the images in that folder",
    ),
    (
        [*MERGE, *OUT, *IMAGES, "--data", "imagefolder:empty"],
        1,
        "no images in empty cause there is no class folder remedy lay",
    ),
    (
        ["diagnose", "a.pt", "b.pt", *DEMO, *IMAGES, "--data", "imagefolder:photos", "-o", "d.html"],
        1,
        "cannot read the image photos/cat/",
    ),
    ([*MERGE, *OUT, "--batch-size", 0], 2, "Invalid value for '--batch-size': 0 is not in the range x>=1"),
    ([*MERGE, *OUT, "--key", "ema"], 2, "a.pt has no network under key 'ema' remedy accepted:"),
    (
        ["merge", "a.pt", "two.pt", *DEMO, *OUT, "--key", "teacher"],
        2,
        "or where files differ, once for each in their order, as '' for one that needs none",
    ),
    (
        [*MERGE, *OUT, *["--key", "ema"] * 3],
        2,
        "--key is given 3 times for 2 files remedy give it once, for all of them, or once for each in their order",
    ),
    (
        [*MERGE, *OUT, "--matching", "foo"],
        2,
        "unknown matching 'foo' remedy accepted: activations, auto, cca, identity, weights, zipit",
    ),
    ([*MERGE, *OUT, "--matching", "aut"], 2, "unknown matching 'aut' remedy did you mean 'auto'?"),
    (["prune", "a.pt", *DEMO, *OUT], 2, "neither a sparsity nor a pattern is given"),
    (
        ["groups", "vfsurgery.networks.demo:TinyConvNet"],
        1,
        "remedy pass --input-size 3x224x224, or of the shape that it takes",
    ),
    (
        ["check", "tabs.yaml"],
        2,
        "found character '\\t' that cannot start any token at line 3, column 1 remedy indent",
    ),
    (["check", "option.yaml"], 2, "unexpected keyword argument 'num_clases'"),
    (["check", "data.yaml"], 1, "there is no image folder nowhere"),
    (["check", "heads.yaml"], 1, "a.pt and seven.pt are not the same architecture remedy only fc differs"),
    (["run", "heads.yaml", "-o", "out"], 1, "a.pt and seven.pt are not the same architecture remedy only fc differs"),
    (["push", "empty", "ada/net", "--dry-run"], 1, "empty has no card"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[message[:40] for _, _, message in MISTAKES])
def test_a_mistake_is_told_in_words_of_the_command_line(tmp_path, arguments, code, message):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = call(*arguments)
    assert message in flat(result.stderr)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_what_was_taken_of_a_file_is_said(tmp_path):
    state = from_seed(TinyConvNet, 1).state_dict()
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(2)}},
        "b.ckpt",
    )
    torch.save({"model": state, "model_ema": from_seed(TinyConvNet, 0).state_dict()}, "ema.pt")
    options = [*DEMO, "--renormalize", "none", *OUT]
    result = call("merge", "ema.pt", "b.ckpt", *options)
    assert result.exit_code == 0, result.output
    assert "ema.pt: its weights under model_ema were taken, not those under model" in result.stderr
    assert "b.ckpt: left out, as no part of the network below model.: criterion.weight" in result.stderr
    quiet = call("merge", "ema.pt", "b.ckpt", *options, "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    same = call("merge", "a.pt", "a.pt", *options)
    assert "warning: a.pt and a.pt are the same file" in same.stderr
    assert call("merge", "two.pt", "two.pt", *options, "--key", "student").exit_code == 0


def test_each_file_of_a_command_may_have_its_network_under_another_key():
    options = [*DEMO, "--matching", "identity", "--renormalize", "none", "-o"]
    states = torch.load("two.pt")
    torch.save(states["student"], "student.pt")
    for place, keys in enumerate([("student", "teacher"), ("teacher", "student")]):
        said = [word for key in keys for word in ("--key", key)]
        assert call("merge", "two.pt", "two.pt", *options, f"{place}.safetensors", *said, "--alpha", 0.0).exit_code == 0
        found = load_state_dict(f"{place}.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in states[keys[0]].items())
    mixed = call(
        "merge", "student.pt", "two.pt", *options, "mixed.safetensors", "--key", "", "--key", "teacher", "--alpha", 0.0
    )
    assert mixed.exit_code == 0, mixed.output
    assert all(
        torch.equal(load_state_dict("mixed.safetensors")[name], tensor) for name, tensor in states["student"].items()
    )


@click.command("merge")
@click.option("--data")
@click.option("--renormalize", "restore")
@click.option("--max-flops")
@click.option("--input-size")
@click.option("--ema/--no-ema")
def command(**options): ...


@click.command("check")
@click.argument("recipe")
def of_recipe(**options): ...


@pytest.mark.parametrize(
    ("message", "options", "keys"),
    [
        ("pass data=, or renormalize=None", "pass --data, or --renormalize none", "pass data:, or renormalize: none"),
        ("data=[1, 2] and data=='x'", "--data[1, 2] and data=='x'", None),
        (
            "max_flops=1.2, ema=False or ema=True",
            "--max-flops 1.2, --no-ema or --ema",
            "max_flops=1.2, ema=False or ema=True",
        ),
        ("example_inputs=torch.randn(2, 1, 8, 8).", "--input-size 1x8x8.", "input_size: 1x8x8."),
        ("merge(a.PART, data=x) or (data=)", "merge(a.PART, data=x) or (--data)", "merge(a.PART, data=x) or (data:)"),
        ("leaf='a' and some.data=3", "leaf='a' and some.data=3", "leaf: a and some.data=3"),
        ("matching='weights'", "matching='weights'", "matching: weights"),
    ],
)
def test_arguments_become_options_where_the_command_has_them(message, options, keys):
    if keys is None:
        options = keys = message  # a list is no option
    assert in_options(message, command) == options
    assert in_options(message, of_recipe) == keys

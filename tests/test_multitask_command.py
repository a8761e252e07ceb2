"""``vfsurgery multitask``: checkpoints by task into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from vfsurgery.cli import main
from vfsurgery.networks.demo import TinyResNet

SPEC = "vfsurgery.networks.demo:TinyResNet"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Checkpoints with 4 and 3 classes, their base, and names of classes."""
    monkeypatch.chdir(tmp_path)
    for name, classes in (("low", 4), ("high", 3), ("base", 10)):
        torch.save(TinyResNet(num_classes=classes).state_dict(), f"{name}.pt")
    Path("names.txt").write_text("a\nb\nc\n")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["multitask", *arguments, "--model", SPEC, "--input-size", "1x8x8"])


def test_checkpoints_of_different_classes_become_a_folder(files):
    found = run("low=low.pt", "high=high.pt", "--base", "base.pt", "--labels", "high=names.txt", "-o", "both")
    assert found.exit_code == 0, found.output
    assert "low: 4 classes, head fc" in found.output
    contents = json.loads(Path("both/multitask.json").read_text())
    assert [(task, entry["classes"], entry["labels"]) for task, entry in contents["tasks"].items()] == [
        ("low", 4, None),
        ("high", 3, ["a", "b", "c"]),
    ]
    trunk = load_file("both/trunk.safetensors")
    for task, classes in (("low", 4), ("high", 3)):
        model = TinyResNet(num_classes=classes)
        model.load_state_dict({**trunk, **load_file(f"both/heads/{task}.safetensors")})
        assert torch.equal(model.fc.weight, torch.load(f"{task}.pt", weights_only=True)["fc.weight"])
    again = run("low=low.pt", "high=high.pt", "--data", "digits", "--limit", "64", "--quiet", "-o", "both")
    assert (again.exit_code, again.output) == (0, "")
    entry = json.loads(Path("both/multitask.json").read_text())
    assert entry["report"]["batchnorm"] == "per-task"
    assert any("running_mean" in key for key in load_file("both/heads/low.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["low.pt", "high=high.pt"], "'low.pt' names no task"),
        (["a=low.pt", "a=high.pt"], "two tasks are called 'a'"),
        (["a=low.pt"], "there are 1 tasks"),
        (["a=low.pt", "../b=high.pt"], "no name of a task"),
        (["a=low.pt", "b=nothing.pt"], "nothing.pt"),
        (["a=low.pt", "b=high.pt", "--data", "c=digits"], "images of 'c'"),
        (["a=low.pt", "b=high.pt", "--labels", "b=none.txt"], "none.txt cannot be read"),
        (["a=low.pt", "b=high.pt", "--labels", "a=names.txt"], "has 4 classes"),
        (["a=low.pt", "b=high.pt", "--batchnorm", "joint"], "needs data"),
        (["a=low.pt", "b=high.pt", "-o", "names.txt"], "is there and is no such folder"),
    ],
)
def test_mistakes_are_one_message(files, arguments, message):
    found = run(*arguments, *([] if "-o" in arguments else ["-o", "both"]))
    assert found.exit_code in (1, 2)
    assert message in found.output
    assert not Path("both").exists()

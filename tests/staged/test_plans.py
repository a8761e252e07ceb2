"""Plans say what a recipe would do, from shapes alone; and recipes on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from small import RECIPE, ROOT, staged

import vfsurgery as surgery
from vfsurgery.checkpoints import load_state_dict, save_state_dict
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, SurgeryError
from vfsurgery.networks.demo import TinyConvNet, TinyResNet


def test_a_plan_says_what_would_happen_and_makes_no_weights(monkeypatch):
    from torch import nn

    made: list[str] = []
    original = nn.Parameter.__new__

    def new(cls, data=None, requires_grad=True):
        made.append(data.device.type)
        return original(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", new)
    text = staged(
        {"merge": {"preserve": {"flops": 1.5}}},
        "diagnose",
        sources=["timm:resnet18", {}],
        data={"name": "cifar10", "path": "none"},
    )
    found = surgery.plan(surgery.Recipe.from_yaml(text))
    assert set(made) == {"meta"}
    network = found.networks[0]
    assert (network.parameters, network.image, network.groups) == (11689512, (3, 32, 32), 12)
    assert network.networks == ("a", "b")
    assert "flops x1." in found.steps[0].notes[0] and found.writes[:3] == ("small.html", "small.pt2", "report.json")
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
    first = {"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}}
    for file, message in (
        ("a", None),
        ("b", "does not fit TinyConvNet: convs.0.weight differs"),
        ("c", "is damaged or no checkpoint"),
    ):
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
    assert vfsurgery("check", "small.yaml").stdout == "small.yaml can run: 4 steps on 1 architectures\n"
    wrong = vfsurgery("check", "small.yaml", "--set", "stages.merge.alpha=2")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: small.yaml:9: alpha must lie in [0, 1] but is 2")
    assert not (tmp_path / "out").exists()
    done = vfsurgery("run", "small.yaml", "--dtype", "float64", "--set", "stages.train.epochs=1")
    assert "\n  2 merge\n    merge of 2 x TinyConvNet" in done.stdout, done.stderr
    assert load_state_dict(tmp_path / "out/small/small.safetensors")["fc.bias"].dtype == torch.float64

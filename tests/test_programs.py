"""Whole networks on disk compute what they computed, for any batch size and every kind of result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_nets import images, net
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.checkpoints import save_onnx, save_program
from vfsurgery.errors import CheckpointError
from vfsurgery.passes import Preserve

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DATA, MORE = images(64), images(7, 5)


def merged(name: str = "residual", bias: dict[str, bool] | None = None, **options: Any) -> nn.Module:
    return surgery.merge(net(name, 1, **bias or {}), net(name, 2, **bias or {}), data=DATA, progress=False, **options)


def pruned() -> nn.Module:
    model, generator = merged(), torch.Generator().manual_seed(0)
    kept = {name: torch.rand(mask.shape, generator=generator) > 0.5 for name, mask in surgery.Masks.of(model).items()}
    surgery.Masks(kept).apply(model)
    return model


def with_created_bias() -> nn.Module:
    model = merged("chain", {"bias": False}, renormalize="repair")
    assert surgery.report_of(model).created_biases
    return model


RESULTS: dict[str, Callable[[], nn.Module]] = {
    "merged": merged,
    "of branches": lambda: merged(preserve=Preserve(boundary=3, form="branches")),
    "grouped": lambda: merged(preserve=Preserve(boundary=3, form="grouped")),
    "pruned": pruned,
    "with a bias created": with_created_bias,
}


@pytest.fixture(scope="module", params=RESULTS)
def result(request: pytest.FixtureRequest) -> nn.Module:
    return RESULTS[request.param]()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return copy.deepcopy(model).eval()(MORE)


def in_onnxruntime(path: Path) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: MORE.numpy()})[0])


def test_programs_of_torch_compute_the_same(result: nn.Module, tmp_path: Path) -> None:
    modes = [module.training for module in result.modules()]
    save_program(result, (DATA[:2],), tmp_path / "net.pt2", {"by": "test"})
    extra = {"by": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    torch.testing.assert_close(program.module()(MORE), outputs(result), **CLOSE)
    assert extra["by"] == "test"
    assert [module.training for module in result.modules()] == modes


def test_onnx_computes_the_same(result: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    save_onnx(result, (DATA[:2],), tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    torch.testing.assert_close(in_onnxruntime(tmp_path / "net.onnx"), outputs(result), **CLOSE)


def test_other_weights_compute_something_else(result: nn.Module, tmp_path: Path) -> None:
    other = copy.deepcopy(result)
    with torch.no_grad():
        next(other.parameters()).mul_(-1)
    save_program(other, (DATA[:2],), tmp_path / "net.pt2")
    found = torch.export.load(tmp_path / "net.pt2").module()(MORE)
    assert not torch.allclose(found, outputs(result), **CLOSE)


def test_without_onnxscript_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"onnxscript, which is not installed\n  remedy  pip install onnxscript"):
        save_onnx(nn.Linear(1, 1), (torch.ones(2, 1),), tmp_path / "net.onnx")


def test_networks_too_large_for_onnx_are_refused_before_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with torch.device("meta"):
        large = nn.Linear(2**15, 2**15)
    with pytest.raises(CheckpointError, match=r"bytes, and an ONNX file at most .*\n  remedy  write net\.pt2"):
        save_onnx(large, (torch.ones(2, 1),), tmp_path / "net.onnx")


@pytest.mark.parametrize(("save", "ending"), [(save_program, ".pt2"), (save_onnx, ".onnx")])
def test_the_ending_says_the_format(tmp_path: Path, save: Callable[..., None], ending: str) -> None:
    with pytest.raises(CheckpointError, match=rf"is written as net\{ending}"):
        save(nn.Linear(1, 1), (torch.ones(2, 1),), tmp_path / "net.pt")


@pytest.mark.parametrize("save", [save_program, save_onnx])
def test_the_same_network_has_the_same_bytes(tmp_path: Path, save: Callable[..., None]) -> None:
    ending = ".pt2" if save is save_program else ".onnx"
    for name in "ab":
        save(net("chain", 1), (DATA[:2],), tmp_path / f"{name}{ending}", {"z": json.dumps([1]), "a": "b"})
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()

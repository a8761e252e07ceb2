"""Results that do not depend on how many cores a machine has: always with a given number of threads, mostly without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import vfsurgery as surgery
from vfsurgery.checkpoints import file_hash, save_state_dict
from vfsurgery.cli import main
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.stats.threads import threads
from vfsurgery.training import from_seed

ROOT = Path(__file__).resolve().parent.parent

COUNTING = '''
import torch
from torch import nn


class Net(nn.Module):
    """Computes with the number of threads: as sums do in their last digits, but on every machine."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)) + torch.get_num_threads())
        return self.third(torch.relu(self.second(x)))
'''


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Merges two checkpoints of a network that counts threads, and returns the hash of the result."""
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in "ab":
        layers = [nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
        state = dict(zip(("first", "second", "third"), layers, strict=True))
        save_state_dict(nn.ModuleDict(state).state_dict(), tmp_path / f"{name}.safetensors")
    options = ["--model=counting:Net", "--input-size=1x8x8", "--data=digits", "--renormalize=repair", "--quiet"]

    def merge(*more: str) -> str:
        call("merge", "a.safetensors", "b.safetensors", *options, *more, "-o", "ab.safetensors")
        return file_hash(tmp_path / "ab.safetensors")

    return merge


def call(*arguments: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def test_the_option_decides_and_not_the_machine(merged):
    found = {}
    for machine in (1, 2):
        with threads(machine):
            found[machine] = merged(), merged("--threads=1"), merged("--threads=2")
            assert torch.get_num_threads() == machine
    assert found[1][1:] == found[2][1:]
    assert found[1][0] == found[1][1] and found[2][0] == found[2][2]
    assert found[1][0] != found[2][0]


def test_a_replay_on_another_machine_makes_the_same_file(merged, tmp_path):
    with threads(2):
        merged()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vfsurgery", "replay", "ab.report.json"]

    def replay() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    assert replay().stdout.startswith("the same: ab.safetensors")
    report = json.loads((tmp_path / "ab.report.json").read_text())
    assert report["replay"]["threads"] == 2
    report["replay"]["threads"] = 1
    (tmp_path / "ab.report.json").write_text(json.dumps(report))
    assert "made again differs" in replay().stderr


@pytest.mark.parametrize("count", ["0", "2000", "two"])
def test_odd_numbers_of_threads_are_refused(count):
    result = CliRunner().invoke(main, ["merge", "a.pt", "b.pt", "--model=x", "-o=ab.safetensors", f"--threads={count}"])
    assert result.exit_code == 2 and "--threads" in result.output


def pair() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    images = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return from_seed(TinyConvNet, 0).eval(), from_seed(TinyConvNet, 1).eval(), images


FACTORIZATIONS = ("eigh", "svd", "cholesky_ex", "solve_triangular")

WORK: dict[str, Callable[..., nn.Module]] = {
    "weights": lambda a, b, x: surgery.merge(a, b, imagine=False, example_inputs=x[:2]),
    "repair": lambda a, b, x: surgery.merge(a, b, data=x, matching="activations", renormalize="repair"),
    "cca": lambda a, b, x: surgery.merge(a, b, data=x, matching="cca", renormalize="repair", preserve=2),
    "sparsegpt": lambda a, b, x: surgery.prune(a, 0.5, method="sparsegpt", data=x),
    "regress": lambda a, b, x: surgery.merge(a, b, data=x, matching="identity", renormalize="regress"),
}


@pytest.mark.parametrize("work", WORK)
def test_one_thread_and_two_give_the_same_bits_and_matrices_are_factored_on_one(work, monkeypatch):
    seen: set[int] = set()
    for name in FACTORIZATIONS:
        monkeypatch.setattr(torch.linalg, name, _noting(seen, getattr(torch.linalg, name)))
    states: list[dict[str, Any]] = []
    for count in (1, 2):
        with threads(count):
            states.append(WORK[work](*pair()).state_dict())
            assert torch.get_num_threads() == count
    equal = all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert equal or (work in ("cca", "sparsegpt") and not _products_are_equal())
    assert seen == ({1} if work in ("cca", "sparsegpt", "regress") else set())


def _products_are_equal() -> bool:
    """Whether products of many numbers have the same bits on one thread and on two: not on every processor."""
    units = torch.randn(64, 6400, generator=torch.Generator().manual_seed(0))
    products: list[torch.Tensor] = []
    for count in (1, 2):
        with threads(count):
            products.append(units @ units.T)
    return torch.equal(*products)


def _noting(seen: set[int], function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.get_num_threads())
        return function(*args, **kwargs)

    return noted

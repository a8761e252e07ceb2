"""Checkpoints combined on disk: the bits of the merge in memory, little memory, and files whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

import vfsurgery.checkpoints.streams as streams
from vfsurgery.checkpoints import load_state_dict, save_sharded, save_state_dict
from vfsurgery.cli import main
from vfsurgery.combining import COMBINERS, combine_states
from vfsurgery.combining.base import PART
from vfsurgery.combining.files import beside, combine_files
from vfsurgery.errors import SurgeryError

METHODS = [name for name in COMBINERS if name != "lines" and not COMBINERS[name].needs_data]  # a graph, or images
FORMATS = ("safetensors", "pt", "sharded")


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A net of every kind of tensor: matrices, norms, 0-d, empty, counters, one of several parts."""
    drawn = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn).to(dtype)

    return {
        "stem.weight": random(8, 3, 3, 3),
        "norm.weight": random(8),
        "norm.running_mean": random(8),
        "norm.running_var": random(8).abs(),
        "norm.num_batches_tracked": torch.tensor(3),
        "depthwise.weight": random(8, 1, 3, 3),
        "large.weight": random(3, PART // 2),
        "logit_scale": random(),
        "one": random(1),
        "none": random(0, 4),
        "fc.weight": random(4, 8),
    }


def models(count: int = 2, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    base = state(0, dtype)
    tuned = []
    for seed in range(1, count + 1):
        other = state(seed, dtype)
        tuned.append(
            {
                name: tensor + 0.1 * other[name] if tensor.is_floating_point() else tensor
                for name, tensor in base.items()
            }
        )
    return base, tuned


def write(state: dict, path: Path, kind: str = "safetensors") -> Path:
    if kind == "pt":
        turned = {
            name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            for name, tensor in reversed(state.items())
        }
        torch.save({"model": turned, "epoch": 3}, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    if kind == "sharded":
        return save_sharded(state, path.with_suffix(".safetensors"), "500KB")[-1]
    save_state_dict(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def written(folder: Path, kind: str = "safetensors", **changed: object) -> tuple[Path, list[Path]]:
    base, tuned = models(**changed)
    return write(base, folder / "base", kind), [write(each, folder / f"tuned{n}", kind) for n, each in enumerate(tuned)]


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_from_files_comes_the_very_result_of_memory(method, kind, tmp_path):
    base, tuned = models(1 if method == "wise-ft" else 2)
    combiner = COMBINERS[method]()
    expected = combine_states(tuned, combiner, base=base, seed=5)
    files = written(tmp_path, kind, count=len(tuned))
    report = combine_files(*files, tmp_path / "out.safetensors", method, seed=5, progress=False)
    assert same(load_state_dict(tmp_path / "out.safetensors"), expected)
    assert report.method == method
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    other = combine_states(tuned, combiner, base=state(9), seed=5)
    assert not same(load_state_dict(tmp_path / "out.safetensors"), other)  # the control: another base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_base_or_the_one_that_is_asked_for(dtype, tmp_path):
    base, tuned = models(dtype=dtype)
    files = written(tmp_path, dtype=dtype)
    combine_files(*files, tmp_path / "out.safetensors", "ties", progress=False)
    assert same(load_state_dict(tmp_path / "out.safetensors"), combine_states(tuned, COMBINERS["ties"](), base=base))
    combine_files(*files, tmp_path / "half.safetensors", "ties", dtype="float16", progress=False)
    found = load_state_dict(tmp_path / "half.safetensors")
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.float16", "torch.int64"}


def test_large_results_are_written_in_shards_with_an_index(tmp_path):
    base, tuned = models()
    files = written(tmp_path)
    report = combine_files(*files, tmp_path / "out.safetensors", "ties", max_shard_size="500KB", progress=False)
    assert len(report.output) > 2
    assert report.output[-1].endswith(".index.json")
    assert same(load_state_dict(report.output[-1]), combine_states(tuned, COMBINERS["ties"](), base=base))


def test_a_file_is_the_same_to_the_byte_and_says_what_it_was_made_of(tmp_path):
    files = written(tmp_path)
    for name in ("one", "two"):
        combine_files(*files, tmp_path / f"{name}.safetensors", "dare", seed=3, progress=False)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with safetensors.safe_open(tmp_path / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    report = json.loads(beside(tmp_path / "one.safetensors").read_text())
    assert json.loads(metadata["sources"]) == [each["sha256"] for each in report["sources"]]
    assert metadata["base"] == report["base"]["sha256"]
    assert json.loads(metadata["recipe"])["combine"] == report["method"] == "dare"
    assert report["told_by"] == "names and shapes"


def test_tensors_that_are_one_are_combined_once_and_written_under_each_name(tmp_path):
    base, tuned = models()
    for each in (base, *tuned):
        each["head.weight"] = each["fc.weight"]
    paths = [write(each, tmp_path / f"net{n}", "pt") for n, each in enumerate((base, *tuned))]
    report = combine_files(paths[0], paths[1:], tmp_path / "out.safetensors", "ties", progress=False)
    found = load_state_dict(tmp_path / "out.safetensors")
    plain = models()
    expected = combine_states(plain[1], COMBINERS["ties"](), base=plain[0])
    assert same({name: found[name] for name in expected}, expected)
    assert torch.equal(found["head.weight"], found["fc.weight"])
    assert any("one with another" in note for note in report.notes)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(8, 5))
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(torch.nn.functional.linear(x, self.embed)))


def test_with_a_model_its_graph_tells_what_tensors_are(tmp_path):
    nets = [Net() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict({name: x + 0.1 * net.state_dict()[name] for name, x in nets[0].state_dict().items()})
    paths = [
        write({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / f"n{n}", "pt")
        for n, net in enumerate(nets)
    ]
    with torch.device("meta"):
        model = Net()
    given = {"model": model, "example_inputs": torch.randn(2, 5), "progress": False}
    by_graph = combine_files(paths[0], paths[1:], tmp_path / "a.safetensors", "tsv-m", **given)
    by_name = combine_files(paths[0], paths[1:], tmp_path / "b.safetensors", "tsv-m", progress=False)
    assert dict((kind, count) for kind, count, _ in by_graph.kinds)["matrix"] == 2  # the name says table
    assert dict((kind, count) for kind, count, _ in by_name.kinds)["matrix"] == 1
    nets[0].load_state_dict(load_state_dict(tmp_path / "a.safetensors"))
    combine_files(paths[0], paths[1:], tmp_path / "lines.safetensors", "lines", **given)


SLOW = """
import sys, time
import vfsurgery.checkpoints.streams as streams
from vfsurgery.combining.files import combine_files
close = streams.Stream.close_tensor
def slowly(self, name):
    close(self, name)
    print(name, flush=True)
    time.sleep(0.2)
streams.Stream.close_tensor = slowly
folder = sys.argv[1]
combine_files(f"{folder}/base.safetensors", [f"{folder}/tuned{n}.safetensors" for n in (0, 1)],
              f"{folder}/out.safetensors", "ties", progress=False)
"""


def killed(folder: Path, after: int) -> list[str]:
    """Run in another process that is killed after some tensors, and return their names."""
    with subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        names = [process.stdout.readline().strip() for _ in range(after)]
        os.kill(process.pid, signal.SIGKILL)
    return names


def test_a_killed_run_leaves_no_half_file_and_is_gone_on_with(tmp_path):
    files, output = written(tmp_path), tmp_path / "out.safetensors"
    names = killed(tmp_path, 4)
    assert all(names)
    assert not output.exists()
    report = combine_files(*files, output, "ties", progress=False)
    assert report.resumed >= 4
    base, tuned = models()
    assert same(load_state_dict(output), combine_states(tuned, COMBINERS["ties"](), base=base))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("change", ["options", "inputs", "damage"])
def test_what_was_left_is_used_only_if_it_is_of_the_same_work(change, tmp_path):
    files, output = written(tmp_path), tmp_path / "out.safetensors"
    killed(tmp_path, 4)
    base, tuned = models()
    density = 0.2
    if change == "options":
        density = 0.5
    elif change == "inputs":
        tuned[0] = {n: t + 1 if t.is_floating_point() else t for n, t in tuned[0].items()}
        write(tuned[0], files[1][0].with_suffix(""))
    else:
        with (tmp_path / ".out.safetensors.partial").open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length)
            file.write(b"\1" * 500)
    report = combine_files(*files, output, "ties", density=density, progress=False)
    assert report.resumed < 4
    assert same(load_state_dict(output), combine_states(tuned, COMBINERS["ties"](density=density), base=base))


def test_nobody_writes_where_somebody_is_writing(tmp_path):
    files, output = written(tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(SurgeryError, match="being written by another process"), streams.Stream(output, {}, {}, "x"):
        combine_files(*files, output, "ties", progress=False)
    combine_files(*files, output, "ties", progress=False)


PEAK = """
import sys, torch
import vfsurgery as surgery
from pathlib import Path
from vfsurgery.combining.files import combine_files
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
folder, method = sys.argv[1:]
names = [f"{folder}/small{n}.pt" for n in range(3)]
combine_files(names[0], names[1:], f"{folder}/warm.safetensors", method, progress=False)
before = peak()
names = [f"{folder}/net{n}.pt" for n in range(3)]
combine_files(names[0], names[1:], f"{folder}/out.safetensors", method, progress=False)
print(peak() - before)
"""


@pytest.mark.parametrize("method", ["ties", "task-arithmetic"])
def test_memory_does_not_grow_with_the_model(method, tmp_path):
    largest, tensors = 2**22, 24  # 16 MiB each, 384 MiB in all
    for size, name in ((1000, "small"), (largest, "net")):
        for n in range(3):
            drawn = torch.Generator().manual_seed(n)
            net = {f"{k}.weight": torch.randn(4, size // 4, generator=drawn) for k in range(tensors)}
            torch.save(net, tmp_path / f"{name}{n}.pt")
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), method], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) <= 4 * largest * 4 + 64 * 2**20


def test_the_command_does_what_the_function_does(tmp_path):
    base, sources = written(tmp_path)
    paths = [str(base), *map(str, sources), "-o", str(tmp_path / "out.safetensors")]
    options = ["--method", "ties", "--option", "density=0.5", "--weights", "1,-1", "--scale", "0.5"]
    found = CliRunner().invoke(main, ["combine", *paths, *options])
    assert found.exit_code == 0, found.output
    assert "names and shapes" in found.output
    combined = load_state_dict(tmp_path / "out.safetensors")
    own, tuned = models()
    expected = combine_states(tuned, COMBINERS["ties"](density=0.5, scale=0.5), base=own, weights=[1, -1])
    assert same(combined, expected)
    wrong = CliRunner().invoke(main, ["combine", *paths, "--option", "densty=1"])
    assert wrong.exit_code == 2
    assert "did you mean 'density'" in wrong.output

"""Checkpoints that cannot be combined on disk: one error that names file and tensor, and nothing written."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch
from test_combining_files import models, same, write, written

import vfsurgery.checkpoints.streams as streams
from vfsurgery.checkpoints import load_state_dict
from vfsurgery.checkpoints.lazy import open_checkpoint
from vfsurgery.combining.files import combine_files
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, InvalidWeightsError, OptionError


def spoil(state: dict, name: str, value: object) -> dict:
    return {**state, name: value}


def nan(state: dict) -> dict:
    broken = state["large.weight"].clone()
    broken.view(-1)[-1] = math.nan
    return spoil(state, "large.weight", broken)


BAD = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "one"}, IncompatibleModelsError, "missing.*tuned1.*one"),
    "extra": (lambda s: spoil(s, "two", torch.zeros(1)), IncompatibleModelsError, "extra.*two"),
    "shape": (lambda s: spoil(s, "one", torch.zeros(2)), IncompatibleModelsError, r"one \(1,\) and \(2,\)"),
    "nan": (nan, InvalidWeightsError, r"tuned1.*NaN[\s\S]*large.weight"),
    "inf": (lambda s: spoil(s, "one", torch.tensor([math.inf])), InvalidWeightsError, r"infinite[\s\S]*one"),
    "integer": (lambda s: spoil(s, "one", torch.tensor([1])), InvalidWeightsError, r"cannot be combined[\s\S]*one"),
}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("bad", BAD)
def test_sources_that_do_not_belong_together_are_refused_by_name(bad, kind, tmp_path):
    change, error, message = BAD[bad]
    base, tuned = models()
    paths = [write(each, tmp_path / name, kind) for each, name in ((base, "base"), (tuned[0], "tuned0"))]
    paths.append(write(change(tuned[1]), tmp_path / "tuned1", kind))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        combine_files(paths[0], paths[1:], tmp_path / "out.safetensors", "ties", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_of_another_network_is_refused_and_one_of_another_head_is_told(tmp_path):
    base, tuned = models()
    other = {f"other.{name}": tensor for name, tensor in base.items()}
    paths = [write(each, tmp_path / f"tuned{n}") for n, each in enumerate(tuned)]
    with pytest.raises(IncompatibleModelsError, match="more than a head"):
        combine_files(write(other, tmp_path / "other"), paths, tmp_path / "out.safetensors", "ties", progress=False)
    headed = write(spoil(base, "fc.weight", torch.zeros(7, 8)), tmp_path / "headed")
    report = combine_files(headed, paths, tmp_path / "out.safetensors", "ties", progress=False)
    assert any("fc.weight" in note for note in report.notes)
    assert same(
        {"fc.weight": load_state_dict(tmp_path / "out.safetensors")["fc.weight"]},
        {"fc.weight": (tuned[0]["fc.weight"] + tuned[1]["fc.weight"]) / 2},
    )


def test_counters_are_those_of_the_base_and_differences_are_told(tmp_path):
    base, tuned = models()
    tuned[1]["norm.num_batches_tracked"] = torch.tensor(9)
    paths = [write(each, tmp_path / f"n{n}") for n, each in enumerate((base, *tuned))]
    report = combine_files(paths[0], paths[1:], tmp_path / "out.safetensors", "ties", progress=False)
    assert load_state_dict(tmp_path / "out.safetensors")["norm.num_batches_tracked"] == 3
    assert any("num_batches_tracked" in note for note in report.notes)


def test_complex_numbers_are_copied_where_they_agree_and_else_refused(tmp_path):
    base, tuned = models()
    turns = torch.polar(torch.ones(4), torch.arange(4.0))
    paths = [write(spoil(each, "freqs", turns), tmp_path / f"n{n}", "pt") for n, each in enumerate((base, *tuned))]
    combine_files(paths[0], paths[1:], tmp_path / "out.safetensors", "ties", progress=False)
    assert torch.equal(load_state_dict(tmp_path / "out.safetensors")["freqs"], turns)
    write(spoil(tuned[0], "freqs", turns * 2), tmp_path / "n1", "pt")
    with pytest.raises(InvalidWeightsError, match="complex"):
        combine_files(paths[0], paths[1:], tmp_path / "out.safetensors", "ties", progress=False)


def test_outputs_are_refused_where_they_would_replace_an_input(tmp_path):
    base, sources = written(tmp_path, "sharded")
    for output, size in (("base", "500KB"), ("tuned0", "500KB"), (next(tmp_path.glob("base-*")).stem, None)):
        with pytest.raises(CheckpointError, match="would be overwritten"):
            combine_files(
                base, sources, tmp_path / f"{output}.safetensors", "ties", max_shard_size=size, progress=False
            )
    assert same(load_state_dict(base), models()[0])


def test_missing_bases_and_wrong_options_are_refused(tmp_path):
    base, sources = written(tmp_path)
    output = tmp_path / "out.safetensors"
    for error, message, args, options in (
        (OptionError, "there is none", (None, sources, output, "ties"), {}),
        (OptionError, "nothing to combine", (base, [], output, "ties"), {}),
        (OptionError, "unknown combining method", (base, sources, output, "tise"), {}),
        (OptionError, "no option 'densty'", (base, sources, output, "ties"), {"densty": 0.1}),
        (OptionError, "density", (base, sources, output, "ties"), {"density": 0.0}),
        (OptionError, "one number for each", (base, sources, output, "ties"), {"weights": [1.0]}),
        (OptionError, "sum other than zero", (None, sources, output, "mean"), {"weights": [1.0, -1.0]}),
        (CheckpointError, "safetensors", (base, sources, tmp_path / "out.pt", "ties"), {}),
        (CheckpointError, "no checkpoint", (tmp_path / "absent.pt", sources, output, "ties"), {}),
    ):
        with pytest.raises(error, match=message):
            combine_files(*args, progress=False, **options)
        assert not output.exists()


def test_broken_files_are_refused_as_when_they_are_read_whole(tmp_path):
    base, _ = written(tmp_path)
    content = base.read_bytes()
    base.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(base)
    torch.save(models()[0], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="can only be read whole"):
        open_checkpoint(tmp_path / "old.pt")
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match="no weight"):
        open_checkpoint(tmp_path / "sparse.pt")
    torch.save({"a": object}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="run code"):
        open_checkpoint(tmp_path / "code.pt")
    index, _ = written(tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path, "sharded")
    next((tmp_path / "x").glob("base-00002*")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(index)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    files = written(tmp_path)

    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        combine_files(*files, tmp_path / "out.safetensors", "ties", progress=False)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    files = written(tmp_path)
    close = streams.Stream.close_tensor

    def meddling(self: streams.Stream, name: str) -> None:
        close(self, name)
        os.utime(files[0], ns=(time.time_ns(), 1))

    monkeypatch.setattr(streams.Stream, "close_tensor", meddling)
    with pytest.raises(CheckpointError, match="has changed"):
        combine_files(*files, tmp_path / "out.safetensors", "ties", progress=False)
    assert not (tmp_path / "out.safetensors").exists()

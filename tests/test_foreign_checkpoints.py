"""Checkpoints as training scripts write them, and files that are none: read, or refused for the real cause."""

import io
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from vfsurgery.checkpoints import load_into, load_state_dict, read_checkpoint, save_state_dict
from vfsurgery.errors import CheckpointError, OptionError


class Net(nn.Module):
    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


def weights(seed=0, **options):
    torch.manual_seed(seed)
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 7
        for key, value in Net(**options).state_dict().items()
    }


def below(prefix, state):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def loaded(path, **options):
    net = Net()
    notes = load_into(net, load_state_dict(path, **options), path)
    return net.state_dict(), notes


def same(found, expected):
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


EXTRA = {"criterion.weight": torch.ones(3), "val_metric.total": torch.zeros(()), "loss_fn.bank.queue": torch.ones(2, 2)}
CONTENTS = {
    "net": lambda w: {"net": w, "acc": 93.1, "epoch": 7},
    "network in a list of others": lambda w: {"network": w, "history": [1, 2], "args": {"lr": 0.1}},
    "nested": lambda w: {"state": 3, "checkpoint": {"model": {"state_dict": w, "epoch": 1}}},
    "an unknown key": lambda w: {
        "my_resnet": w,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    },
    "ema of a class": lambda w: {"ema": {"decay": 0.9, "updates": 5, "module": w}},
    "basicsr": lambda w: {"params_ema": w, "params": weights(5)},
    "data parallel": lambda w: {"state_dict": below("module", w)},
    "compiled": lambda w: {"model": below("_orig_mod", w)},
    "both": lambda w: below("module._orig_mod", w),
    "compiled parts": lambda w: {key.replace("conv.", "conv._orig_mod."): value for key, value in w.items()},
    "checkpointed parts": lambda w: {
        key.replace("fc.", "fc._checkpoint_wrapped_module."): value for key, value in w.items()
    },
    "parallel parts": lambda w: {key.replace("conv.", "conv.module."): value for key, value in w.items()},
    "lightning": lambda w: {"epoch": 3, "state_dict": below("model", w), "hyper_parameters": {"lr": 0.1}},
    "lightning with losses": lambda w: {"state_dict": {**below("net", w), **EXTRA}},
    "lightning, compiled": lambda w: {"state_dict": {**below("model._orig_mod", w), **EXTRA}},
    "lightning, deeper": lambda w: {"state_dict": {**below("task.backbone", w), **EXTRA, "task.scale": torch.ones(1)}},
    "a module that is the network": lambda w: {"state_dict": {**w, **EXTRA}},
    "extra state": lambda w: {"state_dict": {**w, "norm._extra_state": {"version": 1}}},
}


@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("name", CONTENTS)
def test_what_training_scripts_write_is_read(tmp_path, name, ending):
    path = tmp_path / f"epoch=3-step=20{ending}"
    torch.save(CONTENTS[name](weights()), path)
    found, notes = loaded(path)
    same(found, weights())
    assert bool(notes) == any(key in name for key in ("losses", "deeper", "lightning, compiled", "is the network"))


def test_what_is_left_out_is_said(tmp_path):
    _, notes = load(tmp_path, {**below("model", weights()), **EXTRA})
    assert notes == (
        "left out, as no part of the network below model.: criterion.weight, val_metric.total, loss_fn.bank.queue",
    )


def load(folder, content, **options):
    torch.save(content, folder / "net.pt")
    return loaded(folder / "net.pt", **options)


@pytest.mark.parametrize("prefix", ["", "model"])
def test_counters_of_batch_norm_may_be_missing(tmp_path, prefix):
    old = {key: value for key, value in weights().items() if "num_batches" not in key}
    found, notes = load(tmp_path, below(prefix, old) if prefix else old)
    assert notes == ("not in the file, so as the model has them: norm.num_batches_tracked",)
    same(found, {**weights(), "norm.num_batches_tracked": torch.tensor(0)})
    del old["norm.running_var"]
    with pytest.raises(CheckpointError, match=r"norm\.running_var differs\n(.|\n)*cause\s+it lacks 1 of"):
        load(tmp_path, old)


@pytest.mark.parametrize("key", ["backbone.weight", "fc2.weight", "conv.extra", "valuehead.bias"])
def test_what_may_belong_to_the_network_is_not_left_out(tmp_path, key):
    with pytest.raises(CheckpointError, match=re.escape(f"{key} differs\n  model       has no such entry")):
        load(tmp_path, {**weights(), key: torch.ones(2)})
    if not key.startswith("conv"):
        load(tmp_path, {**below("model", weights()), key: torch.ones(2)})  # beside the network
    with pytest.raises(CheckpointError, match=r"below\s+model\.\n"):
        load(tmp_path, {**below("model", {**weights(), key: torch.ones(2)}), **EXTRA})


def test_of_several_networks_the_key_says_which(tmp_path):
    student, teacher = weights(1), weights(2)
    together = {"state_dict": {**below("student", student), **below("teacher", teacher)}}
    with pytest.raises(
        CheckpointError, match=r"2 networks that fit Net\n  below\s+student, teacher\n  remedy .*key='student'"
    ):
        load(tmp_path, together)
    apart = {"student": student, "teacher": {"net": teacher}, "acc": {"best": torch.ones(())}}
    with pytest.raises(CheckpointError, match=r"holds 3 networks\n  under\s+student, teacher\.net, acc\n"):
        load(tmp_path, apart)
    for content in (together, apart):
        same(load(tmp_path, content, key="student")[0], student)
        same(load(tmp_path, content, key="teacher")[0], teacher)
        with pytest.raises(OptionError, match=r"no network under key 'techer'\n  remedy  did you mean 'teacher"):
            load(tmp_path, content, key="techer")
    same(load(tmp_path, apart, key="teacher.net")[0], teacher)


def test_of_averages_and_weights_it_is_said_which_was_taken(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"state_dict": weights(1), "state_dict_ema": weights(2), "epoch": 3}, path)
    found = read_checkpoint(path)
    same(found.state, weights(2))
    assert found.note == "its weights under state_dict_ema were taken, not those under state_dict"
    same(load_state_dict(path, ema=False), weights(1))
    same(load_state_dict(path, key="state_dict"), weights(1))
    same(load_state_dict(path, ema=False, key="state_dict_ema"), weights(2))
    torch.save({"ema": weights(2)}, path)
    assert read_checkpoint(path).note is None
    with pytest.raises(CheckpointError, match="holds the moving average of weights alone"):
        load_state_dict(path, ema=False)


def renamed(state):
    return {key.replace("norm", "bn"): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (below("layers.0", {"weight": torch.ones(2)}), r"cause\s+none of its 1 entries has a name of the model's 9"),
        (renamed(weights()), r"nearest\s+bn\.weight \(4,\)(.|\n)*missing\s+norm\.weight, norm\.bias"),
        (renamed(weights()), r"unexpected\s+bn\.weight(.|\n)*cause\s+4 of the model's 9 entries are there"),
        (weights(classes=10), r"remedy\s+only the class count differs: build the model with num_classes=10"),
        (below("model", weights(classes=10)), r"below\s+model\.\n  remedy\s+only the class count differs"),
        (
            {**weights(), "fc.bias": torch.ones(3) * 1j},
            r"fc\.bias differs\n  model\s+\(3,\)\n  checkpoint\s+\(3,\) complex64",
        ),
    ],
)
def test_what_does_not_fit_is_told_for_its_cause(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, content)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipped(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"0" * 900)
    return file.getvalue()


def numpy_file():
    file = io.BytesIO()
    np.save(file, np.ones(9))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102530333\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head>" + b" " * 900
FILES = {
    "git lfs": (LFS, "a pointer of Git LFS", "git lfs pull"),
    "a page": (PAGE, "a web page", "download or copy it again"),
    "text": (b"epoch,loss\n1,0.3\n", "text, which begins with 'epoch,loss", "name a file of weights"),
    "json": (b'{"error": "not found"}', "text, which begins with '{\"error", "name a file of weights"),
    "cut off": (saved(weights())[:-300], "cut off after", "download or copy it again"),
    "no checkpoint": (zipped("word/document.xml"), "a zip without a checkpoint, with word/document.xml", "unpack"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 90, "compressed with gzip", "unpack it first"),
    "numpy": (numpy_file(), "an array of NumPy", "save the weights"),
    "keras": (b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "an HDF5 file", "save the weights"),
}


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".safetensors", ".bin"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint_is_told_for_what_it_is(tmp_path, name, ending):
    content, kind, remedy = FILES[name]
    path = tmp_path / f"net{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} is damaged or no checkpoint"
    assert kind in lines[1] and remedy in lines[2]


def test_safetensors_are_known_by_their_content_and_told_where_they_are_cut_off(tmp_path):
    save_state_dict(weights(), tmp_path / "net.safetensors")
    content = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"cause\s+it is a file of safetensors\n  remedy  name it net\.safetensors"
    ):
        load_state_dict(tmp_path / "net.pt")
    (tmp_path / "net.safetensors").write_bytes(content[:-8])
    with pytest.raises(
        CheckpointError, match=f"it has {len(content) - 8:,} bytes, and its header tells of {len(content):,}"
    ):
        load_state_dict(tmp_path / "net.safetensors")


def test_programs_and_true_archives_are_told_apart_from_weights(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(
        CheckpointError, match=r"it is a program of torch\.export(.|\n)*torch\.export\.load\(FILE\)\.state_dict"
    ):
        load_state_dict(tmp_path / "net.pt2")
    with tarfile.open(tmp_path / "net.pth.tar", "w") as archive:
        archive.add(tmp_path / "net.pt2", "net.pt2")
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load_state_dict(tmp_path / "net.pth.tar")


def test_a_folder_names_the_checkpoints_in_it(tmp_path):
    save_state_dict(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"is a folder\n  remedy  name the checkpoint file inside it: model\.safetensors$"
    ):
        load_state_dict(tmp_path)

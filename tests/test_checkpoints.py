"""Reading refuses whatever could run code; writing leaves a whole file or none."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from vfsurgery.checkpoints import (
    EMA_WRAPPERS,
    WRAPPERS,
    atomic,
    check_writable,
    file_hash,
    load_into,
    load_state_dict,
    save_sharded,
    save_state_dict,
    write_text,
)
from vfsurgery.checkpoints.shards import checkpoint_hash
from vfsurgery.errors import CheckpointError


class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)


class RunsCode:
    """Unpickling it creates the file ``opened``."""

    def __init__(self, opened: Path) -> None:
        self.opened = opened

    def __reduce__(self):
        return open, (str(self.opened), "w")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return Net().state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_load(state, tmp_path, suffix, zipped):
    path = tmp_path / f"net{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(path), state)


def test_safetensors_round_trip(state, tmp_path):
    save_state_dict(state, tmp_path / "deep" / "er" / "net.safetensors", {"by": "test"})
    assert_same(load_state_dict(tmp_path / "deep" / "er" / "net.safetensors"), state)
    with safe_open(tmp_path / "deep" / "er" / "net.safetensors", "pt") as file:
        assert file.metadata() == {"by": "test", "format": "pt"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_state_dict_is_found(state, tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: state, "lr": 0.1}, tmp_path / "net.pt")
    assert_same(load_state_dict(tmp_path / "net.pt"), state)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("averaged", EMA_WRAPPERS)
def test_moving_averages_are_preferred_unless_told_otherwise(state, tmp_path, wrapper, averaged):
    ema = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({wrapper: state, averaged: ema}, tmp_path / "net.pt")
    assert_same(load_state_dict(tmp_path / "net.pt"), ema)
    assert_same(load_state_dict(tmp_path / "net.pt", ema=False), state)


def test_an_average_that_holds_no_weights_is_passed_over(state, tmp_path):
    torch.save({"model": state, "ema": {"decay": 0.999, "updates": 3}}, tmp_path / "net.pt")
    assert_same(load_state_dict(tmp_path / "net.pt"), state)


def test_moving_averages_as_timm_and_torchvision_write_them_load(tmp_path):
    from timm.utils import ModelEmaV3, get_state_dict

    net, path = Net(), tmp_path / "net.pth"
    averaged = torch.optim.swa_utils.AveragedModel(net)  # torchvision's references derive theirs from it
    torch.save({"model": Net().state_dict(), "model_ema": averaged.state_dict(), "epoch": 3}, path)
    assert_same(load_state_dict(path), net.state_dict())
    torch.save({"state_dict": Net().state_dict(), "state_dict_ema": get_state_dict(ModelEmaV3(net))}, path)
    assert_same(load_state_dict(path), net.state_dict())


def test_timm_reads_what_is_read_here(state, tmp_path):
    from timm.models import load_state_dict as timm_load_state_dict

    torch.save({"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "net.pt")
    for ema in (True, False):
        found = load_state_dict(tmp_path / "net.pt", ema=ema)
        assert_same(found, timm_load_state_dict(str(tmp_path / "net.pt"), use_ema=ema))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(state, tmp_path, prefix):
    torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "net.pt")
    assert_same(load_state_dict(tmp_path / "net.pt"), state)


def test_prefix_of_some_keys_is_kept(tmp_path):
    state = {"module.weight": torch.ones(1), "bias": torch.zeros(1)}
    torch.save(state, tmp_path / "net.pt")
    assert_same(load_state_dict(tmp_path / "net.pt"), state)


def test_whole_module_is_refused_with_the_way_out(tmp_path):
    torch.save(Net(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"whole\.pt holds more than tensors") as caught:
        load_state_dict(tmp_path / "whole.pt")
    assert re.search(r"found\s+\S*test_checkpoints\.Net", str(caught.value))
    assert "model.state_dict()" in str(caught.value) and "safetensors" in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(state, tmp_path, zipped):
    opened = tmp_path / "opened"
    content = {"state_dict": state, "x": RunsCode(opened)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_state_dict(tmp_path / "evil.pt")
    assert not opened.exists()


def test_training_arguments_are_passed_over_and_classes_of_training_scripts_refused_by_name(state, tmp_path):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "net.pth")
    assert list(load_state_dict(tmp_path / "net.pth")) == list(state)
    torch.save({"state_dict": state, "took": datetime.timedelta(hours=1)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"found\s+datetime\.timedelta"):
        load_state_dict(tmp_path / "net.pth")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"script\.pt holds more than tensors"):
        load_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_truncated_file_is_damaged(state, tmp_path, suffix, keep):
    path = tmp_path / f"net{suffix}"
    save_state_dict(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"net\{suffix} is damaged or no checkpoint\n  cause .*\n  remedy "):
        load_state_dict(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_text_is_no_checkpoint(tmp_path, suffix):
    (tmp_path / f"net{suffix}").write_text("hello world, not a checkpoint\n" * 9)
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint"):
        load_state_dict(tmp_path / f"net{suffix}")


def test_empty_file(tmp_path):
    (tmp_path / "net.pt").touch()
    with pytest.raises(CheckpointError, match=r"net\.pt is empty"):
        load_state_dict(tmp_path / "net.pt")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*net\.safetensors\n  folder  "):
        load_state_dict(tmp_path / "net.safetensors")


def test_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder\n  remedy  name the checkpoint file"):
        load_state_dict(tmp_path)


def test_unknown_kind_offers_the_nearest(tmp_path):
    with pytest.raises(CheckpointError, match=r"of no known kind\n  remedy  did you mean '\.safetensors'\?"):
        load_state_dict(tmp_path / "net.safetensor")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "net": {"weight": 1.0}}, "a mapping with the keys epoch, net"),
        ({"weight": torch.ones(1), "bias": 3}, "a mapping with the keys weight, bias"),
        ({3: torch.ones(1)}, "a mapping with the keys 3"),
        ({str(i): i for i in range(9)}, "a mapping with the keys 0, 1, 2, 3, 4, 5 …"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        (OrderedDict(), "an empty mapping"),
    ],
)
def test_no_state_dict(tmp_path, content, found):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=re.escape(found)) as caught:
        load_state_dict(tmp_path / "net.pt")
    assert "holds no state dict" in str(caught.value)


def test_tied_and_strided_tensors_are_saved_per_key(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "tied": weight, "part": weight[0], "turned": weight.t()}
    save_state_dict(state, tmp_path / "net.safetensors")
    assert_same(load_state_dict(tmp_path / "net.safetensors"), state)


def test_saving_does_not_touch_the_model(tmp_path):
    net = Net()
    places = [tensor.data_ptr() for tensor in net.state_dict().values()]
    save_state_dict(net.state_dict(), tmp_path / "net.safetensors")
    assert places == [tensor.data_ptr() for tensor in net.state_dict().values()]
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_weights_are_written_as_safetensors_only(state, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*net\.pt\n  remedy  weights are written as net\.safe"):
        save_state_dict(state, tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_folder_is_not_overwritten(tmp_path):
    (tmp_path / "net.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="a folder of this name is there"):
        check_writable(tmp_path / "net.safetensors")


def test_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "report.json", "old")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "report.json") as partial:
        partial.write_text("half of the n")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_finished_write_replaces_the_old_file(tmp_path):
    write_text(tmp_path / "report.json", "old")
    write_text(tmp_path / "report.json", "new α")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "new α"


def test_unfinished_file_has_another_name(tmp_path):
    with atomic(tmp_path / "plot.png") as partial:
        partial.write_text("...")
        assert partial.parent == tmp_path and partial.suffix == ".png"
        assert not (tmp_path / "plot.png").exists()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.json\n  cause  "):
        write_text(tmp_path / "file" / "report.json", "text")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_new_file_has_the_usual_permissions(state, tmp_path):
    save_state_dict(state, tmp_path / "net.safetensors")
    (tmp_path / "usual").touch()
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_load_into_copies_and_converts(state):
    net = Net().double()
    load_into(net, {key: tensor + 1 for key, tensor in state.items()}, "net.pt")
    assert torch.equal(net.conv.weight, (state["conv.weight"] + 1).double())


def test_first_differing_entry_is_named_with_both_shapes(state):
    state["norm.weight"] = torch.ones(5)
    state["fc.bias"] = torch.ones(7, 2)
    net = Net()
    before = net.conv.weight.clone()
    with pytest.raises(CheckpointError, match=r"net\.pt does not fit Net: norm\.weight differs") as caught:
        load_into(net, {key: tensor + 1 for key, tensor in state.items()}, "net.pt")
    assert re.search(r"model\s+\(4,\)\n  checkpoint\s+\(5,\)\n  others\s+1 more entries differ", str(caught.value))
    assert "load the architecture that it was saved from" in str(caught.value)
    assert torch.equal(net.conv.weight, before)


def test_missing_entry(state):
    del state["norm.running_var"]
    with pytest.raises(CheckpointError, match=r"running_var differs\n  model\s+\(4,\)\n  checkpoint  has no such"):
        load_into(Net(), state, "net.pt")


def test_left_over_entry(state):
    state["extra"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"extra differs\n  model\s+has no such entry\n  checkpoint  \(2,\)"):
        load_into(Net(), state, "net.pt")


def test_other_class_count_gets_a_hint():
    with pytest.raises(CheckpointError, match=r"only the class count differs: .* num_classes=10$"):
        load_into(Net(), Net(num_classes=10).state_dict(), "net.pt")


@pytest.mark.parametrize(
    "changed",
    [
        {"fc.weight": torch.ones(10, 5)},
        {"fc.weight": torch.ones(10, 4), "fc.bias": torch.ones(11)},
        {"new": torch.ones(1)},
    ],
)
def test_other_differences_get_no_hint_on_classes(state, changed):
    with pytest.raises(CheckpointError) as caught:
        load_into(Net(), state | changed, "net.pt")
    assert "class count" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "network", "student"])
def test_a_leading_name_is_removed_or_added_where_that_makes_all_keys_fit(state, name):
    net = Net()
    load_into(net, {f"{name}.{key}": tensor + 1 for key, tensor in state.items()}, "net.pt")
    assert torch.equal(net.fc.weight, state["fc.weight"] + 1)
    wrapped = nn.Module()
    wrapped.add_module(name, Net())
    load_into(wrapped, {key: tensor + 2 for key, tensor in state.items()}, "net.pt")
    assert torch.equal(wrapped.get_submodule(name).fc.weight, state["fc.weight"] + 2)


def test_a_leading_name_of_some_keys_is_no_wrapper(state):
    odd = {("model." if key.startswith("fc") else "") + key: tensor for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"fc\.weight differs"):
        load_into(Net(), odd, "net.pt")


def test_the_same_content_has_the_same_bytes_in_every_process(state, tmp_path):
    code = (
        "import sys, torch; from vfsurgery.checkpoints import save_state_dict\n"
        "save_state_dict({'b': torch.ones(2), 'a': torch.zeros(3)}, sys.argv[1], {k: k for k in 'zyxwvu'})"
    )
    contents = set()
    for run in range(2):
        path = tmp_path / f"{run}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **{k: k for k in "zyxwvu"}}


@pytest.mark.parametrize("stem", ["net", "net.v1", "{net}", "a b", "n" * 200])
def test_shards_round_trip(state, tmp_path, stem):
    *parts, index = save_sharded(state, tmp_path / f"{stem}.safetensors", 100, {"by": "test"})
    assert len(parts) > 2 and index.name == f"{stem}.safetensors.index.json"
    assert_same(load_state_dict(index), state)
    for part in parts:
        with safe_open(part, "pt") as file:
            assert file.metadata() == {"by": "test", "format": "pt"}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 100


def test_what_fits_into_one_file_is_written_as_one(state, tmp_path):
    assert save_sharded(state, tmp_path / "net.safetensors", "1GB") == (tmp_path / "net.safetensors",)
    assert_same(load_state_dict(tmp_path / "net.safetensors"), state)


def test_shards_of_huggingface_hub_load(state, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    huggingface_hub.save_torch_state_dict(state, tmp_path, max_shard_size=100)
    assert_same(load_state_dict(tmp_path / "model.safetensors.index.json"), state)
    huggingface_hub.save_torch_state_dict(state, tmp_path, max_shard_size=100, safe_serialization=False)
    assert_same(load_state_dict(tmp_path / "pytorch_model.bin.index.json"), state)


def test_the_name_without_index_says_where_it_is(state, tmp_path):
    save_sharded(state, tmp_path / "net.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*\n.*\n  remedy  it is sharded: name .*index"):
        load_state_dict(tmp_path / "net.safetensors")


def test_the_hash_of_shards_is_of_all_of_them(state, tmp_path):
    *parts, index = save_sharded(state, tmp_path / "net.safetensors", 100)
    before = checkpoint_hash(index)
    assert checkpoint_hash(index) == before
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    assert checkpoint_hash(index) != before


def test_a_hash_needs_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*net\.pt\n  cause  "):
        file_hash(tmp_path / "net.pt")

"""What training scripts save beside weights is no reason to refuse them, and never run."""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vfsurgery.checkpoints import load_state_dict
from vfsurgery.errors import CheckpointError

STATE = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}
VALUES = {
    "accuracy": np.float64(93.1),
    "epoch": np.int64(7),
    "name": np.str_("best"),
    "confusion": np.eye(3),
    "classes": np.array(["cat", "dog"], dtype=object),
    "options": argparse.Namespace(lr=0.1, output=Path("runs/1"), best=[np.float32(0.5)]),
    "paths": [Path("photos")],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_values_beside_weights_are_left_alone(tmp_path, name, zipped):
    torch.save({"net": STATE, name: VALUES[name]}, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    before = set(map(str, torch.serialization.get_safe_globals()))
    found = load_state_dict(tmp_path / "net.pth")
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)
    assert set(map(str, torch.serialization.get_safe_globals())) == before  # what users have allowed stays as it was


def test_options_of_lightning_are_left_alone(tmp_path, monkeypatch):
    name = "pytorch_lightning.utilities.parsing"
    module = types.ModuleType(name)
    exec("class AttributeDict(dict): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.utilities", types.ModuleType("pytorch_lightning.utilities"))
    monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": STATE, "hyper_parameters": module.AttributeDict(lr=0.1, layers=[1, 2])}
    torch.save(content, tmp_path / "net.ckpt")
    monkeypatch.delitem(sys.modules, name)  # it need not be installed where weights are read
    assert load_state_dict(tmp_path / "net.ckpt").keys() == STATE.keys()


def test_other_classes_and_weights_of_numpy_are_refused(tmp_path):
    torch.save({"net": STATE, "model": nn.Linear(1, 1)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        load_state_dict(tmp_path / "net.pt")
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    torch.save({key: value.numpy() for key, value in STATE.items()}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_state_dict(tmp_path / "net.pt")


def test_numpy_is_not_called_for_what_is_left_alone(tmp_path):
    class Forged:
        def __reduce__(self):
            return np._core.multiarray.scalar, ("no dtype", b"more bytes than any number has")

    torch.save({"net": STATE, "accuracy": Forged()}, tmp_path / "net.pt")
    with pytest.raises(TypeError):
        torch.load(tmp_path / "net.pt", weights_only=False)
    assert load_state_dict(tmp_path / "net.pt").keys() == STATE.keys()

"""What steps gave, kept in a folder under the hash of all that decides it, so that a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vfsurgery.checkpoints import load_into, load_state_dict, save_state_dict
from vfsurgery.errors import CheckpointError, SurgeryError, explain

RECORD = "record.json"


def digest(*parts: Any) -> str:
    """The SHA-256 of plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest("a") == digest("b")
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """One step's folder: its plain values, and the weights of networks by their name."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict[str, Any])

    def load(self, name: str, model: nn.Module) -> nn.Module:
        """Bring one network's weights into ``model``, which has random ones, and return it.

        Raises:
            CheckpointError: the file is damaged or does not fit.
        """
        path = self.folder / f"{name}.safetensors"
        load_into(model, load_state_dict(path), path)
        return model.eval()


@dataclass(frozen=True)
class Store:
    """A folder of steps; ``reads`` says whether it may hold any that are of use.

    Steps are written under a temporary name and moved into place, so what is there is whole.
    """

    folder: Path
    reads: bool

    def prepare(self) -> None:
        """Make the folder, empty where nothing in it is to be used.

        Raises:
            CheckpointError: it cannot be written to.
        """
        try:
            if not self.reads and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left)
        except OSError as error:
            raise CheckpointError(explain(f"cannot keep steps in {self.folder}", cause=error)) from error

    def find(self, key: str) -> Kept | None:
        """What was kept under a key, if it can be read."""
        folder = self.folder / key
        if not self.reads or not folder.is_dir():
            return None
        try:
            return Kept(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def keep(self, key: str, record: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> None:
        """Keep a step, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, suffix=".partial", ignore_cleanup_errors=True) as made:
                for name, model in networks.items():
                    save_state_dict(model.state_dict(), Path(made) / f"{name}.safetensors")
                (Path(made) / RECORD).write_text(json.dumps(record), encoding="utf-8")
                target = self.folder / key
                if target.exists():
                    shutil.rmtree(target)
                os.rename(made, target)
        except OSError as error:
            raise CheckpointError(explain(f"cannot keep a step in {self.folder}", cause=error)) from error

    def training(self, key: str, name: str) -> Path:
        """The file that keeps a training after every epoch until the step is done."""
        return self.folder / f"{key[:16]}_{name}.training.pt"

    def forget_trainings(self, key: str) -> None:
        """Remove those files: the step that they belong to is kept."""
        for path in self.folder.glob(f"{key[:16]}_*.training.pt"):
            path.unlink(missing_ok=True)


def loads(model: nn.Module, untrained: nn.Module) -> bool:
    """Whether a network's weights can be kept: its class, built anew, takes all of them."""
    try:
        load_into(untrained, model.state_dict(), "weights")
    except SurgeryError:
        return False
    return type(model) is type(untrained)

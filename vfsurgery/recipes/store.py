"""What steps gave, kept in a folder under the hash of all that decides it, so that a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vfsurgery.checkpoints import WEIGHTS, load_into, load_state_dict, save_state_dict
from vfsurgery.errors import CheckpointError, SurgeryError, explain
from vfsurgery.hub.cards import Summary
from vfsurgery.recipes.bench import Told

RECORD, LARGEST = "record.json", 2**28
"""The file of a step's plain values, and the most bytes that are read of one."""


def digest(*parts: Any) -> str:
    """The SHA-256 of plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest("a") == digest("b")
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Record(Told):
    """What a stage said, with what its networks' files and cards say; anything else in its file is damage."""

    metadata: dict[str, dict[str, str]]
    summaries: dict[str, Summary]

    @property
    def key(self) -> str:
        """The hash of all of it, which stands beside it: a record that was changed is none."""
        return digest(self.model_dump_json())


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
        if self.folder.is_symlink():  # what lies behind it is not ours to delete
            raise CheckpointError(explain(f"cannot keep steps in {self.folder}", cause="it is a link"))
        try:
            if not self.reads and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(explain(f"cannot keep steps in {self.folder}", cause=error)) from error
        for left in self.folder.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def find(self, key: str) -> Record | None:
        """What was kept under a key, if it can be read."""
        path = self.folder / key / RECORD
        try:
            if not self.reads or not path.is_file() or path.stat().st_size > LARGEST:  # a pipe would never end
                return None
            whole, _, text = path.read_text(encoding="utf-8").partition("\n")
            record = Record.model_validate_json(text)
            return record if record.key == whole else None
        except (OSError, ValueError):
            return None

    def load(self, key: str, name: str, model: nn.Module) -> nn.Module:
        """Bring the weights of one network of a step into ``model``, which has random ones, and return it.

        Raises:
            CheckpointError: the file is damaged or does not fit.
        """
        path = self.folder / key / f"{name}{WEIGHTS}"
        load_into(model, load_state_dict(path), path)
        return model.eval()

    def keep(self, key: str, record: Record, networks: Mapping[str, nn.Module]) -> None:
        """Keep a step, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, suffix=".partial", ignore_cleanup_errors=True) as made:
                for name, model in networks.items():
                    save_state_dict(model.state_dict(), Path(made) / f"{name}{WEIGHTS}")
                (Path(made) / RECORD).write_text(f"{record.key}\n{record.model_dump_json()}", encoding="utf-8")
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

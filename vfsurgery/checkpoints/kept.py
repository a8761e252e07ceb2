"""Networks kept in a folder under the hash of all that decides them, so that work that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vfsurgery.checkpoints.files import WEIGHTS, write_text
from vfsurgery.checkpoints.fitting import load_into
from vfsurgery.checkpoints.plain import read_text
from vfsurgery.checkpoints.reading import load_state_dict
from vfsurgery.checkpoints.writing import save_state_dict
from vfsurgery.errors import CheckpointError, SurgeryError, explain

RECORD, LARGEST = "record.json", 2**28
"""The file of what a step said, and the most bytes that are read of one."""


def digest(*parts: Any) -> str:
    """The SHA-256 of plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest("a") == digest("b")
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of steps, each with networks and a text; ``reads`` says whether it may hold any that are of use.

    What a step said is written last and behind its hash: where it can be read, the networks are there too, and what
    was changed counts for nothing.
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
        if not self.reads:
            self._empty(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(explain(f"cannot keep steps in {self.folder}", cause=error)) from error

    def find(self, key: str) -> str | None:
        """What a step said, if it can be read."""
        path = self.folder / key / RECORD
        try:
            whole, _, text = read_text(path, LARGEST).partition("\n") if self.reads else ("", "", "")
            return text if digest(text) == whole else None
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

    def keep(self, key: str, text: str, networks: Mapping[str, nn.Module]) -> None:
        """Keep a step.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._empty(self.folder / key)
        for name, model in networks.items():
            save_state_dict(model.state_dict(), self.folder / key / f"{name}{WEIGHTS}")
        write_text(self.folder / key / RECORD, f"{digest(text)}\n{text}")

    def training(self, key: str, name: str) -> Path:
        """The file that keeps a training after every epoch until the step is done."""
        return self.folder / f"{key[:16]}_{name}.training.pt"

    def forget_trainings(self, key: str) -> None:
        """Remove those files: the step that they belong to is kept."""
        for path in self.folder.glob(f"{key[:16]}_*.training.pt"):
            path.unlink(missing_ok=True)

    def _empty(self, folder: Path) -> None:
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise CheckpointError(explain(f"cannot remove {folder}", cause=error)) from error


def loads(model: nn.Module, untrained: nn.Module) -> bool:
    """Whether a network's weights can be kept: its class, built anew, takes all of them."""
    try:
        load_into(untrained, model.state_dict(), "weights")
    except SurgeryError:
        return False
    return type(model) is type(untrained)

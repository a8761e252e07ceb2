"""A training kept on disk after every epoch, so that one that was cut off goes on to the very same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor

from vfsurgery.checkpoints import Sink, atomic
from vfsurgery.errors import CheckpointError, explain


class Stateful(Protocol):
    """A model, an optimizer or a learning-rate schedule."""

    @property
    def state_dict(self) -> Callable[[], dict[str, Any]]:
        """Hands out the state."""
        ...

    @property
    def load_state_dict(self) -> Callable[[dict[str, Any]], object]:
        """Takes a state over."""
        ...


@dataclass(frozen=True)
class Progress:
    """What decides how a training goes on: the ``parts`` that hold state, and the generator that draws the images.

    Args:
        parts: By name; all have ``state_dict`` and ``load_state_dict``.
        generator: Draws the order of images and what is done to them.
        setting: Options of the training, as text; a file of another setting is refused.
    """

    parts: Mapping[str, Stateful]
    generator: torch.Generator
    setting: str

    def save(self, path: Path, epoch: int) -> None:
        """Write all of it, whole or not at all; ``epoch`` counts the finished ones."""
        content: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"epoch": epoch, "generator": self.generator.get_state(), "setting": self.setting}
        with atomic(path) as partial, Sink(partial) as file:
            torch.save(content, cast("IO[bytes]", file))

    def load(self, path: Path) -> int:
        """Take over what :meth:`save` wrote and return the number of finished epochs; 0 where there is no file.

        Raises:
            CheckpointError: The file is damaged, or belongs to another training.
        """
        if not path.exists():
            return 0
        remedy = "delete it to train from the beginning"
        try:
            content = cast("dict[str, Any]", torch.load(path, map_location="cpu", weights_only=True))
            setting = content["setting"]
        except Exception as error:  # torch raises nearly anything on random bytes
            raise _damaged(path, error, remedy) from error
        if setting != self.setting:
            raise CheckpointError(
                explain(f"{path} is of another training", found=setting, expected=self.setting, remedy=remedy)
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(content[name])
            self.generator.set_state(cast("Tensor", content["generator"]))
            return int(content["epoch"])
        except Exception as error:  # and so do its optimizers
            raise _damaged(path, error, remedy) from error


def _damaged(path: Path, error: Exception, remedy: str) -> CheckpointError:
    cause = str(error).partition("\n")[0][:120] or type(error).__name__
    return CheckpointError(explain(f"{path} is damaged", cause=cause, remedy=remedy))

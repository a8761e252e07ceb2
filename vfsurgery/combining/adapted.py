"""A base and a LoRA adapter as one checkpoint that stays in its files, for what combines checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfsurgery.checkpoints.lazy import LazyCheckpoint
from vfsurgery.checkpoints.shards import files_of
from vfsurgery.combining.adapter_files import files_of_adapter
from vfsurgery.combining.adapters import Adapter, check_same_base, read_adapter
from vfsurgery.combining.folded import Folded
from vfsurgery.errors import IncompatibleModelsError, OptionError, explain


@dataclass(frozen=True)
class Adapted:
    """A fine-tuned model whose tensors are computed as they are read; see :class:`LazyCheckpoint` for what it has."""

    path: Path
    state: dict[str, Tensor]
    folded: Folded
    adapter: Adapter
    base: LazyCheckpoint = field(repr=False)
    same: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, adapter: Adapter, base: LazyCheckpoint, same: Mapping[str, str]) -> Adapted:
        """Fold an adapter into a base.

        Args:
            adapter: What was read of a folder.
            base: The checkpoint that it was trained on.
            same: Tensors of the base that are one with another, by name that one's: what is added to one of them
                is added to both.

        Raises:
            IncompatibleModelsError: they do not fit.
        """
        folded = adapter.onto(base, {name: tuple(tensor.shape) for name, tensor in base.state.items()})
        folded = _once(folded, same, adapter.folder)
        state = {
            name: torch.empty(shape, dtype=_dtype(name, base, adapter), device="meta")
            for name, shape in folded.shapes.items()
        }
        return cls(adapter.folder, state, folded, adapter, base, same)

    @property
    def note(self) -> str | None:
        """What a user should know of the adapter."""
        return "; ".join(self.folded.notes) or None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`~vfsurgery.combining.base.Store`."""
        return self.folded.read(self.same.get(name, name), start, stop)

    def same_storage(self) -> dict[str, str]:
        """As its base."""
        return self.base.same_storage()

    def close(self) -> None:
        """Close the adapter's file."""
        self.adapter.file.close()


def read_adapters(paths: Sequence[Path], base: object) -> dict[int, Adapter]:
    """The adapters among sources, by their place: folders.

    Raises:
        CheckpointError: a folder cannot be read, is no adapter, or its base is neither given nor named.
        OptionError: no base is given.
        IncompatibleModelsError: adapters are of different bases.
    """
    found = {place: read_adapter(path) for place, path in enumerate(paths) if path.is_dir()}
    for adapter in found.values() if base is None else ():
        raise OptionError(
            explain(
                f"{adapter.folder} is an adapter, and there is no base to fold it into",
                base=adapter.named_base(),
                remedy="give that model as the base",
            )
        )
    check_same_base([*found.values()])
    return found


def files_behind(path: Path) -> list[Path]:
    """All files of a source: of a checkpoint, or of an adapter's folder.

    Raises:
        CheckpointError: an index is none, or a folder has no weights.
    """
    return files_of_adapter(path) if path.is_dir() else files_of(path)


def _dtype(name: str, base: LazyCheckpoint, adapter: Adapter) -> torch.dtype:
    if name in base.state:
        return base.state[name].dtype
    return adapter.file.state[adapter.saved[name].key].dtype


def _once(folded: Folded, same: Mapping[str, str], folder: Path) -> Folded:
    """The same with what is changed under the one name by which tensors of several names are read."""
    changed: dict[str, dict[str, Any]] = {}
    for kind in ("weights", "biases", "saved"):
        own: Mapping[str, Any] = getattr(folded, kind)
        changed[kind] = {same.get(name, name): value for name, value in own.items()}
        if len(changed[kind]) < len(own) and kind != "saved":
            twice = next(name for name in own if same.get(name, name) in own and name in same)
            raise IncompatibleModelsError(
                explain(
                    f"{folder} changes one tensor of its base twice",
                    tensors=f"{twice} and {same[twice]}",
                    remedy="fold it with peft and save the weights",
                )
            )
    return Folded(folded.base, folded.shapes, **changed, notes=folded.notes)

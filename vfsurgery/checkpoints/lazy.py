"""Checkpoints whose tensors stay in their files: shapes and places first, then numbers, a few at a time.

Files are not mapped into memory: pages that were read would count as the process's own until something else needs
them. What a file holds, and what of it is meant, is told by the same code as for files that are read whole.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vfsurgery.checkpoints.files import WEIGHTS
from vfsurgery.checkpoints.formats import (
    READERS,
    check_archive,
    check_readable,
    check_tensors,
    load_torch,
    read_header,
    refuse,
)
from vfsurgery.checkpoints.reading import Checkpoint, find_checkpoint
from vfsurgery.checkpoints.refusals import printable, refuse_damaged
from vfsurgery.errors import CheckpointError, explain

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""By the names that safetensors gives them; those of 8 bits and less are codes, not numbers to compute with."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's storage begins in a file, in bytes, and how it lies in there."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, offset: int, like: Tensor) -> Self:
        """From a tensor's shape, strides and dtype."""
        return cls(path, offset, tuple(like.shape), tuple(like.stride()), like.dtype)

    @property
    def extent(self) -> int:
        """Numbers from the first to the last that it has."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass
class LazyCheckpoint:
    """A state dict that stays in its files.

    Attributes:
        path: The file, or the index of several.
        state: Tensors of shapes and dtypes alone, on the meta device.
        part: The keys under which it stood in the file.
        note: What was chosen among several networks, where there was a choice.
    """

    path: Path
    state: dict[str, Tensor]
    part: str = ""
    note: str | None = None
    _places: dict[str, Place | Tensor] = field(default_factory=dict[str, "Place | Tensor"], repr=False)
    _open: tuple[Path, int] | None = field(default=None, repr=False)
    _turned: tuple[str, Tensor] | None = field(default=None, repr=False)

    def renamed(self, names: dict[str, str]) -> LazyCheckpoint:
        """The tensors that are named, under new names.

        Args:
            names: From new names to those that they have.
        """
        state = {new: self.state[old] for new, old in names.items()}
        return LazyCheckpoint(
            self.path, state, self.part, self.note, {new: self._places[old] for new, old in names.items()}
        )

    def with_those_of(self, other: LazyCheckpoint, names: Sequence[str]) -> LazyCheckpoint:
        """With tensors of another checkpoint in place of its own, or beside them."""
        state = self.state | {name: other.state[name] for name in names}
        places = self._places | {name: other._places[name] for name in names}
        return LazyCheckpoint(self.path, state, self.part, self.note, places)

    def same_storage(self) -> dict[str, str]:
        """For tensors that are one and the same in the file, by name the first one's name."""
        first: dict[Place, str] = {}
        found: dict[str, str] = {}
        for name, place in self._places.items():
            if isinstance(place, Place) and place.extent:
                found[name] = first.setdefault(place, name)
        return {name: other for name, other in found.items() if name != other}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers ``start`` to ``stop`` of a tensor laid out flat, of the tensor's own dtype, in memory of their own.

        Raises:
            CheckpointError: The file cannot be read any more, or has become shorter.
        """
        place = self._places[name]
        if isinstance(place, Tensor):
            return place.reshape(-1)[start:stop].clone()
        if self.state[name].is_contiguous():
            return self._read(place, start, stop)
        if self._turned is None or self._turned[0] != name:  # in another order: all of it, once
            self._turned = None
            whole = torch.as_strided(self._read(place, 0, place.extent), place.shape, place.stride)
            self._turned = name, whole.contiguous().reshape(-1)
        return self._turned[1][start:stop].clone()

    def close(self) -> None:
        """Close the file that was read last."""
        if self._open is not None:
            os.close(self._open[1])
        self._open = self._turned = None

    def _read(self, place: Place, start: int, stop: int) -> Tensor:
        found = torch.empty(stop - start, dtype=place.dtype)
        if not len(found):
            return found
        into = memoryview(found.view(torch.uint8).numpy().data)
        at = place.offset + start * place.dtype.itemsize
        try:
            file, done = self._file(place.path), 0
            while done < len(into):
                count = os.preadv(file, [into[done:]], at + done)
                if not count:
                    raise CheckpointError(
                        explain(f"{place.path} has become shorter while it was read", remedy="leave it alone meanwhile")
                    )
                done += count
        except OSError as error:
            raise CheckpointError(explain(f"cannot read {place.path}", cause=error)) from error
        return found

    def _file(self, path: Path) -> int:
        """One at a time is open: there may be more shards than a process may have files."""
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = path, os.open(path, os.O_RDONLY)
        return self._open[1]


def open_checkpoint(path: str | Path, *, ema: bool = True, key: str | None = None) -> LazyCheckpoint:
    """Find the weights of one model as :func:`~vfsurgery.checkpoints.load_state_dict` does, and leave them there.

    Args:
        path: The file, or the ``.index.json`` of several.
        ema: Whether to take the moving average of the weights where the file has one.
        key: Which network to take, where there are several.

    Raises:
        CheckpointError: As for :func:`~vfsurgery.checkpoints.load_state_dict`, or the file is of torch's format before
            1.6, or packed: it can only be read whole.
        OptionError: There is no network under ``key``.

    >>> import tempfile
    >>> from vfsurgery.checkpoints import save_state_dict
    >>> file = Path(tempfile.mkdtemp()) / "layer.safetensors"
    >>> save_state_dict({"weight": torch.arange(6.0).reshape(2, 3)}, file)
    >>> found = open_checkpoint(file)
    >>> found.state["weight"].shape, found.read("weight", 2, 4)
    (torch.Size([2, 3]), tensor([2., 3.]))
    """
    reader = _Reader()
    found: Checkpoint = find_checkpoint(Path(path), ema, key, reader.load, reader.check)
    places = {name: reader.places[id(tensor)] for name, tensor in found.state.items()}
    return LazyCheckpoint(Path(path), found.state, found.part, found.note, places)


class _Reader:
    """Reads files as tensors of shapes alone; ``places`` says where those are, by ``id``."""

    def __init__(self) -> None:
        self.places: dict[int, Place | Tensor] = {}
        self._kept: list[Tensor] = []  # or else an id may be given again

    def load(self, path: Path) -> object:
        """Stands for :func:`~vfsurgery.checkpoints.formats.read`."""
        check_readable(path, READERS)
        return self._safetensors(path) if path.suffix == WEIGHTS else _torch(path)

    def check(self, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        """Stands for :func:`~vfsurgery.checkpoints.formats.check_tensors`."""
        return {
            key: tensor if id(tensor) in self.places else self._placed(tensor, path)
            for key, tensor in (state if path.suffix == WEIGHTS else check_tensors(state, path)).items()
        }

    def _placed(self, tensor: Tensor, path: Path) -> Tensor:
        begins = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        place = (
            tensor
            if begins is None
            else Place.of(path, int(begins) + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor)
        )
        return self._keep(place, tensor)

    def _keep(self, place: Place | Tensor, like: Tensor) -> Tensor:
        hollow = torch.empty_strided(tuple(like.shape), tuple(like.stride()), dtype=like.dtype, device="meta")
        self._kept.append(hollow)
        self.places[id(hollow)] = place
        return hollow

    def _safetensors(self, path: Path) -> dict[str, Tensor]:
        shapes = read_header(path)  # by the library, which checks it
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = cast("dict[str, dict[str, object]]", json.loads(file.read(length)))
        state: dict[str, Tensor] = {}
        for key, hollow in shapes.items():
            said = str(entries[key]["dtype"])
            if said not in DTYPES:
                raise CheckpointError(
                    explain(f"{path} holds a tensor that is no weight", key=printable(key), found=f"numbers of {said}",
                            remedy="save weights in float32, float16 or bfloat16")
                )  # fmt: skip
            begins = cast("list[int]", entries[key]["data_offsets"])[0]
            like = torch.empty(hollow.shape, dtype=DTYPES[said], device="meta")
            state[key] = self._keep(Place.of(path, 8 + length + begins, like), like)
        return state


def _torch(path: Path) -> object:
    """What a zip of torch holds; its tensors without numbers, each of which knows its place in the file."""
    check_archive(path)
    if not zipfile.is_zipfile(path):
        _refuse_old(path)
    _check_plain(path)
    try:
        with FakeTensorMode():
            return load_torch(path)
    except Exception:  # for sparse tensors and others that torch has no fakes of: mapped, to be refused by their names
        try:
            return load_torch(path, mmap=True)
        except Exception as error:
            refuse(path, error)


def _refuse_old(path: Path) -> None:
    """Refuse a pickle: it has its numbers where only unpickling finds them."""
    try:
        load_torch(path)
    except Exception as error:  # no checkpoint at all
        refuse(path, error)
    raise CheckpointError(
        explain(
            f"{path} is of torch's format before 1.6, which can only be read whole",
            remedy="write it again: torch.save(torch.load('old.pt', weights_only=True), 'new.pt')",
        )
    )


def _check_plain(path: Path) -> None:
    """Refuse archives whose bytes are not the numbers: packed, or of a machine of another byte order."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(
                explain(f"{path} is packed, and can only be read whole", remedy="save it again with torch.save")
            )
        for name in archive.namelist():
            if name.rpartition("/")[2] == "byteorder":
                order = archive.read(name).decode("ascii", "replace").strip()
                if order != sys.byteorder:
                    refuse_damaged(path, f"its numbers are of byte order {printable(order, 20)}")


def count_of_bytes(tensor: Tensor) -> int:
    """What the numbers of a tensor take.

    >>> count_of_bytes(torch.empty(3, 2, device="meta"))
    24
    """
    return math.prod(tensor.shape) * tensor.dtype.itemsize

"""Weights written as they are computed, never held whole, and gone on with after an interruption.

The length of every tensor is known beforehand, so the header comes first, and each number has its place. What is
written lies in hidden files beside the output, and a journal says which tensors are whole: a run that is killed is
continued by the next with the same inputs, and nothing has the output's name before all is there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from vfsurgery.checkpoints.files import check_writable
from vfsurgery.checkpoints.lazy import DTYPES, count_of_bytes
from vfsurgery.checkpoints.shards import INDEX
from vfsurgery.checkpoints.writing import split_by_size
from vfsurgery.errors import CheckpointError, explain

PIECE = 2**20
"""Bytes that are read back at a time."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Sheet:
    """One file that is to be: its header, and where in it each tensor begins, in bytes."""

    path: Path
    header: bytes
    begins: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """Lay out tensors of shapes alone: the longest numbers first, so that all are aligned, then by name."""
        order = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
        entries: dict[str, Any] = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items()))}
        at, begins = 0, dict[str, int]()
        for name in order:
            tensor, begins[name] = state[name], at
            at += count_of_bytes(tensor)
            entries[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": [*tensor.shape],
                "data_offsets": [begins[name], at],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(path, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + at)

    @property
    def partial(self) -> Path:
        """The file that it is until it is whole."""
        return hidden(self.path, "partial")


def hidden(path: Path, kind: str) -> Path:
    """The name of a file beside ``path`` that is there only while that is made.

    >>> hidden(Path("out/ab.safetensors"), "journal").name
    '.ab.safetensors.journal'
    """
    name = path.name if len(path.name) < 200 else hashlib.sha256(path.name.encode()).hexdigest()
    return path.with_name(f".{name}.{kind}")


@dataclass
class Stream:
    """Files of weights, written tensor by tensor. Use it in a ``with`` block, and end that with :meth:`finish`.

    An error in the block deletes what was written; a process that is stopped leaves it, and the next with the same
    ``belongs_to`` finds in ``done`` what it need not do again.

    Args:
        path: As for :func:`~vfsurgery.checkpoints.save_state_dict`.
        state: Tensors of shapes and dtypes alone.
        metadata: Text for the header; :meth:`finish` may change it, but not its length.
        belongs_to: What the numbers come from, as one text.
        max_shard_size: As for :func:`~vfsurgery.checkpoints.save_sharded`.
    """

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    belongs_to: str
    max_shard_size: int | str | None = None
    done: frozenset[str] = frozenset()
    _files: list[int] = field(default_factory=list[int], repr=False)
    _sums: dict[str, int] = field(default_factory=dict[str, int], repr=False)
    _index: dict[str, Any] | None = field(default=None, repr=False)
    _finished: bool = False

    def __post_init__(self) -> None:
        check_writable(self.path)
        plan = None if self.max_shard_size is None else split_by_size(self.state, self.path, self.max_shard_size)
        if plan is None or not plan.is_sharded:
            self._parts = [(self.path, self.state)]
        else:
            self._parts = [
                (self.path.with_name(name), {key: self.state[key] for key in keys})
                for name, keys in plan.filename_to_tensors.items()
            ]
            self._index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        self.sheets = [Sheet.of(path, state, self.metadata) for path, state in self._parts]
        self._sheet_of = {name: number for number, sheet in enumerate(self.sheets) for name in sheet.begins}
        self._journal_path = hidden(self.path, "journal")

    @property
    def written(self) -> tuple[Path, ...]:
        """The files that there will be; the last one is the one to read."""
        index = [] if self._index is None else [self.path.with_name(self.path.name + INDEX)]
        return (*(sheet.path for sheet in self.sheets), *index)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = os.fdopen(_open_own(self._journal_path), "r+b")
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._journal.close()
                raise CheckpointError(
                    explain(f"{self.path} is being written by another process", remedy="wait for it, or end it")
                ) from error
            try:
                self._begin()
            except BaseException:
                self._leave(delete=True)
                raise
        except OSError as error:
            raise self._cannot(error) from error
        return self

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Put numbers in their place, from ``start`` in the flat tensor; those of a tensor in their order.

        Raises:
            CheckpointError: It cannot be done.
        """
        if not part.numel():
            return
        content = memoryview(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        number = self._sheet_of[name]
        at, done = self.sheets[number].begins[name] + start * part.dtype.itemsize, 0
        self._sums[name] = zlib.crc32(content, self._sums.get(name, 0))
        try:
            while done < len(content):
                done += os.pwrite(self._files[number], content[done:], at + done)
        except OSError as error:
            raise self._cannot(error) from error

    def close_tensor(self, name: str) -> None:
        """Note down that a tensor is whole."""
        try:
            self._journal.write(json.dumps([name, self._sums.pop(name, 0)]).encode() + b"\n")
            self._journal.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def finish(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Give all files their names, an index last; returns :attr:`written`.

        Raises:
            CheckpointError: It cannot be done.
        """
        sheets = [Sheet.of(path, state, metadata) for path, state in self._parts]
        try:
            for file, sheet, old in zip(self._files, sheets, self.sheets, strict=True):
                assert len(sheet.header) == len(old.header)
                os.pwrite(file, sheet.header, 0)
                os.fsync(file)
            index = None
            if self._index is not None:
                index, last = hidden(self.path, "index"), self.written[-1]
                index.write_text(json.dumps(self._index, indent=2) + "\n", encoding="utf-8")
                last.unlink(missing_ok=True)  # new shards are never read by an old index
            for sheet in sheets:
                os.replace(sheet.partial, sheet.path)
            if index is not None:
                os.replace(index, self.written[-1])
        except OSError as error:
            raise self._cannot(error) from error
        self._finished = True
        return self.written

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._leave(delete=self._finished or (kind is not None and issubclass(kind, Exception)))

    def _begin(self) -> None:
        """Take up what an earlier run has left, if it is of the same work; else begin."""
        identity = hashlib.sha256(
            json.dumps([self.belongs_to, [sheet.header.decode("latin-1") for sheet in self.sheets]]).encode()
        ).hexdigest()
        lines = self._journal.read().split(b"\n")[:-1]
        sums = _left(lines, identity)
        self._files = [_open_own(sheet.partial) for sheet in self.sheets]
        if sums is None or any(
            os.fstat(file).st_size != sheet.size for file, sheet in zip(self._files, self.sheets, strict=True)
        ):
            sums = {}
            self._delete_others(lines)
        done = {name: value for name, value in sums.items() if name in self._sheet_of and self._sum_of(name) == value}
        self.done = frozenset(done)
        self._journal.seek(0)
        self._journal.truncate()
        first = {"identity": identity, "files": [sheet.partial.name for sheet in self.sheets]}
        self._journal.write(b"".join(json.dumps(line).encode() + b"\n" for line in (first, *map(list, done.items()))))
        self._journal.flush()
        for file, sheet in zip(self._files, self.sheets, strict=True):
            if not done:
                os.ftruncate(file, 0)
            _reserve(file, sheet.size)
            os.pwrite(file, sheet.header, 0)

    def _sum_of(self, name: str) -> int:
        """Read a tensor back."""
        number, total = self._sheet_of[name], 0
        at = self.sheets[number].begins[name]
        stop = at + count_of_bytes(self.state[name])
        while at < stop:
            piece = os.pread(self._files[number], min(PIECE, stop - at), at)
            if not piece:
                break
            total, at = zlib.crc32(piece, total), at + len(piece)
        return total

    def _delete_others(self, lines: list[bytes]) -> None:
        """Partial files of other work under this name, which had other shards."""
        first = _parsed(lines[0]) if lines else None
        names = cast("dict[str, object]", first).get("files") if isinstance(first, dict) else None
        mine = {sheet.partial.name for sheet in self.sheets}
        for name in cast("list[object]", names) if isinstance(names, list) else []:
            if not isinstance(name, str) or name in mine or Path(name).name != name:
                continue
            if name.startswith(".") and name.endswith(".partial"):
                self.path.with_name(name).unlink(missing_ok=True)

    def _leave(self, *, delete: bool) -> None:
        for file in self._files:
            os.close(file)
        if delete:
            for partial in (*(sheet.partial for sheet in self.sheets), hidden(self.path, "index")):
                partial.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)
        self._files = []
        self._journal.close()

    def _cannot(self, error: OSError) -> CheckpointError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(explain(f"cannot write {self.path}", cause=error))
        needed, free = sum(sheet.size for sheet in self.sheets), shutil.disk_usage(self.path.parent).free
        return CheckpointError(
            explain(
                f"cannot write {self.path}: the disk is full",
                needed=f"{needed:,} bytes, and {free:,} are free",
                remedy="make room, or write elsewhere",
            )
        )


def _open_own(path: Path) -> int:
    """Open a file of a known name for writing, unless somebody else has laid something under it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        os.close(file)
        raise CheckpointError(explain(f"{path} is in the way", remedy="remove it"))
    return file


def _reserve(file: int, size: int) -> None:
    """All the room that is needed, before any work; where the file system cannot, it will show."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(file, size)


def _left(lines: list[bytes], identity: str) -> dict[str, int] | None:
    """Check sums of the tensors that a journal says are whole; ``None`` where it is of other work."""
    first = _parsed(lines[0]) if lines else None
    if not isinstance(first, dict) or cast("dict[str, object]", first).get("identity") != identity:
        return None
    entries = (_parsed(line) for line in lines[1:])
    return {entry[0]: entry[1] for entry in entries if isinstance(entry, list) and len(entry) == 2}  # pyright: ignore


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:  # cut off
        return None

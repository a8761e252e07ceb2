"""Files by their names: checked before the work, written whole or not at all, known by their hash."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vfsurgery.errors import CheckpointError, explain

if TYPE_CHECKING:
    from typing_extensions import Buffer

WEIGHTS, PROGRAM, ONNX = ".safetensors", ".pt2", ".onnx"
"""Endings of what is written: weights, and whole networks as programs of ``torch.export`` or in ONNX."""

_KINDS = {
    WEIGHTS: "weights are",
    PROGRAM: "a network with preserved prefixes is",
    ONNX: "a network for other runtimes is",
}

LONGEST_NAME = 255
"""Bytes that a file name may have on the file systems in use."""


def file_hash(path: str | Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits; of no use once it was ``stopped``.

    Raises:
        CheckpointError: The file cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "empty"
    >>> file.touch()
    >>> file_hash(file)[:16]
    'e3b0c44298fc1c14'
    """
    try:
        with open(path, "rb", buffering=0) as file:
            found, piece = hashlib.sha256(), bytearray(2**20)
            while (count := file.readinto(piece)) and not stopped():
                found.update(memoryview(piece)[:count])
            return found.hexdigest()
    except OSError as error:
        raise CheckpointError(explain(f"cannot read {path}", cause=error)) from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` in UTF-8, so that the file is either complete or not there."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic(path: str | Path) -> Generator[Path]:
    """Hand out an empty file beside ``path`` that takes its place when the block succeeds, and is deleted if not.

    A link of that name is replaced, what it points to is left alone. A process that is killed leaves at most a hidden
    file whose name holds ``partial``.

    Raises:
        CheckpointError: The folder cannot be made, or the file cannot be written there.
    """
    with atomic_set([path]) as partials:
        yield partials[0]


@contextmanager
def atomic_set(paths: Iterable[str | Path]) -> Generator[list[Path]]:
    """As :func:`atomic` for files that belong together, the last of which names the others.

    An older last file is removed before the first of the new ones appears, so that whatever is met at any moment, new
    and old are never read as one.

    Raises:
        CheckpointError: As for :func:`atomic`; no file has appeared then, unless moving them failed.
    """
    targets = [Path(path) for path in paths]
    partials: list[Path] = []
    try:
        try:
            for target in targets:
                check_name(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                _reserve(target, partials)
            yield partials
            if len(targets) > 1:
                targets[-1].unlink(missing_ok=True)
            for partial, target in zip(partials, targets, strict=True):
                os.replace(partial, target)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(explain(f"cannot write {targets[-1]}", cause=error)) from error


def _reserve(path: Path, made: list[Path]) -> None:
    """Make an empty file of a new name in the folder of ``path``, and put it on the list of those made.

    In the same folder, so that the move cannot cross file systems; with the same ending, because writers choose the
    format by it. The name cannot be foreseen and must be new: in a folder that others may write to, a link of theirs
    would else lead the writer elsewhere.
    """
    partial = path.with_name(f".{path.stem[:64]}.{secrets.token_hex(6)}.partial{path.suffix}")
    made.append(partial)  # before it is there: Ctrl-C may come in between
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        made.remove(partial)
        raise


class Sink(io.RawIOBase):
    """A file for torch's writers, which end the whole process where a write fails.

    Their destructor writes, and C++ may not raise there. So the first failure is kept, all later writes are dropped,
    and leaving the block raises what was kept.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._error: OSError | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always: ``torch.export`` goes back to the start when all is written."""
        return True

    def write(self, content: Buffer, /) -> int:
        """Write all of it, or drop it once a write has failed."""
        self._keep(lambda: self._file.write(content))
        return memoryview(content).nbytes

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As in any file."""
        self._keep(lambda: self._file.seek(offset, whence))
        return offset

    def flush(self) -> None:
        """As all else, without a failure."""
        if not self._file.closed:
            self._keep(self._file.flush)

    def _keep(self, step: Callable[[], object]) -> None:
        if self._error is None:
            try:
                step()
            except OSError as error:
                self._error = error

    def __exit__(self, *exception: object) -> None:
        try:
            self._file.close()  # which writes what is left
        except OSError as error:
            self._error = self._error or error
        self.close()
        if self._error is not None:
            raise self._error


def check_writable(path: str | Path, suffix: str = WEIGHTS) -> None:
    """Refuse, before any work is done, a path at which nothing could be written after it.

    Args:
        path: Where a file is to be.
        suffix: The ending that the kind of file must have: one of :data:`WEIGHTS`, :data:`PROGRAM`, :data:`ONNX`.

    Raises:
        CheckpointError: ``path`` does not end in ``suffix``, is a folder, or lies where no file can be made.
    """
    path = Path(path)
    check_name(path)
    if path.suffix != suffix:
        raise CheckpointError(
            explain(f"cannot write {path}", remedy=f"{_KINDS[suffix]} written as {path.stem or 'NAME'}{suffix}")
        )
    try:
        if path.is_dir():
            raise CheckpointError(explain(f"cannot write {path}", cause="a folder of this name is there"))
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise CheckpointError(explain(f"cannot write {path}", cause=f"{folder} is no folder"))
    except OSError as error:
        raise CheckpointError(explain(f"cannot write {path}", cause=error)) from error
    if not os.access(folder, os.W_OK):
        raise CheckpointError(explain(f"cannot write {path}", cause=f"{folder} may not be written to"))


def check_name(path: Path) -> None:
    """Refuse names that no file system takes, or that would garble what is printed about them.

    Raises:
        CheckpointError: A part of the path is too long, or holds characters that cannot be printed.

    >>> check_name(Path("out/ab.safetensors"))
    """
    for part in path.parts:
        if not part.isprintable():
            raise CheckpointError(
                explain(f"{str(path)!r} is no name for a file", cause="it holds characters that cannot be printed")
            )
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise CheckpointError(
                explain(f"{part[:32]}… is no name for a file", cause=f"it is longer than {LONGEST_NAME} bytes")
            )

"""Files by their names: checked before the work, written whole or not at all, known by their hash."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from vfsurgery.errors import CheckpointError, explain

WEIGHTS, PROGRAM, ONNX = ".safetensors", ".pt2", ".onnx"
"""Endings of what is written: weights, and whole networks as programs of ``torch.export`` or in ONNX."""

LONGEST_NAME = 255
"""Bytes that a file name may have on the file systems in use."""


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits.

    Raises:
        CheckpointError: The file cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "empty"
    >>> file.touch()
    >>> file_hash(file)[:16]
    'e3b0c44298fc1c14'
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
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
                partials.append(_reserve(target))
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


def _reserve(path: Path) -> Path:
    """Make an empty file of a new name in the folder of ``path``.

    In the same folder, so that the move cannot cross file systems; with the same ending, because writers choose the
    format by it. The name cannot be foreseen and must be new: in a folder that others may write to, a link of theirs
    would else lead the writer elsewhere.
    """
    partial = path.with_name(f".{path.stem[:64]}.{secrets.token_hex(6)}.partial{path.suffix}")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial


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
        kind = "weights are" if suffix == WEIGHTS else "a network with preserved prefixes is"
        raise CheckpointError(
            explain(f"cannot write {path}", remedy=f"{kind} written as {path.stem or 'NAME'}{suffix}")
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

"""Hashes of all files that are combined, taken beside the work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vfsurgery.checkpoints.files import file_hash
from vfsurgery.checkpoints.provenance import FileRecord
from vfsurgery.combining.adapted import files_behind
from vfsurgery.errors import CheckpointError, explain


@dataclass
class Hashing:
    """SHA-256 of all files, taken beside the work; also tells whether a file has changed meanwhile."""

    paths: Sequence[Path]
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        self._files = {file: None for path in self.paths for file in files_behind(path)}
        self._before = {file: _stamp(file) for file in self._files}
        self._pool = ThreadPoolExecutor(1, "hashing")
        self._found: dict[Path, Future[str]] = {
            file: self._pool.submit(file_hash, file, self._stop.is_set) for file in self._files
        }

    @property
    def stamps(self) -> list[tuple[object, ...]]:
        """Names, sizes and times of all files, in their order."""
        return [(str(file.resolve()), *stamp) for file, stamp in self._before.items()]

    def result(self) -> list[FileRecord]:
        """One for each path.

        Raises:
            CheckpointError: A file has changed.
        """
        records = [
            FileRecord.of(path, lambda file: self._found[file].result(), files_behind(path)) for path in self.paths
        ]
        for file, stamp in self._before.items():
            if _stamp(file) != stamp:
                raise CheckpointError(
                    explain(f"{file} has changed while it was read", remedy="leave it alone meanwhile")
                )
        return records

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(explain(f"cannot read {file}", cause=error)) from error
    return found.st_ino, found.st_size, found.st_mtime_ns

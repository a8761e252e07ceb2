"""What a merge of files leaves behind: the result, and beside it a record by which it can be made again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import (
    ONNX,
    PROGRAM,
    FileRecord,
    file_hash,
    provenance,
    save_onnx,
    save_program,
    save_sharded,
    save_state_dict,
    timm_config,
    write_text,
)
from vfsurgery.errors import CheckpointError, explain
from vfsurgery.hub.loading import CONFIG, TIMM_WEIGHTS
from vfsurgery.records.results import merge_report_of

Option = str | int | float | bool | None

LARGEST_REPORT = 64 * 2**20
"""Bytes."""


@dataclass(frozen=True)
class Record:
    """The sources of a merge by their hashes, its options as the command line takes them, and what it wrote.

    Paths of sources are absolute until written; in the report they are relative to its folder, so that the whole may
    be moved.
    """

    sources: tuple[FileRecord, ...]
    options: Mapping[str, Option]
    threads: int
    output: tuple[FileRecord, ...] = ()

    @classmethod
    def of(cls, sources: tuple[Path, ...], options: Mapping[str, Any]) -> Self:
        """Before the merge: the hashes of its sources, and its options."""
        texts = {name: as_text(name, value) for name, value in sorted(options.items())}
        # a missing or odd file is refused with a better message where it is read
        records = tuple(FileRecord.of(path.absolute()) for path in sources if path.is_file())
        return cls(records, texts, torch.get_num_threads())

    def write(self, merged: nn.Module, inputs: tuple[Tensor, ...], output: Path, report: Path) -> tuple[Path, ...]:
        """Write the result by the ending of ``output``, then the report; return all paths, the report's last."""
        content = merge_report_of(merged).to_dict()
        written = self._write_result(merged, inputs, output)
        content["replay"] = {
            "command": "merge",
            "options": dict(self.options),
            "threads": self.threads,
            "sources": [
                {"path": os.path.relpath(source.path, report.absolute().parent), "sha256": source.sha256}
                for source in self.sources
            ],
            "output": [{"path": path.name, "sha256": file_hash(path)} for path in written],
        }
        write_text(report, json.dumps(content, indent=2) + "\n")
        return (*written, report)

    def _write_result(self, merged: nn.Module, inputs: tuple[Tensor, ...], output: Path) -> tuple[Path, ...]:
        recipe = json.dumps({"command": "merge", **self.options})
        metadata = {"model": str(self.options["model"]), **provenance(merge_report_of(merged), recipe, self.sources)}
        if output.suffix in (PROGRAM, ONNX):
            (save_program if output.suffix == PROGRAM else save_onnx)(merged, inputs, output, metadata)
            return (output,)
        config = timm_config(merged)
        if config is not None:
            metadata["timm_config"] = config
        limit = self.options["max_shard_size"]
        if limit is not None:
            written = save_sharded(merged.state_dict(), output, str(limit), metadata)
        else:
            save_state_dict(merged.state_dict(), output, metadata)
            written = (output,)
        if config is not None and output.name == TIMM_WEIGHTS:
            write_text(output.with_name(CONFIG), config)
        return written

    @classmethod
    def read(cls, report: Path) -> Self:
        """Take the record out of a report.

        Raises:
            CheckpointError: The file is no report of ``vfsurgery merge``, or of a version without records.
        """
        try:
            if not report.is_file() or report.stat().st_size > LARGEST_REPORT:
                raise ValueError("no regular file, or too large")
            found = json.loads(report.read_text(encoding="utf-8"))["replay"]
            if found["command"] != "merge":
                raise ValueError(f"a report of {found['command']!r}")
            sources = tuple(_file(entry, report.absolute().parent) for entry in found["sources"])
            output = tuple(_file(entry, report.absolute().parent) for entry in found["output"])
            options, threads = found["options"], found["threads"]
            if not (len(sources) == 2 and output and isinstance(threads, int) and 1 <= threads <= 1024):
                raise ValueError("its entry replay is incomplete")
            if not all(value is None or isinstance(value, str | int | float) for value in options.values()):
                raise ValueError("its options are no options of the command")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            cause = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)[:120]
            raise CheckpointError(
                explain(f"{report} is no report that can be replayed", cause=cause, remedy="vfsurgery merge writes one")
            ) from error
        return cls(sources, cast("dict[str, Option]", options), threads, output)

    def arguments(self) -> list[str]:
        """The options as on the command line, defaults included."""
        found: list[str] = []
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                found.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                found.append(f"--{flag}={value}")
        return found


def as_text(name: str, value: Any) -> Option:
    """One option as it is written on the command line."""
    if isinstance(value, tuple):
        return ("x" if name == "input_size" else ",").join(map(str, cast("tuple[float, ...]", value)))
    return value


def _file(entry: Any, folder: Path) -> FileRecord:
    path, digest = entry["path"], entry["sha256"]
    if not (
        isinstance(path, str)
        and isinstance(digest, str)
        and len(digest) == 64
        and path.isprintable()
        and Path(path).name
    ):
        raise ValueError("a file is given without path and hash")
    return FileRecord(os.path.normpath(folder / path), digest)

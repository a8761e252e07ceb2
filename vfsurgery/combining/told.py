"""What is told of checkpoints that were combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfsurgery.checkpoints.provenance import FileRecord
from vfsurgery.combining.adapter_files import WEIGHTS
from vfsurgery.records.report import Report


@dataclass(frozen=True)
class FileReport(Report):
    """What was combined into which files. Print it for a summary.

    Attributes:
        method: Name of the method.
        options: Its options, ``scale`` among them.
        weights: A number for each source.
        base: The checkpoint that the sources were fine-tuned from.
        sources: The files that were combined.
        output: What was written; the last one is the one to read.
        kinds: For each kind of tensor how many there are, and numbers in them.
        told_by: What told the kinds.
        notes: What else is to be known, a sentence each.
        seed: Of random draws.
        resumed: Tensors that an earlier run, which was interrupted, had left.
    """

    method: str
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    base: FileRecord | None
    sources: tuple[FileRecord, ...]
    output: tuple[str, ...]
    kinds: tuple[tuple[str, int, int], ...]
    told_by: str
    notes: tuple[str, ...]
    seed: int
    resumed: int
    versions: Mapping[str, str]
    seconds: float

    @property
    def is_adapter(self) -> bool:
        """Whether a LoRA adapter was written."""
        return Path(self.output[-1]).name == WEIGHTS[0]

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        kinds = ", ".join(f"{count} {kind} ({numbers:,} numbers)" for kind, count, numbers in self.kinds)
        weights = [f"{source}, weight {weight:g}" for source, weight in zip(self.sources, self.weights, strict=True)]
        return "\n".join(
            [
                f"combined {len(self.sources)} checkpoints by {self.method}: {options}",
                f"  base {self.base or 'none'}",
                *(f"  {each}" for each in weights),
                f"  tensors by {self.told_by}: {kinds}",
                *(f"  {note}" for note in self.notes),
                *([f"  went on after {self.resumed} tensors of an earlier run"] if self.resumed else []),
                f"  {self.seconds:.1f} s",
            ]
        )

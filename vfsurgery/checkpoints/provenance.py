"""Where weights come from, written so that others can check it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from vfsurgery.checkpoints.files import file_hash
from vfsurgery.checkpoints.shards import checkpoint_hash
from vfsurgery.records.report import MergeReport, Report


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was: its path and the SHA-256 of its content.

    >>> print(FileRecord("models/a.safetensors", "e3b0c442" + 56 * "0"))
    a.safetensors (sha256 e3b0c44200000000)
    """

    path: str
    sha256: str

    @staticmethod
    def of(path: Path, hash_file: Callable[[Path], str] = file_hash, files: Sequence[Path] | None = None) -> FileRecord:
        """Take the hash now; of what consists of several files as :func:`checkpoint_hash` does.

        Raises:
            CheckpointError: The file cannot be read.
        """
        return FileRecord(str(path), checkpoint_hash(path, hash_file, files))

    @property
    def name(self) -> str:
        """The path without its folders."""
        return Path(self.path).name

    def to_dict(self) -> dict[str, str]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:16]})"


def provenance(report: Report, recipe: str, sources: Sequence[FileRecord] = ()) -> dict[str, str]:
    """Metadata for a file of weights: what was done, by which versions, to which files, and that it was proven.

    Holds nothing that differs between two runs of one merge: no times, paths or measured errors (the report has
    these), so that the file has the same hash.

    Args:
        report: Of what made them.
        recipe: How to do it again: a recipe's text, or options as JSON.
        sources: The files that were merged, where there were any.

    Returns:
        ``recipe`` as it is, and as JSON ``sources`` (their SHA-256), ``versions`` and ``certificate``.
    """
    certificates = [
        {"source": each.source, "holds": bool(each), "tolerance": each.tolerance, "dtype": each.dtype}
        for each in (report.certificates if isinstance(report, MergeReport) else ())
    ]
    found: Mapping[str, object] = {
        "sources": [source.sha256 for source in sources],
        "versions": dict(getattr(report, "versions", ())),
        "certificate": certificates,
    }
    return {"recipe": recipe, **{name: json.dumps(value, sort_keys=True) for name, value in found.items()}}


def timm_config(model: nn.Module, weights: str = "model.safetensors") -> str | None:
    """Return the JSON by which timm knows a model's architecture, classes and preprocessing; ``None`` for others.

    It is what timm's ``push_to_hub`` writes as ``config.json``: beside the weights it makes the folder one that
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, and a repository one for ``hf-hub:``.

    Args:
        model: Any network.
        weights: Name of the file of its weights; timm's own name for it needs no mention.

    >>> timm_config(nn.Linear(1, 1)) is None
    True
    """
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        return None
    from timm.models._hub import save_config_for_hf  # what push_to_hub calls; timm exports it with weights only

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(model, str(file))
        config = file.read_text(encoding="utf-8")
    if weights == "model.safetensors":
        return config
    content = json.loads(config)
    content["pretrained_cfg"]["hf_hub_filename"] = weights
    return json.dumps(content, indent=2)

"""Checkpoints in several files and an index, as huggingface_hub lays them out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import Tensor

from vfsurgery.checkpoints.files import LONGEST_NAME, file_hash
from vfsurgery.checkpoints.formats import READERS, check_readable, check_tensors, read
from vfsurgery.checkpoints.refusals import printable, refuse_damaged
from vfsurgery.errors import CheckpointError, explain

INDEX = ".index.json"
"""Ending of the file that says which tensor lies in which shard, under the key ``weight_map``."""

Load: TypeAlias = Callable[[Path], object]
"""Reads one file."""
Check: TypeAlias = Callable[[dict[str, Tensor], Path], dict[str, Tensor]]
"""Refuses tensors of a file that are no weights, and returns them as they are taken."""

LARGEST_INDEX = 64 * 2**20
"""Bytes. A hundred thousand tensors need about a tenth."""


def read_shards(path: Path, load: Load = read, check: Check = check_tensors) -> dict[str, Tensor]:
    """Read all tensors that an index names, from the files beside it.

    Args:
        path: The index, ``NAME.safetensors.index.json`` or ``NAME.bin.index.json``.
        load: Reads one shard.
        check: Is given each tensor that is taken.

    Raises:
        CheckpointError: The index is no such, names a file that is missing or lies elsewhere, or a tensor that its
            file does not hold.
    """
    state: dict[str, Tensor] = {}
    for name, keys in _by_shard(_weight_map(path), path).items():
        shard = path.parent / name
        if not shard.exists():
            raise CheckpointError(explain(f"{path} names a shard that is missing", shard=name, remedy="fetch it again"))
        content = load(shard)
        found = cast("dict[object, object]", content) if isinstance(content, dict) else {}
        for key in keys:
            tensor = found.get(key)
            if not isinstance(tensor, Tensor):
                raise CheckpointError(
                    explain(f"{path} does not fit its shard {name}", missing=printable(key), remedy="fetch both again")
                )
            state |= check({key: tensor}, shard)
    return {key: state[key] for key in sorted(state)}


def checkpoint_hash(
    path: Path, hash_file: Callable[[Path], str] = file_hash, files: Sequence[Path] | None = None
) -> str:
    """Return the SHA-256 of a checkpoint; of one in several files, that of a list of their hashes, an index's first.

    Args:
        path: The file or the index.
        hash_file: Takes the hash of one file.
        files: Those that it consists of, where they are not :func:`files_of` it.

    Raises:
        CheckpointError: A file is missing, or the index is none.
    """
    first, *others = files_of(path) if files is None else files
    if not others:
        return hash_file(first)
    return hashlib.sha256("\n".join(hash_file(file) for file in (first, *others)).encode()).hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or an index and its shards.

    Raises:
        CheckpointError: The index is none.
    """
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *(path.parent / name for name in sorted(_by_shard(_weight_map(path), path)))]


def _weight_map(path: Path) -> dict[str, str]:
    check_readable(path, {".json": read_shards})
    if path.stat().st_size > LARGEST_INDEX:
        refuse_damaged(path, f"an index of more than {LARGEST_INDEX:,} bytes")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        refuse_damaged(path, error)
    mapped = cast("dict[str, object]", content).get("weight_map") if isinstance(content, dict) else None
    entries = cast("dict[str, object]", mapped) if isinstance(mapped, dict) else {}
    if not entries or not all(isinstance(name, str) for name in entries.values()):
        raise CheckpointError(
            explain(f"{path} is no index of shards", expected="a mapping weight_map from tensors to files beside it")
        )
    return cast("dict[str, str]", entries)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def _by_shard(weight_map: dict[str, str], path: Path) -> dict[str, list[str]]:
    """The keys of each file; a name that is more than a name is refused: it would lead out of the folder."""
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        plain = name == Path(name).name and "\\" not in name and name.isprintable() and Path(name).suffix in READERS
        if not plain or len(name.encode()) > LONGEST_NAME:
            raise CheckpointError(
                explain(
                    f"{path} names a shard that it may not name",
                    shard=printable(repr(name)),
                    remedy="an index names checkpoint files of its own folder, without any path",
                )
            )
        shards.setdefault(name, []).append(key)
    return shards

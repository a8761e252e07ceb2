"""Weights as safetensors, in one file or in shards, the same bytes for the same content."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from vfsurgery.checkpoints.files import ONNX, PROGRAM, WEIGHTS, atomic, atomic_set, check_writable
from vfsurgery.checkpoints.programs import save_onnx, save_program
from vfsurgery.checkpoints.provenance import timm_config
from vfsurgery.checkpoints.shards import INDEX
from vfsurgery.errors import OptionError, explain

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit


def save_state_dict(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights as ``.safetensors``, so that the file is either complete or not there.

    Tensors that share storage (tied weights) are written once per key, so every key loads again. The same weights and
    metadata give the same bytes.

    Args:
        state: Tensors by state-dict key, of any device, dtype and layout in memory.
        path: The file, ending in ``.safetensors``; missing parent folders are made.
        metadata: Text to keep in the file's header, beside ``format: pt``.

    Raises:
        CheckpointError: ``path`` has another ending, or cannot be written.
    """
    check_writable(path)
    with atomic(path) as partial:
        _write(state, partial, metadata or {})


def save_network(
    model: nn.Module, inputs: tuple[Tensor, ...], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network as the ending of a file says: its weights, or the whole of it as a program or in ONNX.

    Args:
        model: The network, left as it is.
        inputs: For whole networks, one tensor per argument of its forward, of two images or more.
        path: The file; missing parent folders are made.
        metadata: Text to keep in the file. Beside weights of a network of timm it also says how timm builds it.

    Raises:
        CheckpointError: it cannot be written.
    """
    suffix = Path(path).suffix
    if suffix in (PROGRAM, ONNX):
        (save_program if suffix == PROGRAM else save_onnx)(model, inputs, path, metadata)
    else:
        config = timm_config(model)
        known = {} if config is None else {"timm_config": config}
        save_state_dict(model.state_dict(), path, {**(metadata or {}), **known})


def save_sharded(
    state: Mapping[str, Tensor],
    path: str | Path,
    max_shard_size: int | str,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Write weights as :func:`save_state_dict` does, in several files where one would be too large.

    Then ``NAME.safetensors`` becomes ``NAME-00001-of-00003.safetensors`` and so on, and
    ``NAME.safetensors.index.json``, which is written last.

    Args:
        state: As for :func:`save_state_dict`.
        path: The name of the file if it were one.
        max_shard_size: Bytes, or as in ``"5GB"`` (10^9 bytes each). One tensor is never split.
        metadata: As for :func:`save_state_dict`; every shard has it.

    Returns:
        What was written; the last file is the one that :func:`~vfsurgery.checkpoints.load_state_dict` reads.

    Raises:
        CheckpointError: ``path`` has another ending, or cannot be written.
        OptionError: ``max_shard_size`` is no size.

    >>> import tempfile, torch
    >>> state = {"a": torch.zeros(100), "b": torch.ones(100)}
    >>> [path.name for path in save_sharded(state, Path(tempfile.mkdtemp()) / "net.safetensors", "0.5KB")]
    ['net-00001-of-00002.safetensors', 'net-00002-of-00002.safetensors', 'net.safetensors.index.json']
    """
    check_writable(path)
    path = Path(path)
    split = split_by_size(state, path, max_shard_size)
    if not split.is_sharded:
        save_state_dict(state, path, metadata)
        return (path,)
    written = [path.with_name(name) for name in split.filename_to_tensors]
    written.append(path.with_name(path.name + INDEX))
    with atomic_set(written) as (*shards, index):
        for shard, keys in zip(shards, split.filename_to_tensors.values(), strict=True):
            _write({key: state[key] for key in keys}, shard, metadata or {})
        content = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return tuple(written)


def split_by_size(state: Mapping[str, Tensor], path: Path, max_shard_size: int | str) -> StateDictSplit:
    """Which tensors belong in which file; shapes and dtypes are all that counts.

    Raises:
        OptionError: ``max_shard_size`` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        get_storage_id=lambda tensor: None,  # what shares storage is written once per key, wherever
        filename_pattern=path.stem.replace("{", "{{").replace("}", "}}") + "{suffix}" + WEIGHTS,
        max_shard_size=check_shard_size(max_shard_size),
    )


def check_shard_size(size: int | str) -> int | str:
    """Return a size as huggingface_hub takes it, unless it is none; it would take negative ones, too.

    Raises:
        OptionError: See above.

    >>> check_shard_size("500MB")
    '500MB'
    """
    named = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *[KMGT]B", size, re.IGNORECASE) if isinstance(size, str) else None
    if (float(named[1]) if named else size if isinstance(size, int) else 0) <= 0:
        raise OptionError(explain(f"{size!r} is no size of a shard", remedy="write bytes, or as in 5GB or 500MB"))
    return size


def _write(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one file, its header in a fixed order.

    safetensors writes the entries of the metadata in an order that differs from run to run, so they are put into the
    header here: 8 bytes with its length, JSON filled up with spaces to a multiple of 8, then all values.
    """
    copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format).cpu() for key, tensor in state.items()}
    # not save_file, whose files only their owner may read
    content = memoryview(safetensors.torch.save(copies))
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(bytes(content[8:start]))
    entries.pop("__metadata__", None)
    ordered = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items())), **entries}
    header = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(content[start:])

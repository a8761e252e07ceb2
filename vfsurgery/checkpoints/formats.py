"""What files of each kind hold: read on the CPU, as they are, with bounds on what a small file may become."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vfsurgery.checkpoints.files import WEIGHTS, check_name
from vfsurgery.checkpoints.kinds import kind_of
from vfsurgery.checkpoints.refusals import listing, printable, refuse_code, refuse_damaged
from vfsurgery.errors import CheckpointError, did_you_mean, explain

SLACK = 2**20
"""Bytes by which a file's content may be larger than the file."""


class Unread:
    """Stands in the place of a value that is no weight, whatever it is made of: nothing is kept, nothing is run."""

    def __init__(self, *content: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY = ("multiarray.scalar", "multiarray._reconstruct")
_UNREAD = (
    *(f"{module}.{name}" for module in ("numpy.core", "numpy._core") for name in _NUMPY),
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("", "Posix", "Windows")),
)
_MAPPINGS = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
BESIDE_WEIGHTS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Unread, name) for name in _UNREAD),
    *((dict, name) for name in _MAPPINGS),
]
"""Classes and functions that training scripts let into checkpoints by the accuracies, options and paths that they save
beside the weights, with what is called in their place: NumPy's and their own are never imported."""


def read(path: Path) -> object:
    """Read one file by its ending, without running code from it.

    Raises:
        CheckpointError: The file is missing, damaged, of an unknown kind, holds pickled code, or would unpack to more
            than itself.
    """
    check_readable(path, READERS)
    return READERS[path.suffix](path)


def check_readable(path: Path, endings: dict[str, Callable[[Path], object]]) -> None:
    """Refuse what is no file, or none of a kind with a reader.

    Raises:
        CheckpointError: See above.
    """
    check_name(path)
    if path.is_dir():
        inside = sorted(
            file.name for file in path.iterdir() if file.suffix in endings or file.name.endswith(".index.json")
        )
        remedy = f"name the checkpoint file inside it{f': {listing(inside)}' if inside else ''}"
        raise CheckpointError(explain(f"{path} is a folder", remedy=remedy))
    if path.suffix not in endings:
        kind = kind_of(path) if path.is_file() else None
        if kind is not None:
            refuse_damaged(path, *kind)
        raise CheckpointError(
            explain(f"{path} is of no known kind", remedy=did_you_mean(path.suffix or path.name, endings))
        )
    if not path.exists():
        index = path.with_name(f"{path.name}.index.json")
        remedy = f"it is sharded: name {index}" if index.exists() else None
        raise CheckpointError(explain(f"there is no checkpoint {path}", folder=path.parent.resolve(), remedy=remedy))
    if not path.is_file():  # reading a pipe or a device may never end
        raise CheckpointError(explain(f"{path} is no regular file", remedy="copy its content into one"))
    if path.stat().st_size == 0:
        raise CheckpointError(explain(f"{path} is empty", remedy="save or copy it again"))


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except Exception as error:  # dtypes that this torch does not know raise whatever the lookup raises
        refuse(path, error)


def read_header(path: Path) -> dict[str, Tensor]:
    """The entries of a ``.safetensors`` file as tensors of shapes alone.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        refuse(path, error)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _read_torch(path: Path) -> object:
    check_archive(path)
    try:
        return load_torch(path)
    except Exception as error:  # random bytes make torch's reader of old formats raise nearly anything
        refuse(path, error)


def load_torch(path: Path, *, mmap: bool = False) -> object:
    """``torch.load`` without running code from the file; it raises nearly anything on damage."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(BESIDE_WEIGHTS):
        warnings.simplefilter("ignore")  # remarks on old pickle protocols, before the refusal that follows
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def refuse(path: Path, error: Exception) -> NoReturn:
    """By what the file is, where that can be told, else by what its reader says."""
    kind = kind_of(path)
    if kind is not None:
        refuse_damaged(path, *kind)
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        refuse_code(path, error)
    refuse_damaged(path, error)


READERS: dict[str, Callable[[Path], object]] = {
    WEIGHTS: _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    ".tar": _read_torch,
}
"""By ending."""


def check_archive(path: Path) -> None:
    """Refuse a zip whose entries declare more than the file holds: torch stores tensors, it never packs them."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells its formats apart; the older one is no archive
            return
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # zipfile meets damage with errors of many kinds
        refuse(path, error)
    size = path.stat().st_size
    if declared > size + SLACK:
        raise CheckpointError(
            explain(
                f"{path} unpacks to more than itself",
                found=f"{declared:,} bytes in a file of {size:,}",
                remedy="torch.save writes tensors unpacked: save it again with torch, not with a zip program",
            )
        )


def check_tensors(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors without gradients, after refusing those that could not be weights.

    Raises:
        CheckpointError: A tensor is sparse, quantized or without values, or repeats itself to more than the file holds.
    """
    size = path.stat().st_size
    for key, tensor in state.items():
        fault = None
        if tensor.is_quantized:
            fault = f"quantized as {str(tensor.dtype).removeprefix('torch.')}"
        elif tensor.layout != torch.strided or tensor.is_nested:
            fault = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        elif tensor.device.type != "cpu":
            fault = f"on the {tensor.device.type} device, without values"
        elif tensor.numel() * tensor.element_size() > size + SLACK:
            fault = f"{tuple(tensor.shape)}, more than the {size:,} bytes of the file"
        if fault:
            raise CheckpointError(
                explain(f"{path} holds a tensor that is no weight", key=printable(key), found=fault,
                        remedy="save dense tensors: {key: value.to_dense().contiguous() ...}")
            )  # fmt: skip
    return {key: tensor.detach() for key, tensor in state.items()}

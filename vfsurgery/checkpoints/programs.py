"""Whole networks on disk, as programs that run without the code that made them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints.files import ONNX, PROGRAM, Sink, atomic, check_writable
from vfsurgery.errors import CheckpointError, explain
from vfsurgery.tracing.sources import eval_mode

LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights: an ONNX file is one protobuf message, which may have 2 GiB."""


def save_program(
    model: nn.Module, inputs: tuple[Tensor, ...], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network as a program of ``torch.export`` that takes any batch size in eval mode.

    ``torch.export.load(path).module()`` runs it, without the code that made it. A network with preserved prefixes is of
    no class whose instances could load its weights.

    Args:
        model: The network, left as it is.
        inputs: One tensor per argument of its forward, of two images or more.
        path: The file, ending in ``.pt2``; missing parent folders are made.
        metadata: Text to keep in the file, which ``torch.export.load`` fills into its ``extra_files``.

    Raises:
        CheckpointError: ``path`` has another ending, or cannot be written.
    """
    check_writable(path, PROGRAM)
    with eval_mode(model):
        program = torch.export.export(model, inputs, dynamic_shapes=_any_batch(inputs))
    # a file object, because torch stores the name of a path, and this one is random
    with atomic(path) as partial, Sink(partial) as file:
        torch.export.save(program, cast("IO[bytes]", file), extra_files=dict(metadata or {}))


def save_onnx(
    model: nn.Module, inputs: tuple[Tensor, ...], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network in ONNX, in one file, for any batch size in eval mode.

    Args:
        model: The network, left as it is.
        inputs: One tensor per argument of its forward, of two images or more.
        path: The file, ending in ``.onnx``; missing parent folders are made.
        metadata: Text to keep in the file, as its ``metadata_props``.

    Raises:
        CheckpointError: ``path`` has another ending or cannot be written, onnxscript is not installed, or the weights
            are larger than an ONNX file may be.
    """
    check_onnx(path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise CheckpointError(
            explain(
                f"cannot write {path}",
                cause=f"the weights have {size:,} bytes, and an ONNX file at most {LARGEST_ONNX:,}",
                remedy=f"write {Path(path).with_suffix(PROGRAM).name}",
            )
        )
    with eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of the exporter on its own parts
        program = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=_any_batch(inputs), external_data=False, verbose=False
        )
    assert program is not None
    program.model.metadata_props.update(metadata or {})
    with atomic(path) as partial, _written(path):
        program.save(partial, external_data=False)


def check_onnx(path: str | Path) -> None:
    """Refuse, before any work is done, what :func:`save_onnx` would refuse after it.

    Raises:
        CheckpointError: ``path`` has another ending or cannot be written, or onnxscript is not installed.
    """
    check_writable(path, ONNX)
    if importlib.util.find_spec("onnxscript") is None:
        raise CheckpointError(
            explain(
                f"cannot write {path}",
                cause="torch writes ONNX with the package onnxscript, which is not installed",
                remedy="pip install onnxscript",
            )
        )


def _any_batch(inputs: tuple[Tensor, ...]) -> tuple[dict[int, object], ...]:
    return tuple({0: torch.export.Dim.AUTO} for _ in inputs)


@contextmanager
def _written(path: str | Path) -> Generator[None]:
    """Writers in C++ report a full disk as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise CheckpointError(explain(f"cannot write {path}", cause=cause)) from error

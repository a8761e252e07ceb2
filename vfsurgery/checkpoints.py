"""Weights on disk: read without running anything a file contains, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vfsurgery.errors import CheckpointError, did_you_mean, explain
from vfsurgery.sources import eval_mode

StateDict = dict[str, Tensor]

WEIGHTS, PROGRAM = ".safetensors", ".pt2"
"""Endings of what is written: weights, and whole networks as programs of ``torch.export``."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store the state dict, beside epochs and optimizers."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


def load_state_dict(path: str | Path) -> StateDict:
    """Read the weights of one model, on the CPU, without running code from the file.

    ``.safetensors`` files are read as they are. ``.pt``, ``.pth`` and ``.bin`` files are read with
    ``weights_only=True`` and may hold a state dict, or one under a key of :data:`WRAPPERS`. A prefix of
    :data:`PREFIXES` that all keys carry is removed.

    Args:
        path: The file.

    Returns:
        The tensors by their state-dict key, with the dtype they were saved in.

    Raises:
        CheckpointError: The file is missing, damaged, of an unknown kind, or holds pickled code.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "layer.safetensors"
    >>> save_state_dict(nn.Linear(2, 3).state_dict(), file)
    >>> {key: tuple(tensor.shape) for key, tensor in load_state_dict(file).items()}
    {'bias': (3,), 'weight': (3, 2)}
    """
    path = Path(path)
    _check_file(path)
    return _strip_prefixes(_find_state(_READERS[path.suffix](path), path))


def save_state_dict(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights as ``.safetensors``, so that the file is either complete or not there.

    Tensors that share storage (tied weights) are written once per key, so every key loads again.

    Args:
        state: Tensors by state-dict key, of any device, dtype and layout in memory.
        path: The file, ending in ``.safetensors``; missing parent folders are made.
        metadata: Text to keep in the file's header, beside ``format: pt``.

    Raises:
        CheckpointError: ``path`` has another ending, or cannot be written.
    """
    check_writable(path)
    copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format).cpu() for key, tensor in state.items()}
    with atomic(path) as partial:
        # not save_file, whose files only their owner may read
        partial.write_bytes(safetensors.torch.save(copies, {"format": "pt", **(metadata or {})}))


def save_program(model: nn.Module, inputs: tuple[Tensor, ...], path: str | Path) -> None:
    """Write a network as a program of ``torch.export`` that takes any batch size in eval mode.

    ``torch.export.load(path).module()`` runs it, without the code that made it. A network with preserved prefixes is of
    no class whose instances could load its weights.

    Args:
        model: The network, left as it is.
        inputs: One tensor per argument of its forward, of two images or more.
        path: The file, ending in ``.pt2``; missing parent folders are made.

    Raises:
        CheckpointError: ``path`` has another ending, or cannot be written.
    """
    check_writable(path, PROGRAM)
    any_batch = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    with eval_mode(model):
        program = torch.export.export(model, inputs, dynamic_shapes=any_batch)
    with atomic(path) as partial:
        torch.export.save(program, partial)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` in UTF-8, so that the file is either complete or not there."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic(path: str | Path) -> Generator[Path]:
    """Hand out a temporary name beside ``path`` that takes its place when the block succeeds, and is deleted if not.

    Raises:
        CheckpointError: The folder cannot be made, or the file cannot be written there.
    """
    path = Path(path)
    # Same folder, so that the move cannot cross file systems; same ending, because writers choose the format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(explain(f"cannot write {path}", cause=error)) from error


def check_writable(path: str | Path, suffix: str = WEIGHTS) -> None:
    """Refuse, before any work is done, a path that :func:`save_state_dict` would refuse after it.

    With :data:`PROGRAM` as suffix, one that :func:`save_program` would.

    Raises:
        CheckpointError: ``path`` is a folder or does not end in ``suffix``.
    """
    path = Path(path)
    if path.suffix != suffix:
        kind = "weights are" if suffix == WEIGHTS else "a network with preserved prefixes is"
        raise CheckpointError(
            explain(f"cannot write {path}", remedy=f"{kind} written as {path.stem or 'NAME'}{suffix}")
        )
    if path.is_dir():
        raise CheckpointError(explain(f"cannot write {path}", cause="a folder of this name is there"))


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy ``state`` into ``model``, key for key; values are converted to the model's dtype and device.

    Args:
        model: Receives the weights; unchanged when an error is raised.
        state: As :func:`load_state_dict` returns it.
        path: Where it came from, for the message.

    Raises:
        CheckpointError: A key is missing, left over or of another shape; the first one is named.
    """
    own = model.state_dict()
    differing = [key for key in own if key not in state or own[key].shape != state[key].shape]
    differing += [key for key in state if key not in own]
    if differing:
        first = differing[0]
        raise CheckpointError(
            explain(
                f"{path} does not fit {type(model).__name__}: {first} differs",
                model=_shape(own, first),
                checkpoint=_shape(state, first),
                others=f"{len(differing) - 1} more entries differ" if len(differing) > 1 else None,
                remedy=_class_count_hint(own, state, differing) or "load the architecture that it was saved from",
            )
        )
    model.load_state_dict(dict(state), strict=True)


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "has no such entry"


def _class_count_hint(own: Mapping[str, Tensor], state: Mapping[str, Tensor], differing: list[str]) -> str | None:
    """The remedy when every difference is the same two lengths of dim 0, as two class counts make."""
    if any(key not in own or key not in state for key in differing):
        return None
    shapes = [(own[key].shape, state[key].shape) for key in differing]
    if any(len(mine) != len(theirs) or mine[1:] != theirs[1:] for mine, theirs in shapes):
        return None
    lengths = {(mine[0], theirs[0]) for mine, theirs in shapes}
    if len(lengths) != 1:
        return None
    classes = lengths.pop()[1]
    return f"only the class count differs: build the model with num_classes={classes} (--num-classes {classes})"


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(explain(f"{path} is a folder", remedy="name the checkpoint file inside it"))
    if path.suffix not in _READERS:
        raise CheckpointError(
            explain(f"{path} is of no known kind", remedy=did_you_mean(path.suffix or path.name, _READERS))
        )
    if not path.exists():
        raise CheckpointError(explain(f"there is no checkpoint {path}", folder=path.parent.resolve()))
    if path.stat().st_size == 0:
        raise CheckpointError(explain(f"{path} is empty", remedy="save or copy it again"))


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (OSError, safetensors.SafetensorError) as error:
        _refuse_damaged(path, error)


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old pickle protocols, before the refusal that follows
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # random bytes make torch's reader of old formats raise nearly anything
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            _refuse_code(path, error)
        _refuse_damaged(path, error)


_READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    cause = str(error).partition("\n")[0][:120] or type(error).__name__
    raise CheckpointError(
        explain(f"{path} is damaged or no checkpoint", cause=cause, remedy="save or copy it again")
    ) from error


def _refuse_code(path: Path, error: Exception) -> NoReturn:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    raise CheckpointError(
        explain(
            f"{path} holds more than tensors, and reading that would run code from the file",
            found=found[1] if found else "pickled objects",
            remedy="where you trust the file, load it and save its weights alone: "
            "torch.save(model.state_dict(), 'weights.pt') or safetensors.torch.save_file",
        )
    ) from None  # torch's own message recommends weights_only=False


def _find_state(content: object, path: Path) -> StateDict:
    """The state dict in what was read: the content itself, or what lies under one of :data:`WRAPPERS`."""
    if isinstance(content, Mapping):
        content = cast("Mapping[object, object]", content)
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        entries = cast("Mapping[object, object]", inner)
        state = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if state and len(state) == len(entries):
            return state
    raise CheckpointError(
        explain(
            f"{path} holds no state dict",
            found=_describe(content),
            remedy=f"save model.state_dict(), alone or under one of the keys {', '.join(WRAPPERS)}",
        )
    )


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in cast("Mapping[object, object]", content)]
    return f"a mapping with the keys {', '.join(keys[:6])}{' …' * (len(keys) > 6)}" if keys else "an empty mapping"


def _strip_prefixes(state: StateDict) -> StateDict:
    """Remove wrappers' prefixes, however nested, as long as *all* keys carry one: else it is a module's real name."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _strip_prefixes({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state

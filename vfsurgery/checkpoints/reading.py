"""The state dict in a checkpoint, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from vfsurgery.checkpoints.formats import check_tensors, read
from vfsurgery.checkpoints.refusals import printable
from vfsurgery.checkpoints.shards import INDEX, read_shards
from vfsurgery.errors import CheckpointError, explain

StateDict = dict[str, Tensor]

EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Keys under which training scripts store the moving average of the weights; the first two are timm's."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store the state dict, beside epochs and optimizers."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


def load_state_dict(path: str | Path, *, ema: bool = True) -> StateDict:
    """Read the weights of one model, on the CPU, without running code from the file.

    ``.safetensors`` files are read as they are. ``.pt``, ``.pth`` and ``.bin`` files are read with
    ``weights_only=True`` and may hold a state dict, or one under a key of :data:`EMA_WRAPPERS` or :data:`WRAPPERS`.
    Of a checkpoint in shards, name the ``.index.json``. A prefix of :data:`PREFIXES` that all keys carry is removed.

    Args:
        path: The file.
        ema: Whether to take the moving average of the weights where the file has one, as timm does by default.

    Returns:
        The tensors by their state-dict key, with the dtype they were saved in.

    Raises:
        CheckpointError: The file is missing, damaged, of an unknown kind, holds pickled code or something else than
            dense tensors, or would take more memory than it is large.

    >>> import tempfile
    >>> from torch import nn
    >>> from vfsurgery.checkpoints import save_state_dict
    >>> file = Path(tempfile.mkdtemp()) / "layer.safetensors"
    >>> save_state_dict(nn.Linear(2, 3).state_dict(), file)
    >>> {key: tuple(tensor.shape) for key, tensor in load_state_dict(file).items()}
    {'bias': (3,), 'weight': (3, 2)}
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return _strip_prefixes(read_shards(path))
    return _strip_prefixes(check_tensors(_find_state(read(path), path, ema), path))


def _find_state(content: object, path: Path, ema: bool) -> StateDict:
    """The state dict in what was read: under the first wrapper that holds one, or the content itself."""
    for candidate in _candidates(content, ema):
        state = {key: value for key, value in candidate.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if state and len(state) == len(candidate):
            return _without_counter(state)
    raise CheckpointError(
        explain(
            f"{path} holds no state dict",
            found=_describe(content),
            remedy=f"save model.state_dict(), alone or under one of the keys {', '.join((*WRAPPERS, *EMA_WRAPPERS))}",
        )
    )


def _candidates(content: object, ema: bool) -> Iterator[Mapping[object, object]]:
    if isinstance(content, Mapping):
        content = cast("Mapping[object, object]", content)
        for key in (*EMA_WRAPPERS, *WRAPPERS) if ema else WRAPPERS:
            inner = content.get(key)
            if isinstance(inner, Mapping):
                yield cast("Mapping[object, object]", inner)
        yield content


def _without_counter(state: StateDict) -> StateDict:
    """Leave out how many steps torch's ``AveragedModel`` has averaged over, which is beside the weights it wraps."""
    others = [key for key in state if key != "n_averaged"]
    averaged = len(others) < len(state) and others and all(key.startswith("module.") for key in others)
    return {key: state[key] for key in others} if averaged else state


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [_shown(key) for key in cast("Mapping[object, object]", content)]
    return f"a mapping with the keys {', '.join(keys[:6])}{' …' * (len(keys) > 6)}" if keys else "an empty mapping"


def _shown(key: object) -> str:
    """Numbers only while short: Python refuses to write those of thousands of digits."""
    if isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 64):
        return printable(str(key), 40)
    return f"a {type(key).__name__}"


def _strip_prefixes(state: StateDict) -> StateDict:
    """Remove wrappers' prefixes, however nested, as long as *all* keys carry one: else it is a module's real name."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _strip_prefixes({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state

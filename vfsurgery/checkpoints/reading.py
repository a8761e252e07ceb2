"""The state dict in a checkpoint, whatever it is wrapped in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from torch import Tensor

from vfsurgery.checkpoints.files import WEIGHTS
from vfsurgery.checkpoints.formats import check_tensors, read, read_header
from vfsurgery.checkpoints.refusals import listing, printable
from vfsurgery.checkpoints.shards import INDEX, Check, Load, read_shards
from vfsurgery.errors import CheckpointError, OptionError, did_you_mean, explain

StateDict = dict[str, Tensor]
Steps = tuple[str, ...]
"""Keys that lead to a state dict."""

EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
"""Keys under which training scripts store the moving average of the weights; the first two are timm's."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "model_weights", "weights", "params")
"""Keys under which training scripts store the state dict, beside epochs and optimizers."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""

WRAPPING = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into the keys of the modules that they wrap."""

DEEPEST = 4
"""Mappings in mappings that are looked into."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict, the keys under which it stood, as in ``ema.module``, and other state dicts of the file."""

    state: StateDict
    part: str = ""
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """What was chosen among several networks, where there was a choice."""
        return (
            f"its weights under {self.part} were taken, not those under {listing(self.others)}" if self.others else None
        )


def load_state_dict(path: str | Path, *, ema: bool = True, key: str | None = None) -> StateDict:
    """Read the weights of one model, on the CPU, without running code from the file.

    ``.safetensors`` files are read as they are. Files of torch (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pth.tar``)
    are read with ``weights_only=True`` and may hold a state dict, or one under a key of :data:`EMA_WRAPPERS` or
    :data:`WRAPPERS`, or under any other where it is the only one. Of a checkpoint in shards, name the ``.index.json``.
    What :data:`PREFIXES` and :data:`WRAPPING` add to keys is removed.

    Args:
        path: The file.
        ema: Whether to take the moving average of the weights where the file has one, as timm does by default.
        key: Which network to take: the key under which it stands, as in ``"teacher"`` or ``"ema.module"``, or the
            leading name of its entries.

    Returns:
        The tensors by their state-dict key, with the dtype they were saved in.

    Raises:
        CheckpointError: The file is missing, damaged, of an unknown kind, holds pickled code or something else than
            dense tensors, would take more memory than it is large, or holds several networks under unknown keys.
        OptionError: There is no network under ``key``.

    >>> import tempfile
    >>> from torch import nn
    >>> from vfsurgery.checkpoints import save_state_dict
    >>> file = Path(tempfile.mkdtemp()) / "layer.safetensors"
    >>> save_state_dict(nn.Linear(2, 3).state_dict(), file)
    >>> {key: tuple(tensor.shape) for key, tensor in load_state_dict(file).items()}
    {'bias': (3,), 'weight': (3, 2)}
    """
    return read_checkpoint(path, ema=ema, key=key).state


def read_checkpoint(path: str | Path, *, ema: bool = True, key: str | None = None) -> Checkpoint:
    """As :func:`load_state_dict`, with where in the file the weights stood."""
    return find_checkpoint(Path(path), ema, key, read, check_tensors)


def find_checkpoint(path: Path, ema: bool, key: str | None, load: Load, check: Check) -> Checkpoint:
    """The state dict in a checkpoint by what reads one file, and what checks and returns the tensors that are taken."""
    if path.name.endswith(INDEX):
        return _chosen(read_shards(path, load, check), path, ema, key)
    found = _chosen(load(path), path, ema, key)
    return Checkpoint(check(found.state, path), found.part, found.others)


def read_shapes(path: str | Path) -> StateDict | None:
    """The entries of a ``.safetensors`` file as tensors of shapes alone, from its header; ``None`` for other files.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = Path(path)
    if path.is_file():
        return read_header(path) if path.suffix == WEIGHTS else None
    return read_checkpoint(path).state  # which says what is there instead


def _chosen(content: object, path: Path, ema: bool, key: str | None) -> Checkpoint:
    """The network that is meant; under the first wrapper that holds one, if nothing is said."""
    parts = {steps: _plain(state) for steps, state in _parts(content) if _is_wanted(steps, ema or key is not None)}
    if not parts:
        _refuse_none(content, path, ema)
    if key is not None:
        return _at(key, parts, path)
    known = [steps for steps in parts if _rank(steps) is not None]
    if not known and len(parts) > 1:
        names = listing([_dotted(steps) for steps in parts])
        remedy = f"say which one, as in key={_dotted(next(iter(parts)))!r}"
        raise CheckpointError(explain(f"{path} holds {len(parts)} networks", under=names, remedy=remedy))
    return _checkpoint(min(known or parts, key=lambda steps: _rank(steps) or ()), parts)


def _checkpoint(steps: Steps, parts: Mapping[Steps, StateDict]) -> Checkpoint:
    others = tuple(_dotted(other) for other in parts if other != steps and parts[other].keys() == parts[steps].keys())
    return Checkpoint(parts[steps], _dotted(steps), others)


def _at(key: str, parts: Mapping[Steps, StateDict], path: Path) -> Checkpoint:
    """The network under a key, or the part of one whose entries begin with it.

    Raises:
        OptionError: there is none.
    """
    under = [steps for steps in parts if f"{_dotted(steps)}.".startswith(f"{key}.")]
    if under:
        nested = len(key.split("."))
        return _checkpoint(min(under, key=lambda steps: (len(steps) - nested, _rank(steps) or ())), parts)
    for steps, state in parts.items():
        inside = {name.removeprefix(f"{key}."): tensor for name, tensor in state.items() if name.startswith(f"{key}.")}
        if inside:
            return Checkpoint(_plain(inside), f"{_dotted(steps)}.{key}".removeprefix("."))
    names = [
        *filter(None, map(_dotted, parts)),
        *{name.partition(".")[0] for state in parts.values() for name in state},
    ]
    raise OptionError(
        explain(f"{path} has no network under key {key!r}", remedy=did_you_mean(key, map(printable, names)))
    )


def _parts(content: object, steps: Steps = ()) -> Iterator[tuple[Steps, StateDict]]:
    """All state dicts in what was read, each with the keys that lead to it."""
    if not isinstance(content, Mapping) or len(steps) > DEEPEST:
        return
    content = cast("Mapping[object, object]", content)
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    beside = [key for key in content if key not in state and not _is_extra(key)]
    if state and not beside:
        yield steps, _without_counter(state)
        return
    for key in beside:
        if isinstance(key, str):
            yield from _parts(content[key], (*steps, key))


def _is_extra(key: object) -> bool:
    """What modules keep beside tensors, under a name that torch gives it."""
    return isinstance(key, str) and key.endswith("_extra_state")


def _is_wanted(steps: Steps, ema: bool) -> bool:
    return ema or not any(step in EMA_WRAPPERS for step in steps)


def _rank(steps: Steps) -> tuple[int, ...] | None:
    """By the least of which one of several is taken; ``None`` where a key is no known wrapper."""
    order = (*EMA_WRAPPERS, *WRAPPERS)
    return tuple(order.index(step) for step in steps) if all(step in order for step in steps) else None


def _dotted(steps: Steps) -> str:
    return ".".join(printable(step, 80) for step in steps)


def _without_counter(state: StateDict) -> StateDict:
    """Leave out how many steps torch's ``AveragedModel`` has averaged over, which is beside the weights it wraps."""
    others = [key for key in state if key != "n_averaged"]
    averaged = len(others) < len(state) and others and all(key.startswith("module.") for key in others)
    return {key: state[key] for key in others} if averaged else state


def _refuse_none(content: object, path: Path, ema: bool) -> NoReturn:
    if not ema and any(True for _ in _parts(content)):
        raise CheckpointError(
            explain(f"{path} holds the moving average of weights alone", remedy="take that: ema=True")
        )
    raise CheckpointError(
        explain(
            f"{path} holds no state dict",
            found=_describe(content),
            remedy=f"save model.state_dict(), alone or under one of the keys {', '.join((*WRAPPERS, *EMA_WRAPPERS))}",
        )
    )


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


def _plain(state: StateDict) -> StateDict:
    """Remove what wrappers put into keys; a prefix only if *all* keys carry it: else it is a module's real name."""
    plain = {WRAPPING.sub("", key): tensor for key, tensor in state.items()}
    if len(plain) == len(state):
        state = plain
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _plain({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state

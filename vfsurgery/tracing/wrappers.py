"""The network in what users pass: without what torch wraps around networks to run them elsewhere or faster."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import PathLike

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vfsurgery.errors import OptionError, explain

COMPILED = "_orig_mod"
"""Under which name ``torch.compile`` keeps what it has compiled; its class is private, and slow to import."""


def network(model: object, name: str = "the model") -> nn.Module:
    """The network itself, of ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile``.

    All that is done to networks begins here, so that a wrapper and what it holds are one and the same everywhere, and
    what comes out is of the inner class.

    Args:
        model: What a user has passed.
        name: What it is called in messages.

    Raises:
        OptionError: it is no module; or one whose forward or weights cannot be read: TorchScript, FSDP, a network of
            which parts are compiled, or a wrapper with hooks, which would be lost.

    >>> layer = nn.Linear(2, 3)
    >>> network(DataParallel(layer)) is layer
    True
    """
    inner = model
    while isinstance(inner, nn.Module) and (held := _held(inner)) is not None:
        if inner._forward_hooks or inner._forward_pre_hooks:
            wrapper = type(inner).__name__
            remedy = f"register it on the network inside, {wrapper}(...).module or ._orig_mod"
            raise OptionError(explain(f"{name} has a hook on its {wrapper}, which is not part of it", remedy=remedy))
        inner = held
    inner = checked(inner, name)
    if isinstance(inner, torch.jit.ScriptModule):
        raise OptionError(
            explain(f"{name} is a TorchScript program", remedy="pass the module that it was made from, not the script")
        )
    scripted = next((path for path, part in inner.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        remedy = f"put the module that it was made from in its place: model.{scripted} = ...; and script the result"
        raise OptionError(explain(f"a part of {name} is a TorchScript program", module=scripted, remedy=remedy))
    if _is_sharded(inner):
        raise OptionError(
            explain(f"{name} is sharded (FSDP)", remedy="load its full state dict into a network of one piece")
        )
    compiled = next((path for path, part in inner.named_modules() if COMPILED in part._modules), None)
    if compiled is not None:
        raise OptionError(
            explain(
                f"a part of {name} is compiled",
                module=compiled,
                remedy=f"take it back before: model.{compiled} = model.{compiled}.{COMPILED}; or compile the result",
            )
        )
    return inner


def checked(model: object, name: str = "the model") -> nn.Module:
    """What a user has passed as it is, wrapped or not, for what only runs it.

    Raises:
        OptionError: it is no module, but a path, a state dict, ...; says how they become one.
    """
    if not isinstance(model, nn.Module):
        remedy = _how_to_load(model)
        raise OptionError(explain(f"{name} is no torch.nn.Module but {type(model).__name__}", remedy=remedy))
    return model


def as_given(result: nn.Module, given: nn.Module) -> nn.Module:
    """What a user gets back: the wrapper that was passed, if the network in it was changed in place."""
    held: nn.Module | None = given
    while held is not None:
        if held is result:
            return given
        held = _held(held)
    return result


def _held(model: nn.Module) -> nn.Module | None:
    """The module in a wrapper, ``None`` if it is none."""
    if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
        return model.module
    return getattr(model, COMPILED) if COMPILED in model._modules else None


def _is_sharded(model: nn.Module) -> bool:
    """Importing FSDP takes a second or two; where a network is of it, that has been done."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FullyShardedDataParallel)


def _how_to_load(given: object) -> str | None:
    if isinstance(given, str | PathLike):
        return "build the network, and checkpoints.load_into(network, checkpoints.load_state_dict(path), path)"
    if isinstance(given, Mapping):
        return "build the network of these weights, network.load_state_dict(weights), and pass the network"
    return None

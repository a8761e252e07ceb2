"""Weights into a model that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from vfsurgery.checkpoints.refusals import printable
from vfsurgery.errors import CheckpointError, explain


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy ``state`` into ``model``, key for key; values are converted to the model's dtype and device.

    Where all keys differ by one leading name, as between a network and a training wrapper that holds it as ``model``,
    the name is removed or added.

    Args:
        model: Receives the weights; unchanged when an error is raised.
        state: As :func:`~vfsurgery.checkpoints.load_state_dict` returns it.
        path: Where it came from, for the message.

    Raises:
        CheckpointError: A key is missing, left over or of another shape; the first one is named.

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> load_into(layer, {"model.weight": torch.ones(1, 1), "model.bias": torch.zeros(1)}, "net.ckpt")
    >>> layer.weight.item()
    1.0
    """
    own = model.state_dict()
    state = _renamed(own, state)
    differing = [key for key in own if key not in state or own[key].shape != state[key].shape]
    differing += [key for key in state if key not in own]
    if differing:
        first = differing[0]
        raise CheckpointError(
            explain(
                f"{path} does not fit {type(model).__name__}: {printable(first)} differs",
                model=_shape(own, first),
                checkpoint=_shape(state, first),
                others=f"{len(differing) - 1} more entries differ" if len(differing) > 1 else None,
                remedy=_class_count_hint(own, state, differing) or "load the architecture that it was saved from",
            )
        )
    model.load_state_dict(dict(state), strict=True)


def _renamed(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` under the keys of ``own``, where one leading name is all that lies between them."""
    for longer, shorter in ((state, own), (own, state)):
        prefix = next(iter(longer), "").partition(".")[0] + "."
        if longer and set(longer) == {prefix + key for key in shorter}:
            if longer is state:
                return {key.removeprefix(prefix): tensor for key, tensor in state.items()}
            return {prefix + key: tensor for key, tensor in state.items()}
    return state


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

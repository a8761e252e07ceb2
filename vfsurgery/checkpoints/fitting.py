"""Weights into a model that they fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from vfsurgery.checkpoints.refusals import listing, printable
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, explain
from vfsurgery.tracing.compatibility import differing_heads

COUNTERS = ".num_batches_tracked"
"""Ending of entries that checkpoints of torch before 0.4.1 and of other libraries lack: nothing that is computed in
eval mode depends on them, and torch, too, leaves the model's own there."""

WRAPPED = "module"
"""Under which name ``DataParallel`` and its like keep what they wrap."""

OF_TRAINING = frozenset(["criterion", "criteria", "loss", "losses", "metric", "metrics", "acc", "accuracy"])
PHASES = frozenset(["train", "val", "valid", "test", "ema"])
"""Words of the names of modules that training scripts keep beside a network, in one module with it: ``loss_fn``,
``bce_loss``; the latter begin them: ``val_acc``."""


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> tuple[str, ...]:
    """Copy ``state`` into ``model``, key for key; values are converted to the model's dtype and device.

    All entries of the model must be there, in its shapes. Where they stand below a leading name, as in a training
    wrapper that holds the network as ``model``, the name is removed; what lies beside it belongs to something else and
    is left out, as are losses and metrics (:data:`OF_TRAINING`) of a wrapper that is the network. A leading name that
    the model has and the checkpoint has not is added. BatchNorm's counters may be missing.

    Args:
        model: Receives the weights; unchanged when an error is raised.
        state: As :func:`~vfsurgery.checkpoints.load_state_dict` returns it.
        path: Where it came from, for the message.

    Returns:
        What was left out, removed or kept, one sentence each.

    Raises:
        CheckpointError: A key is missing, left over or of another shape, or several leading names fit; the first one is
            named.

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> state = {"model.weight": torch.ones(1, 1), "model.bias": torch.zeros(1), "criterion.weight": torch.ones(3)}
    >>> load_into(layer, state, "net.ckpt")
    ('left out, as no part of the network below model.: criterion.weight',)
    >>> layer.weight.item()
    1.0
    """
    own = model.state_dict()
    inside, notes = fitted(model, state, path)
    model.load_state_dict({key: inside.get(key, own[key]) for key in own}, strict=True)
    return notes


def fitted(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What :func:`load_into` would load, by the model's keys, and what it would say.

    Neither need hold numbers: the model may be on the meta device, and so may the tensors.

    Raises:
        CheckpointError: as for :func:`load_into`.
    """
    own = model.state_dict()
    state = _unwrapped_inside(own, state)
    prefix, inside = _fitting(model, own, state, path)
    kept = [key for key in own if key not in inside]
    left_out = [] if prefix.startswith("+") else [key for key in state if not _is_used(key, prefix, own)]
    return {key: inside[key] for key in own if key in inside}, tuple(_notes(prefix, left_out, kept))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse what :func:`load_into` would refuse; the model may be one of shapes alone, on the meta device.

    Raises:
        CheckpointError: as for :func:`load_into`.
    """
    fitted(model, state, path)


def _fitting(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path
) -> tuple[str, dict[str, Tensor]]:
    """The leading name below which all entries of the model are found, and what stands there."""
    found = {prefix: _below(state, prefix) for prefix in _prefixes(own, state)}
    fitting = {prefix: inside for prefix, inside in found.items() if not _differing(own, inside)}
    if "" in fitting:
        return "", fitting[""]
    if not fitting:
        raise _refusal(model, own, state, path)
    if len(fitting) > 1:
        names = [prefix.rstrip(".") for prefix in fitting]
        raise CheckpointError(
            explain(
                f"{path} holds {len(fitting)} networks that fit {type(model).__name__}",
                below=listing(names),
                remedy=f"say which one, as in key={names[0]!r}",
            )
        )
    return next(iter(fitting.items()))


def check_same_classes(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse checkpoints that are to become one network and were trained on different classes.

    To be asked when one of them has not fitted: no number of classes fits all of them, which a message on one cannot
    know.

    Args:
        states: What the checkpoints hold, by their names.

    Raises:
        IncompatibleModelsError: names two of them, the layer and both numbers.
    """
    (first, own), *others = states.items()
    for name, state in others:
        remedy = differing_heads(own, state)
        if remedy is not None:
            raise IncompatibleModelsError(explain(f"{first} and {name} are not the same architecture", remedy=remedy))


def _unwrapped_inside(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the name that ``DataParallel`` adds to keys of the parts that it wraps, where the model has none such."""
    plain = {".".join(step for step in key.split(".") if step != WRAPPED): tensor for key, tensor in state.items()}
    inside = any(f".{WRAPPED}." in f".{key}" for key in own)
    return state if inside or len(plain) < len(state) else plain


def _is_used(key: str, prefix: str, own: Mapping[str, Tensor]) -> bool:
    return key.startswith(prefix) and key.removeprefix(prefix) in own


def _notes(prefix: str, left_out: list[str], kept: list[str]) -> Iterable[str]:
    if left_out:
        below = f" below {prefix}" if prefix else ""
        yield f"left out, as no part of the network{below}: {listing(left_out)}"
    if kept:
        yield f"not in the file, so as the model has them: {listing(kept)}"


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The leading names below which the model's first entry is found; with a ``+``, those to be added."""
    first = next((key for key in own if not key.endswith(COUNTERS)), None)
    if first is None:
        return [""]
    found = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    parts = first.split(".")
    added = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
    return [*found, *(f"+{name}" for name in added if all(key.startswith(name) for key in own))] or [""]


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if prefix.startswith("+"):
        return {prefix[1:] + key: tensor for key, tensor in state.items()}
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _differing(own: Mapping[str, Tensor], inside: Mapping[str, Tensor]) -> list[str]:
    """Entries that are missing, of another shape, or left over."""
    differing = [key for key in own if key not in inside and not key.endswith(COUNTERS)]
    differing += [key for key in own if key in inside and not _fits(own[key], inside[key])]
    order = {key: place for place, key in enumerate(own)}
    beside = {key.partition(".")[0] for key in own}
    left_over = [key for key in inside if key not in own and not _is_of_training(key, beside)]
    return [*sorted(differing, key=order.__getitem__), *left_over]


def _fits(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and (mine.is_complex() or not theirs.is_complex())


def _is_of_training(key: str, beside: set[str]) -> bool:
    name, dot, _ = key.partition(".")
    words = name.lower().split("_")
    return bool(dot) and name not in beside and (words[0] in PHASES or not OF_TRAINING.isdisjoint(words))


def _refusal(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path
) -> CheckpointError:
    """Say what differs, seen from the leading name below which most entries are the model's."""
    leading = {".".join(parts[:count]) + "." for key in state for parts in [key.split(".")] for count in (1, 2)}
    common = {prefix: len(_below(state, prefix).keys() & own.keys()) for prefix in ["", *sorted(leading)]}
    prefix = max(common, key=common.__getitem__)
    inside = _below(state, prefix)
    differing = _differing(own, inside)
    first = differing[0]
    missing = [key for key in differing if key not in inside]
    unexpected = [key for key in differing if key not in own]
    near = difflib.get_close_matches(first, unexpected, n=1, cutoff=0.6) if first in missing else []
    return CheckpointError(
        explain(
            f"{path} does not fit {type(model).__name__}: {printable(first)} differs",
            model=_shape(own, first),
            checkpoint=_shape(inside, first),
            others=f"{len(differing) - 1} more entries differ" if len(differing) > 1 else None,
            nearest=f"{printable(near[0])} {_shape(inside, near[0])}" if near else None,
            missing=listing(missing) if len(missing) > 1 else None,
            unexpected=listing(unexpected) if len(unexpected) > 1 else None,
            below=prefix or None,
            cause=_cause(own, inside, missing, unexpected, common[prefix]),
            remedy=_class_count_hint(own, inside, differing) or "load the architecture that it was saved from",
        )
    )


def _cause(
    own: Mapping[str, Tensor],
    inside: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    common: int,
) -> str | None:
    if not common:
        return f"none of its {len(inside)} entries has a name of the model's {len(own)}: another architecture"
    if missing and not unexpected:
        return f"it lacks {len(missing)} of the model's {len(own)} entries: a part of the network, or a smaller one"
    if unexpected and not missing:
        return f"it has {len(unexpected)} entries more than the model: a larger network, or other modules beside it"
    if missing:
        return f"{common} of the model's {len(own)} entries are there: a relative of the architecture, or renamed parts"
    return None


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    if key not in state:
        return "has no such entry"
    complex_ = f" {str(state[key].dtype).removeprefix('torch.')}" if state[key].is_complex() else ""
    return f"{tuple(state[key].shape)}{complex_}"


def _class_count_hint(own: Mapping[str, Tensor], state: Mapping[str, Tensor], differing: list[str]) -> str | None:
    """The remedy when every difference is the same two lengths of dim 0, as two class counts make."""
    if any(key not in own or key not in state for key in differing):
        return None
    shapes = [(own[key].shape, state[key].shape) for key in differing]
    if any(len(mine) != len(theirs) or mine[1:] != theirs[1:] for mine, theirs in shapes):
        return None
    lengths = {(mine[0], theirs[0]) for mine, theirs in shapes if mine}
    if len(lengths) != 1:
        return None
    classes = lengths.pop()[1]
    return f"only the class count differs: build the model with num_classes={classes}"

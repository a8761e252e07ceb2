"""Models, and the process, without their hooks, for a while or for good."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn

from vfsurgery.tracing.hooks import GLOBAL, KINDS, WEIGHT_HOOKS, global_hooks, hooks_of


def take_away(model: nn.Module, places: Sequence[tuple[str, str, int]]) -> None:
    """Take hooks from a model for good, by their places as :attr:`Hooks.onlookers` has them."""
    for path, kind, key in places:
        getattr(model.get_submodule(path), kind).pop(key, None)


@contextmanager
def unwatched(model: nn.Module, places: Sequence[tuple[str, str, int]]) -> Generator[None]:
    """A model without hooks that look on, for runs on tensors without data, which they cannot read."""
    owners = [getattr(model.get_submodule(path), kind) for path, kind, _ in places]
    kept = [(owner, list(owner.items())) for owner in owners]
    try:
        take_away(model, places)
        yield
    finally:
        for owner, hooks in kept:
            owner.clear()
            owner.update(hooks)


def without_backward_hooks(skeleton: nn.Module) -> nn.Module:
    """Take the hooks for gradients, which would look for a history in proxies, from a copy of a model."""
    for module in skeleton.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return skeleton


@contextmanager
def without_global_hooks() -> Generator[None]:
    """No hooks on all modules of the process; they have been seen to look on only."""
    kept = {kind: dict(global_hooks(kind)) for kind in GLOBAL}
    try:
        for kind in GLOBAL:
            global_hooks(kind).clear()
        yield
    finally:
        for kind, hooks in kept.items():
            global_hooks(kind).update(hooks)


def without_hooks(module: nn.Module) -> nn.Module:
    """A module that shares all tensors and submodules with ``module``, and has no forward hooks but those for weights.

    A module without such hooks is returned as it is.

    >>> layer = nn.Linear(2, 1)
    >>> handle = layer.register_forward_hook(lambda module, args, output: output + 1)
    >>> twin = without_hooks(layer)
    >>> twin.weight is layer.weight, len(twin._forward_hooks), without_hooks(twin) is twin
    (True, 0, True)
    """
    if not any(True for hook in hooks_of(module) if not hook.path):
        return module
    twin = module.__new__(type(module))
    twin.__dict__.update(vars(module))
    for kind in KINDS:
        hooks = getattr(module, kind)
        kept = [(key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith(WEIGHT_HOOKS)]
        twin.__dict__[kind] = type(hooks)(kept)
    return twin


def is_twin(module: object, other: object) -> bool:
    """Whether one module is the other, or what :func:`without_hooks` makes of it."""
    if not (isinstance(module, nn.Module) and isinstance(other, nn.Module)):
        return module is other
    return module is other or module._parameters is other._parameters

"""Running a model on other weights, after which it is bit for bit what it was.

Everything that a forward can reach is stood in for: each module lends its ``__dict__`` and the containers in it, its
parameters become the given ones, and buffers and plain tensors become copies. What the forward writes, sets or caches
goes with the stand-ins; the very same objects come back at the end, also when the forward raises.
(``torch.func.functional_call`` leaves its tensors in a module that is registered under two paths; torch 2.14.)
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), Tensor, nn.Parameter, torch.Size})
"""Types of values that hold nothing else: most of what modules have, and left out first."""
COMMON = frozenset({dict, OrderedDict, list, set, tuple})
"""Types of what holds values, looked up before the slower question for abstract types: every module has a dozen."""
MAPPINGS = frozenset({dict, OrderedDict})
HOLDERS = (tuple, MutableMapping, MutableSequence, MutableSet)
MEMBERS = ("_parameters", "_buffers", "_modules")
"""Dicts of a module whose keys are its attributes."""
HOOKS = frozenset(vars(nn.Module())) - {"training", *MEMBERS}
"""Dicts and sets for hooks and the like that every module has, nearly always empty."""

SETTINGS = (bool, int, float, str)
"""Types of attributes that say how a module computes."""


@contextmanager
def borrowed(
    model: nn.Module,
    state: Mapping[str, Tensor],
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Generator[None]:
    """Have a model hold other parameters and buffers for a while.

    Args:
        model: Any module; a module under several paths and tied tensors are what they are, once.
        state: Tensors by ``state_dict`` key. They are not written to, whatever the forward does. What is left out
            stays as it is.
        convert: Applied to all tensors of the model that are not in ``state``, plain attributes included.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad(), borrowed(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}):
    ...     float(layer(torch.ones(1, 2)))
    2.0
    """
    kept = [(container.items, contents_of(container.items)) for container in containers_of(model)]
    places = [vars(module).get(name) for module in model.modules() for name in HOOKS]
    hookless = [hooks for hooks in places if isinstance(hooks, dict | set) and not hooks]
    own = model.state_dict(keep_vars=True)
    owners = {id(tensor) for tensor in own.values() if isinstance(tensor, Tensor)}
    given = {id(tensor): state[name] for name, tensor in own.items() if name in state}
    lent: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in lent:
            lent[id(tensor)] = _lent(tensor, given.get(id(tensor)), convert)
        return lent[id(tensor)]

    guard = _Guard()
    try:
        for container, contents in kept:
            put(container, [(key, _replaced(value, stand_in)) for key, value in contents])
        guard.protect(lent[key] for key in owners if isinstance(lent.get(key), nn.Parameter))
        with guard:
            yield
    finally:
        for container, contents in kept:
            put(container, contents)
        for hooks in hookless:
            hooks.clear()
        guard.restore()


def _lent(tensor: Tensor, given: Tensor | None, convert: Callable[[Tensor], Tensor] | None) -> Tensor:
    """What stands in for a tensor: an object of its own; for all but parameters with memory of its own too."""
    with torch.no_grad():
        value = tensor.detach() if given is None else given.detach()
        if given is None and convert is not None:
            value = convert(value)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(value, tensor.requires_grad and (value.is_floating_point() or value.is_complex()))
        return value.clone()


def _replaced(value: Any, stand_in: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return stand_in(value)
    if type(value) is tuple and any(isinstance(item, Tensor | tuple) for item in value):
        return tuple(_replaced(item, stand_in) for item in value)
    return value


def set_mode(model: nn.Module, training: bool) -> None:
    """``model.train(training)``, without what a ``train()`` of its own does to weights and settings.

    It may add low-rank factors to a weight in eval mode and take them out in training, or freeze layers. What the model
    computes does not depend on it, but who runs a model to look at it must not write into it. What it keeps may go.

    >>> layer = nn.Sequential(nn.Linear(2, 1))
    >>> set_mode(layer, False)
    >>> layer[0].training
    False
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        model.train(training)
        return
    settings = [
        (container.items, [(key, value) for key, value in contents_of(container.items) if type(value) in SETTINGS])
        for container in containers_of(model)
        if container.named
    ]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    guard = _Guard()
    guard.protect(tensor for tensor in (*model.parameters(), *model.buffers()))
    try:
        with guard, torch.no_grad():
            model.train(training)
    finally:
        guard.restore()
        for items, contents in settings:
            items.update((key, value) for key, value in contents if key != "training")
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)


class Container(NamedTuple):
    """A dict, list or set that a model holds at ``path``; where it is the ``__dict__`` of an object, that is ``owner``.

    ``named`` says that its keys are attributes.
    """

    path: str
    items: Any
    owner: Any
    named: bool

    def path_of(self, key: Any) -> str:
        """The path of what it holds under a key."""
        return f"{self.path}.{key}".lstrip(".") if self.named else f"{self.path}[{key!r}]"


def containers_of(model: nn.Module) -> Iterator[Container]:
    """All that holds what a forward may change: attributes of modules, and dicts, lists and sets in them, once each.

    Left out are the places for hooks that every module has, where they are empty.

    >>> layer = nn.Linear(2, 1)
    >>> layer.tables = [{"cpu": torch.ones(1)}]
    >>> [container.path for container in containers_of(nn.Sequential(layer)) if "tables" in container.path]
    ['0.tables', '0.tables[0]']
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any, bool]] = [("", model, False)]
    while waiting:
        path, value, named = waiting.pop()
        owner = value if isinstance(value, nn.Module | SimpleNamespace) or _is_record(value) else None
        value = value if owner is None else vars(owner)
        if id(value) in seen or not (type(value) in COMMON or isinstance(value, HOLDERS)):
            continue
        seen.add(id(value))
        container = Container(path, value, owner, named or owner is not None)
        is_module = isinstance(owner, nn.Module)
        if not isinstance(value, tuple):
            yield container
        for key, item in reversed(contents_of(value)) if value else ():
            if type(item) in PLAIN or (is_module and key in HOOKS and not item):
                continue
            inside = container.named and key in MEMBERS
            waiting.append((path if inside else container.path_of(key), item, inside))


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")


def contents_of(container: Any) -> list[tuple[Any, Any]]:
    """What a container holds, with the key or place of each."""
    mapping = type(container) in MAPPINGS or isinstance(container, MutableMapping)
    return list(container.items()) if mapping else list(enumerate(container))


def put(container: Any, contents: list[tuple[Any, Any]]) -> None:
    """Make a container hold these very objects, in this order; one that does is not touched."""
    if not container and not contents:
        return
    present = contents_of(container)
    if len(present) == len(contents) and all(
        mine[1] is theirs[1] and mine[0] == theirs[0] for mine, theirs in zip(present, contents, strict=True)
    ):
        return
    if isinstance(container, MutableSequence):
        container[:] = [value for _, value in contents]
        return
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(contents)
    else:
        for _, value in contents:
            container.add(value)


class _Guard(TorchDispatchMode):
    """Copies a parameter's values before an op writes into them, as forwards do that clip or normalize weights."""

    supports_higher_order_operators = True  # conditionals of exported programs, whose branches write into nothing

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def protect(self, tensors: Iterator[Tensor]) -> None:
        """Watch over the memory of these tensors."""
        for tensor in tensors:
            values = tensor.detach()
            self._tensors.setdefault(_memory(values), []).append(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place in _written(func):
            value = args[place] if isinstance(place, int) and place < len(args) else (kwargs or {}).get(place)
            for tensor in tree_leaves(value):
                key = _memory(tensor) if isinstance(tensor, Tensor) else None
                if key in self._tensors and key not in self._values:
                    self._values[key] = [(mine, mine.clone()) for mine in self._tensors[key]]
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        """Write the copies back."""
        with torch.no_grad():
            for tensor, values in (pair for pairs in self._values.values() for pair in pairs):
                tensor.copy_(values)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


@functools.cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Places of the arguments that an op writes into, and their names for those given by name."""
    arguments = enumerate(func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ())
    written = [(place, arg) for place, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write]
    return tuple(key for place, arg in written for key in (place, arg.name))

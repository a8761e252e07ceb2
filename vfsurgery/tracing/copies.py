"""Copies of a user's model, without what its forward has computed and kept.

A forward that keeps what it computes of the weights (a table of biases, an attention map) leaves tensors in attributes,
dicts and lists. With a gradient history they cannot be copied; and a copy whose weights become others would go on
reading what was computed of the old ones. So a copy starts without them:

- the model's own ``train()`` is called, which clears what it knows to be stale;
- tensors with a gradient history are left out;
- where inputs are known, tensors that the forward makes again, with the same outputs, are left out too.

What is left are constants.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.tracing.borrowed import MEMBERS, PLAIN, Container, borrowed, containers_of, contents_of, put, set_mode

SIMPLE = PLAIN - {Tensor}
"""Types of values without a history; a parameter is a leaf."""
HOOKS = "torch.nn.utils"
"""The package whose hooks set a module's weight before each forward."""


@dataclass(frozen=True)
class Plain:
    """An entry of a container that holds a tensor which is no parameter or buffer (or a tuple of such)."""

    container: Container
    key: Any

    @property
    def path(self) -> str:
        """Where it lies, as the user would write it."""
        return self.container.path_of(self.key)

    @property
    def value(self) -> Any:
        """What lies there now."""
        items = self.container.items
        if isinstance(items, MutableMapping):
            return items.get(self.key)
        values = list(items)
        return values[self.key] if self.key < len(values) else None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that lie there."""
        return [leaf for leaf in tree_leaves(self.value) if isinstance(leaf, Tensor)]

    def forget(self, absent: bool) -> None:
        """Leave it out: an attribute is then ``None`` or ``absent``, a list is empty."""
        items, owner = self.container.items, self.container.owner
        if not isinstance(items, MutableMapping):
            items.clear()
        elif owner is None or absent:
            del items[self.key]
        else:
            items[self.key] = None


def plain_tensors(model: nn.Module) -> Iterator[Plain]:
    """All tensors of a model that are neither parameters nor buffers, nor set by torch's own hooks.

    >>> layer = nn.Linear(2, 1)
    >>> layer.scale = torch.ones(1)
    >>> [plain.path for plain in plain_tensors(nn.Sequential(layer))]
    ['0.scale']
    """
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for container in containers_of(model):
        if container.named and container.owner is None:  # a dict of parameters, buffers or modules
            continue
        hooked = _set_by_hooks(container.owner)
        for key, value in contents_of(container.items):
            leaves = tree_leaves(value) if type(value) is tuple else [value]
            if key not in hooked and any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in leaves):
                yield Plain(container, key)


def _set_by_hooks(owner: Any) -> set[Any]:
    """Names of weights that torch's hooks set: of old weight and spectral norm, and of pruning."""
    hooks = owner._forward_pre_hooks.values() if isinstance(owner, nn.Module) else ()
    own = [hook for hook in hooks if type(hook).__module__.startswith(HOOKS)]
    return {getattr(hook, "name", None) or getattr(hook, "_tensor_name", None) for hook in own}


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model without what its forward has computed and kept.

    Args:
        model: Any module; it stays as it is.
        memo: What stands for objects of the model in the copy, by ``id``, as for ``copy.deepcopy``.

    Raises:
        SurgeryError: an attribute cannot be copied; names it.

    >>> class Net(nn.Linear):
    ...     table = None
    ...     def forward(self, x):
    ...         self.table = self.weight.exp() if self.table is None else self.table
    ...         return x @ self.table.T
    >>> net = Net(2, 1)
    >>> _ = net(torch.ones(1, 2))
    >>> net.table is None, copied(net).table is None
    (False, True)
    """
    memo = {} if memo is None else memo
    computed: dict[int, Tensor] = {}
    for tensor in _with_history(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
            computed[id(memo[id(tensor)])] = memo[id(tensor)]
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise SurgeryError(
            explain(
                f"{type(model).__name__} cannot be copied: {error}",
                attribute=_uncopyable(model, memo),
                remedy="set the attribute to None before, or give its class a __deepcopy__",
            )
        ) from error
    for plain in list(plain_tensors(result)) if computed else ():
        if any(id(tensor) in computed for tensor in plain.tensors):
            plain.forget(absent=not _initialized(plain))
    _clear(result)
    return result


def _with_history(model: nn.Module) -> Iterator[Tensor]:
    for container in containers_of(model):
        for _, value in contents_of(container.items):
            if type(value) in SIMPLE:
                continue
            for leaf in tree_leaves(value) if type(value) is tuple else [value]:
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    yield leaf
    for module in model.modules():  # what hooks that collect activations have collected is copied with them
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            holder = getattr(hook, "__self__", hook)
            kept = [] if isinstance(holder, nn.Module) else tree_leaves(dict(getattr(holder, "__dict__", {})))
            yield from (leaf for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf)


def _initialized(plain: Plain) -> bool:
    """Whether an attribute is there before the first forward: ``__init__`` names it, or the class has it."""
    kinds = type(plain.container.owner).__mro__ if plain.container.owner is not None else ()
    codes = [getattr(vars(kind).get("__init__"), "__code__", None) for kind in kinds]
    return any(code is not None and plain.key in code.co_names for code in codes)


def _clear(model: nn.Module) -> None:
    """Let the model's own ``train()`` clear what it has kept, where it is more than torch's."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return
    modes = [(module, module.training) for module in model.modules()]
    set_mode(model, model.training)
    for module, training in modes:
        module.training = training


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str | None:
    for container in containers_of(model):
        for key, value in contents_of(container.items):
            if container.owner is not None and key not in MEMBERS and not isinstance(value, nn.Module):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    return container.path_of(key)
    return None


def fresh(model: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """A twin of a model that shares its parameters, has buffers of its own, and nothing that its forward keeps.

    Args:
        model: Any module; it stays as it is.
        inputs: What its forward takes. It runs only if there are tensors in question.

    Raises:
        SurgeryError: the forward needs what was computed once, of weights, outside of it.
    """
    twin = copied(model, {id(parameter): parameter for parameter in model.parameters()})
    candidates = list(plain_tensors(twin))
    lost = {plain.path for plain in plain_tensors(model)} - {plain.path for plain in candidates}
    if not candidates and not lost:
        return twin
    expected = _outputs(twin, inputs)
    if isinstance(expected, Exception):
        if lost and not isinstance(_outputs(model, inputs), Exception):
            raise SurgeryError(
                explain(
                    f"{type(model).__name__} needs what was computed of its weights before its forward",
                    attribute=", ".join(sorted(lost)[:4]),
                    because=f"without it the forward raises {type(expected).__name__}: {expected}",
                    remedy="compute it in the forward, or detach() it, to make it a constant",
                )
            ) from expected
        return twin
    for plain in candidates:
        _forget_if_made_again(twin, plain, inputs, expected)
    return twin


def forget_kept(model: nn.Module, other: nn.Module) -> None:
    """Drop from a model, whose weights have changed, what its forward has kept and a fresh twin of it does not have."""
    constants = {plain.path for plain in plain_tensors(other)}
    places = {each.path: each for each in containers_of(other) if each.owner is not None or not each.named}
    for plain in list(plain_tensors(model)):
        if plain.tensors and plain.path not in constants:
            like = places.get(plain.container.path)
            plain.forget(absent=like is None or plain.key not in like.items)
    _clear(model)


def _forget_if_made_again(twin: nn.Module, plain: Plain, inputs: Sequence[Tensor], expected: list[Tensor]) -> None:
    before = contents_of(plain.container.items)
    for absent in (False, True):
        if not plain.tensors:  # gone with a list
            return
        plain.forget(absent)
        found = _outputs(twin, inputs, made=plain)
        if isinstance(found, list) and _equal(found, expected):
            return
        put(plain.container.items, before)


def _outputs(model: nn.Module, inputs: Sequence[Tensor], made: Plain | None = None) -> list[Tensor] | Exception:
    """What a model returns in eval mode; an exception where it fails, or does not set what is to be made."""
    try:
        with borrowed(model, {}), torch.no_grad(), torch.random.fork_rng([]):
            model.eval()
            result = model(*(x.clone() for x in inputs))
            if made is not None and all(plain.path != made.path for plain in plain_tensors(model)):
                return LookupError(made.path)
    except Exception as error:
        return error
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if not found or [x.shape for x in found] != [y.shape for y in expected]:
        return False
    return all(torch.allclose(x, y, equal_nan=True) for x, y in zip(found, expected, strict=True))

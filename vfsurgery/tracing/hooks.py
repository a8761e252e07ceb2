"""Forward hooks of a model that is traced: those that compute become part of the graph, those that look on do not.

``fx`` runs the hooks of modules that it traces through, and none of the model's own or of single nodes. Here all are
recorded alike. A hook that returns nothing and changes nothing (one that collects activations, say) is left out of the
trace and of every run of the graph: it would collect proxies. Which is which shows one run on the example, whose values
the hooks see; the model is afterwards bit for bit what it was.

Hooks that write into weights whenever the model runs are refused: no analysis of the weights would be true for long.
So are hooks, and functions put in the place of a module's forward, that hold a module in their closure: in a copy of
the model, which a merge returns, they would go on using the original.

Backward hooks do not matter to a forward and are left alone. Hooks of ``torch.nn.utils`` that compute a weight
(pruning, weight and spectral norm of old) are run wherever the model runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from vfsurgery.errors import HookError, explain
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.values import tensors_of

ONLOOKERS = "vfsurgery_onlookers"
"""Key in a graph module's ``meta``: where the model has hooks that look on."""
WEIGHT_HOOKS = "torch.nn.utils"
"""The package whose hooks set a module's weight before each forward."""
KINDS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
"""Where a module keeps its hooks, and what they are called."""
GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks")
REMOVE = "call .remove() on the handle that registering it returned, and register it again on the result"


@dataclass(eq=False)
class Hook:
    """A forward hook of a model, and what it was seen to do: ``None`` until it ran."""

    path: str
    kind: str
    key: int
    function: Callable[..., Any]
    computes: bool | None = None
    writes: str = ""
    sets: set[str] = field(default_factory=set[str])

    @property
    def owner(self) -> str:
        """The module that has it, in words."""
        return f"module {self.path}" if self.path else "the model itself"

    def __str__(self) -> str:
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{KINDS[self.kind]} {getattr(function, '__module__', '')}.{name}"


@dataclass(frozen=True)
class Hooks:
    """All forward hooks of a model but those of ``torch.nn.utils``."""

    found: tuple[Hook, ...] = ()

    @staticmethod
    def of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Hooks:
        """Find the hooks; run the model on ``inputs``, if there are any, to see what they do.

        Raises:
            HookError: a hook cannot be followed; names it, its module, and what to do.
        """
        _refuse_foreign_forwards(model)
        own = _own(model)
        found = Hooks.seen(model, inputs)
        found.refuse_writers()
        for hook in found.found:
            held = _held(hook.function, own) if hook.computes is not False else ""
            if held:
                raise HookError(
                    explain(
                        f"a hook refers to a module of the model, a {held}, by itself and not through its arguments",
                        hook=f"{hook} on {hook.owner}",
                        because="in a copy of the model, which is returned, it would go on using the original's",
                        remedy=f"make it a method of a module, or compute it in a forward; or {REMOVE}",
                    )
                )
        return found

    @staticmethod
    def seen(model: nn.Module, inputs: tuple[Tensor, ...]) -> Hooks:
        """The hooks and what they do, whatever that is; only those on all modules of the process must look on alone."""
        found = Hooks(tuple(hooks_of(model)))
        if found.found or any(map(global_hooks, GLOBAL)):
            found._watch(model, inputs)
        return found

    def refuse_writers(self) -> None:
        """Refuse hooks that write into weights.

        Raises:
            HookError: names the first one, and its module.
        """
        for hook in self.found:
            if hook.writes:
                raise HookError(
                    explain(
                        f"a hook writes into {hook.writes} whenever the model runs",
                        hook=f"{hook} on {hook.owner}",
                        remedy=REMOVE,
                    )
                )

    @property
    def onlookers(self) -> tuple[tuple[str, str, int], ...]:
        """Where the hooks are that look on: the module's path, the kind, and their key there."""
        return tuple((hook.path, hook.kind, hook.key) for hook in self.found if hook.computes is False)

    @property
    def guards(self) -> list[str]:
        """What is to be said of the graph: which hooks are in it, and which are not."""
        ran = [hook for hook in self.found if hook.computes is not None]
        words = {True: "is recorded", False: "looks on, and is left out of the graph"}
        return [f"{hook} on {hook.owner} {words[bool(hook.computes)]}" for hook in ran]

    def surround(self, path: str) -> bool:
        """Whether hooks of the module at ``path`` are to be recorded around it."""
        return any(hook.path == path and hook.computes is not False for hook in self.found)

    def inside(self, path: str) -> Hook | None:
        """A hook that computes on a module inside the one at ``path``, if there is one."""
        return next((hook for hook in self.found if hook.computes and hook.path.startswith(f"{path}.")), None)

    def set_weights(self, path: str) -> bool:
        """Whether a hook of the module at ``path`` sets a tensor that its forward reads."""
        return any(hook.path == path and hook.sets for hook in self.found)

    def _watch(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Run the model with every hook watched; where it does not run, all hooks count as computing."""
        everywhere = [
            (owner, key, Hook("", kind.removeprefix("_global"), key, function))
            for kind in GLOBAL
            for owner in [global_hooks(kind)]
            for key, function in owner.items()
        ]
        devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
        with borrowed(model, {}), torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            model.eval()
            places = [(getattr(model.get_submodule(hook.path), hook.kind), hook.key, hook) for hook in self.found]
            with _watched([*places, *everywhere]):
                try:
                    model(*(x.clone() for x in inputs))
                except Exception:  # tracing will say why
                    return
        for _, _, hook in everywhere:
            if hook.computes or hook.writes:
                raise HookError(
                    explain("a hook on all modules of the process changes what they compute", hook=hook, remedy=REMOVE)
                )


NO_HOOKS = Hooks()


def hooks_of(model: nn.Module) -> Iterator[Hook]:
    for path, module in model.named_modules():
        for kind in KINDS:
            for key, function in getattr(module, kind).items():
                if not type(function).__module__.startswith(WEIGHT_HOOKS):
                    yield Hook(path, kind, key, function)


def has_hooks(model: nn.Module) -> bool:
    """Whether a model has forward hooks other than those of ``torch.nn.utils``."""
    return any(True for _ in hooks_of(model))


def global_hooks(kind: str) -> MutableMapping[int, Callable[..., Any]]:
    return getattr(torch_module, kind)


@contextmanager
def _watched(places: list[tuple[MutableMapping[int, Callable[..., Any]], int, Hook]]) -> Generator[None]:
    try:
        for owner, key, hook in places:
            owner[key] = functools.partial(_watching, hook)
        yield
    finally:
        for owner, key, hook in places:
            owner[key] = hook.function


def _watching(hook: Hook, module: nn.Module, *arguments: Any) -> Any:
    """Call a hook as torch would, and note what it does."""
    seen = [(tensor, tensor.clone()) for tensor in tensors_of(arguments)]
    state = [(name, tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()]
    attributes = dict(vars(module))
    result = hook.function(module, *arguments)
    now = tensors_of(arguments)
    in_place = len(now) != len(seen) or any(
        new is not old or not _equal(old, value) for new, (old, value) in zip(now, seen, strict=True)
    )
    for name, tensor, before in state:
        if not _equal(tensor, before):
            hook.writes = f"{hook.path}.{name}".lstrip(".")
    if hook.kind == "_forward_pre_hooks":
        hook.sets |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and attributes.get(name) is not value and _reads(module, name)
        }
    returned = result is not None and not _same(result, arguments)
    hook.computes = bool(hook.computes) or in_place or returned or bool(hook.sets)
    return result


def _equal(tensor: Tensor, before: Tensor) -> bool:
    if tensor.is_meta or tensor.shape != before.shape:
        return tensor.shape == before.shape
    return bool(((tensor == before) | ((tensor != tensor) & (before != before))).all())


def _same(result: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a hook returned just what it was given: the output, or all arguments."""
    if any(result is argument for argument in arguments):
        return True
    given = arguments if len(arguments) == 2 and isinstance(arguments[1], dict) else arguments[0]
    parts = tuple(result) if isinstance(result, tuple | list) else (result,)
    return len(parts) == len(given) and all(mine is own for mine, own in zip(parts, given, strict=True))


def _reads(module: nn.Module, name: str) -> bool:
    """Whether a module's forward reads an attribute, as far as its code tells."""
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(module, nn.RNNBase) or (code is not None and name in code.co_names)


def computes_weights(module: nn.Module) -> bool:
    """Whether a module does not hold but computes a weight: by a parametrization, or by hooks of ``torch.nn.utils``.

    >>> computes_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), computes_weights(nn.Linear(2, 2))
    (True, False)
    """
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(type(hook).__module__.startswith(WEIGHT_HOOKS) for hook in hooks)


def _refuse_foreign_forwards(model: nn.Module) -> None:
    own = _own(model)
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and (held := _held(forward, own)):
            raise HookError(
                explain(
                    f"the forward of {path or 'the model'} was replaced by a function that uses its {held}",
                    because="in a copy of the model, which is what is returned, it would go on using the original's",
                    remedy="bind it as a method, types.MethodType(function, module), or override forward in a subclass",
                )
            )


def _own(model: nn.Module) -> set[int]:
    """Modules and tensors of a model by ``id``; a twin of the user's model shares its tensors."""
    return {id(part) for parts in (model.modules(), model.parameters(), model.buffers()) for part in parts}


def _held(function: Any, own: set[int], seen: frozenset[int] = frozenset()) -> str:
    """The class of a module of the model that a plain function refers to; methods and partials are copied with theirs.

    Args:
        function: A hook or forward.
        own: The model's modules and tensors by ``id``.
        seen: Functions that were looked at on the way here.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return ""
    seen |= {id(function)}
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    for value in (*cells, *named, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        held = getattr(value, "__self__", value) if isinstance(value, types.MethodType) else value
        if isinstance(held, nn.Module) and not own.isdisjoint(_own(held)):
            return type(held).__name__
        if isinstance(value, types.FunctionType) and value in cells and (inner := _held(value, own, seen)):
            return inner
    return ""


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def recorded_around(
    module: nn.Module, run: Callable[..., Any], record: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Call a module's hooks around a node that stands for it.

    Args:
        module: Of a copy of the model that is being traced.
        run: Calls the module with its hooks, as torch does.
        record: Makes the node, from what the pre-hooks leave of the arguments.
        args: What the module is called with.
        kwargs: The same, by name.
    """
    own = vars(module).get("forward")

    def once(*given: Any, **named: Any) -> Any:
        restore()
        return record(*given, **named)

    def restore() -> None:
        vars(module).pop("forward", None)
        if own is not None:
            vars(module)["forward"] = own

    vars(module)["forward"] = once
    try:
        return run(*args, **kwargs)
    finally:
        restore()

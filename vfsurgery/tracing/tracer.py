"""Record a model's forward as an ``fx`` graph, with every node's shape beside it.

Plain symbolic tracing stops at the first ``if x.shape[-1] % 2``. Here every proxy also carries the value of one example
run, computed on fake tensors (shapes without data), so control flow, ``int()``, ``len()``, unpacking and item
assignment resolve while the graph stays symbolic: sizes that the model computes from its input remain computed in the
graph.

Three decisions keep the graph faithful to the model:

- the forward runs on a *skeleton*, a deep copy whose parameters are fake, so the model itself is never run, copied or
  changed; the graph is then put back over the model's own modules and parameters;
- modules of ``torch.nn``, every BatchNorm subclass, and parameter-free modules whose forward asks for ``self.training``
  (stochastic depth) stay single nodes, so ``train()`` and ``eval()`` keep their meaning;
- the transformer modules of ``torch.nn`` are traced through, the way that they go in training: attention, norms and
  linear layers are nodes. In eval mode they compute the same in one fused call, but for padded positions, where a
  ``nn.TransformerEncoder`` may give zeros (:mod:`vfsurgery.tracing.transformers`);
- what the forward does in training is recorded too where it asks which mode it is in (:mod:`vfsurgery.tracing.modes`).

Functions that ``torch.fx.wrap`` marks, because plain symbolic tracing stops inside them, are traced through, except
those that have a coupling rule of their own.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import _symbolic_trace
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from vfsurgery.errors import HookError, explain
from vfsurgery.tracing.borrowed import containers_of, contents_of, put, set_mode
from vfsurgery.tracing.bound import find_bound
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.failures import is_users, not_recorded, shown
from vfsurgery.tracing.followers import reads_of_mode
from vfsurgery.tracing.hooks import NO_HOOKS, REMOVE, Hooks, computes_weights, recorded_around
from vfsurgery.tracing.proxies import GuardingTracer, ValueProxy, holds_proxy, recording_lengths, values_of
from vfsurgery.tracing.transformers import TRANSFORMERS, one_by_one
from vfsurgery.tracing.unhooked import without_global_hooks
from vfsurgery.tracing.values import KEPT_WHOLE, RETURNS_INPUT, VALUE, abstract, fields_of, is_record

FACTORIES = "arange empty eye full linspace ones rand randint randn randperm tensor tril_indices triu_indices zeros"
"""Functions that make tensors from sizes: torch's argument parser takes no proxies for numbers, so they are wrapped."""


@dataclass(frozen=True)
class Recording:
    """A forward as it was recorded in one mode.

    ``skeleton`` is what it ran on, with what the trace made on it; ``guards`` say what the example decided; ``asks``
    whether the forward looked at ``training`` outside of modules that stay single nodes; ``bound`` the number of
    images that the graph holds for, 0 for any.
    """

    graph: fx.Graph
    skeleton: nn.Module
    guards: tuple[str, ...]
    asks: bool
    bound: int


def record_forward(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    leaves: frozenset[str] = frozenset(),
    *,
    training: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> Recording:
    """Record the forward of ``model`` in eval mode, or in training.

    Args:
        model: Any module whose forward takes tensors. It is not run, copied or changed.
        example_inputs: One tensor per positional argument; only shapes and dtypes matter.
        leaves: Paths of modules to keep as single nodes. One that cannot run on shapes alone runs once, as a copy, on
            zeros.
        training: In which mode.
        hooks: The model's forward hooks, those that look on taken away.

    Raises:
        TraceError: the forward cannot be recorded; says at which module.
        HookError: a forward hook cannot be followed; names it.
    """
    tracer = ValueTracer(example_inputs, leaves, model, hooks)
    skeleton = tracer.skeleton(model, training)
    before = [(container.items, contents_of(container.items)) for container in containers_of(skeleton)]
    rng = torch.get_rng_state()
    try:
        with (
            tracer.recording_factories(),
            recording_lengths(),
            _unwrapped_functions(),
            one_by_one(tracer.guards),
            without_global_hooks(),
            reads_of_mode(tracer.is_computing) as asked,
        ):
            graph = tracer.trace(skeleton)
            bound = 0
            if tracer.guards:
                with _without_proxies(before):
                    bound = tracer.bound(graph, skeleton)
    except HookError:
        raise
    except Exception as error:
        raise not_recorded(model, error, tracer.innermost, example_inputs) from error
    finally:
        torch.set_rng_state(rng)
    guards = tuple(dict.fromkeys(tracer.guards))
    return Recording(graph, skeleton, (*guards, *([f"images in a batch == {bound}"] * bool(bound))), bool(asked), bound)


class ValueTracer(GuardingTracer):
    """An ``fx.Tracer`` whose proxies carry the values of one example run on fake tensors."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        example_inputs: tuple[Tensor, ...],
        leaves: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.leaves, self.model, self.hooks = leaves, model, hooks
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = tuple(self.mode.from_tensor(x) for x in example_inputs)
        self.guards = []
        self._computing = False

    def is_computing(self) -> bool:
        """Whether a node's value is being computed, and not the forward recorded."""
        return self._computing

    def skeleton(self, model: nn.Module, training: bool = False) -> nn.Module:
        """A copy in eval mode, or in training, whose parameters and floating-point buffers are fake: without memory.

        Integer buffers are real copies, since forwards index and branch with them, and may count them up. Modules
        without parameters that ask for the mode (stochastic depth) stay in eval mode: as single nodes they know it.
        """
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            fake = self.mode.from_tensor(parameter.detach())
            memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = self.mode.from_tensor(buffer) if buffer.is_floating_point() else buffer.clone()
        skeleton = copied(model, memo)
        if training:
            skeleton.train()  # with all that a train() of its own does
        else:
            set_mode(skeleton, False)
        for module in skeleton.modules():
            if module is not skeleton and _knows_its_mode(module):
                module.eval()
        return skeleton

    @contextmanager
    def recording_factories(self) -> Generator[None]:
        """Record calls such as ``torch.zeros(x.shape[0], 4)`` as nodes; calls with plain numbers stay constants."""

        def recording(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self._computing or not holds_proxy((args, kwargs)):
                    return function(*args, **kwargs)
                return self.create_proxy("call_function", function, args, kwargs)

            return call

        originals = {name: getattr(torch, name) for name in FACTORIES.split()}
        try:
            for name, function in originals.items():
                setattr(torch, name, recording(function))
            yield
        finally:
            for name, function in originals.items():
                setattr(torch, name, function)

    @property
    def innermost(self) -> str:
        """The path of the innermost module that is running; it stays there where one raises."""
        return next(reversed(self.module_stack.values()), ("",))[0]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if self._must_be_seen_inside(m, module_qualified_name):
            return False
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            return True
        if isinstance(m, TRANSFORMERS):
            return False
        if _knows_its_mode(m):
            return True
        if isinstance(m, nn.DataParallel) and not m.device_ids:  # on the CPU it calls what it holds
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def _must_be_seen_inside(self, module: nn.Module, path: str) -> bool:
        """Whether a module is not what its class says: it computes its weights, or somebody has changed its forward."""
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention):  # whose forwards cannot be recorded
            return "forward" in vars(module)
        computed = any(map(computes_weights, module.modules())) or self.hooks.set_weights(path)
        changed = "forward" in vars(module) or self.hooks.inside(path) is not None
        return computed or changed or isinstance(module, parametrize.ParametrizationList)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder per example input; other arguments keep their defaults and do not enter the graph."""
        names = [
            name
            for name, parameter in inspect.signature(self.root.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        names += [f"input_{index}" for index in range(len(names), len(self.inputs))]
        arguments: list[Any] = [self.root]
        for name, value in zip(names, self.inputs, strict=False):
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.value = value
            proxy.node.meta[VALUE] = abstract(value)
            arguments.append(proxy)
        return nn.Module._call_impl, arguments  # runs the model's own hooks, too

    def create_arg(self, a: Any) -> Any:
        """As ``fx`` does; a dataclass becomes a node that makes one, also where it is a mapping as well."""
        if type(a) is ValueProxy:
            return a.node
        if not is_record(a):
            return super().create_arg(a)
        parts = fields_of(a)
        node = self.create_node("call_function", type(a), (), {name: self.create_arg(x) for name, x in parts.items()})
        node.meta[VALUE] = {name: abstract(values_of(x)) for name, x in parts.items()}
        return node

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> ValueProxy:
        """Make the node as ``fx`` does, then compute its value."""
        del proxy_factory_fn  # parameters get value proxies too
        if kind == "call_function" and not args and "input" in kwargs:  # as F.relu(input=x)
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        proxy = cast(ValueProxy, super().create_proxy(kind, target, args, kwargs, name, type_expr))
        if kind != "placeholder":
            proxy.node.meta["stack_trace"] = _forward_line()
            first = values_of(args[0]) if args else None
            before = _writes(first)
            value = self._compute(kind, target, values_of(args), values_of(kwargs))
            proxy.__dict__["value"] = value
            proxy.node.meta[VALUE] = abstract(value)
            if kind in ("call_function", "call_method") and value is not None:
                self._follow_in_place(args, value, proxy)
            returns_input = kind == "call_module" and len(args) == 1 and isinstance(value, Tensor) and value is first
            untouched = returns_input and _writes(value) == before
            proxy.node.meta[RETURNS_INPUT] = untouched and target not in self.leaves
        return proxy

    def _follow_in_place(self, args: tuple[Any, ...], value: Any, proxy: ValueProxy) -> None:
        """After an op that wrote into its input, what reads that input reads the op: there is no other value of it."""
        if args and type(args[0]) is ValueProxy and isinstance(value, Tensor) and args[0].value is value:
            args[0].node = proxy.node

    def bound(self, graph: fx.Graph, skeleton: nn.Module) -> int:
        """The number of images that a graph holds for, 0 for any."""
        self._computing = True
        try:
            with self.mode:
                return find_bound(graph, skeleton, self.inputs)
        finally:
            self._computing = False

    def _compute(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._computing = True
        try:
            with self.mode, torch.no_grad():
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                owner = self.root
                for atom in target.split("."):
                    owner = getattr(owner, atom)
                if kind == "call_module" and target in self.leaves:
                    return self._run_leaf(target, owner, args, kwargs)
                return owner.forward(*args, **kwargs) if kind == "call_module" else owner
        finally:
            self._computing = False

    def _run_leaf(self, path: str, leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A leaf whose forward looks at values, which fake tensors lack, runs on zeros as a copy of the real module."""
        try:
            return leaf.forward(*args, **kwargs)
        except Exception:
            if self.model is None:
                raise
            with unset_fake_temporarily():
                real = copied(self.model.get_submodule(path)).eval()
                zeros = lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
                result = real(*tree_map_only(Tensor, zeros, args), **tree_map_only(Tensor, zeros, kwargs))
            self.guards.append(f"{path} gives what it gives for zeros")
            return tree_map_only(Tensor, self.mode.from_tensor, result)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computing or m not in (
            self.submodule_paths or {}
        ):  # a module made during the forward is traced through
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        record = functools.partial(super().call_module, m, forward)
        if not self.is_leaf_module(m, path):
            return record(args, kwargs)
        hook = self.hooks.inside(path)
        if hook is not None:
            raise HookError(
                explain(
                    f"a hook computes something inside {path}, which is kept as one node",
                    hook=f"{hook} on {hook.owner}",
                    remedy=f"leave leaf= out; or {REMOVE}",
                )
            )
        if not self.hooks.surround(path):
            return record(args, kwargs)
        return recorded_around(m, forward, lambda *given, **named: record(given, named), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)


@contextmanager
def _without_proxies(before: list[tuple[Any, list[tuple[Any, Any]]]]) -> Generator[None]:
    """Let containers of a skeleton hold what they did before, and what is new in them, but no proxies.

    A forward may keep what it computes, and run again with proxies it would go on recording.
    """
    now = [(items, contents_of(items)) for items, _ in before]
    try:
        for (items, old), (_, new) in zip(before, now, strict=True):
            known = {key for key, _ in old}
            put(items, [*old, *(pair for pair in new if pair[0] not in known and not holds_proxy(pair[1]))])
        yield
    finally:
        for items, contents in now:
            put(items, contents)


@contextmanager
def _unwrapped_functions() -> Generator[None]:
    """Let ``torch.fx.wrap`` hold only for functions that have a coupling rule, and for builtins."""
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    before = dict(wrapped)
    try:
        for (number, name), namespace in before.items():
            if name in namespace and namespace[name] not in KEPT_WHOLE:
                del wrapped[number, name]
        yield
    finally:
        wrapped.clear()
        wrapped.update(before)


def _writes(value: Any) -> int:
    """How often a tensor has been written into; nobody counts under inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _forward_line() -> str:
    """The line of the model's code that is being recorded, as a traceback would show it; empty if there is none.

    ``fx`` can record whole stacks, at a hundred times the price.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not record_forward.__code__:
        if is_users(frame):
            return shown(frame, frame.f_lineno)
        frame = frame.f_back
    return ""


def _knows_its_mode(module: nn.Module) -> bool:
    """Whether a module without parameters, that is not one of torch's, asks for ``self.training``."""
    code = getattr(type(module).forward, "__code__", None)
    asks = code is not None and "training" in code.co_names
    return asks and not type(module).__module__.startswith("torch.nn") and not any(True for _ in module.parameters())

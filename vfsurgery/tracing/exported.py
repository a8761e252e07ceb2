"""The graph of a model that ``fx`` cannot record, by way of ``torch.export``.

An exported program is a graph of aten calls whose parameters have the model's names. Here it is put into the form of an
``fx`` trace, so that coupling rules, statistics and passes read it like one:

- the call that a module of ``torch.nn`` consists of becomes a node of that module again, so that BatchNorm stays a
  BatchNorm whose statistics can be renewed, and a convolution a layer that can take a bias;
- aten calls that have no counterpart of the same arguments (``select``, ``slice``, ``index``) become what the user
  wrote;
- it is put over the model's own modules and tensors, with sizes of the example run beside every node.

The graph serves to find groups and to read statistics; a merge returns an instance of the model's own class.
"""

from __future__ import annotations

import io
import operator
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.errors import TraceError, explain
from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.graph_modules import put_over_model
from vfsurgery.tracing.modes import NOT_FOLLOWED, asks_for_mode
from vfsurgery.tracing.values import VALUE, TensorValue

EXPORTED = "vfsurgery_exported"
"""Key in a graph module's ``meta``: why the graph comes from ``torch.export``, in one line."""

Call: TypeAlias = tuple[str, Any, tuple[Any, ...], dict[str, Any]]

CHECKS = ("_assert", "sym_constrain", "_guards_fn")
"""Beginnings of names of nodes that only check something."""

aten = torch.ops.aten


def is_exported(graph_module: fx.GraphModule) -> bool:
    """Whether a graph comes from ``torch.export``."""
    return EXPORTED in graph_module.meta


def export_module(model: nn.Module, example_inputs: tuple[Tensor, ...], reason: str) -> fx.GraphModule:
    """Export ``model`` in eval mode and put the result into the form of an ``fx`` trace over the model itself.

    Args:
        model: Any module whose forward takes tensors. It is not run or changed; its parameters are shared.
        example_inputs: One tensor per positional argument. All dims but the first become fixed.
        reason: Why ``fx`` does not do.

    Raises:
        TraceError: the forward cannot be exported either.
    """
    exported = _export(model, example_inputs)
    graph = _Rewriting(model, exported).graph_of_calls()
    graph_module = put_over_model(model, exported, graph)
    graph_module.meta[EXPORTED] = reason
    graph_module.meta["guards"] = ("recorded by torch.export: every size but that of the batch is the example's",)
    if asks_for_mode(model):
        graph_module.meta[NOT_FOLLOWED] = "it is recorded through torch.export, in eval mode alone"
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Export a copy that shares the model's parameters; with any batch size and by plain Python where that works."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copied(fresh(model, inputs), memo)
    set_mode(twin, False)
    two = tuple(torch.cat([x, x]) if x.ndim and len(x) == 1 else x for x in inputs)  # one image fixes the batch size
    any_batch = tuple({0: torch.export.Dim.AUTO} if x.ndim else None for x in inputs)
    attempts = [(two, any_batch, False), (two, any_batch, True), (inputs, None, False)]
    failures: list[Exception] = []
    for example, sizes, strict in attempts:
        try:
            with torch.random.fork_rng([]), _quiet():
                return torch.export.export(twin, example, dynamic_shapes=sizes, strict=strict).module()
        except Exception as error:
            failures.append(error)
    raise TraceError(f"torch.export fails too: {first_line(failures[0])}") from failures[0]


@contextmanager
def _quiet() -> Generator[None]:
    """No warnings, and nothing on stderr, where torch prints the graph of an export that fails."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """What an error says, without its details."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _Rewriting:
    """The nodes of an exported graph, one by one, as calls of an ``fx`` trace."""

    def __init__(self, model: nn.Module, exported: fx.GraphModule) -> None:
        self.model, self.nodes = model, list(exported.graph.nodes)
        self.graph = fx.Graph()
        self.places: dict[fx.Node, fx.Node] = {}
        self.calls = Counter(key for node in self.nodes if _computes(node) for key in _stack(node))

    def graph_of_calls(self) -> fx.Graph:
        """The rewritten graph; what nothing uses (parameters, checks) is left out."""
        for node in self.nodes:
            if node.op == "output":
                self.graph.output(map_arg(node.args[0], self.places.__getitem__))
            elif node.op == "placeholder":
                self.places[node] = self._noted(self.graph.placeholder(str(node.target)), node)
            elif node.op == "get_attr":
                self.places[node] = self._noted(self.graph.get_attr(str(node.target)), node)
            elif not str(node.name).startswith(CHECKS):
                self._call(node)
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        return self.graph

    def _call(self, node: fx.Node) -> None:
        if _takes_all(node):
            self.places[node] = self.places[node.args[0]]  # type: ignore[index]
            return
        written = _written(node)
        if written is not None:  # the node's value is what was written into
            self.graph.call_function(operator.setitem, map_arg(written, self.places.__getitem__))
            self.places[node] = self.places[written[0]]
            return
        kind, target, args, kwargs = self._module_call(node) or _spelled(node)
        arguments: Any = map_arg((args, kwargs), self.places.__getitem__)
        self.places[node] = self._noted(self.graph.create_node(kind, target, *arguments), node)

    def _noted(self, mine: fx.Node, node: fx.Node) -> fx.Node:
        mine.meta[VALUE] = _abstract(node.meta.get("val"), node)
        mine.meta["nn_module_stack"] = {path: kind for path, kind in _stack(node).values()}
        return mine

    def _module_call(self, node: fx.Node) -> Call | None:
        """The module that consists of this one call on its own parameters, if it is one of torch's."""
        key, (path, _) = next(reversed(_stack(node).items()), ("", ("", "")))
        if not path or self.calls[key] > 1 or not _is_layer(module := self.model.get_submodule(path)):
            return None
        first, *others = node.args or (None,)
        own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        given = [other for other in (*others, *node.kwargs.values()) if isinstance(other, fx.Node)]
        if not isinstance(first, fx.Node) or any(other.op != "get_attr" for other in given):
            return None
        read = {id(operator.attrgetter(str(other.target))(self.model)) for other in given}
        needed = {id(tensor) for tensor in module.parameters()}
        return ("call_module", path, (first,), {}) if needed <= read <= own else None


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _computes(node: fx.Node) -> bool:
    checks = str(node.name).startswith((*CHECKS, "sym_size"))
    return node.op not in ("placeholder", "get_attr", "output") and not checks


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """The modules around a node from the outside in: for each call of a module, its path and class."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: entry for key, entry in stack.items() if not str(entry[0]).startswith("_empty")}


def _abstract(value: Any, node: fx.Node) -> Any:
    """As :func:`vfsurgery.tracing.values.abstract`, with the example's number for each symbolic size."""
    if isinstance(value, Tensor):
        return TensorValue(tuple(_number(size, node) for size in value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(_abstract(item, node) for item in value)
    return _number(value, node) if isinstance(value, torch.SymInt) else value


def _number(size: Any, node: fx.Node) -> int:
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    if hint is None:
        raise TraceError(
            explain(
                "the size of a tensor depends on values",
                node=node.name,
                module=next(reversed(_stack(node).values()), ("",))[0] or "the top module",
                remedy="keep the module that makes it as one node with leaf=",
            )
        )
    return int(hint)


def _takes_all(node: fx.Node) -> bool:
    """Whether a node is a slice of everything, as ``x[:, 1]`` begins with."""
    if node.target is not aten.slice.Tensor:
        return False
    args: Any = node.args
    return _slice(*args)[1] == slice(None)


def _written(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """The three parts of ``x[index] = value``, if that is what a node does."""
    packet = getattr(node.target, "overloadpacket", None)
    args: Any = node.args
    if packet in (aten.copy_, aten.fill_):
        return args[0], Ellipsis, args[1]
    if packet is aten.index_put_ and not (len(args) > 3 and args[3]):
        return args[0], _index(*args[:2])[2][1], args[2]
    return (args[0], Ellipsis, 0.0) if packet is aten.zero_ else None


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> tuple[int, slice]:
    end = None if end == sys.maxsize else end
    return dim, slice(None if start == 0 else start, end, None if step == 1 else step)


def _spelled(node: fx.Node) -> Call:
    """A call as the user would have written it, where arguments of aten's spelling mean something else."""
    spelling = SPELLINGS.get(getattr(node.target, "overloadpacket", None))
    if spelling is None:
        return node.op, node.target, tuple(node.args), dict(node.kwargs)
    return spelling(*node.args, **node.kwargs)


def _at(x: fx.Node, dim: int, index: Any) -> Call:
    dim %= x.meta["val"].ndim
    return "call_function", operator.getitem, (x, (*(slice(None),) * dim, index)), {}


def _index(x: fx.Node, indices: list[Any]) -> Call:
    given = tuple(slice(None) if index is None else index for index in indices)
    return "call_function", operator.getitem, (x, given), {}


def _function(function: Callable[..., Any]) -> Callable[..., Call]:
    return lambda *args, **kwargs: ("call_function", function, args, kwargs)


def _resized(mode: str, **more: Any) -> Callable[..., Call]:
    def call(x: fx.Node, size: Any, *rest: Any) -> Call:
        options: dict[str, Any] = {"size": size, "mode": mode, **more}
        if size is None:
            options["scale_factor"] = rest[-1]
        if len(rest) > 1:
            options["align_corners"] = rest[0]
        return "call_function", F.interpolate, (x,), options

    return call


SPELLINGS: dict[Any, Callable[..., Call]] = {
    aten.sym_size: lambda x, dim: ("call_method", "size", (x, dim), {}),
    aten.select: _at,
    aten.slice: lambda *args: _at(args[0], *_slice(*args)),
    aten.index: _index,
    aten.unfold: lambda *args: ("call_method", "unfold", args, {}),
    aten.lift_fresh_copy: _function(torch.clone),
    aten.embedding: lambda table, indices, *_: ("call_function", F.embedding, (indices, table), {}),
    aten.constant_pad_nd: lambda x, pad, value=0: ("call_function", F.pad, (x, pad, "constant", value), {}),
    aten.im2col: _function(F.unfold),
    aten.upsample_nearest1d: _resized("nearest"),
    aten.upsample_nearest2d: _resized("nearest"),
    aten.upsample_nearest3d: _resized("nearest"),
    aten.upsample_linear1d: _resized("linear"),
    aten.upsample_bilinear2d: _resized("bilinear"),
    aten.upsample_bicubic2d: _resized("bicubic"),
    aten._upsample_bilinear2d_aa: _resized("bilinear", antialias=True),
    aten._upsample_bicubic2d_aa: _resized("bicubic", antialias=True),
    aten.upsample_trilinear3d: _resized("trilinear"),
}
"""By aten call, what it is called in a trace; the others keep their order of arguments."""

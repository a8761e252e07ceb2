"""A trace of both modes of a model: what it computes in eval mode, and what it computes otherwise in training.

Most networks compute the same in both but for modules that know their mode (BatchNorm, dropout). Where a forward asks
for the mode itself, it is recorded a second time in training, and the two graphs are compared node by node:

- A call of functional dropout that is on in training alone becomes a dropout module.
- Another argument that differs (``dropout_p``, ``training``) is looked up in the module's mode from then on
  (:mod:`vfsurgery.tracing.followers`).
- Where training computes something else (auxiliary heads), the graph stays that of eval mode, and the one of training
  lies beside it: groups and proofs look at both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vfsurgery.errors import TraceError
from vfsurgery.tracing.bound import BOUND
from vfsurgery.tracing.chance import without_chance
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.followers import Followers, owner_of
from vfsurgery.tracing.graph_modules import put_over_model
from vfsurgery.tracing.hooks import ONLOOKERS, Hooks
from vfsurgery.tracing.tracer import Recording, record_forward
from vfsurgery.tracing.unhooked import unwatched, without_backward_hooks

IN_TRAINING = "vfsurgery_in_training"
"""Key in a graph module's ``meta``: the graph module of what the model computes in training, if that is another one."""
NOT_FOLLOWED = "vfsurgery_not_followed"
"""Key in a graph module's ``meta``: why it is not known what the model computes in training, in one line."""

DROPOUTS: dict[Callable[..., Any], type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
RATE, ON, IN_PLACE = ("p", 1), ("training", 2), ("inplace", 3)
"""Arguments of functional dropout, by name and place."""
TRAINING = "training "
"""How guards begin that tell of training."""
LISTED = 6
"""How many names a guard lists."""


def trace_module(
    model: nn.Module, example_inputs: tuple[Tensor, ...], leaves: frozenset[str] = frozenset()
) -> fx.GraphModule:
    """Trace ``model`` in both modes; the graph module shares the model's submodules, parameters and buffers.

    Args:
        model: As for :func:`~vfsurgery.tracing.tracer.record_forward`, and so are the others.
        example_inputs: One tensor per positional argument; only shapes and dtypes matter.
        leaves: Paths of modules to keep as single nodes.

    Returns:
        A graph module with the model's ``state_dict`` keys and training mode. Each node's ``meta["vfsurgery"]`` holds
        its abstract value; ``graph_module.meta["guards"]`` lists what the example run decided, and where training
        computes something else. What it computes is found by :func:`in_training`.

    Raises:
        TraceError: the forward cannot be recorded in eval mode; says at which module.
        HookError: a forward hook cannot be followed; names it.
    """
    hooks = Hooks.of(model, example_inputs)
    with unwatched(model, hooks.onlookers):
        twin = without_backward_hooks(fresh(model, example_inputs))
    recording = record_forward(twin, example_inputs, leaves, hooks=hooks)
    guards = [*hooks.guards, *recording.guards]
    training: Recording | None = None
    meta: dict[str, Any] = {ONLOOKERS: hooks.onlookers, BOUND: recording.bound}
    partners: dict[fx.Node, fx.Node] = {}
    if recording.asks or any(type(module).train is not nn.Module.train for module in model.modules()):
        try:
            training = _record_training(twin, example_inputs, leaves, hooks)
        except TraceError as error:
            meta[NOT_FOLLOWED] = " ".join(str(error).splitlines()[0].split())
            guards.append(f"{TRAINING}is not followed: {meta[NOT_FOLLOWED]}")
    if training is not None:
        partners = _partners(recording, training)
        if len(partners) < max(len(recording.graph.nodes), len(training.graph.nodes)):
            guards.append(_difference(recording.graph, training.graph, partners))
            meta[IN_TRAINING] = _over(model, training, recording.graph)
    _follow_training(recording, partners, known=training is not None or not recording.asks)
    graph_module = put_over_model(model, recording.skeleton, recording.graph)
    _take_modes(graph_module, model)
    graph_module.meta.update(guards=tuple(guards), **meta)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def in_training(graph_module: fx.GraphModule) -> fx.GraphModule | None:
    """What a traced model computes in training, if that is another graph; its nodes have names of their own.

    >>> in_training(trace_module(nn.Linear(2, 2), (torch.zeros(1, 2),))) is None
    True
    """
    return graph_module.meta.get(IN_TRAINING)


def not_followed(graph_module: fx.GraphModule) -> str:
    """Why it is not known what a traced model computes in training; empty if it is."""
    return graph_module.meta.get(NOT_FOLLOWED, "")


def limits(graph_module: fx.GraphModule) -> list[str]:
    """The guards that say what a traced model does in training and its graph does not.

    >>> limits(trace_module(nn.Linear(2, 2), (torch.zeros(1, 2),)))
    []
    """
    return [guard for guard in graph_module.meta.get("guards", ()) if guard.startswith(TRAINING)]


def asks_for_mode(model: nn.Module) -> bool:
    """Whether the code of a module that is not torch's reads ``training``: for what cannot be recorded."""

    def asks(kind: type) -> bool:
        codes = (getattr(function, "__code__", None) for function in vars(kind).values())
        return any("training" in code.co_names for code in codes if code is not None)

    kinds = {base for module in model.modules() for base in type(module).__mro__ if issubclass(base, nn.Module)}
    return any(asks(kind) for kind in kinds if kind.__module__.split(".")[0] != "torch")


def _record_training(model: nn.Module, inputs: tuple[Tensor, ...], leaves: frozenset[str], hooks: Hooks) -> Recording:
    """Record the forward in training; of a single image with another one, since BatchNorm wants several.

    What it leaves to chance (layers dropped at random, weights of a mixture) is taken as it is in proofs.
    """
    try:
        with without_chance():
            return record_forward(model, inputs, leaves, training=True, hooks=hooks)
    except TraceError:
        if not all(x.ndim and len(x) == 1 for x in inputs):
            raise
        two = tuple(torch.cat([x, x]) for x in inputs)
        with without_chance():
            return record_forward(model, two, leaves, training=True, hooks=hooks)


def _over(model: nn.Module, training: Recording, beside: fx.Graph) -> fx.GraphModule:
    """The graph of training over the model, with names that no node or constant of eval mode's graph has."""
    prefix = "training_"
    while any(node.name.startswith(prefix) for node in beside.nodes):
        prefix = f"_{prefix}"
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for node in training.graph.nodes:
        if node.op == "get_attr" and node.target not in known and "." not in str(node.target):
            setattr(training.skeleton, f"{prefix}{node.target}", getattr(training.skeleton, str(node.target)))
            node.target = f"{prefix}{node.target}"
        if node.op != "output":
            node._rename(f"{prefix}{node.name}")
    graph_module = put_over_model(model, training.skeleton, training.graph)
    graph_module.recompile()
    return graph_module


def _partners(recording: Recording, training: Recording) -> dict[fx.Node, fx.Node]:
    """Nodes of eval mode and of training that do the same, but for plain values among their arguments."""
    sides = recording, training
    nodes = [list(side.graph.nodes) for side in sides]
    sketches = [[_sketch(node, side) for node in side.graph.nodes] for side in sides]
    matcher = difflib.SequenceMatcher(None, *sketches, autojunk=False)
    partners: dict[fx.Node, fx.Node] = {}
    for block in matcher.get_matching_blocks():
        for place in range(block.size):
            mine, theirs = nodes[0][block.a + place], nodes[1][block.b + place]
            read = zip(_parts((mine.args, mine.kwargs)), _parts((theirs.args, theirs.kwargs)), strict=True)
            if all(partners.get(x) is y for x, y in read if isinstance(x, fx.Node)):
                partners[mine] = theirs
    return partners


def _sketch(node: fx.Node, recording: Recording) -> tuple[Any, ...]:
    """What a node does, to be compared: what it calls and where, and which of its arguments are nodes."""
    target: Any = node.target
    if node.op == "get_attr":
        value = getattr(recording.skeleton, str(target), None) if "." not in str(target) else None
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and str(target).startswith("_tensor_c"):
            target = repr(value)  # a constant, numbered as they come
    return node.op, target, owner_of(node), _outline((node.args, node.kwargs))


def _outline(arguments: Any) -> Any:
    if isinstance(arguments, fx.Node):
        return fx.Node
    if isinstance(arguments, tuple | list):
        return tuple(_outline(item) for item in arguments)
    if isinstance(arguments, dict):
        return tuple((name, _outline(item)) for name, item in arguments.items())
    if isinstance(arguments, slice):
        return slice, _outline((arguments.start, arguments.stop, arguments.step))
    return None


def _parts(arguments: Any) -> Iterator[Any]:
    """All that is no container, in order."""
    if isinstance(arguments, tuple | list):
        for item in arguments:
            yield from _parts(item)
    elif isinstance(arguments, dict):
        yield from _parts(tuple(arguments.values()))
    elif isinstance(arguments, slice):
        yield from _parts((arguments.start, arguments.stop, arguments.step))
    else:
        yield arguments


def _difference(graph: fx.Graph, training: fx.Graph, partners: dict[fx.Node, fx.Node]) -> str:
    """For the guards: what only one of the modes computes."""
    shared = set(partners.values())
    only = [
        [node for node in graph.nodes if node not in partners and node.op != "output"],
        [node for node in training.nodes if node not in shared and node.op != "output"],
    ]
    places = [_outermost([_place(node) for node in nodes]) for nodes in only]
    named = [", ".join(found[:LISTED]) + (", …" if len(found) > LISTED else "") for found in places]
    said = [f"{mode} alone: {names}" for mode, names in zip(("eval", "training"), named, strict=True) if names]
    return f"{TRAINING}computes something else than this graph of eval mode ({'; '.join(said) or 'other outputs'})"


def _outermost(paths: list[str]) -> list[str]:
    """Each path once, without those that lie in another one."""
    return [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths)]


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else owner_of(node) or node.name


def _follow_training(recording: Recording, partners: dict[fx.Node, fx.Node], known: bool) -> None:
    """Let what differs in arguments alone follow the mode; where training is not known, functional dropout does."""
    followers = Followers(recording.graph, recording.skeleton)
    for node in list(recording.graph.nodes):
        partner = partners.get(node)
        kind = DROPOUTS.get(node.target) if node.op == "call_function" else None
        on = True if partner is None and not known else _argument(partner or node, *ON, True)
        if kind is not None and _argument(node, *ON, True) is False and on is True:
            rate, in_place = _argument(node, *RATE, 0.5), _argument(node, *IN_PLACE, False)
            if not isinstance(rate, fx.Node):
                data = node.args[0] if node.args else node.kwargs["input"]
                followers.module(node, kind(p=rate, inplace=bool(in_place)), (data,))
                continue
        if partner is not None:
            node.args, node.kwargs = _either(followers, node, (node.args, node.kwargs), (partner.args, partner.kwargs))


def _argument(node: fx.Node, name: str, place: int, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _either(followers: Followers, node: fx.Node, mine: Any, theirs: Any) -> Any:
    """The arguments of a node, those that differ in training looked up when the graph runs."""
    if isinstance(mine, fx.Node):
        return mine
    if isinstance(mine, tuple | list):
        parts = [_either(followers, node, x, y) for x, y in zip(mine, theirs, strict=True)]
        return tuple(parts) if isinstance(mine, tuple) else parts
    if isinstance(mine, dict):
        return {name: _either(followers, node, item, theirs[name]) for name, item in mine.items()}
    if isinstance(mine, slice):
        ends = (mine.start, mine.stop, mine.step), (theirs.start, theirs.stop, theirs.step)
        return slice(*_either(followers, node, *ends))
    if mine is theirs or (type(mine) is type(theirs) and mine == theirs):
        return mine
    return followers.either(node, mine, theirs)


def _take_modes(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Give modules that the trace has made the mode of the module that they lie in."""
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in graph_module.named_modules():
        if path not in modes:
            module.training = nearest_mode(modes, path)


def nearest_mode(modes: Mapping[str, bool], path: str) -> bool:
    """The mode of a module, or of the innermost one around it that is known.

    >>> nearest_mode({"": True, "a": False}, "a.b.c"), nearest_mode({"": True, "a": False}, "d")
    (False, True)
    """
    while path and path not in modes:
        path = path.rpartition(".")[0]
    return modes[path]

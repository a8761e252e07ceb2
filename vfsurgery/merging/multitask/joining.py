"""One graph for several experts: what they share once, and behind it the head of each.

Two nodes of different experts are the same if they compute the same from the same, in modules of the same settings, and
read nothing that is of a head. What is the same in all experts is the *trunk*; all that is left of an expert is its
head, whatever it is made of. So heads may have other numbers of classes, or other layers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from vfsurgery.errors import IncompatibleModelsError, OptionError, explain
from vfsurgery.merging.multitask.heads import Head, canonical_tensors, tensors_read
from vfsurgery.tracing.bound import BOUND
from vfsurgery.tracing.compatibility import TRAINING_ONLY
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.exported import is_exported
from vfsurgery.tracing.followers import FOLLOWS_MODE, in_eval_mode
from vfsurgery.tracing.graph_modules import put_over_model
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.precision import is_inexact


@dataclass(frozen=True)
class Places:
    """Where the tensors of each expert are in the joined network.

    ``prefixes`` are the paths below which those of the heads lie, under the names that they have in their expert; all
    others have the names that they have there.
    """

    prefixes: Mapping[str, str]
    heads: Mapping[str, Head]

    def names(self, task: str) -> dict[str, str]:
        """For each tensor of a task's head, by its name in the expert: its name in the joined network."""
        return {name: f"{self.prefixes[task]}.{name}" for name in self.heads[task].signs}

    @property
    def in_heads(self) -> set[str]:
        """All tensors of heads, by their names in the joined network."""
        return {name for task in self.prefixes for name in self.names(task).values()}


@dataclass(frozen=True)
class Joined:
    """The joined network, which returns a dict of what the experts return, by task; and where their tensors are."""

    graph_module: fx.GraphModule
    places: Places


def join(tasks: Mapping[str, nn.Module], graphs: Sequence[fx.GraphModule], heads: Sequence[Head]) -> Joined:
    """Join experts, whose tensors are copied; those of the trunk are the first expert's.

    Args:
        tasks: The experts by task.
        graphs: Their traces, in that order.
        heads: Their heads, in that order.

    Raises:
        IncompatibleModelsError: the trunks differ; names the first step that does.
        OptionError: an expert was recorded in another way, so that there is no graph of its modules.

    >>> import vfsurgery as surgery
    >>> from vfsurgery.merging.multitask.heads import find_heads
    >>> tasks = {k: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for k, n in {"a": 2, "b": 3}.items()}
    >>> graphs = [surgery.trace(model, torch.randn(2, 4)) for model in tasks.values()]
    >>> joined = join(tasks, graphs, find_heads([*tasks.values()], graphs))
    >>> {name: tuple(x.shape) for name, x in joined.graph_module(torch.randn(5, 4)).items()}
    {'a': (5, 2), 'b': (5, 3)}
    """
    for task, graph_module in zip(tasks, graphs, strict=True):
        if is_exported(graph_module):
            raise OptionError(
                explain(
                    f"the expert {task!r} can only be recorded by torch.export, which keeps no modules for heads",
                    remedy="keep what fx cannot record as one node: leaf='path.of.the.module'",
                )
            )
    models = [*tasks.values()]
    shared = _shared([*graphs], heads)
    _check_trunks(tasks, graphs, heads, shared)
    prefixes = {task: _free(models, f"task_{number}") for number, task in enumerate(tasks)}
    host = copied(models[0])
    keep = {str(node.target) for node in shared[0] if node.op in ("call_module", "get_attr")}
    _strip(host, heads[0].signs, keep)
    graph, places = fx.Graph(tracer_cls=fx.Tracer), dict[fx.Node, fx.Node]()
    outputs: dict[str, Any] = {}
    for node in graphs[0].graph.nodes:
        if node in shared[0]:
            places[node] = graph.node_copy(node, lambda each: places[each])
            if node.op in ("call_module", "get_attr"):
                _lend(host, "", str(node.target), graphs[0])
    for number, task in enumerate(tasks):
        own = {node: places[first] for node, first in shared[number].items()}
        part = copied(models[number])
        used = [node for node in graphs[number].graph.nodes if node not in own and node.op != "output"]
        targets = {str(node.target) for node in used if node.op in ("call_module", "get_attr")}
        _strip(part, [name for name in canonical_tensors(part) if name not in heads[number].signs], targets)
        host.add_module(prefixes[task], part)
        for node in used:
            own[node] = _head_node(graph, node, own, prefixes[task], graphs[number], host)
        output = next(node for node in graphs[number].graph.nodes if node.op == "output")
        outputs[task] = map_arg(output.args[0], lambda node, own=own: own[node])
    graph.output(outputs)
    graph_module = put_over_model(host, host, graph)
    guards = dict.fromkeys(guard for each in graphs for guard in each.meta["guards"])
    graph_module.meta = {"guards": tuple(guards), BOUND: max(int(each.meta.get(BOUND, 0)) for each in graphs)}
    graph_module.graph.lint()
    graph_module.recompile()
    return Joined(graph_module, Places(prefixes, dict(zip(tasks, heads, strict=True))))


def _shared(graphs: Sequence[fx.GraphModule], heads: Sequence[Head]) -> list[dict[fx.Node, fx.Node]]:
    """For each expert its nodes that all have, each with the node of the first expert that computes the same."""
    candidates = [_candidates(graph, head) for graph, head in zip(graphs, heads, strict=True)]
    found: list[dict[fx.Node, fx.Node]] = [{node: node for node in candidates[0]}]
    first: dict[Any, list[fx.Node]] = {}
    for node in candidates[0]:
        first.setdefault(_key(node, graphs[0], found[0]), []).append(node)
    for graph, nodes in zip(graphs[1:], candidates[1:], strict=True):
        waiting, mine = {key: [*each] for key, each in first.items()}, dict[fx.Node, fx.Node]()
        for node in nodes:
            if all(each in mine for each in node.all_input_nodes):
                alike = waiting.get(_key(node, graph, mine), [])
                place = next((n for n, each in enumerate(alike) if _same_constant(node, graph, each, graphs[0])), None)
                if place is not None:
                    mine[node] = alike.pop(place)
        found.append(mine)
    common = set(found[0]).intersection(*(mine.values() for mine in found[1:]))
    return [{node: mine for node, mine in each.items() if mine in common} for each in found]


def _candidates(graph_module: fx.GraphModule, head: Head) -> list[fx.Node]:
    """Nodes that depend on no tensor of the head."""
    behind, free, reads = set[fx.Node](), list[fx.Node](), tensors_read(graph_module)
    for node in graph_module.graph.nodes:
        read = any(name in head.signs for name in reads[node])
        if node.op == "output" or read or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        else:
            free.append(node)
    return free


def _key(node: fx.Node, graph_module: fx.GraphModule, places: Mapping[fx.Node, fx.Node]) -> Any:
    """What a node computes in eval mode, and of which nodes of the first expert."""
    named = in_eval_mode((node.args, node.kwargs))
    told = repr(map_aggregate(named, lambda each: f"%{places[each].name}" if isinstance(each, fx.Node) else each))
    settings = ""
    if node.op == "call_module" and FOLLOWS_MODE not in node.meta:
        settings = TRAINING_ONLY.sub("", repr(graph_module.get_submodule(str(node.target))))
    return node.op, node.target, told, settings


def _same_constant(node: fx.Node, graph_module: fx.GraphModule, other: fx.Node, its: fx.GraphModule) -> bool:
    """Whether two nodes that read what nothing trains read the same; true of all others."""
    if node.op != "get_attr":
        return True
    mine, theirs = (operator.attrgetter(str(node.target))(each) for each in (graph_module, its))
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return True
    saved = id(mine) in canonical_parameters(graph_module)
    return (saved and is_inexact(mine)) or torch.equal(mine, theirs)


def _check_trunks(
    tasks: Mapping[str, nn.Module],
    graphs: Sequence[fx.GraphModule],
    heads: Sequence[Head],
    shared: Sequence[Mapping[fx.Node, fx.Node]],
) -> None:
    """Refuse experts of which more differs than heads: that read a tensor of the trunk where they share nothing.

    Raises:
        IncompatibleModelsError: names tensor and step.
    """
    for task, graph_module, head, mine in zip(tasks, graphs, heads, shared, strict=True):
        for node, reads in tensors_read(graph_module).items():
            lost = [name for name in reads if node not in mine and name not in head.signs]
            if not lost:
                continue
            behind = set(_candidates(graph_module, head))
            step = next((each for each in graph_module.graph.nodes if each not in mine and each in behind), None)
            before = next(each for each in graph_module.graph.nodes if each not in mine)
            raise IncompatibleModelsError(
                explain(
                    f"the experts differ in more than their heads: {task!r} has no trunk in common with the others "
                    f"from {(step or before).name} on",
                    parameter=lost[0],
                    head=str(head)[:200] if step is None else None,
                    step=None if step is None else f"{step.op} {getattr(step.target, '__name__', step.target)}",
                    remedy="build all experts with the same constructor arguments but for the number of classes; or "
                    'say which part is the head: head="fc"',
                )
            )
    if not any(reads for node, reads in tensors_read(graphs[0]).items() if node in shared[0]):
        raise IncompatibleModelsError(
            explain(
                "the experts have no layer with weights in common",
                classes=", ".join(type(model).__name__ for model in tasks.values()),
                remedy="experts of one architecture share a trunk; only heads may differ",
            )
        )


def _free(models: Sequence[nn.Module], name: str) -> str:
    """A name that no expert uses at its top."""
    while any(hasattr(model, name) for model in models):
        name += "_"
    return name


def _strip(module: nn.Module, names: Iterable[str], used: set[str]) -> None:
    """Take tensors out of a module, and then all submodules that have none left and are not called."""
    gone, tensors = set(names), canonical_parameters(module)
    for path, each in module.named_modules(remove_duplicate=False):
        for name in [*each._parameters, *each._buffers]:
            tensor = each._parameters.get(name, each._buffers.get(name))
            if tensor is not None and tensors.get(id(tensor)) in gone and f"{path}.{name}".lstrip(".") not in used:
                each._parameters.pop(name, None)
                each._buffers.pop(name, None)
    _prune(module, "", used)


def _prune(module: nn.Module, path: str, used: set[str]) -> bool:
    """Take away empty submodules; whether anything is left."""
    for name, child in list(module._modules.items()):
        inner = f"{path}.{name}".lstrip(".")
        if child is None or not _prune(child, inner, used):
            del module._modules[name]
    needed = path in used or any(each.startswith(f"{path}.") for each in used)
    saved = any(name not in module._non_persistent_buffers_set for name in module._buffers)
    return bool(module._modules or module._parameters or saved or needed)


def _lend(host: nn.Module, prefix: str, target: str, graph_module: fx.GraphModule) -> None:
    """Give the host what only a trace has: constants of the forward, and modules that follow the mode."""
    path = f"{prefix}.{target}".lstrip(".")
    try:
        operator.attrgetter(path)(host)
        return
    except AttributeError:
        pass
    owner, _, name = path.rpartition(".")
    place = host
    for part in owner.split(".") if owner else ():
        if part not in place._modules:
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    member = operator.attrgetter(target)(graph_module)
    if isinstance(member, nn.Module):
        place.add_module(name, copied(member))
    elif isinstance(member, Tensor):
        place.register_buffer(name, member.detach().clone(), persistent=False)
    else:
        setattr(place, name, member)


def _head_node(
    graph: fx.Graph,
    node: fx.Node,
    places: Mapping[fx.Node, fx.Node],
    prefix: str,
    graph_module: fx.GraphModule,
    host: nn.Module,
) -> fx.Node:
    """A node of a head, its modules and tensors below the head's own path; it writes into nothing that is shared."""
    writes = (str(node.target).endswith("_") and not str(node.target).endswith("__")) or node.kwargs.get(
        "inplace"
    ) is True
    if writes and node.op in ("call_method", "call_function"):
        given = next((each for each in node.all_input_nodes if not places[each].meta.get(prefix)), None)
        if given is not None:
            own = graph.call_method("clone", (places[given],))
            own.meta = {**places[given].meta, prefix: True}
            places = {**places, given: own}
    made = graph.node_copy(node, lambda each: places[each])
    made.meta = {**node.meta, prefix: True}
    if node.op in ("call_module", "get_attr"):
        made.target = f"{prefix}.{node.target}"
        _lend(host, prefix, str(node.target), graph_module)
        member = operator.attrgetter(made.target)(host)
        if getattr(member, "inplace", False) is True:
            member.inplace = False
    stack = node.meta.get("nn_module_stack")
    if stack:
        made.meta["nn_module_stack"] = {
            f"{prefix}.{key}".rstrip("."): (f"{prefix}.{path}".rstrip("."), kind) for key, (path, kind) in stack.items()
        }
    return made

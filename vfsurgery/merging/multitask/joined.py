"""The network that has several tasks: one trunk, a head for each, and where they are known each task's statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.merging.multitask.heads import canonical_tensors, with_tensors
from vfsurgery.merging.multitask.joining import Joined, Places
from vfsurgery.merging.multitask.labels import Labels, places_in_union
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.values import judged

TEMPERATURE = 1.0
FITTED = "fitted"
FOUND = "_found"
"""Attribute for what is found again from the graph, so that it is neither copied nor saved."""

Exchanged: TypeAlias = Mapping[str, Mapping[str, str]]
"""For the target of a node, the names of its buffers with the names that the network has for them."""


@dataclass(frozen=True)
class Task:
    """One task: how many classes it has and what they are called, and an empty model of its expert's class."""

    classes: int
    labels: Labels
    template: nn.Module = field(repr=False)


class Multitask(nn.Module):
    """Several experts as one network, made by :func:`~vfsurgery.multitask`.

    An ordinary module: it moves, saves, copies and exports like others. It computes what the experts do in eval mode;
    to train a task on, take :meth:`task`.

    Attributes:
        network: The graph of the trunk and of all heads.
        tasks: What is known of each task.
        temperatures: Fitted ones by task, for :meth:`concat`; 1 where there were no images.
    """

    def __init__(
        self,
        joined: Joined,
        tasks: Mapping[str, Task],
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        temperatures: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.network = joined.graph_module
        self.tasks = dict(tasks)
        self.places: Places = joined.places
        self.temperatures = {task: TEMPERATURE for task in tasks} | dict(temperatures or {})
        self.statistics = nn.ModuleDict()
        self.hold(statistics or {})
        self.eval()

    def forward(self, images: Tensor, *more: Tensor, task: str | None = None) -> Any:
        """What the experts return, by task in the order of tasks; for one ``task``, that alone.

        Where tasks have BatchNorm statistics of their own, the trunk runs once for each task, else once.

        Args:
            images: As every expert takes them.
            more: Further inputs, for experts that take several.
            task: One of the tasks.

        Raises:
            OptionError: there is no such task.
        """
        inputs = (images, *more)
        if task is not None:
            return self._run(task, inputs)
        if not len(self.statistics):
            return self.network(*inputs)
        return {name: self._run(name, inputs) for name in self.tasks}

    def hold(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give tasks running statistics of their own, by the names of the network's tensors that they stand for."""
        self.__dict__.pop(FOUND, None)
        for task, own in statistics.items():
            holder = nn.Module()
            for name, tensor in own.items():
                holder.register_buffer(_key(name), tensor)
            self.statistics[self.places.prefixes[self._checked(task)]] = holder

    def task(self, name: str) -> nn.Module:
        """A plain model for one task: of its expert's class, with its number of classes, and tensors of its own.

        Its state dict loads with ``strict=True`` into what built the expert, as in
        ``timm.create_model(..., num_classes=...)``.

        Raises:
            OptionError: there is no such task.
        """
        template = self.tasks[self._checked(name)].template
        state = {key: tensor.detach().clone() for key, tensor in self.state_of(name).items()}
        model = with_tensors(template, state)
        return model.to(next(iter(state.values())).device).eval()

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The tensors of one task by the names that they have in its expert: those of trunk, head and statistics."""
        tensors, own = canonical_tensors(self.network), self.places.names(self._checked(name))
        kept = self._statistics(name)
        return {
            key: kept[here] if here in kept else tensors[here]
            for key in canonical_tensors(self.tasks[name].template)
            for here in [own.get(key, key)]
        }

    def graph_of(self, name: str) -> fx.GraphModule:
        """The trunk and one task's head as a graph module, over this network's own modules, without own statistics."""
        return fx.GraphModule(self.network, self._part(name)[0])

    def concat(self, temperatures: Mapping[str, float] | float | str = TEMPERATURE) -> Concat:
        """A module that returns one tensor over the classes of all tasks, without being told the task.

        Heads of different tasks were never trained against each other, so their logits are not comparable. Each head's
        are turned into log-probabilities of its own classes, and the largest of all says class and task at once: it
        *guesses* the task, by which head is surest. Judge it apart from the tasks' own accuracies, which are told the
        task.

        Args:
            temperatures: What the logits of each head are divided by before, one number or by task; a larger one makes
                a head less sure. ``"fitted"`` is the number with which a head is as sure, on average, as it agrees with
                its expert, where there were images to fit it on, else 1.

        Raises:
            OptionError: a temperature is no positive number, or there is no such task.
        """
        if isinstance(temperatures, str):
            if temperatures != FITTED:
                accepted = f"a number, one for each task, or {FITTED!r}"
                raise OptionError(explain(f"unknown temperature {temperatures!r}", accepted=accepted))
            temperatures = self.temperatures
        if isinstance(temperatures, int | float):
            temperatures = dict.fromkeys(self.tasks, float(temperatures))
        given = {self._checked(task): float(value) for task, value in temperatures.items()}
        bad = next((task for task, value in given.items() if not 0 < value < float("inf")), None)
        if bad is not None:
            raise OptionError(explain(f"the temperature of {bad!r} is {given[bad]}", accepted="a positive number"))
        return Concat(self, dict.fromkeys(self.tasks, TEMPERATURE) | given)

    def labels(self) -> dict[str, Labels]:
        """The names of each task's classes."""
        return {name: task.labels for name, task in self.tasks.items()}

    def extra_repr(self) -> str:
        """The tasks, for ``print``."""
        return "\n".join(
            f"{name!r}: {task.classes} classes, head {self.places.heads[name]}" for name, task in self.tasks.items()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != FOUND}

    def __deepcopy__(self, memo: dict[int, Any]) -> Multitask:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return result

    def _statistics(self, task: str) -> dict[str, Tensor]:
        """The statistics that a task has of its own, by the names of the tensors of the network that they stand for."""
        prefix = self.places.prefixes[task]
        if prefix not in self.statistics:
            return {}
        return {_name(key): tensor for key, tensor in self.statistics[prefix]._buffers.items() if tensor is not None}

    def _run(self, task: str, inputs: Sequence[Tensor]) -> Any:
        graph, exchanged = self._part(task)
        return _OfTask(self.network, graph, exchanged, self._statistics(task)).run(*inputs)

    def _part(self, task: str) -> tuple[fx.Graph, Exchanged]:
        """The graph of one task, and which tensors of its nodes the task has of its own; found when first asked for."""
        known: dict[str, tuple[fx.Graph, Exchanged]] = self.__dict__.setdefault(FOUND, {})
        if self._checked(task) not in known:
            graph = _part(self.network.graph, task)
            known[task] = graph, _exchanged(self.network, graph, self._statistics(task))
        return known[task]

    def _checked(self, task: str) -> str:
        if task not in self.tasks:
            raise OptionError(explain(f"there is no task {task!r}", remedy=did_you_mean(str(task), self.tasks)))
        return task


class Concat(nn.Module):
    """One tensor ``(N, classes, ...)`` of log-probabilities over the classes of all tasks.

    :meth:`Multitask.concat` says what they are worth.

    Classes of equal name are one; its probability is the mean of what the tasks that have it say.

    Attributes:
        classes: Their names in order.
        places: For each task, where its classes are among them.
    """

    def __init__(self, network: Multitask, temperatures: Mapping[str, float]) -> None:
        super().__init__()
        self.multitask = network
        self.temperatures = dict(temperatures)
        counts = {name: task.classes for name, task in network.tasks.items()}
        self.classes, self.places = places_in_union(network.labels(), counts)
        self.eval()

    def forward(self, images: Tensor, *more: Tensor) -> Tensor:
        """Log-probabilities, each head's of its own classes, one beside the other.

        Raises:
            OptionError: heads give outputs of different sizes, as of different resolutions.
        """
        columns: list[list[Tensor]] = [[] for _ in self.classes]
        for task, output in self.multitask(images, *more).items():
            logits = judged(output)
            assert logits is not None  # a task without logits is refused when it is made
            log_p = (logits / self.temperatures[task]).log_softmax(1)
            for place, column in zip(self.places[task], log_p.unbind(1), strict=True):
                columns[place].append(column)
        shapes = {tuple(column.shape[1:]) for each in columns for column in each}
        if len(shapes) > 1:
            raise OptionError(
                explain(
                    "the heads' outputs differ in more than classes, so they are not one tensor",
                    sizes=", ".join(map(str, sorted(shapes))),
                    remedy="take them apart: network(images) is a dict by task",
                )
            )
        return torch.stack([_mean_log(each) for each in columns], 1)


def _mean_log(logs: Sequence[Tensor]) -> Tensor:
    if len(logs) == 1:
        return logs[0]
    return torch.stack(list(logs)).logsumexp(0) - torch.tensor(float(len(logs))).log().item()


class _OfTask(fx.Interpreter):
    """Runs one task's part of the graph with that task's own running statistics.

    The layers' buffers stay as they are, so tasks may be run in any order, and exported.
    """

    def __init__(
        self, network: fx.GraphModule, graph: fx.Graph, exchanged: Exchanged, statistics: Mapping[str, Tensor]
    ) -> None:
        super().__init__(network, graph=graph)
        self._exchanged, self._statistics = exchanged, statistics

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, its buffers exchanged for the task's."""
        own = {local: self._statistics[name] for local, name in self._exchanged.get(target, {}).items()}
        if not own:
            return super().call_module(target, args, kwargs)
        return torch.func.functional_call(self.fetch_attr(target), own, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a tensor, or the task's in its place."""
        if target in self._exchanged:
            return self._statistics[self._exchanged[target][""]]
        return super().get_attr(target, args, kwargs)


def _exchanged(network: fx.GraphModule, graph: fx.Graph, statistics: Mapping[str, Tensor]) -> Exchanged:
    """Which buffers nodes read that a task has of its own."""
    names, state = canonical_parameters(network), network.state_dict(keep_vars=True)
    found: dict[str, dict[str, str]] = {}
    for target in {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}:
        inside = {key: names[id(x)] for key, x in state.items() if key == target or key.startswith(f"{target}.")}
        own = {key.removeprefix(target).lstrip("."): name for key, name in inside.items() if name in statistics}
        if own:
            found[target] = own
    return found


def _part(graph: fx.Graph, task: str) -> fx.Graph:
    """A graph without what only other tasks need."""
    output = next(node for node in graph.nodes if node.op == "output")
    outputs = cast("dict[str, Any]", output.args[0])
    needed = _behind(outputs[task])
    others = {node for name, each in outputs.items() if name != task for node in _behind(each)} - needed
    part, places = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node is output or (node in others and node.op != "placeholder"):
            continue
        if all(each in places for each in node.all_input_nodes):  # what only writes, and into nothing of others
            places[node] = part.node_copy(node, lambda each: places[each])
    part.output(map_arg(outputs[task], lambda node: places[node]))
    return part


def _behind(value: Any) -> set[fx.Node]:
    """The nodes that a value needs."""
    waiting, found = list[fx.Node](), set[fx.Node]()
    map_arg(value, waiting.append)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _key(name: str) -> str:
    """A tensor's name as that of a buffer, in which there are no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")

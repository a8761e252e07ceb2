"""What differs between two models: nodes of the graph, and parameters, readable in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, TypeAlias

import torch
from torch import Tensor, fx, nn

from vfsurgery.discovery.recording import record
from vfsurgery.records.report import Report
from vfsurgery.tracing.examples import example_inputs_of
from vfsurgery.tracing.excerpts import describe_call
from vfsurgery.tracing.precision import as_real
from vfsurgery.tracing.sources import canonical_state

Sign: TypeAlias = Literal["+", "-", "~"]
COLOURS = {"+": "\033[32m", "-": "\033[31m", "~": "\033[33m"}
PLAIN = "\033[0m"
WORDS = {"+": "added", "-": "removed", "~": "changed"}


@dataclass(frozen=True, slots=True)
class Change:
    """One node or parameter that is new (``+``), gone (``-``) or different (``~``), and what it was and is."""

    sign: Sign
    name: str
    before: str
    after: str

    def lines(self, width: int) -> list[str]:
        """As it is printed; what was and what is one below the other where that is long."""
        name = f"  {self.sign} {self.name:<{width}}  "
        if self.sign != "~":
            return [f"{name}{self.before or self.after}"]
        if not self.before:
            return [f"{name}{self.after}"]
        return [f"{name}{self.before}", f"{' ' * (len(name) - 3)}-> {self.after}"]


@dataclass(frozen=True)
class Difference(Report):
    """What differs between two models: falsy if nothing does; ``show()`` prints it, in colours on a terminal."""

    nodes: tuple[Change, ...]
    parameters: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.nodes or self.parameters)

    def __str__(self) -> str:
        return "\n".join(line for _, line in self._lines())

    def show(self, file: TextIO | None = None) -> None:
        """Print it: in colours where ``file`` (standard output) is a terminal and ``NO_COLOR`` is not set."""
        stream: TextIO = file or sys.stdout  # type: ignore[assignment]
        coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        for sign, line in self._lines():
            print(f"{COLOURS[sign]}{line}{PLAIN}" if coloured and sign in COLOURS else line, file=stream)

    def _lines(self) -> list[tuple[str, str]]:
        """Each line with the sign that says its colour."""
        lines: list[tuple[str, str]] = []
        for title, changes in (("graph", self.nodes), ("parameters", self.parameters)):
            lines.append(("", f"{title}: {_counts(changes)}"))
            width = max((len(change.name) for change in changes), default=0)
            lines += [(change.sign, line) for change in changes for line in change.lines(width)]
        return lines


def diff(before: nn.Module, after: nn.Module, example_inputs: Tensor | Sequence[Tensor] | None = None) -> Difference:
    """Compare two models node by node and parameter by parameter.

    Nodes correspond by name, parameters by ``state_dict`` key. A node has changed if it calls something else, reads
    something else, or its module has other settings; a parameter, if its shape or dtype or any number is another one:
    the share is ``|after - before| / |before|`` in the Euclidean norm.

    Args:
        before: A model, or a graph module.
        after: The same, after surgery.
        example_inputs: For models that are to be traced; by default as configured.

    Raises:
        ExampleInputError: a model is to be traced and does not say what it takes.
        TraceError: a model cannot be recorded.

    >>> import copy, vfsurgery as surgery
    >>> a = surgery.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    >>> b = copy.deepcopy(a)
    >>> with surgery.edit(b) as graph:
    ...     _ = graph.replace(graph.select(op=nn.ReLU)[0], nn.GELU())
    >>> _ = b.get_parameter("0.bias").data.mul_(1.5)
    >>> print(diff(a, b))
    graph: 1 changed
      ~ _1  1(_0)  ReLU()
         -> 1(_0)  GELU(approximate='none')
    parameters: 1 changed
      ~ 0.bias  changed by 50%
    """
    graphs = [_graph_of(model, example_inputs) for model in (before, after)]
    return Difference(_node_changes(*graphs), _parameter_changes(before, after))


def _graph_of(model: nn.Module, example_inputs: Tensor | Sequence[Tensor] | None) -> fx.GraphModule:
    return model if isinstance(model, fx.GraphModule) else record(model, example_inputs_of(model, example_inputs))


def _node_changes(before: fx.GraphModule, after: fx.GraphModule) -> tuple[Change, ...]:
    """In the order of the new graph; nodes that are gone stand where they were."""
    old, new = _steps(before), _steps(after)
    changes: list[Change] = []
    waiting = list(old)
    for name, step in new.items():
        while waiting and waiting[0] not in new:
            gone = waiting.pop(0)
            changes.append(Change("-", gone, old[gone], ""))
        if name not in old:
            changes.append(Change("+", name, "", step))
        elif old[name] != step:
            changes.append(Change("~", name, old[name], step))
        if name in waiting:
            waiting.remove(name)
    changes += [Change("-", name, old[name], "") for name in waiting if name not in new]
    return tuple(changes)


def _steps(graph_module: fx.GraphModule) -> dict[str, str]:
    """What each node does, in words, without its shape and its own name."""
    steps: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        call = describe_call(node, longest=None).partition(" = ")[2]
        if node.op == "call_module":
            call = f"{call}  {graph_module.get_submodule(str(node.target))}"
        steps[node.name] = " ".join(call.split()) if "\n" in call else call
    return steps


def _parameter_changes(before: nn.Module, after: nn.Module) -> tuple[Change, ...]:
    old, new = canonical_state(before), canonical_state(after)
    changes: list[Change] = []
    for name, tensor in old.items():
        if name not in new:
            changes.append(Change("-", name, _describe(tensor), ""))
        elif _describe(tensor) != _describe(new[name]):
            changes.append(Change("~", name, _describe(tensor), _describe(new[name])))
        elif not torch.equal(tensor, new[name].to(tensor.device)):
            changes.append(Change("~", name, "", f"changed by {_share(tensor, new[name]):.3g}%"))
    changes += [Change("+", name, "", _describe(tensor)) for name, tensor in new.items() if name not in old]
    return tuple(changes)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _share(before: Tensor, after: Tensor) -> float:
    """Norm of the change over the norm of what was, in percent; infinite if that was zero."""
    old, new = (as_real(tensor).double() for tensor in (before, after.to(before.device)))
    return float(100 * (new - old).norm() / old.norm())


def _counts(changes: Sequence[Change]) -> str:
    counts = {sign: sum(change.sign == sign for change in changes) for sign in ("-", "+", "~")}
    return ", ".join(f"{count} {WORDS[sign]}" for sign, count in counts.items() if count) or "no difference"

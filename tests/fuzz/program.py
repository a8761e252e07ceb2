"""Random networks as programs: statements that a grammar draws, printed as the source of a module, and shrunk.

A network that breaks a law is only worth something if a person can read it, so a network *is* its source: every
statement has lines for ``__init__`` and lines for ``forward``, and shrinking takes statements out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

HEADER = """\
import dataclasses
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


class Net(nn.Module):
"""


@dataclass(frozen=True)
class Value:
    """A tensor of the forward: its name and its shape without the batch."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "map": channels first; "tokens": channels last; "vector"

    @property
    def units(self) -> int:
        """Its channels."""
        return self.shape[0] if self.kind == "map" else self.shape[-1]

    @property
    def spatial(self) -> int:
        """How many dims behind the channels a map has."""
        return len(self.shape) - 1


@dataclass(frozen=True)
class Statement:
    """One step: ``made`` from ``reads`` by ``code``; ``setup`` goes into ``__init__``, ``has`` says what is special."""

    made: Value
    reads: tuple[str, ...]
    code: tuple[str, ...]
    setup: tuple[str, ...] = ()
    has: frozenset[str] = frozenset()

    def renamed(self, old: str, new: str) -> Statement:
        """The same step, reading another value."""
        word = re.compile(rf"\b{old}\b")
        reads = tuple(new if name == old else name for name in self.reads)
        return replace(self, reads=reads, code=tuple(word.sub(new, line) for line in self.code))


@dataclass(frozen=True)
class Program:
    """A network: its input, its statements, and what it returns."""

    seed: int
    input: Value
    statements: tuple[Statement, ...]
    returns: str
    wiring: tuple[str, ...] = ()
    """Last lines of ``__init__``: aliases, tied weights, hooks."""

    @property
    def has(self) -> frozenset[str]:
        """What is special about the network."""
        return frozenset().union(*(statement.has for statement in self.statements))

    @property
    def source(self) -> str:
        """The network as Python."""
        setup = [line for statement in self.statements for line in statement.setup]
        lines = ["def __init__(self):", "    super().__init__()", *(f"    {line}" for line in (*setup, *self.wiring))]
        lines += ["", f"def forward(self, {self.input.name}):"]
        lines += [f"    {line}" for statement in self.statements for line in statement.code]
        lines += [f"    return {self.returns}"]
        return HEADER + "\n".join(f"    {line}" if line else "" for line in lines) + "\n"

    def build(self) -> nn.Module:
        """The network in float64 and eval mode, with lively weights; the same every time."""
        namespace: dict[str, Any] = {"__name__": "fuzzed"}
        exec(compile(self.source, f"<network {self.seed}>", "exec"), namespace)
        torch.manual_seed(self.seed)
        return lively(namespace["Net"]().double(), self.seed).eval()

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Random inputs, units of different scale and correlated with each other."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((count, *self.input.shape), generator=generator, dtype=torch.float64)
        return x + torch.randn((count, *(1 for _ in self.input.shape)), generator=generator, dtype=torch.float64)


@torch.no_grad()
def lively(model: nn.Module, seed: int) -> nn.Module:
    """Random vectors: at initialization a forgotten norm parameter or statistic changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            positive = "running_var" in name or bool((tensor > 0).all())
            tensor.copy_(0.5 + noise if positive else noise - 0.5)
    return model


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program without the statements that are not needed to fail."""
    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in _smaller(program):
            if _fails(smaller, fails):
                program, shrunk = smaller, True
                break
    return program


def _fails(program: Program, fails: Callable[[Program], bool]) -> bool:
    try:
        with torch.no_grad():
            program.build()(program.images(2))
    except Exception:  # an invalid program tells nothing
        return False
    return fails(program)


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with one line of wiring, or one statement, less: what read it reads one of its inputs of that shape."""
    for place in range(len(program.wiring)):
        yield replace(program, wiring=program.wiring[:place] + program.wiring[place + 1 :])
    shapes = {program.input.name: (program.input.shape, program.input.kind)}
    shapes |= {s.made.name: (s.made.shape, s.made.kind) for s in program.statements}
    for place in reversed(range(len(program.statements))):
        gone, rest = program.statements[place], program.statements[:place] + program.statements[place + 1 :]
        name = gone.made.name
        used = any(name in s.reads for s in rest) or re.search(rf"\b{name}\b", program.returns)
        stand_ins = [read for read in gone.reads if shapes[read] == shapes[name]] if used else [name]
        for other in stand_ins:
            renamed = tuple(s.renamed(name, other) for s in rest)
            yield replace(program, statements=renamed, returns=re.sub(rf"\b{name}\b", other, program.returns))
    if program.returns != program.statements[-1].made.name and "(" in program.returns:
        yield replace(program, returns=program.statements[-1].made.name)

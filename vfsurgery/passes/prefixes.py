"""The prefixes of all sources in one graph, as branches: every kept node once per source."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.discovery.maps import UnitMap, map_units, permutations_of
from vfsurgery.discovery.roles import READS
from vfsurgery.groups import Member, permute_tensor
from vfsurgery.passes.base import Context
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.values import PRESERVED, VALUE, TensorValue

CONTAINER = "source"
"""The modules of branch 0 lie below ``source_0``, and so on."""


class Prefixes(Protocol):
    """Prefixes under construction; nodes are made where the graph's insertion point is."""

    def keep(self, node: fx.Node) -> None:
        """Have a node run for every source."""
        ...

    def first(self, node: fx.Node) -> fx.Node:
        """A node that has the sizes that ``node`` has for one source."""
        ...

    def each(self, node: fx.Node) -> Sequence[fx.Node]:
        """The values of a kept node, one node per source."""
        ...

    def joined(self, node: fx.Node, dim: int) -> fx.Node:
        """The values of a kept node, concatenated along ``dim``."""
        ...


@dataclass(frozen=True)
class Aligned:
    """The weights of the sources that have a share in the merge, in the reference's order of units."""

    context: Context
    sources: tuple[int, ...]

    @staticmethod
    def of(context: Context) -> Aligned:
        """A source without a share is left out."""
        return Aligned(context, tuple(number for number, weight in enumerate(context.weights) if weight))

    @property
    def weights(self) -> list[float]:
        """The sources' shares."""
        return [self.context.weights[number] for number in self.sources]

    def weights_of(self, name: str) -> list[float]:
        """Their shares in one weight."""
        shares = self.context.weights_of(name)
        return [shares[number] for number in self.sources]

    def tensor(self, number: int, name: str) -> Tensor:
        """One entry of the state of a source, by its place among those that have a share."""
        source = self.sources[number]
        state, orders = self.context.sources[source].state, self.context.permutations[source]
        return permute_tensor(name, state[name], self.context.groups, permutations_of(orders))

    def at_border(self, name: str) -> list[Tensor]:
        """One weight of all their states for a layer that reads what prefixes make and writes merged units.

        Maps of units end here: inside a prefix a source's units are its own.
        """
        groups, numbers = self.context.groups, range(len(self.sources))
        rows = {member.dim for _, member in groups.by_parameter.get(name, ()) if member.role != READS}
        dim = min(rows, default=0)
        found: list[Tensor] = []
        for number in numbers:
            maps = {n: o for n, o in self.context.permutations[self.sources[number]].items() if isinstance(o, UnitMap)}
            units = self.tensor(number, name).movedim(dim, 0)
            found.append(map_units(units, name, dim, groups, maps).movedim(0, dim))
        return found

    def tensors(self, name: str) -> list[Tensor]:
        """One entry of all their states."""
        return [self.tensor(number, name) for number in range(len(self.sources))]

    def border_maps(self, value: str, shape: Sequence[int]) -> list[tuple[int, list[Tensor]]]:
        """For a kept value that the rest reads: the dims whose units are mapped, and each source's matrix there."""
        found: list[tuple[int, list[Tensor]]] = []
        for group in self.context.groups:
            for member in group.activations:
                orders = [self.context.permutations[source].get(group.name) for source in self.sources]
                maps = [order for order in orders if isinstance(order, UnitMap)]
                if member.parameter == value and maps:
                    found.append((member.dim, [_whole(member, order, shape[member.dim]) for order in maps]))
        return found

    def copy_of(self, number: int, path: str, memo: dict[int, Any]) -> nn.Module:
        """A copy of a source's module with aligned weights; ``memo`` keeps what is tied within the source tied."""
        source = self.context.sources[self.sources[number]]
        original = source.graph_module.get_submodule(path)
        mine = copied(original, memo)
        names = canonical_parameters(source.graph_module)
        states = (module.state_dict(keep_vars=True).values() for module in (original, mine))
        for old, new in zip(*states, strict=True):
            new.detach().copy_(self.tensor(number, names[id(old)]))
        return mine


def _whole(member: Member, unit_map: UnitMap, length: int) -> Tensor:
    """A map of units as a matrix over all indices of the axis that they lie on."""
    places = torch.from_numpy(member.positions())
    matrix = torch.eye(length, dtype=unit_map.merge.dtype)
    for column in places.T:
        matrix[column[:, None], column] = unit_map.merge.cpu()
    return matrix


class Branches:
    """Every kept node once per source, with modules and parameters of its own."""

    def __init__(self, graph_module: fx.GraphModule, aligned: Aligned) -> None:
        self.graph_module, self.graph, self.aligned = graph_module, graph_module.graph, aligned
        container = CONTAINER
        while any(hasattr(graph_module, f"{container}_{number}") for number in range(len(aligned.sources))):
            container += "_"
        self.containers = [f"{container}_{number}" for number in range(len(aligned.sources))]
        self.memos: list[dict[int, Any]] = [{} for _ in aligned.sources]
        self.copies: dict[fx.Node, list[fx.Node]] = {}
        self.source_of: dict[fx.Node, int] = {}

    def keep(self, node: fx.Node) -> None:
        """Make one copy of a node per source."""
        self.copies[node] = [self._copy(node, number) for number in range(len(self.containers))]

    def first(self, node: fx.Node) -> fx.Node:
        """The copy of the first source."""
        return self.copies[node][0]

    def each(self, node: fx.Node) -> Sequence[fx.Node]:
        """The copies."""
        return self.copies[node]

    def joined(self, node: fx.Node, dim: int) -> fx.Node:
        """A node that concatenates the copies."""
        made = self.graph.create_node("call_function", torch.cat, (self.copies[node], dim), {}, f"{node.name}_joined")
        made.meta = {VALUE: widened(node.meta[VALUE], dim, len(self.containers)), PRESERVED: True}
        return made

    def run_in_turn(self, sizes: Container[str]) -> None:
        """Let one source's copies run after the other's where no merged node stands between them.

        Then the activations of one source alone are alive at a time; ``sizes`` are read from the first source's.
        """
        run: list[fx.Node] = []
        for node in list(self.graph.nodes):
            if node in self.source_of or node.name in sizes:
                run.append(node)
                continue
            for moved in sorted(run, key=lambda each: self.source_of.get(each, 0)):
                node.prepend(moved)
            run = []

    def _copy(self, node: fx.Node, number: int) -> fx.Node:
        arguments: Any = map_arg((node.args, node.kwargs), lambda arg: self._counterpart(arg, number))
        args, kwargs = arguments
        written = node.args[0] if _works_in_place(node) else None
        if isinstance(written, fx.Node) and written not in self.copies:  # other sources read it too
            own = self.graph.call_method("clone", (written,))
            own.meta = dict(written.meta)
            self.source_of[own] = number
            args = (own, *args[1:])
        target = node.target
        if node.op == "call_module":
            target = self._module(str(target), number)
        elif node.op == "get_attr":
            target = self._tensor(str(target), number)
        name = f"{self.containers[number]}_{node.name}"
        made = self.graph.create_node(node.op, target, args, kwargs, name, node.type)
        made.meta = {**node.meta, PRESERVED: True}
        self.source_of[made] = number
        return made

    def _counterpart(self, node: fx.Node, number: int) -> fx.Node:
        return self.copies[node][number] if node in self.copies else node

    def _module(self, path: str, number: int) -> str:
        """The path of a source's own module; one without weights serves all."""
        if not self.graph_module.get_submodule(path).state_dict():
            return path
        mine = f"{self.containers[number]}.{path}"
        if not isinstance(_found(self.graph_module, mine), nn.Module):
            self.graph_module.add_submodule(mine, self.aligned.copy_of(number, path, self.memos[number]))
        return mine

    def _tensor(self, path: str, number: int) -> str:
        """The path of a source's own parameter or buffer."""
        mine = f"{self.containers[number]}.{path}"
        if _found(self.graph_module, mine) is not None:
            return mine
        source = self.aligned.context.sources[self.aligned.sources[number]].graph_module
        original = _found(source, path)
        assert isinstance(original, Tensor)
        tensor = copy.deepcopy(original, self.memos[number])
        tensor.detach().copy_(self.aligned.tensor(number, canonical_parameters(source)[id(original)]))
        owner, _, name = mine.rpartition(".")
        if not isinstance(_found(self.graph_module, owner), nn.Module):
            self.graph_module.add_submodule(owner, nn.Module())
        put_tensor(self.graph_module.get_submodule(owner), name, tensor)
        return mine


def widened(value: Any, dim: int, times: int) -> TensorValue:
    """The abstract value of a tensor that is ``times`` as long along ``dim``."""
    assert isinstance(value, TensorValue)
    shape = list(value.shape)
    shape[dim] *= times
    return TensorValue(tuple(shape), value.dtype)


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the module's parameter of that name, or its buffer if it is no parameter."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def _found(module: nn.Module, path: str) -> Any:
    """What lies at a path, ``None`` if nothing does."""
    found: Any = module
    for atom in path.split("."):
        found = getattr(found, atom, None)
    return found


def _works_in_place(node: fx.Node) -> bool:
    """Whether a call may write into its first argument."""
    name = str(getattr(node.target, "__name__", node.target))
    operators = ("iadd", "isub", "imul", "itruediv", "setitem")
    return node.op != "call_module" and bool(node.args) and (name.rstrip("_") != name or name in operators)

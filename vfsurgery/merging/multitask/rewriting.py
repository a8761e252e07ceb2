"""A graph on its way to a network with experts: what differs where, and what is put beside which op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from vfsurgery.merging.multitask.image_layouts import image_layouts
from vfsurgery.merging.multitask.linear_ops import Computed, LinearOp, linear_ops, read_elsewhere
from vfsurgery.merging.multitask.routed import Factors, Gate, Layout, Routed, recorded
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.tracing.values import VALUE, TensorValue

Choice: TypeAlias = Literal["image", "token"]
TASK = "task"
"""The argument of the forward that chooses an expert by its number."""


@dataclass(frozen=True, slots=True)
class Expertise:
    """What stands beside one op: the tensors that its weight and bias come from, its size, and its experts' rank.

    ``inputs`` are those that one unit reads, kernel included. ``gate`` is ``"mean"`` where no weight differs, or where
    the op reads the same of all images, and ``"token"`` where it was to be ``"image"`` and the op's input does not tell
    images apart.
    """

    op: str
    tensors: tuple[str, ...]
    units: int
    inputs: int
    k: int
    k_gate: int
    gate: Gate


@dataclass(frozen=True)
class Plan:
    """One op, and what its experts will be: factors and differences of biases."""

    op: LinearOp
    tensors: tuple[str, ...]
    factors: Factors
    biases: Tensor | None
    kernel: tuple[int, ...]
    gate: Gate
    layout: Layout
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        return self.factors.right.shape[3]

    @property
    def units(self) -> int:
        return self.factors.left.shape[0] * self.factors.left.shape[2]

    def parameters(self, k: int, k_gate: int, experts: int) -> int:
        """Numbers that it adds to the network."""
        k, groups = min(k, self.factors.rank), self.factors.right.shape[0]
        gate = 0 if self.gate == "mean" else groups * k_gate * self.columns
        codes = k * (groups * self.columns + self.units)
        return experts * (codes + gate + (self.units if self.biases is not None else 0))


class Rewriting:
    """One graph on its way: the rest is set first, since differences are those from what the graph holds."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        computed: Computed,
        base: Mapping[str, Tensor],
        experts: Mapping[str, nn.Module],
        trunk: Sequence[str],
        rest: str,
    ) -> None:
        self.graph_module, self.computed, self.notes = graph_module, computed, list[str]()
        names = set(trunk)
        self.states = [
            {name: tensor for name, tensor in canonical_state(expert).items() if name in names}
            for expert in experts.values()
        ]
        stored = computed.values({})
        self.ops = {op.node: op for op in linear_ops(graph_module, computed) if _fits(op, stored[op.weight])}
        elsewhere = read_elsewhere(graph_module, computed, self.ops)
        own = canonical_state(graph_module)
        differing = [
            name
            for name in own
            if name in names
            and name in base
            and own[name].is_floating_point()
            and any(not torch.equal(state[name], base[name].to(state[name])) for state in self.states)
        ]
        read = {name for op in self.ops.values() for name in self._tensors(op)}
        self.skipped = {
            name: elsewhere.get(name, "no op") for name in differing if name not in read or name in elsewhere
        }
        order = {task: state for task, state in zip(experts, self.states, strict=True)}
        with torch.no_grad():
            for name, tensor in own.items():
                if name in names and name in base and tensor.is_floating_point():
                    tensor.copy_(base[name] if name not in self.skipped else _rest(name, base, order, rest))
        self.linked = _Links(graph_module, len(experts))
        self._whole: dict[fx.Node, fx.Node] = {}

    def layouts(self, inputs: Tensor) -> dict[fx.Node, Layout | None]:
        """Where images lie in what ops read."""
        return image_layouts(self.graph_module, inputs, [op.input for op in self.ops.values()])

    def plans(self, layouts: Mapping[fx.Node, Layout | None], gate: Choice, most: int | None) -> Iterator[Plan]:
        """All ops in whose weights or biases experts differ from the graph; of each ``most`` directions at most."""
        stored = self.computed.values({})
        values = [self.computed.values(state) for state in self.states]
        for op in self.ops.values():
            weight = stored[op.weight]
            deltas = torch.stack([_as_rows(each[op.weight] - weight, op) for each in values], 1)
            biases = None
            if op.bias is not None:
                biases = torch.stack([each[op.bias] - stored[op.bias] for each in values])
                biases = biases if bool(biases.any()) else None
            if biases is None and not bool(deltas.any()):
                continue
            factors, layout = Factors.of(deltas, most), layouts.get(op.input)
            chosen: Gate = gate
            if not factors.rank or factors.right.shape[3] < 2 or (layout is None and op.input in layouts):
                chosen = "mean"  # there is nothing to choose by
            elif layout is None and gate == "image":
                chosen = "token"
                self.notes.append(f"{op.node.name} chooses for each token: its input does not tell images apart")
            kernel = tuple(weight.shape[2:]) if op.is_convolution else ()
            tensors = tuple(sorted(self._tensors(op)))
            yield Plan(op, tensors, factors, biases, kernel, chosen, layout or Layout(), weight.dtype)

    def insert(self, plan: Plan, k: int, k_gate: int, top_k: int) -> Expertise:
        """Put experts beside an op."""
        op, graph = plan.op, self.graph_module.graph
        routed = Routed(
            plan.factors,
            plan.biases,
            k=k,
            k_gate=k_gate,
            gate=plan.gate,
            layout=plan.layout,
            ndim=len(_shape(op.input)),
            top_k=top_k,
            kernel=plan.kernel,
            settings=op.settings,
            dtype=plan.dtype,
        ).to(self.linked.device)
        path = self.linked.free_path(f"experts_{op.node.name}")
        self.graph_module.add_submodule(path, recorded(routed))
        images = self.linked.images() if plan.layout.windows and plan.gate == "image" else 0
        read = self._whole.get(op.input, op.input)  # of a linear op right before, its experts included
        with graph.inserting_before(op.node):
            added = graph.call_module(path, (read, self.linked.forced, self.linked.free, images))
        with graph.inserting_after(op.node):
            total = graph.call_function(torch.add, (op.node, added))
        self._whole[op.node] = total
        op.node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        gate = 0 if plan.gate == "mean" else k_gate
        return Expertise(op.node.name, plan.tensors, plan.units, plan.columns, k, gate, plan.gate)

    def connect(self) -> None:
        """Compile the graph."""
        self.graph_module.graph.lint()
        self.graph_module.recompile()

    def _tensors(self, op: LinearOp) -> set[str]:
        found: set[str] = set()
        for each in (op.weight, op.bias):
            if each is not None:
                found |= {each} if isinstance(each, str) else self.computed.behind[each]
        return found


class _Links:
    """What all experts read: which task is chosen from outside, by the argument :data:`TASK`, and the batch's size."""

    def __init__(self, graph_module: fx.GraphModule, experts: int) -> None:
        self.graph_module, self._images = graph_module, None
        like = next(parameter for parameter in graph_module.parameters() if parameter.is_floating_point())
        self.device = like.device
        numbers, ones = self.free_path("experts_numbers"), self.free_path("experts_ones")
        graph_module.register_buffer(numbers, torch.arange(experts, device=like.device))
        graph_module.register_buffer(ones, torch.ones(experts, dtype=like.dtype, device=like.device))
        graph = graph_module.graph
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        after = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(after):
            task = graph.placeholder(TASK, default_value=-1)
            chosen = graph.call_function(torch.eq, (graph.get_attr(numbers), task))
            self.forced = graph.call_function(torch.mul, (graph.get_attr(ones), chosen))
            self.free = graph.call_function(torch.rsub, (graph.call_method("sum", (self.forced,)), 1))
            self._last = self.free

    def images(self) -> fx.Node:
        """The number of images in the batch."""
        if self._images is None:
            with self.graph_module.graph.inserting_after(self._last):
                self._images = self.graph_module.graph.call_method("size", (self._inputs[0], 0))
        return self._images

    def free_path(self, wanted: str) -> str:
        """A name that nothing has."""
        path, number = wanted, 1
        while hasattr(self.graph_module, path):
            path, number = f"{wanted}_{number}", number + 1
        return path


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get(VALUE)
    return value.shape if isinstance(value, TensorValue) else ()


def _fits(op: LinearOp, weight: Tensor) -> bool:
    """Whether an op is one matrix for each group, and reads a batch."""
    ndim = len(_shape(op.input))
    return ndim == weight.ndim if op.is_convolution else weight.ndim == 2 and ndim > 1


def _as_rows(delta: Tensor, op: LinearOp) -> Tensor:
    """``(groups, units, columns)``."""
    if op.is_convolution:
        return delta.unflatten(0, (int(op.settings["groups"]), -1)).flatten(2)
    return (delta.T if op.turned else delta).unsqueeze(0)


def _rest(name: str, base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]], rest: str) -> Tensor:
    if rest == "base":
        return base[name]
    if rest != "mean":
        return states[rest][name]
    return torch.stack([state[name].to(torch.float64) for state in states.values()]).mean(0)

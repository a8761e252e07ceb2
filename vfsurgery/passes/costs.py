"""What a network costs, and what it costs more with a prefix of every source preserved.

FLOPs are torch's count (``torch.utils.flop_counter``, two per multiply-add; convolutions, matrix products and
attention) of one image on the network's own graph, run on shapes alone. A preserved node counts once per source, a
layer on the border as often, since it reads that many inputs; the mean of what crosses counts nothing. So the cost of
every boundary is known before any weights are touched. (Qu & Horvath, CPAL 2025, section 5.4, count pooling and
activations too, and put the mean before the next layer: a bias more per source.)
"""

from __future__ import annotations

import operator
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfsurgery.passes.cut import Cut
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.hooks import Hooks
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.transformers import one_by_one
from vfsurgery.tracing.unhooked import unwatched

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters of a network, and FLOPs for one image.

    >>> print(Cost(parameters=10, flops=12) / Cost(parameters=5, flops=10))
    flops x1.200, parameters x2.000
    """

    parameters: float
    flops: float

    def __truediv__(self, other: Cost) -> Cost:
        """The ratios; one to nothing is 1."""
        ratios = (
            mine / theirs if theirs else 1.0
            for mine, theirs in ((self.parameters, other.parameters), (self.flops, other.flops))
        )
        return Cost(*ratios)

    def __str__(self) -> str:
        if isinstance(self.flops, int):
            return f"{self.flops:,} flops, {self.parameters:,} parameters"
        return f"flops x{self.flops:.3f}, parameters x{self.parameters:.3f}"


def cost_of(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> Cost:
    """Count a network's parameters, and its FLOPs for one image in eval mode; it runs on shapes alone.

    Args:
        model: Any network. It is not changed.
        inputs: One tensor per argument of its forward, of any batch size; only shapes and dtypes matter.

    >>> import torch
    >>> print(cost_of(nn.Linear(4, 2), torch.zeros(8, 4)))
    16 flops, 10 parameters
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    onlookers = Hooks.seen(model, given).onlookers
    with unwatched(model, onlookers):
        images = _fewest(model, given)
        with _counting(model) as (mode, counter):
            model(*_part(given, images, mode))
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // images)


@contextmanager
def _counting(model: nn.Module) -> Generator[tuple[FakeTensorMode, FlopCounterMode]]:
    """FLOPs are counted and nothing is computed, in eval mode, by ops that have a count (fused attention has none)."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton's part of torch

    mode, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:  # the counter's hooks stumble over views of those
            parameter.requires_grad_(False)
        with borrowed(model, {}), eval_mode(model), one_by_one(), sdpa_kernel(SDPBackend.MATH), mode, counter:
            yield mode, counter
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _part(inputs: Iterable[Tensor], images: int, mode: FakeTensorMode) -> list[Tensor]:
    return [mode.from_tensor(tensor[:images] if tensor.ndim else tensor) for tensor in inputs]


def _fewest(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """One image, or all of the example where the model does not run on one, as when it folds frames into the batch."""
    images = len(inputs[0]) if inputs and inputs[0].ndim else 1
    if images > 1:
        try:
            with _counting(model) as (mode, _):
                model(*_part(inputs, 1, mode))
        except Exception:
            return images
    return 1


@dataclass(frozen=True)
class Ledger:
    """The cost of each node of a traced network, and from that the cost of any cut of it.

    ``parameters`` are numbers of entries by canonical name; ``reads`` are the names that a node reads.
    """

    graph_module: fx.GraphModule
    flops: Mapping[str, int]
    parameters: Mapping[str, int]
    reads: Mapping[str, frozenset[str]]

    @staticmethod
    def of(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Ledger:
        """Run one image through the graph on shapes alone."""
        images = _fewest(graph_module, inputs)
        with _counting(graph_module) as (mode, counter):
            run = _NodeFlops(graph_module, counter)
            run.run(*_part(inputs, images, mode))
        names = canonical_parameters(graph_module)
        sizes = {names[id(parameter)]: parameter.numel() for parameter in graph_module.parameters()}
        reads = {node.name: _reads(graph_module, node, names) for node in graph_module.graph.nodes}
        flops = {name: count // images for name, count in run.flops.items()}
        return Ledger(graph_module, flops, sizes, reads)

    def cost(self, cut: Cut, sources: int) -> Cost:
        """What the merged network costs if the cut's prefix is kept of so many sources."""
        repeated = cut.copied | cut.joined.keys()
        flops = sum(count * (sources if name in repeated else 1) for name, count in self.flops.items())
        kept = self._sizes(cut.copied)
        joined = sum(self.parameters.get(layer.weight, 0) for layer in cut.joined.values())
        return Cost(sources * kept + (sources - 1) * joined + self._sizes(self._rest(cut)), flops)

    def _sizes(self, nodes: Iterable[str]) -> int:
        """Entries of the parameters that nodes read, each counted once."""
        return sum(self.parameters.get(name, 0) for name in {name for node in nodes for name in self.reads[node]})

    def _rest(self, cut: Cut) -> set[str]:
        """The nodes of the merged rest: all that outputs depend on, up to where copies come in."""
        rest: set[str] = set()
        waiting = [node for node in self.graph_module.graph.nodes if node.name not in cut.copied]
        while waiting:
            node = waiting.pop()
            if node.name in rest:
                continue
            rest.add(node.name)
            enters = {node.args[0]} if node.name in cut.joined else set[Any]()
            stops = node.name in cut.sizes
            for before in node.all_input_nodes:
                if before.name not in cut.copied or not (stops or before.name in cut.averaged or before in enters):
                    waiting.append(before)
        return rest


class _NodeFlops(fx.Interpreter):
    """Counts the FLOPs of every node."""

    def __init__(self, graph_module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph_module)
        self.counter = counter
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops[n.name] = self.counter.get_total_flops() - before
        return value


def _reads(graph_module: fx.GraphModule, node: fx.Node, names: Mapping[int, str]) -> frozenset[str]:
    if node.op == "call_module":
        tensors = [*graph_module.get_submodule(str(node.target)).parameters()]
    elif node.op == "get_attr":
        tensors = [operator.attrgetter(str(node.target))(graph_module)]
    else:
        tensors = []
    return frozenset(names[id(tensor)] for tensor in tensors if id(tensor) in names)

"""Running a graph node by node over all images at once, so that a layer can be changed before the next one runs.

A pass over the data runs batch by batch through the whole graph; what is learnt about a layer comes too late for the
layers behind it. Here every node runs on all batches before the next node does. The price is memory: the values that
are still needed are kept for all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from vfsurgery.tracing.values import floats_per_image


class Lockstep:
    """One graph module on its way through its nodes, on all ``batches`` at once."""

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self._runner = fx.Interpreter(graph_module)
        self.batches = batches
        self._rest = iter(list(graph_module.graph.nodes))
        self._next = next(self._rest)
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]

    def run_before(self, name: str) -> fx.Node:
        """Run all nodes up to the one called ``name``, which is returned and runs next."""
        while self._next.name != name:
            self._run()
        return self._next

    def run_through(self, name: str) -> fx.Node:
        """Run all nodes up to the one called ``name``, and that one too."""
        node = self.run_before(name)
        self._run()
        return node

    def peek(self) -> None:
        """Run the node that comes next on all batches, and forget what it gives: for those who watch its calls."""
        for values, images in zip(self.values, self.batches, strict=True):
            self._runner.env, self._runner.args_iter = dict(values), iter((images,))
            self._runner.run_node(self._next)

    def of(self, node: fx.Node) -> Iterator[Tensor]:
        """The node's value on each batch."""
        for values in self.values:
            yield values[node]

    def _run(self) -> None:
        node, self._next = self._next, next(self._rest)
        for values, images in zip(self.values, self.batches, strict=True):
            self._runner.env, self._runner.args_iter = values, iter((images,))
            values[node] = self._runner.run_node(node)
            for done in self._runner.user_to_last_uses.get(node, ()):
                del values[done]


def live_bytes(graph_module: fx.GraphModule) -> int:
    """Bytes per image of the values that are needed at once when the graph runs node by node, at most.

    Counted from the shapes that tracing left behind, in float32.
    """
    nodes: list[fx.Node] = list(graph_module.graph.nodes)
    last_use = {source: place for place, node in enumerate(nodes) for source in node.all_input_nodes}
    sizes = {node: floats_per_image(node) for node in nodes}
    live = peak = 0
    ends: dict[int, list[fx.Node]] = {}
    for node, place in last_use.items():
        ends.setdefault(place, []).append(node)
    for place, node in enumerate(nodes):
        live += sizes[node]
        peak = max(peak, live)
        live -= sum(sizes[done] for done in ends.get(place, ()))
    return 4 * peak

"""Statistics of early layers without running the late ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from vfsurgery.stats.collect import INSIDE, Observer


class Prefix(Observer):
    """Runs a graph module up to the last watched node; a run gives nothing but what the callbacks see.

    All that comes before that node in the graph is run, needed or not: an op may write into its input unseen.
    """

    def __init__(self, graph_module: fx.GraphModule, watch: Mapping[str, Callable[[Tensor], Tensor | None]]) -> None:
        super().__init__(graph_module, watch)
        nodes = list(graph_module.graph.nodes)
        watched = {key.removesuffix(INSIDE) for key in watch}
        last = max((place for place, node in enumerate(nodes) if node.name in watched), default=-1)
        self._later = nodes[last + 1 :]

    def run(self, *args: Any, **options: Any) -> None:
        """Run the nodes before; an interpreter leaves out those whose value it is given."""
        super().run(*args, initial_env=dict.fromkeys(self._later), **options)
        self.env = {}  # later nodes would have freed these

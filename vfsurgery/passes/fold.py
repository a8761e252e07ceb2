"""Folding: absorb affine nodes into the layers before them, so that they cost nothing at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.passes.affine import Affine, absorb
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import find_producers


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Move every affine node that follows a producer into that producer's weight and bias."""

    name: ClassVar[str] = "fold"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all affine nodes, first to last.

        Raises:
            SurgeryError: an affine node follows something that cannot absorb it.
        """
        producers = {producer.node: producer for producer in find_producers(graph_module, context.groups)}
        for node in list(graph_module.graph.nodes):
            affine = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(affine, Affine):
                continue
            source: fx.Node = node.args[0]
            producer = producers.get(source.name)
            if producer is None or producer.inside:
                raise SurgeryError(
                    explain(
                        "an affine node does not follow a layer that can absorb it",
                        node=node.name,
                        after=f"{source.name} ({source.target})",
                        remedy="insert it right after a convolution, linear or normalization layer",
                    )
                )
            absorb(graph_module, producer, affine, context)
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            delattr(graph_module, str(node.target))
        return graph_module

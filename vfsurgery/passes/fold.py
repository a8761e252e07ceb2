"""Folding: absorb affine nodes into the layers before them, so that they cost nothing at inference.

``s * (W x + b) + t = (s W) x + (s b + t)`` per output unit. A weight that is zero stays zero. A missing bias counts as
zero and is created when a shift needs one; the report names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import Producer, find_producers
from vfsurgery.passes.renormalize import Affine


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
            if producer is None:
                raise SurgeryError(
                    explain(
                        "an affine node does not follow a layer that can absorb it",
                        node=node.name,
                        after=f"{source.name} ({source.target})",
                        remedy="insert it right after a convolution, linear or normalization layer",
                    )
                )
            context.folded.append((producer.weight, affine.scale, affine.shift))
            created = fold_affine(graph_module, producer, affine)
            if created is not None:
                context.created_biases.append(created)
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            delattr(graph_module, str(node.target))
        return graph_module


def fold_affine(graph_module: fx.GraphModule, producer: Producer, affine: Affine) -> str | None:
    """Fold one affine step; return the name of the bias that had to be created, if any."""
    weight = tensor_of(graph_module, producer.weight)
    shape = [1] * weight.ndim
    shape[producer.rows] = -1
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) * affine.scale.to(wide).view(shape))
    if producer.bias is not None:
        bias = tensor_of(graph_module, producer.bias)
        bias.copy_(bias.to(wide) * affine.scale.to(wide) + affine.shift.to(wide))
        return None
    if not bool(affine.shift.any()):
        return None
    owner = graph_module.get_submodule(producer.path)
    if not isinstance(owner, nn.Module) or "bias" not in owner._parameters:
        raise SurgeryError(
            explain(
                "a shift has nowhere to go: the layer takes no bias",
                layer=producer.path or producer.node,
                remedy="use renormalize='rescale', which needs no shift",
            )
        )
    owner.register_parameter("bias", nn.Parameter(affine.shift.to(weight.dtype), weight.requires_grad))
    return f"{producer.path}.bias"


def tensor_of(graph_module: fx.GraphModule, name: str) -> Tensor:
    """A parameter or buffer of a graph module by its name, detached: writes go into the module."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor.detach()

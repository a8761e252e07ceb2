"""A scale and a shift per unit: as a node behind a layer, and inside its weight and bias.

``s * (W x + b) + t = (s W) x + (s b + t)`` per output unit. A weight that is zero stays zero. A missing bias counts as
zero and is created when a shift needs one; the report names it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.passes.base import Context
from vfsurgery.passes.producers import Producer


class Affine(nn.Module):
    """``scale * x + shift`` per unit along ``dim``; what renormalization inserts and folding removes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift; shape and dtype of ``x`` are kept."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        wide = torch.promote_types(x.dtype, torch.float32)  # scales are float64: they would make all of x so
        scaled = x * self.scale.to(wide).view(shape)
        return scaled.add_(self.shift.to(wide).view(shape)).to(x.dtype)  # a second large tensor costs as much again


def insert_affine(graph_module: fx.GraphModule, node_name: str, affine: Affine) -> None:
    """Put an affine node after a node; all its users read the affine node instead."""
    node = next(node for node in graph_module.graph.nodes if node.name == node_name)
    path = f"{node_name}_affine"
    while hasattr(graph_module, path):
        path += "_"
    graph_module.add_submodule(path, affine)
    with graph_module.graph.inserting_after(node):
        inserted = graph_module.graph.call_module(path, (node,))
    inserted.meta = dict(node.meta)
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)


def absorb(graph_module: fx.GraphModule, producer: Producer, affine: Affine, context: Context) -> None:
    """Fold one affine step into a layer and tell the report."""
    context.folded.append((producer.weight, affine.scale, affine.shift))
    created = fold_affine(graph_module, producer, affine)
    if created is not None:
        context.created_biases.append(created)


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
    if not producer.takes_shift or not isinstance(owner, nn.Module) or "bias" not in owner._parameters:
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

"""The source models of a merge: read under canonical names, never changed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import copied, forget_kept
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.ops import canonical_parameters


@dataclass(frozen=True)
class Source:
    """A model with its trace, and its parameters and persistent buffers by canonical ``state_dict`` key."""

    model: nn.Module
    graph_module: fx.GraphModule
    state: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module, graph_module: fx.GraphModule) -> Source:
        """Read a traced model."""
        return Source(model, graph_module, canonical_state(model))

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return next(iter(self.state.values())).device

    def clone(self) -> Source:
        """A deep copy, with the graph over the copy's own tensors."""
        model = copied(self.model)
        return Source.of(model, put_over(model, self.graph_module))


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, detached, each once under its first ``state_dict`` key."""
    names = canonical_parameters(model)
    return {
        name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if names[id(tensor)] == name
    }


def write_into(model: nn.Module, other: nn.Module, created_biases: Sequence[str]) -> None:
    """Copy the values of ``other`` into the tensors of ``model``, which keep their storage; add created biases.

    What the model's forward has kept of its old weights is dropped.
    """
    for path in created_biases:
        owner, _, name = path.rpartition(".")
        bias = other.get_parameter(path)
        model.get_submodule(owner).register_parameter(name, nn.Parameter(bias.detach(), bias.requires_grad))
    state = canonical_state(other)
    for name, tensor in canonical_state(model).items():
        tensor.copy_(state[name])
    forget_kept(model, other)


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Generator[None]:
    """Put modules into eval mode without gradients, and give every submodule its own mode back at the end."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            set_mode(root, False)
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

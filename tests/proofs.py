"""What tests of coupling rules share: a network given as a function, and the proof of its groups in both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_nets import planted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize, relative_error
from vfsurgery.groups import GroupSet
from vfsurgery.tracing.values import tensors_of

EXACT = 1e-9
"""Relative error in float64."""


class Apply(nn.Module):
    """A forward given as a function of the module and its inputs; keyword arguments become submodules or tensors."""

    def __init__(self, function: Callable[..., Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def double(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in x)


def vivid(model: nn.Module) -> nn.Module:
    """A copy in float64 with random vectors and buffers."""
    model = copy.deepcopy(model).double().eval()
    randomize(model, torch.Generator().manual_seed(3))
    return model


def outputs(model: nn.Module, x: Sequence[Tensor], training: bool = False) -> tuple[Tensor, ...]:
    model = copy.deepcopy(model).train(training)
    with torch.no_grad():
        return tuple(tensors_of(model(*x)))


def proven(model: nn.Module, *x: Tensor, strict: bool = True) -> GroupSet:
    """The groups of a model without dropout: each is proven, and a planted order of all changes neither mode."""
    model, x = vivid(model), double(x)
    groups = surgery.find_groups(model, x, strict=strict)
    if groups.groups:
        verification = surgery.verify(model, groups, x)
        assert verification, f"{verification}\n{groups}"
        for training in (False, True):
            found = outputs(planted(model, groups), x, training)
            assert relative_error(found, outputs(model, x, training)) < EXACT, f"training={training}\n{groups}"
    return groups


def sizes(groups: GroupSet) -> list[int]:
    return sorted(group.size for group in groups)

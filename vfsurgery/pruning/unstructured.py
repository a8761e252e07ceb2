"""Pruners that look at the weights alone: the smallest ones go, or any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.pruning.base import PRUNERS, Pruner, Pruning, Scope


@PRUNERS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Pruner):
    """Keep the largest weights: saliency ``|w|`` (Han et al., 2015), of all layers together unless said otherwise.

    >>> import vfsurgery as surgery
    >>> net = torch.nn.Linear(4, 1)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.1, -3.0, 2.0, -0.2]]))
    >>> surgery.prune(net, 0.5, method="magnitude").weight.tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    name: ClassVar[str] = "magnitude"
    scope: ClassVar[Scope] = "global"

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """The absolute values."""
        for name, weight in work.weights.items():
            yield name, weight.detach().abs()


@PRUNERS.register("random")
@dataclass(frozen=True)
class Random(Pruner):
    """Keep any weights, each with the same chance: what every other method has to beat."""

    name: ClassVar[str] = "random"

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """Uniform random numbers, the same on every device."""
        for name, weight in work.weights.items():
            yield name, torch.rand(weight.shape, generator=work.generator).to(weight.device)

"""Wanda: weights count by what they carry on the data (Sun et al., A Simple and Effective Pruning Approach, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vfsurgery.pruning.base import PRUNERS, Pruner, Pruning, Scope
from vfsurgery.pruning.inputs import input_norms


@PRUNERS.register("wanda")
@dataclass(frozen=True)
class Wanda(Pruner):
    """Saliency ``|w_ij| ||x_j||_2``: a weight counts as much as its input does, compared within each output unit.

    ``x_j`` are all values that the weight meets on the data: of a convolution one per image and output pixel. The
    weights that are kept keep their values.

    >>> import torch, vfsurgery as surgery
    >>> net = torch.nn.Linear(3, 1)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> surgery.prune(net, 0.5, method="wanda", data=torch.tensor([[9.0, 1.0, 1.0]])).weight.tolist()
    [[1.0, 0.0, 3.0]]
    """

    name: ClassVar[str] = "wanda"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "row"

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """One pass over the data for all layers."""
        for name, norms in input_norms(work, "norms of inputs").items():
            weight, layout = work.weights[name].detach(), work.layouts[name]
            rows = layout.rows(weight.abs()).to(norms.dtype) * norms.unsqueeze(1)
            yield name, layout.weight(rows, weight.shape).float()

"""Gram matrices of what weights read, from the calls that use them.

A weight is used by a call as rows that each read the same columns: ``X`` has one row of columns for each place of the
output (image, token, pixel), and ``G = X^T X / places``. Hooks on modules would miss what is used as a function
(``F.linear(x, self.qkv.weight)``, the projections inside ``nn.MultiheadAttention``); the calls themselves do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.stats.inputs import Call, Layout, WeightCalls
from vfsurgery.stats.threads import threads
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.sources import Source, eval_mode

PLACES, LEAST_PLACES = 10, 20_000
"""Places of a convolution's output that are looked at for each column, and how many at least, where there are as many:
neighbours tell nearly the same."""


@dataclass
class Gram:
    """The sum of ``X^T X`` over ``places``, ``(groups, columns, columns)`` float64, and how rows read the columns."""

    layout: Layout
    total: Tensor
    places: int

    def mean(self, damping: float) -> Tensor:
        """``X^T X / places``, off-diagonals times ``damping``."""
        mean = self.total / max(self.places, 1)
        return mean * damping + torch.diag_embed((1 - damping) * mean.diagonal(dim1=-2, dim2=-1))


class Collected(dict[str, Gram]):
    """Gram matrices by name of the weight, from calls one after the other.

    Args:
        images: That are to come, which decides how many pixels of each are looked at.
        seed: Of which pixels.
    """

    def __init__(self, images: int, seed: int = 0) -> None:
        super().__init__()
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)

    def see(self, call: Call) -> None:
        """Add one call. A weight that is used in different ways is used as it was first."""
        earlier = self.get(call.name)
        if earlier is not None and earlier.layout != call.layout:
            return
        most = None
        if call.kernel:
            columns = call.columns(call.inputs[:1].to("meta")).shape[1]
            most = -(-max(PLACES * columns, LEAST_PLACES) // max(self._images, 1))
        found, places = call.second_moments(most, self._generator)
        if earlier is None:
            self[call.name] = Gram(call.layout, found.double(), places)
        else:
            earlier.total += found
            earlier.places += places


def collect(source: Source, names: Sequence[str], batches: Sequence[Tensor], seed: int = 0) -> Mapping[str, Gram]:
    """Gram matrices of what a model's weights read in its own forward, by name of those that a call shows.

    Args:
        source: A traced model, which runs in eval mode.
        names: Weights, by canonical name.
        batches: Images, ``(batch, channels, height, width)``.
        seed: Of which pixels of convolutions are looked at.

    >>> import vfsurgery as surgery
    >>> net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    >>> found = collect(Source.of(net, surgery.trace(net, x)), ["weight"], [x])["weight"]
    >>> torch.allclose(found.mean(1.0)[0].float(), x.T @ x / 5)
    True
    """
    found = Collected(sum(map(len, batches)), seed)
    with eval_mode(source.graph_module), threads(1), WeightCalls(weights_of(source, names), found.see, attention=True):
        for images in batches:
            source.graph_module(images)
    return found


def weights_of(source: Source, names: Sequence[str]) -> dict[str, Tensor]:
    """A model's parameters of these names, the tensors that its forward uses."""
    aliases = canonical_parameters(source.model)
    wanted = set(names)
    return {
        aliases[id(tensor)]: tensor
        for tensor in source.graph_module.parameters()
        if aliases.get(id(tensor)) in wanted and tensor.ndim > 1
    }

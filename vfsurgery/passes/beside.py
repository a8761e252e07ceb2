"""A reference that runs beside the model which is to have its statistics, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from vfsurgery.stats.collect import Observer, Site, moments_watch
from vfsurgery.stats.moments import Moments
from vfsurgery.stats.precision import taken_by


@dataclass(frozen=True)
class Beside:
    """A reference, and where in it the units of the model's layers are read: by the name of the model's node.

    The model's own batch, corrected to what the reference does on *this* batch, flows on as it will under the final
    correction: what a few images have by chance, both have. So few images and small batches suffice, and a model that
    is its own reference stays what it is.
    """

    graph_module: fx.GraphModule
    sites: Mapping[str, Site]

    def moments(self, images: Tensor) -> dict[str, Moments]:
        """Run the reference on one batch: moments of its units, by the name of the model's node."""
        found: dict[str, Moments] = {}
        Observer(self.graph_module, moments_watch(self.sites, found)).run(taken_by(self.graph_module, images))
        return found

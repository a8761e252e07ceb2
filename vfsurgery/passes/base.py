"""A pass is one step of surgery.

A :class:`Pass` may edit the graph module it is handed and the tensors in it; whoever calls it has made the copy (or the
user asked for surgery in place). Before and after a pass the graph is valid; in between it need not be. What a pass
declares about itself is held against what it does: see :mod:`vfsurgery.passes.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.data.batches import Batches
from vfsurgery.data.progress import progress
from vfsurgery.discovery.maps import Order
from vfsurgery.errors import DataError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.beside import Beside
from vfsurgery.stats.collect import Site, Survey
from vfsurgery.tracing.sources import Source


class Pass:
    """One step of surgery: subclass it as a frozen dataclass whose fields are its options.

    What a subclass may declare, as class attributes or as arguments of :func:`~vfsurgery.register_pass`:

    - ``name``: what users call it by, and what reports call it;
    - ``preserves_function``: the network computes after it what it computed before; measured on the example inputs
      every time it runs, and refused with a :class:`~vfsurgery.errors.CertificateError` if it is not so;
    - ``needs_data``, ``needs_sources``: it is not run without calibration data, or without source models;
    - ``after``, ``before``: names of passes that must come earlier or later where they are in the same list;
    - ``after_merge``: whether ``merge(renormalize=...)`` may run it on the merged model.
    """

    name: ClassVar[str]
    preserves_function: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    needs_sources: ClassVar[bool] = False
    after_merge: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    fills_zeros: ClassVar[bool] = False
    """Whether it gives values to weights that are zero, which undoes pruning."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Do the step and return the graph module, the same one or another."""
        raise TypeError(f"{type(self).__name__} has no run method")

    def reads(self, graph_module: fx.GraphModule, groups: GroupSet) -> Mapping[str, Site]:
        """Where the step needs the moments of every source, by name; they come with the one pass over the data."""
        return {}

    def applies(self, graph_module: fx.GraphModule, groups: GroupSet) -> bool:
        """Whether the step finds anything to do in a network; ``renormalize="auto"`` chooses none that does not."""
        return True

    def holds_out(self) -> bool:
        """Whether the step makes a choice on images that no statistic may see; every fifth one is then held out."""
        return False


@dataclass
class Context:
    """What passes may look at while they run, and where they leave what they found.

    ``groups`` are the permutation groups of the model. ``sources`` are the models that it came from, each with its
    trace (``graph_module``) and its tensors (``state``); ``weights`` are their shares over all and sum to one,
    ``weights_of(name)`` those in one parameter, and ``permutations`` holds for every source the order (or map) of its
    units by group name, usually none for the first. ``survey()`` has the statistics of the sources that the passes
    announced to read. ``data`` are the calibration images, read through ``images()``; where a step holds images out,
    ``data`` is without them. ``inputs`` are what the model was traced with. Random numbers come from ``generator()``
    alone.

    Passes append to ``notes`` sentences for the report, and to ``created_biases`` the names of parameters that they
    gave a layer beyond those of its class. ``errors`` has what the pipeline measured: passes that preserve the
    function, each with the relative error of the outputs. ``restructured`` is set where the model's own forward cannot
    follow what passes did to the graph.

    ``own`` are the images of each source, where they were given apart; ``data`` are then those of all.

    ``beside`` is there where the model has one reference that need not be of its architecture: then only layers with a
    partner there are corrected. ``folded`` has the weights that something was folded into, in order, with the scales
    and shifts.
    """

    groups: GroupSet
    sources: Sequence[Source]
    weights: Sequence[float]
    permutations: Sequence[Mapping[str, Order]]
    survey: Callable[[], Survey]
    data: Batches | None = None
    progress: bool = True
    notes: list[str] = field(default_factory=list[str])
    created_biases: list[str] = field(default_factory=list[str])
    held_out: Batches | None = None
    inputs: tuple[Tensor, ...] = ()
    seed: int = 0
    errors: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    restructured: bool = False
    beside: Beside | None = None
    folded: list[tuple[str, Tensor, Tensor]] = field(default_factory=list[tuple[str, Tensor, Tensor]])
    layer_weights: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    own: Sequence[Batches] = ()

    def weights_of(self, name: str) -> Sequence[float]:
        """The sources' shares in one parameter or buffer, and in the units that a weight of this name makes."""
        return self.layer_weights.get(name, self.weights)

    def generator(self) -> torch.Generator:
        """A fresh generator, seeded as the user said; torch's global random state is not for passes."""
        return torch.Generator().manual_seed(self.seed)

    def images(self, label: str) -> Iterator[Tensor]:
        """One pass over the calibration images, with a progress bar."""
        return calibration_images(self.data, label, self.progress)

    def images_of(self, source: int, label: str) -> Iterator[Tensor]:
        """One pass over the images of one source, with a progress bar; all have the same if none were given apart."""
        return calibration_images(self.own[source] if self.own else self.data, label, self.progress)

    def held_out_images(self, label: str) -> Iterator[Tensor]:
        """One pass over the held-out images, with a progress bar."""
        return calibration_images(self.held_out, label, self.progress)


def calibration_images(data: Batches | None, label: str, show: bool) -> Iterator[Tensor]:
    """One pass over calibration images, with a progress bar.

    Raises:
        DataError: there is no data.
    """
    if data is None:
        raise DataError(explain(f"{label} needs calibration data", remedy="pass data=, any iterable of images"))
    for images, _ in progress(data, label, data.length(), show):
        yield images

"""A pass is one step of surgery, a pipeline runs passes in order.

A :class:`Pass` may edit the graph module it is handed and the tensors in it; whoever calls it has made the copy (or the
user asked for surgery in place). Before and after a pass the graph is valid; in between it need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.batches import Batches, progress
from vfsurgery.errors import DataError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.maps import Order
from vfsurgery.passes.beside import Beside
from vfsurgery.sources import Source
from vfsurgery.stats.collect import Site, Survey


class Pass:
    """One step of surgery: subclass it as a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    preserves_function: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    fills_zeros: ClassVar[bool] = False
    """Whether it gives values to weights that are zero, which undoes pruning."""

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Do the step and return the graph module, the same one or another."""
        raise TypeError(f"{type(self).__name__} has no run method")

    def reads(self, graph_module: fx.GraphModule, groups: GroupSet) -> Mapping[str, Site]:
        """Where the step needs the moments of every source, by name; they come with the one pass over the data."""
        return {}

    def holds_out(self) -> bool:
        """Whether the step makes a choice on images that no statistic may see; every fifth one is then held out."""
        return False


@dataclass
class Context:
    """What passes may look at while a merge runs, and where they leave what they found.

    ``weights`` are the sources' shares and sum to one. ``permutations`` holds for every source the order (or map) of
    its units by group name, usually none for the first. ``survey()`` has the statistics that the passes announced to
    read. ``notes`` are sentences for the report. Where a step holds images out, ``data`` is without them. ``beside`` is
    there where the model has one reference that need not be of its architecture: then only layers with a partner there
    are corrected. ``folded`` has the weights that something was folded into, in order, with the scales and shifts.
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
    beside: Beside | None = None
    folded: list[tuple[str, Tensor, Tensor]] = field(default_factory=list[tuple[str, Tensor, Tensor]])

    def images(self, label: str) -> Iterator[Tensor]:
        """One pass over the calibration images, with a progress bar."""
        return calibration_images(self.data, label, self.progress)

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


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; after each the graph is linted and recompiled, and ``observer`` sees what happened.

    The observer is called with (previous pass or ``None``, graph module, next pass or ``None``).
    """

    passes: tuple[Pass, ...]
    observer: Callable[[Pass | None, fx.GraphModule, Pass | None], None] = lambda previous, module, following: None

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Run all passes on ``graph_module``, which is edited."""
        previous: Pass | None = None
        for step in self.passes:
            self.observer(previous, graph_module, step)
            with torch.no_grad():
                graph_module = step.run(graph_module, context)
            graph_module.graph.lint()
            graph_module.recompile()
            previous = step
        self.observer(previous, graph_module, None)
        return graph_module

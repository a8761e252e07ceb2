"""What a pruner is, and what it is given.

A :class:`Pruner` says how much each entry of each weight counts (its saliency, in :meth:`Pruner.score`), and may give
the entries that are kept new values (:meth:`Pruner.update`). How many are kept, over which entries they compete and in
what pattern is decided for all pruners alike by :mod:`vfsurgery.pruning.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches
from vfsurgery.data.progress import progress
from vfsurgery.errors import DataError, explain
from vfsurgery.pruning.masks import Masks
from vfsurgery.registry import Registry
from vfsurgery.stats.inputs import Layout

Scope: TypeAlias = Literal["global", "layer", "row"]
"""Among which entries the most salient ones are kept: of all layers, of each layer, of each output unit."""

Pattern: TypeAlias = tuple[int, int]
"""``(2, 4)``: of every 4 consecutive inputs of a unit, 2 are kept."""


@dataclass
class Pruning:
    """All that a pruner may look at while one model is pruned, and where it leaves what it found.

    Gradients are off and the model is in eval mode; ``with torch.enable_grad():`` where a pruner needs them.

    Attributes:
        model: A private copy of the user's model, in eval mode, on the user's device. Its weights have their old values
            until :meth:`Pruner.update` is through.
        weights: The parameters of that copy that are to be pruned, by state-dict name; the pruner decides about these
            alone. Excluded layers are not among them, nor those whose sparsity is zero. Entries that are zero already
            stay so, whatever a pruner says.
        layouts: How each of these weights is arranged, by the same name: which entries belong to one output unit.
        data: The calibration data, if there is any, on the model's device and in its dtype; see :meth:`images`.
        generator: The only source of randomness; lives on the CPU, so that all devices prune alike.
        scope: Among which entries those compete that are kept.
        pattern: ``(N, M)`` if N of every M consecutive inputs are kept, whatever the scope.
        memory: GiB that a pruner's statistics may take.
        notes: Sentences for the report.
        dense: Weights that the pruner cannot judge, with the reason; :meth:`Pruner.score` leaves them out.
        cache: What :meth:`Pruner.score` wants to find again in :meth:`Pruner.update`.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    layouts: Mapping[str, Layout]
    data: Batches | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    scope: Scope = "layer"
    pattern: Pattern | None = None
    memory: float = 2.0
    progress: bool = True
    notes: list[str] = field(default_factory=list[str])
    dense: dict[str, str] = field(default_factory=dict[str, str])
    cache: dict[str, Any] = field(default_factory=dict[str, Any])

    def images(self, label: str, most: int | None = None) -> Iterator[Tensor]:
        """One pass over the calibration images, ``(batch, channels, height, width)``.

        Args:
            label: What the bar says if the pass lasts over a second.
            most: Stop after so many images; where the data tells its number of batches, take as many from each.

        Raises:
            DataError: there is no data, or what there is cannot be read.
        """
        for images, _ in self.labelled(label, most):
            yield images

    def labelled(self, label: str, most: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As :meth:`images`, each batch with its labels; ``None`` where the data has no labels."""
        if self.data is None:
            raise DataError(explain(f"{label} needs data", remedy="pass data=, some hundred images"))
        length, seen = self.data.length(), 0
        share = most if most is None or not length else -(-most // length)  # of each batch
        for images, labels in progress(self.data, label, length, self.progress):
            count = len(images) if most is None or share is None else min(share, most - seen)
            yield images[:count], labels if labels is None else labels[:count]
            seen += min(count, len(images))
            if most is not None and seen >= most:
                return


class Pruner:
    """How salient each entry of each weight is: subclass it as a frozen dataclass whose fields are its options.

    Attributes:
        name: Short name for reports, and under which ``@PRUNERS.register`` has it.
        needs_data: Whether it reads :meth:`Pruning.images` or :meth:`Pruning.labelled`.
        scope: Among which entries those compete that are kept, unless the user says.
        rechooses: Whether :meth:`update` may keep other entries than the masks say, as many in every layer at most.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    scope: ClassVar[Scope] = "layer"
    rechooses: ClassVar[bool] = False

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """Name and saliency of one weight of ``work.weights`` after the other; entries with higher ones are kept.

        Saliencies have the weight's shape and any floating dtype. They are compared within ``work.scope``. A weight
        that is not yielded stays dense; ``work.dense[name] = "..."`` says why.
        """
        raise TypeError(f"{type(self).__name__} has no score method")

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        """Name and new values of one weight after the other, zero where its mask is false.

        By default, and for a weight that is not yielded, what is kept stays as it is.
        """
        return iter(())


PRUNERS: Registry[Callable[[], Pruner]] = Registry("pruning method")
"""Pruners by name; a class or function that makes one."""

"""AdaMerging as a method of ``multitask``: its options, and the trunk that is learned put into the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import Combiner
from vfsurgery.data.batches import Data
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.merging.multitask.adamerging import Objective, adapt
from vfsurgery.merging.multitask.adapted import Adapted
from vfsurgery.merging.multitask.joined import Multitask
from vfsurgery.merging.multitask.vectors import Grouping
from vfsurgery.tracing.sources import canonical_state

NAME = "adamerging"


@dataclass(frozen=True)
class AdaMerging:
    """Learn on images of each task how much of its expert goes into each part of the trunk (Yang et al., 2024).

    Options are those of :func:`~vfsurgery.merging.multitask.adamerging.adapt`, which says what they mean.

    >>> AdaMerging(by="block", steps=50).start
    0.3
    """

    by: Grouping = "tensor"
    objective: Objective = "experts"
    plus: bool = False
    start: float = 0.3
    steps: int = 100
    lr: float = 5e-3
    clamp: tuple[float, float] | None = None
    batch_size: int = 16
    images: int = 1024
    held_out: float = 0.2
    patience: int = 5


def learning_of(method: str | Combiner | AdaMerging, base: object, data: object, scale: object) -> AdaMerging | None:
    """What is to be learned, if anything is.

    Raises:
        OptionError: it needs a base, or what it decides itself was given.
        DataError: it needs images.
    """
    if not (method == NAME or isinstance(method, AdaMerging)):
        return None
    if base is None or isinstance(base, str):
        remedy = "base=, the checkpoint that all were fine-tuned from; for different seeds another method"
        raise OptionError(explain(f"{NAME} needs a base", remedy=remedy))
    if scale is not None:
        raise OptionError(explain(f"{NAME} learns scales itself", remedy="leave scale= out; or AdaMerging(start=)"))
    if data is None:
        raise DataError(explain(f"{NAME} learns on images", remedy="data={task: images, ...}; they need no labels"))
    return method if isinstance(method, AdaMerging) else AdaMerging()


def learn(
    method: AdaMerging,
    result: Multitask,
    base: Mapping[str, Tensor],
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
    seed: int,
    progress: bool,
) -> Adapted:
    """Learn the trunk of a network from that of its start, and put it into the network.

    Args:
        method: With its options.
        result: The network at the start; its trunk is written.
        base: Tensors of the base by the names of the trunk.
        experts: By task; they stay as they are.
        data: By task, images.
        seed: Of the order of images.
        progress: Whether to show a bar.

    Raises:
        OptionError: an option is out of its range.
        DataError: too few images.
    """
    state = canonical_state(result.network)
    first = next(iter(experts))
    trunk = [name for name in canonical_state(experts[first]) if name not in result.places.names(first)]
    found = adapt(base, experts, trunk, data, seed=seed, progress=progress, **asdict(method))
    with torch.no_grad():
        for name in (name for names in found.members.values() for name in names):  # running statistics come later
            state[name].copy_(found.tensors[name])
    return found

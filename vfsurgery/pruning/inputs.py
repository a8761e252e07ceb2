"""What the weights of each layer read on the data: norms of inputs, and their second moments."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vfsurgery.errors import DataError, explain
from vfsurgery.pruning.base import Pruning
from vfsurgery.stats.inputs import Call, WeightCalls

UNSEEN = "no convolution or linear call on the data uses it as it is"
"""Why a pruner that needs inputs cannot judge a weight: fused attention, a weight standardized on the fly, ..."""


@contextmanager
def watched(work: Pruning, names: Sequence[str], see: Callable[[Call], None]) -> Generator[None]:
    """Show the uses of these weights to ``see``; what the network cannot compute is said to be the data's fault.

    Raises:
        DataError: the network cannot take the images.
    """

    def see_own(call: Call) -> None:
        if call.layout == work.layouts[call.name]:  # else it is used against its module's own settings
            see(call)

    try:
        with WeightCalls({name: work.weights[name] for name in names}, see_own):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        network, cause = type(work.model).__name__, str(error).split("\n")[0]
        raise DataError(explain(f"{network} cannot take these images", cause=cause)) from error


def input_norms(work: Pruning, label: str) -> dict[str, Tensor]:
    """``||x_j||_2`` of each input of each weight over all data, ``(groups, columns)`` float64; one pass.

    Weights that no call uses are left out, and are noted in ``work.dense``.
    """
    sums: dict[str, Tensor] = {}

    def see(call: Call) -> None:
        found = call.square_sums()
        sums[call.name] = sums[call.name] + found if call.name in sums else found

    for images in work.images(label):
        with watched(work, list(work.weights), see):
            work.model(images)
    _note_unseen(work, list(work.weights), sums)
    return {name: sums[name].sqrt() for name in work.weights if name in sums}


def second_moments(work: Pruning, label: str, names: Sequence[str], most: int | None) -> dict[str, Tensor]:
    """``X X^T`` of the inputs of these weights per image, ``(groups, columns, columns)``; one pass over the data.

    Weights that no call uses are left out, and are noted in ``work.dense``.
    """
    sums: dict[str, Tensor] = {}
    seen = 0

    def see(call: Call) -> None:
        found, _ = call.second_moments()
        sums[call.name] = sums[call.name].add_(found) if call.name in sums else found

    for images in work.images(label, most):
        with watched(work, names, see):
            work.model(images)
        seen += len(images)
    _note_unseen(work, names, sums)
    return {name: sums[name].div_(seen) for name in names if name in sums}


def _note_unseen(work: Pruning, names: Sequence[str], seen: Mapping[str, Tensor]) -> None:
    work.dense.update({name: UNSEEN for name in names if name not in seen})


def in_parts(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, as many together as have at most ``limit`` in sum; a larger one stands alone.

    >>> list(in_parts({"a": 2, "b": 2, "c": 5, "d": 1}, 4))
    [['a', 'b'], ['c'], ['d']]
    """
    part: list[str] = []
    for name, size in sizes.items():
        if part and sum(sizes[other] for other in part) + size > limit:
            yield part
            part = []
        part.append(name)
    if part:
        yield part

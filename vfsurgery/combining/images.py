"""What methods that look at data have in common: so many images of each source, and weights that can be shares."""

from __future__ import annotations

from torch import Tensor

from vfsurgery.combining.arithmetic import weighted_sum
from vfsurgery.combining.base import Entry, Problem
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.stats.precision import taken_by


def first_images(problem: Problem, source: int, most: int) -> list[Tensor]:
    """The first ``most`` images of a source, in batches, as its model takes them.

    Raises:
        DataError: there is none.
    """
    traced = problem.traced[source]
    batches: list[Tensor] = []
    left = most
    for images in problem.images_of(source):
        if left <= 0:
            break
        batches.append(taken_by(traced.graph_module, images[:left]).to(traced.device))
        left -= len(batches[-1])
    if not any(map(len, batches)):
        raise DataError(explain(f"there is no image for source {source}", remedy="data= some images of each task"))
    return batches


def weighted_mean(entry: Entry) -> Tensor:
    """The mean of the sources' task vectors, each as much as its weight says."""
    return weighted_sum(entry).div_(sum(entry.weights))


def positive_weights(method: str, entry: Entry | None) -> None:
    """Refuse weights that are no shares.

    Raises:
        OptionError: one is negative, or all are zero.
    """
    if entry is not None and (min(entry.weights) < 0 or not any(entry.weights)):
        raise OptionError(
            explain(
                f"{method} averages, so weights must not be negative, and not all zero",
                weights=list(entry.weights),
                remedy="combine='task-arithmetic' takes tasks away",
            )
        )

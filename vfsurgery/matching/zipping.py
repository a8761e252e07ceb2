"""Greedy many-to-one matching of the units of several sources, within sources as well as across them.

A permutation must pair every unit of a with some unit of b, however little they have in common, and may not join two
units of a that do the same. Zipping does neither: all units of all sources are put into ``units`` clusters, the most
similar first, and each cluster becomes one unit of the merged model, the mean of its members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vfsurgery.errors import InvalidWeightsError, OptionError, explain

Matrix = npt.NDArray[np.float64]
FORBIDDEN = -math.inf
PATIENCE = 64
"""Rows searched one by one for a merge before all that may be the best are searched at once."""
BLOCK = 64
"""Columns that share a bound, about the square root of their number."""


@dataclass(frozen=True)
class Zip:
    """Which units of which sources become one: ``merged = 1/N sum_i merge_i @ y_i`` and ``y_i ~ unmerge_i @ merged``.

    Validated when made: every joint index ``source * units + unit`` lies in exactly one cluster.

    Attributes:
        clusters: for each of the ``units`` merged units the joint indices of its members, ascending.
        total: similarity of the merges made, each as it stood when its turn came, summed.
        forced: merges among them for which the restrictions of :func:`zip_units` had to be lifted.

    Raises:
        OptionError: the clusters are not a partition, or their number does not divide that of the joint indices.

    >>> both = Zip(((0, 3), (1, 2)))
    >>> both.merge(1)
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """

    clusters: tuple[tuple[int, ...], ...]
    total: float = 0.0
    forced: int = 0

    def __post_init__(self) -> None:
        members = sorted(member for cluster in self.clusters for member in cluster)
        ordered = all(cluster and list(cluster) == sorted(cluster) for cluster in self.clusters)
        if not members or not ordered or members != list(range(len(members))) or len(members) % len(self.clusters):
            raise OptionError(
                explain(
                    f"{len(self.clusters)} clusters of {len(members)} members are not a zip",
                    remedy="list each index source * units + unit once, in clusters that ascend, one cluster per unit",
                )
            )

    @property
    def units(self) -> int:
        """Units of each source and of the merged model."""
        return len(self.clusters)

    @cached_property
    def sources(self) -> int:
        """Number of sources, ``N``."""
        return sum(map(len, self.clusters)) // self.units

    def merge(self, source: int) -> Tensor:
        """Return ``N / len(cluster)`` where a unit of a source (column) lies in a cluster (row), 0 elsewhere.

        Averaged over the sources with equal weights, as any merge averages, a merged unit is the mean of its members.

        Returns:
            float64, ``(units, units)``, on the host.

        Raises:
            OptionError: there is no such source.
        """
        sizes = torch.tensor([len(cluster) for cluster in self.clusters], dtype=torch.float64)
        return self.unmerge(source).T * (self.sources / sizes)[:, None]

    def unmerge(self, source: int) -> Tensor:
        """Return 1 where a unit of a source (row) lies in a cluster (column), 0 elsewhere.

        It hands every unit the mean of its cluster: ``1/N sum_i merge_i @ unmerge_i`` is the identity.

        Returns:
            float64, ``(units, units)``, on the host.

        Raises:
            OptionError: there is no such source.
        """
        if not 0 <= source < self.sources:
            raise OptionError(
                explain(f"no source {source} in a zip of {self.sources}", remedy=f"name one of 0 to {self.sources - 1}")
            )
        first = source * self.units
        places = [
            (member - first, place)
            for place, cluster in enumerate(self.clusters)
            for member in cluster
            if first <= member < first + self.units
        ]
        matrix = torch.zeros(self.units, self.units, dtype=torch.float64)
        matrix[tuple(torch.tensor(places).T)] = 1.0
        return matrix


def zip_units(similarity: Tensor, sources: int, *, alpha: float = 0.3, beta: float = 0.125) -> Zip:
    """Merge the most similar pair of clusters until as many are left as one source has units.

    ZipIt! (Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", 2023), greedy. Each unit
    starts as a cluster. Of the most similar pair i < j, cluster j is merged into i. Any other cluster is as similar to
    the union as to the less similar of both, times ``alpha``::

        s[i, k] = alpha * min(s[i, k], s[j, k])

    Equally similar pairs come in the order of (i, j). A cluster belongs to the source of its first unit, i, whatever it
    has taken in since. A merge of two clusters of one source uses up one of its ``int((N * d - d) // N * beta)`` merges
    within (d units, N sources); after it, if none is left, all pairs within that source are forbidden, so that even
    ``beta=0`` lets one happen.

    From three sources on, the restrictions can forbid every pair before ``units`` clusters are left, and often do where
    ``alpha`` or ``beta`` is small. The published rule has no answer. Here the remaining merges follow the same rule
    without restrictions, from the least similarity between members of two clusters. :attr:`Zip.forced` counts them.

    Takes O(n^2) time for n joint units as a rule, O(n^2.5) at worst (if one unit after the other is the best partner of
    all), and one float64 copy of the matrix on the host.

    Args:
        similarity: correlation of all units of all sources with each other, ``(sources * units, sources * units)``,
            source by source, any float dtype and device. Symmetric; only entries above the diagonal are compared.
        sources: number of sources, ``N``.
        alpha: what is kept of the similarity of a merged cluster, at most 1. With 0 or less a merged cluster may not be
            merged again with any that belongs to either's source.
        beta: share of merges that may be within a source, 0 to 1.

    Returns:
        Clusters with a unit of source 0 stand in the place of their first one, the others in the places left, in the
        order of their first units: identical sources give the identity.

    Raises:
        InvalidWeightsError: a similarity is NaN or infinite.
        OptionError: the matrix is not square, not divisible among the sources, or an option is out of its range.

    >>> rows = [1.0, 0.2, 0.1, 0.9], [0.2, 1.0, 0.3, 0.4], [0.1, 0.3, 1.0, 0.2], [0.9, 0.4, 0.2, 1.0]
    >>> zip_units(torch.tensor(rows), sources=2).clusters
    ((0, 3), (1, 2))
    """
    _check_options(similarity, sources, alpha, beta)
    joint = len(similarity)
    units = joint // sources
    budget = int((joint - units) // sources * beta)
    search = _Search(_on_host(similarity), np.repeat(np.arange(sources), units), alpha, budget)
    clusters, total = search.reduce(units)
    forced = len(clusters) - units
    if forced:
        del search  # its matrix, before the next copy is made
        lifted = _least(_on_host(similarity), clusters)
        unions, more = _Search(lifted, np.arange(len(clusters)), alpha, budget).reduce(units)
        clusters = [[member for index in union for member in clusters[index]] for union in unions]
        total += more
    return Zip(_in_place(clusters, units), total, forced)


def _check_options(similarity: Tensor, sources: int, alpha: float, beta: float) -> None:
    shape = tuple(similarity.shape)
    if len(shape) != 2 or shape[0] != shape[1] or sources < 1 or not shape[0] or shape[0] % sources:
        raise OptionError(
            explain(
                f"similarities of {shape} are not those of {sources} sources among each other",
                remedy="pass a square matrix of sources * units rows, source by source",
            )
        )
    if not (math.isfinite(alpha) and alpha <= 1):
        raise OptionError(explain(f"alpha is {alpha}", remedy="pass a number of at most 1, as in alpha=0.3"))
    if not 0 <= beta <= 1:
        raise OptionError(explain(f"beta is {beta}", remedy="pass a number from 0 to 1, as in beta=0.125"))


def _on_host(similarity: Tensor) -> Matrix:
    """A copy that may be written to, row after row in memory."""
    host = similarity.detach().to("cpu", torch.float64, copy=True, memory_format=torch.contiguous_format)
    matrix: Matrix = host.numpy()
    if not (np.isfinite(matrix.min()) and np.isfinite(matrix.max())):
        row, column = np.argwhere(~np.isfinite(matrix))[0].tolist()
        raise InvalidWeightsError(
            explain(
                f"a similarity matrix of {matrix.shape} holds {matrix[row, column]}, first at ({row}, {column})",
                remedy="look for NaN or infinite weights, images or activations; a constant unit has similarity 0",
            )
        )
    return matrix


class _Search:
    """Clusters that are merged greedily, and for each the best partner among those after it.

    ``matrix[i, j]`` is the similarity of clusters i < j; what lies below the diagonal counts for nothing. Finding the
    best pair anew costs O(n^2). But a merge into i changes only pairs with i and j, so most rows keep their best. A row
    that loses it is marked stale and not searched at once: what it had bounds from above what it has. Only a stale row
    that comes to the top is searched again, one or two per merge as a rule. Where a pair with i gains, as negative
    similarities do times alpha, the bound is raised.

    If many rows lose the same best partner again and again, even that is O(n) searches per merge. So after some of them
    the columns are divided into blocks, each with a bound of its own in every row. A merge spoils two blocks of a row,
    and the others need not be looked through.
    """

    def __init__(self, matrix: Matrix, origins: npt.NDArray[np.intp], alpha: float, budget: int) -> None:
        size = len(matrix)
        self.matrix = matrix
        self.origins = origins  # the source that a cluster belongs to
        self.alpha = alpha
        self.budgets = [budget] * (int(origins.max()) + 1)
        self.clusters = {index: [index] for index in range(size)}
        self.best = np.full(size, FORBIDDEN)  # of the similarities right of the diagonal, or a bound if stale
        self.partner = np.zeros(size, dtype=np.intp)  # the first column that has it
        self.stale = np.zeros(size, dtype=np.bool_)
        self.starts = np.arange(0, size, BLOCK)  # of blocks of columns
        self.bounds = np.empty((0, len(self.starts)))  # of every row's similarities in each block, once they are needed
        for row in range(size - 1):
            self._search_row(row)

    def reduce(self, count: int) -> tuple[list[list[int]], float]:
        """Merge until ``count`` clusters are left or no pair is allowed; return clusters and summed similarity."""
        total = 0.0
        while len(self.clusters) > count:
            i = self._top()
            if self.best[i] == FORBIDDEN:
                break
            total += float(self.best[i])
            self._merge(i, int(self.partner[i]))
        return list(self.clusters.values()), total

    def _top(self) -> int:
        """The first row with the largest similarity; stale ones are searched, since they may not have it any more."""
        for _ in range(PATIENCE):
            row = int(self.best.argmax())
            if not self.stale[row]:
                return row
            self._search_row(row)
        known = self.best[~self.stale].max(initial=FORBIDDEN)
        self._search_rows(np.flatnonzero(self.stale & (self.best >= known)))
        return int(self.best.argmax())

    def _search_row(self, row: int) -> None:
        self._set_row(row, self.matrix[row, row + 1 :])

    def _search_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Search many rows at once, by the bounds of their blocks: in each the highest, until one is attained."""
        if not self.bounds.size:
            for row in range(len(self.matrix)):
                self.matrix[row, : row + 1] = FORBIDDEN
            self.bounds = np.maximum.reduceat(self.matrix, self.starts, axis=1)
        while rows.size:
            block = self.bounds[rows].argmax(axis=1)
            columns = np.minimum(self.starts[block, None] + np.arange(BLOCK), len(self.matrix) - 1)
            similar = self.matrix[rows[:, None], columns]
            first = similar.argmax(axis=1)[:, None]
            best = np.take_along_axis(similar, first, axis=1)[:, 0]
            column = np.take_along_axis(columns, first, axis=1)[:, 0]
            attained = best == self.bounds[rows, block]
            self.bounds[rows, block] = best
            done = rows[attained]
            self.best[done], self.partner[done], self.stale[done] = best[attained], column[attained], False
            rows = rows[~attained]

    def _set_row(self, row: int, after: Matrix) -> None:
        """Note the best of a row's similarities to all clusters after it."""
        column = after.argmax()
        self.best[row], self.partner[row], self.stale[row] = after[column], row + 1 + column, False

    def _merge(self, i: int, j: int) -> None:
        """Take cluster j into cluster i < j."""
        similar = self._linkage(i, j)
        self.matrix[:i, i], self.matrix[i, i + 1 :] = similar[:i], similar[i + 1 :]
        self.matrix[:j, j] = self.matrix[j, j + 1 :] = FORBIDDEN
        self._update_rows(i, j, similar)
        self.clusters[i] += self.clusters.pop(j)
        source = int(self.origins[i])
        if source == self.origins[j]:
            self.budgets[source] -= 1
            if self.budgets[source] <= 0:
                self._forbid_within(source)

    def _linkage(self, i: int, j: int) -> Matrix:
        """Similarity of the union of i and j to every cluster, itself excluded."""
        matrix = self.matrix
        similar = np.empty(len(matrix))
        np.minimum(matrix[:i, i], matrix[:i, j], out=similar[:i])
        np.minimum(matrix[i, i + 1 : j], matrix[i + 1 : j, j], out=similar[i + 1 : j])
        np.minimum(matrix[i, j + 1 :], matrix[j, j + 1 :], out=similar[j + 1 :])
        similar[[i, j]] = FORBIDDEN
        if self.alpha > 0:
            similar *= self.alpha
        else:
            similar[(self.origins == self.origins[i]) | (self.origins == self.origins[j])] = FORBIDDEN
        return similar

    def _update_rows(self, i: int, j: int, similar: Matrix) -> None:
        """Let every row know what the merge of j into i has changed in it."""
        self.best[j] = FORBIDDEN
        self.stale |= (self.partner == i) | (self.partner == j)
        # what now reaches a row's best raises the bound, or comes before what is as good
        self.stale[:i] |= similar[:i] >= self.best[:i]
        np.maximum(self.best[:i], similar[:i], out=self.best[:i])
        self._set_row(i, similar[i + 1 :])
        if self.bounds.size:
            block = self.bounds[:i, i // BLOCK]
            np.maximum(block, similar[:i], out=block)
            self.bounds[i] = np.maximum.reduceat(self.matrix[i], self.starts)

    def _forbid_within(self, source: int) -> None:
        """Forbid all pairs of clusters that belong to one source."""
        own = np.flatnonzero(self.origins == source)
        self.matrix[np.ix_(own, own)] = FORBIDDEN
        self.stale[own] |= self.origins[self.partner[own]] == source


def _least(matrix: Matrix, clusters: Sequence[Sequence[int]]) -> Matrix:
    """Least similarity between the members of every two clusters: ``(clusters, clusters)``."""
    rows = np.stack([matrix[cluster].min(axis=0) for cluster in clusters])
    return np.stack([rows[:, cluster].min(axis=1) for cluster in clusters], axis=1)


def _in_place(clusters: Sequence[Sequence[int]], units: int) -> tuple[tuple[int, ...], ...]:
    """Put clusters where their first unit of source 0 stands, and those without one, in order, where nobody does."""
    ordered = sorted(tuple(sorted(cluster)) for cluster in clusters)
    at = {cluster[0]: cluster for cluster in ordered if cluster[0] < units}
    others = iter(cluster for cluster in ordered if cluster[0] >= units)
    return tuple(at[place] if place in at else next(others) for place in range(units))

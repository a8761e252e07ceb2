"""Accuracy over sparsity, before and after renormalization, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfsurgery.scoring.evaluation import Score
from vfsurgery.shown import draw

DENSE = "dense"


@dataclass(frozen=True)
class Cell:
    """One network of the sweep: pruned by a method to a sparsity, and renormalized."""

    sparsity: float
    pruned: Score
    renormalized: Score

    @property
    def gain(self) -> float:
        """Accuracy that renormalization brings, -1 to 1."""
        return self.renormalized.accuracy - self.pruned.accuracy


@dataclass(frozen=True)
class Curves:
    """Accuracy over sparsity for every method; printed as a table."""

    name: str
    dense: Score
    curves: Mapping[str, tuple[Cell, ...]]

    @property
    def scores(self) -> dict[str, Score]:
        """Every network's score by the label of its row: ``magnitude 80%``, ``magnitude 80% renormalized``."""
        rows = {DENSE: self.dense}
        for method, cells in self.curves.items():
            for cell in cells:
                rows[row(method, cell.sparsity)] = cell.pruned
                rows[row(method, cell.sparsity, renormalized=True)] = cell.renormalized
        return rows

    def plot(self, path: str | Path, published: Mapping[str, Sequence[float | None]] | None = None) -> Path:
        """Draw the curves into ``path``, whose ending is the format, PNG without one.

        Args:
            path: The file.
            published: Accuracies (%) from elsewhere, by method and by ``METHOD renormalized``, one per sparsity.

        Raises:
            CheckpointError: the file cannot be written; nothing is left of it then.
        """
        return draw(self, path, published)


def row(method: str, sparsity: float, renormalized: bool = False) -> str:
    """The label of one network of a sweep.

    >>> row("magnitude", 0.8), row("magnitude", 0.955, renormalized=True)
    ('magnitude 80%', 'magnitude 95.5% renormalized')
    """
    return f"{method} {100 * sparsity:.4g}%{' renormalized' if renormalized else ''}"

"""What was measured of networks, for as long as they stay what they were then."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vfsurgery.scoring.evaluation import Score


@dataclass(frozen=True)
class Measured:
    """The figures that were measured last, for the pages and cards of networks that have not changed since.

    ``rows`` are all of them, accuracies in percent, and ``scores`` are those that a page shows. ``own`` has the row of
    a network; others lie beside. ``figures`` are the line between sources, flips and a sweep.
    """

    rows: dict[str, float] = field(default_factory=dict[str, float])
    scores: dict[str, Score] = field(default_factory=dict[str, Score])
    published: Mapping[str, float] = field(default_factory=dict[str, float])
    own: Mapping[str, str] = field(default_factory=dict[str, str])
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def once_changed(self, ends: Collection[str]) -> Measured:
        """What still holds when all networks but ``ends`` have become others: scores of these, and what lies beside."""
        own = {name: row for name, row in self.own.items() if name in ends}
        gone = {*self.own.values()} - {*own.values()}
        scores = {row: score for row, score in self.scores.items() if row not in gone}
        return Measured({row: self.rows[row] for row in scores}, scores, self.published, own)

    def beside(self, others: Measured) -> Measured:
        """What was measured of a network when it was as it is, and what is known of others by now."""
        return replace(self, rows=self.rows | others.rows, scores=self.scores | others.scores)

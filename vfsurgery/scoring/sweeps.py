"""Accuracy of many networks over one number, as sparsity: the value behind a table by columns, a plot and a page.

The experiment of Qu & Horvath (CPAL 2025), section 5.5 and figures 5 and 14: one-shot pruning kills the accuracy
because features vanish, and giving every unit the dense network's statistics brings much of it back without training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vfsurgery.scoring.evaluation import Score
from vfsurgery.shown import Drawn


@dataclass(frozen=True)
class Course:
    """One curve: a score for each value of a sweep, and published accuracies (%) beside them.

    ``number`` decides its colour; ``behind`` says that it goes on from another curve, which has the same.
    """

    scores: tuple[Score | None, ...]
    published: tuple[float | None, ...]
    number: int
    behind: bool

    @property
    def accuracies(self) -> list[float | None]:
        """In percent."""
        return [None if score is None else 100 * score.accuracy for score in self.scores]


@dataclass(frozen=True)
class Sweep(Drawn):
    """Accuracy over the values of ``axis``, shares in percent, and of the networks that all began with."""

    axis: str
    values: tuple[float, ...]
    first: Mapping[str, Score]
    courses: Mapping[str, Course]

    @classmethod
    def of(
        cls,
        axis: str,
        values: Iterable[float],
        scores: Mapping[str, Score],
        curves: Mapping[str, Sequence[str]],
        bases: Mapping[str, str],
        published: Mapping[str, Any],
    ) -> Self:
        """From a table.

        Args:
            axis: What the values are of.
            values: One for each point of a curve.
            scores: By row; rows that are in no curve come first.
            curves: The rows of each curve, value by value.
            bases: For curves that go on from another one, its name.
            published: Accuracies of a curve in percent, as a tuple; other entries are of no curve.
        """
        colours = [curve for curve in curves if curve not in bases]
        found: dict[str, Course] = {}
        for curve, rows in curves.items():
            listed, number = published.get(curve), colours.index(bases.get(curve, curve))
            figures = listed if isinstance(listed, tuple) else ()
            found[curve] = Course(tuple(scores[row] for row in rows), figures, number, curve in bases)
        inside = {row for rows in curves.values() for row in rows}
        first = {row: score for row, score in scores.items() if row not in inside}
        return cls(axis, tuple(map(float, values)), first, found)

    @property
    def unit(self) -> str:
        """That of the values: shares are drawn and written in percent."""
        return "%" if all(0 <= value <= 1 for value in self.values) else ""

    @property
    def places(self) -> list[float]:
        """The values in their unit."""
        return [100 * value for value in self.values] if self.unit else [*self.values]

    def lines(self) -> Iterator[str]:
        """A table: a row per curve, a column per value; accuracies in percent, published ones in rows of their own."""
        rows = {label: [f"{score.accuracy:.2%}"] for label, score in self.first.items()}
        for label, course in self.courses.items():
            for name, figures in ((label, course.accuracies), (f"{label}, published", course.published)):
                if any(figure is not None for figure in figures):
                    rows[name] = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        width = max(map(len, rows))
        yield " " * width + "".join(f"{f'{place:.4g}{self.unit}':>8}" for place in self.places)
        for label, cells in rows.items():
            yield f"{label:<{width}}" + "".join(f"{cell:>8}" for cell in cells)

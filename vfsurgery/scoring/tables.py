"""Tables of figures, row by row, with published ones beside."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from vfsurgery.scoring.evaluation import Score


def scores_of(
    scores: Mapping[str, Score],
    first: Collection[str],
    published: Mapping[str, float],
    ratios: Mapping[str, float] | None = None,
) -> Iterator[str]:
    """A row per network: accuracy, its distance in points to the mean of those that all began with, and loss.

    Args:
        scores: By row.
        first: Rows of those that all began with.
        published: Figures from elsewhere by row, for a column of their own.
        ratios: More rows, that are no accuracies, with what stands in them.
    """
    middle = sum(scores[row].accuracy for row in first) / len(first)
    width = max(map(len, [*scores, *published, *(ratios or {})]))
    extra = f"  {'published':>9}" if published else ""
    yield f"{'':<{width}}  accuracy{extra}  to sources    loss  ({next(iter(scores.values())).count} images)"
    for label, score in scores.items():
        accuracy = f"{score.accuracy:8.2%}{_beside(label, published)}"
        yield f"{label:<{width}}  {accuracy}  {100 * (score.accuracy - middle):+10.2f}  {score.loss:6.4f}"
    for label, ratio in (ratios or {}).items():
        extra = f"  {published[label]:8.3g}" if label in published else ""
        yield f"{label:<{width}}  {ratio:8.3g}{extra}"


def percents(rows: Mapping[str, float], published: Mapping[str, float]) -> Iterator[str]:
    """A row per figure, in percentage points.

    >>> print(*percents({"barrier naive": 80.0}, {"barrier naive": 79.5}))
    barrier naive    80.00%     79.50%
    """
    for label, value in rows.items():
        yield f"{label:<{max(map(len, rows))}}  {value:7.2f}%{_beside(label, published)}".rstrip()


def _beside(label: str, published: Mapping[str, float]) -> str:
    cell = f"{published[label]:8.2f}%" if label in published else f"{'':9}"
    return f"  {cell}" if published else ""

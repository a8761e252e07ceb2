"""One pair of sources merged in several ways: a table of what each merge keeps of the sources' accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from vfsurgery.api import merge, report_of
from vfsurgery.batches import Data
from vfsurgery.diagnosis import Diagnosis, diagnose
from vfsurgery.evaluation import Barrier, Score, barrier, compare, evaluate
from vfsurgery.flip_rates import Flips, flips
from vfsurgery.report import Report


@dataclass(frozen=True)
class Comparison:
    """Scores of two sources, their ensemble and their merges; printed as a table.

    ``merged`` is the last merge, ``report`` its report, ``diagnosis`` says what is left of the sources' features,
    ``flips`` what it gets wrong that they got right, and ``barrier`` is the line between them, merged that way.
    """

    name: str
    scores: Mapping[str, Score]
    barrier: Barrier
    report: Report
    diagnosis: Diagnosis
    flips: Flips
    merged: nn.Module = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "name": self.name,
            "scores": {label: asdict(score) for label, score in self.scores.items()},
            "barrier": self.barrier.to_dict(),
            "report": self.report.to_dict(),
            "diagnosis": self.diagnosis.to_dict(),
            "flips": self.flips.to_dict(),
        }

    def __str__(self) -> str:
        return "\n".join([self.name, *_table(self.scores)])


def compare_merges(
    name: str,
    a: nn.Module,
    b: nn.Module,
    merges: Mapping[str, Mapping[str, Any]],
    *,
    calibration: Data,
    test: Data,
    alpha: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Merge two sources in several ways and score each on the same test data.

    Args:
        name: Heads the table.
        a: The reference.
        b: Aligned to ``a``.
        merges: By their row's label, keyword arguments for :func:`vfsurgery.merge`; at least one.
        calibration: Images for statistics.
        test: Images and labels for the scores.
        alpha: Weight of ``b``.
        seed: Decides the order of random sweeps in matching.
        progress: Whether to show bars.
    """
    scores = compare({"source a": a, "source b": b}, test, progress=progress)
    merged = a
    for label, options in merges.items():
        merged = merge(a, b, data=calibration, alpha=alpha, seed=seed, progress=progress, **options)
        scores[label] = evaluate(merged, test, progress=progress)
    last = {key: value for key, value in list(merges.values())[-1].items() if key != "preserve"}  # it has none
    line = barrier(a, b, test, calibration=calibration, seed=seed, progress=progress, **last)
    sources = {"source a": a, "source b": b}
    diagnosis = diagnose(merged, list(sources.values()), calibration, progress=progress)
    flipped = flips(sources, merged, test, progress=progress)
    return Comparison(name, scores, line, report_of(merged), diagnosis, flipped, merged)


def _table(scores: Mapping[str, Score]) -> Iterator[str]:
    """Lines of a table; in each row also the distance to the sources' mean accuracy, in points."""
    ends = (scores["source a"].accuracy + scores["source b"].accuracy) / 2
    width = max(map(len, scores))
    yield f"  {'':<{width}}  accuracy  to sources    loss"
    for label, score in scores.items():
        yield f"  {label:<{width}}  {score.accuracy:8.2%}  {100 * (score.accuracy - ends):+10.2f}  {score.loss:6.3f}"

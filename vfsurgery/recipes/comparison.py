"""One pair of sources merged in several ways: a table of what each merge keeps of the sources' accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.matching import Given
from vfsurgery.merging.merge import match, merge
from vfsurgery.records.report import MergeReport
from vfsurgery.records.results import merge_report_of
from vfsurgery.scoring.diagnosis import Diagnosis, diagnose
from vfsurgery.scoring.evaluation import Barrier, Score, barrier, compare, evaluate, first_images
from vfsurgery.scoring.flip_rates import Flips, flips


@dataclass(frozen=True)
class Comparison:
    """Scores of two sources, their ensemble and their merges; printed as a table.

    ``merged`` is the last merge, ``report`` its report, ``diagnosis`` says what is left of the sources' features,
    ``flips`` what it gets wrong that they got right, and ``barrier`` is the line between them, merged that way, which
    goes through it.
    ``diagnoses`` are those of the merges that one was asked for, by label.
    """

    name: str
    scores: Mapping[str, Score]
    barrier: Barrier
    report: MergeReport
    diagnosis: Diagnosis
    flips: Flips
    merged: nn.Module = field(repr=False, compare=False)
    diagnoses: Mapping[str, Diagnosis] = field(default_factory=dict[str, Diagnosis])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "name": self.name,
            "scores": {label: asdict(score) for label, score in self.scores.items()},
            "barrier": self.barrier.to_dict(),
            "report": self.report.to_dict(),
            "diagnosis": self.diagnosis.to_dict(),
            "diagnoses": {
                label: {key: found.to_dict()[key] for key in ("state", "depths", "curves")}
                for label, found in self.diagnoses.items()
            },
            "flips": self.flips.to_dict(),
        }

    def __str__(self) -> str:
        return "\n".join([self.name, *table(self)])


def compare_merges(
    name: str,
    a: nn.Module,
    b: nn.Module,
    merges: Mapping[str, Mapping[str, Any]],
    *,
    calibration: Data,
    test: Data,
    alpha: float = 0.5,
    alphas: int = 11,
    seed: int = 0,
    diagnosed: Collection[str] = (),
    progress: bool = True,
) -> Comparison:
    """Merge two sources in several ways and score each on the same test data.

    Args:
        name: Heads the table.
        a: The reference.
        b: Aligned to ``a``.
        merges: By their row's label, keyword arguments for :func:`vfsurgery.merge`; at least one. What matches in the
            same way is matched once.
        calibration: Images for statistics.
        test: Images and labels for the scores.
        alpha: Weight of ``b``, where a merge says no other.
        alphas: Points of the line between the sources, for the last merge.
        seed: Decides the order of random sweeps in matching.
        diagnosed: Labels of merges to compare with the sources layer by layer, each for a pass over ``calibration``.
        progress: Whether to show bars.
    """
    sources = {"source a": a, "source b": b}
    scores = compare(sources, test, progress=progress)
    diagnoses: dict[str, Diagnosis] = {}
    merged = a
    labels = list(merges)
    known = _matched_once(a, b, [merges[label]["matching"] for label in labels[:-1]], calibration, seed, progress)
    for label, options in merges.items():
        if label != labels[-1]:  # the last one's report names its matching
            options = {**options, "matching": known.get(options["matching"], options["matching"])}
        arguments: dict[str, Any] = {"alpha": alpha, **options}
        merged = merge(a, b, data=calibration, seed=seed, progress=progress, **arguments)
        scores[label] = evaluate(merged, test, progress=progress)
        if label in diagnosed or label == labels[-1]:
            diagnoses[label] = diagnose(merged, [a, b], calibration, progress=progress)
    line = barrier(a, b, test, calibration=calibration, alphas=alphas, through=merged, seed=seed, progress=progress)
    flipped = flips(sources, merged, test, progress=progress)
    last_diagnosis = diagnoses[labels[-1]]
    asked = {label: found for label, found in diagnoses.items() if label in diagnosed}
    return Comparison(name, scores, line, merge_report_of(merged), last_diagnosis, flipped, merged, asked)


def _matched_once(
    a: nn.Module, b: nn.Module, matchings: Sequence[str], calibration: Data, seed: int, progress: bool
) -> dict[str, Given]:
    """What several merges ask for, found once; ``"auto"`` chooses for each merge anew."""
    repeated = {name for name in matchings if matchings.count(name) > 1 and name != "auto"}
    options: dict[str, Any] = {"data": calibration, "example_inputs": first_images(a, calibration), "seed": seed}
    return {name: Given(match(a, b, matching=name, progress=progress, **options)) for name in sorted(repeated)}


def table(
    comparison: Comparison, published: Mapping[str, float] | None = None, ratios: Mapping[str, float] | None = None
) -> Iterator[str]:
    """Lines of a table; in each row also the distance to the sources' mean accuracy, in points.

    Args:
        comparison: What was measured.
        published: Accuracies (%) from elsewhere, by row, for a column of their own.
        ratios: More rows, that are no accuracies, with what stands in them.
    """
    published, ratios = published or {}, ratios or {}
    scores = comparison.scores
    ends = (scores["source a"].accuracy + scores["source b"].accuracy) / 2
    width = max(map(len, [*scores, *published, *ratios]))
    extra = f"  {'published':>9}" if published else ""
    yield f"  {'':<{width}}  accuracy{extra}  to sources    loss"
    for label, score in scores.items():
        distance = 100 * (score.accuracy - ends)
        extra = _cell(published.get(label)) if published else ""
        yield f"  {label:<{width}}  {score.accuracy:8.2%}{extra}  {distance:+10.2f}  {score.loss:6.3f}"
    for name, curve in comparison.barrier.curves.items() if published else ():
        label = f"barrier {name}"
        yield f"  {label:<{width}}  {curve.accuracy_barrier:8.2%}{_cell(published.get(label))}".rstrip()
    for label, ratio in ratios.items():
        extra = f"  {published[label]:8.3g}" if label in published else ""
        yield f"  {label:<{width}}  {ratio:8.3g}{extra}"


def _cell(accuracy: float | None) -> str:
    return f"  {'':9}" if accuracy is None else f"  {accuracy:8.2f}%"

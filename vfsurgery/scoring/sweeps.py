"""One network pruned by several methods to several sparsities, before and after renormalization.

The experiment of Qu & Horvath (CPAL 2025), section 5.5 and figures 5 and 14: one-shot pruning kills the accuracy
because features vanish, and giving every unit the dense network's statistics brings much of it back without training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.pruning import prune_each
from vfsurgery.pruning.renormalizing import Choice
from vfsurgery.pruning.renormalizing import renormalize as restore
from vfsurgery.scoring.curves import DENSE as DENSE
from vfsurgery.scoring.curves import Cell, Curves
from vfsurgery.scoring.curves import row as row
from vfsurgery.scoring.diagnosis import Diagnosis, diagnose
from vfsurgery.scoring.evaluation import Score, evaluate


@dataclass(frozen=True)
class Example:
    """The cell in which renormalization brings most: its networks, what became of their features, and scores."""

    method: str
    sparsity: float
    before: Diagnosis
    after: Diagnosis
    scores: Mapping[str, Score]
    model: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class Sweep(Curves):
    """Accuracy over sparsity for every method, and the networks of one cell; printed as a table."""

    example: Example

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "name": self.name,
            "dense": asdict(self.dense),
            "curves": {method: [asdict(cell) for cell in cells] for method, cells in self.curves.items()},
            "example": {
                "method": self.example.method,
                "sparsity": self.example.sparsity,
                "before": self.example.before.to_dict(),
                "after": self.example.after.to_dict(),
            },
        }

    def __str__(self) -> str:
        return "\n".join([self.name, *sweep_table(self)])


def sweep(
    name: str,
    model: nn.Module,
    methods: Mapping[str, Mapping[str, Any]],
    sparsities: Sequence[float],
    *,
    calibration: Data,
    test: Data,
    renormalize: Choice = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Prune a trained network in several ways and score each network before and after renormalization.

    Args:
        name: Heads the table.
        model: The dense network, left as it is.
        methods: By label, keyword arguments for :func:`vfsurgery.prune`; at least one.
        sparsities: Shares of the prunable weights, rising.
        calibration: Images for statistics; with labels, where a method looks at them.
        test: Images and labels for the scores.
        renormalize: As for :func:`vfsurgery.renormalize`.
        seed: Of whatever a method draws at random.
        progress: Whether to show bars.
    """
    dense = evaluate(model, test, progress=progress)
    curves: dict[str, tuple[Cell, ...]] = {}
    best: tuple[float, str, float, nn.Module, nn.Module] | None = None
    for label, options in methods.items():
        cells: list[Cell] = []
        arguments: dict[str, Any] = {"data": calibration, "seed": seed, "progress": progress, **options}
        for sparsity, pruned in zip(sparsities, prune_each(model, sparsities, **arguments), strict=True):
            restored = restore(pruned, reference=model, data=calibration, renormalize=renormalize, progress=progress)
            scores = [evaluate(network, test, progress=progress) for network in (pruned, restored)]
            cells.append(Cell(sparsity, *scores))
            if best is None or cells[-1].gain > best[0]:
                best = cells[-1].gain, label, sparsity, pruned, restored
        curves[label] = tuple(cells)
    assert best is not None
    _, label, sparsity, pruned, restored = best
    before, after = (diagnose(network, [model], calibration, progress=progress) for network in (pruned, restored))
    cell = next(cell for cell in curves[label] if cell.sparsity == sparsity)
    shown = {
        DENSE: dense,
        row(label, sparsity): cell.pruned,
        row(label, sparsity, renormalized=True): cell.renormalized,
    }
    return Sweep(name, dense, curves, Example(label, sparsity, before, after, shown, restored))


def sweep_table(found: Sweep, published: Mapping[str, float] | None = None) -> Iterator[str]:
    """Lines of a table: a row per method, before and after, a column per sparsity; accuracies in percent.

    Args:
        found: What was measured.
        published: Accuracies (%) from elsewhere by the labels of :attr:`Sweep.scores`; rows of their own, below.
    """
    published = published or {}
    sparsities = [cell.sparsity for cell in next(iter(found.curves.values()))]
    width = max(len(f"{method} renormalized, published") for method in found.curves)
    yield f"  {'':<{width}}" + "".join(f"{f'{100 * sparsity:.4g}%':>8}" for sparsity in sparsities)
    yield f"  {DENSE:<{width}}{found.dense.accuracy:>8.2%}"
    for method, cells in found.curves.items():
        for renormalized in (False, True):
            label = f"{method} renormalized" if renormalized else method
            scores = [cell.renormalized if renormalized else cell.pruned for cell in cells]
            yield f"  {label:<{width}}" + "".join(f"{100 * score.accuracy:>8.2f}" for score in scores)
            known = [published.get(row(method, sparsity, renormalized)) for sparsity in sparsities]
            if any(accuracy is not None for accuracy in known):
                text = "".join(f"{'' if accuracy is None else f'{accuracy:.2f}':>8}" for accuracy in known)
                yield f"  {f'{label}, published':<{width}}{text}"

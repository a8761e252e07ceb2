"""Accuracy and loss along the straight line between two models: what their average loses, naive and aligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import OptionError, explain
from vfsurgery.merging.arguments import Matchings, asks_for_images
from vfsurgery.merging.merge import Made, made, merge
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.scoring.evaluation import ENSEMBLE, Score, compare, evaluate, first_images, score_together
from vfsurgery.shown import Drawn
from vfsurgery.stats.imagined import stand_in
from vfsurgery.tracing.examples import ExampleInputs


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy (0 to 1) and loss (nats) of the models ``f_alpha`` for every ``alpha``, from source a to source b.

    >>> curve = Curve(alphas=(0.0, 0.5, 1.0), accuracy=(0.9, 0.2, 0.7), loss=(0.5, 3.0, 0.5))
    >>> round(curve.accuracy_barrier, 3), curve.loss_barrier
    (0.6, 2.5)
    """

    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def accuracy_barrier(self) -> float:
        """The largest ``(1 - alpha) * Acc(a) + alpha * Acc(b) - Acc(f_alpha)``; 0 where no model is below the line."""
        return _largest(line - here for line, here in zip(self._line(self.accuracy), self.accuracy, strict=True))

    @property
    def loss_barrier(self) -> float:
        """The largest ``loss(f_alpha) - ((1 - alpha) * loss(a) + alpha * loss(b))``; NaN where a loss is NaN."""
        return _largest(here - line for line, here in zip(self._line(self.loss), self.loss, strict=True))

    @property
    def midpoint(self) -> int:
        """Position of ``alpha = 0.5``."""
        return self.alphas.index(0.5)

    def _line(self, ends: tuple[float, ...]) -> list[float]:
        return [(1 - alpha) * ends[0] + alpha * ends[-1] for alpha in self.alphas]


@dataclass(frozen=True, slots=True)
class Barrier(Drawn):
    """What :func:`barrier` found: two sources, their ensemble, and the curves between them. Print it for a table."""

    a: Score
    b: Score
    ensemble: Score
    naive: Curve
    aligned: Curve
    renormalized: Curve | None

    @property
    def curves(self) -> dict[str, Curve]:
        """The curves that were measured, by name."""
        curves = {"naive": self.naive, "aligned": self.aligned, "renormalized": self.renormalized}
        return {name: curve for name, curve in curves.items() if curve is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the barriers included."""
        curves = {
            name: {**asdict(curve), "accuracy_barrier": curve.accuracy_barrier, "loss_barrier": curve.loss_barrier}
            for name, curve in self.curves.items()
        }
        scores = {"a": asdict(self.a), "b": asdict(self.b), "ensemble": asdict(self.ensemble)}
        return {**scores, "curves": curves}

    def __str__(self) -> str:
        sources = [f"{'source a':<13}{self.a}", f"{'source b':<13}{self.b}", f"{'ensemble':<13}{self.ensemble}"]
        header = f"{'alpha':<13}" + "".join(f"{name:<20}" for name in self.curves)
        rows = [
            f"{alpha:<13.2f}" + "".join(_cell(c.accuracy[i], c.loss[i]) for c in self.curves.values())
            for i, alpha in enumerate(self.naive.alphas)
        ]
        barriers = "".join(_cell(curve.accuracy_barrier, curve.loss_barrier) for curve in self.curves.values())
        return "\n".join(line.rstrip() for line in [*sources, header, *rows, f"{'barrier':<13}{barriers}"])


def barrier(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    calibration: Data | str | None = None,
    alphas: int | Sequence[float] = 11,
    matching: Matchings = "auto",
    renormalize: Renormalization = "auto",
    masks: str | None = None,
    symmetries: str = "auto",
    imagine: bool = True,
    through: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Barrier:
    """Measure accuracy and loss along the line from ``a`` to ``b``: naively averaged, aligned, and renormalized too.

    The accuracy barrier is the largest ``(1 - alpha) * Acc(a) + alpha * Acc(b) - Acc(f_alpha)``, the loss barrier the
    largest ``loss(f_alpha) - ((1 - alpha) * loss(a) + alpha * loss(b))`` (Qu & Horvath, CPAL 2025, Fig. 6; their code
    instead takes the distance from the mean of the two ends, which differs where the sources do). ``b`` is matched to
    ``a`` once. At ``alpha`` 0 and 1 every curve holds the sources' own scores: nothing is merged there.

    Everything is done as :func:`vfsurgery.merge` does it halfway, or as it was done for the model ``through``: what
    ``"auto"`` chooses there is used for the whole line, and the score there is that of this very model.

    Args:
        a: The reference.
        b: The source that is aligned to it.
        data: Labelled batches to score on.
        calibration: Images for matching and renormalization; their labels are not looked at. As ``data`` of
            :func:`vfsurgery.merge`.
        alphas: How many evenly spaced values, an odd number, or the values: rising, with 0, 0.5 and 1 among them.
        matching: As for :func:`vfsurgery.merge`.
        renormalize: As for :func:`vfsurgery.merge`; ``None`` leaves the renormalized curve out.
        masks: As for :func:`vfsurgery.merge`, for all curves.
        symmetries: As for :func:`vfsurgery.merge`.
        imagine: As for :func:`vfsurgery.merge`.
        through: A model that :func:`vfsurgery.merge` returned of ``a`` and ``b``, whose share of ``b`` becomes one of
            ``alphas``. Its matching, normalizations, masks and preserved layers are then taken, and the arguments for
            these not looked at.
        example_inputs: As for :func:`vfsurgery.merge`; ``None`` takes the first images of the data.
        seed: Of the matching.
        progress: Show a bar when it takes over a second.

    Raises:
        OptionError: ``alphas`` lack an end or the midpoint; ``through`` was not made by a merge, or in shares by layer.
        SurgeryError: As for :func:`evaluate` and :func:`vfsurgery.merge`.
    """
    points = _alphas(alphas)
    if example_inputs is None:
        example_inputs = first_images(a, data if calibration is None or isinstance(calibration, str) else calibration)
    asks = (
        asks_for_images(matching, renormalize) if through is None else asks_for_images("weights", made(through).passes)
    )
    calibration = stand_in([a, b], calibration, example_inputs, unasked=imagine and asks, seed=seed, progress=progress)
    options: dict[str, Any] = {"example_inputs": example_inputs, "imagine": False, "seed": seed, "progress": False}
    if through is None:
        chosen = {"matching": matching, "renormalize": renormalize, "masks": masks, "symmetries": symmetries}
        through = merge(a, b, data=calibration, **chosen, **options)
    way = made(through)
    if way.alpha is None:
        raise OptionError(
            explain(
                "the model through which the line shall go has shares by layer, and the line has one for all",
                remedy="merge with one number as alpha=, or leave through= out",
            )
        )
    points = tuple(sorted({*points, way.alpha}))
    kinds = _kinds(way, calibration)
    ends = compare({"a": a, "b": b}, data, progress=False)
    scores = {kind: {0.0: ends["a"], 1.0: ends["b"]} for kind in kinds}
    *others, last = kinds  # the last one goes through the model
    for alpha in progress_bar(points[1:-1], "barrier", len(points) - 2, progress):
        wanted = others if alpha == way.alpha else kinds
        merged = [merge(a, b, alpha=alpha, **kinds[kind], **options) for kind in wanted]
        for kind, score in zip(wanted, score_together(merged, None, data, None, False) if merged else (), strict=True):
            scores[kind][alpha] = score
    scores[last][way.alpha] = evaluate(through, data, progress=False)
    curves = {kind: _curve(points, [scores[kind][alpha] for alpha in points]) for kind in kinds}
    sources = ends["a"], ends["b"], ends[ENSEMBLE]
    return Barrier(*sources, curves["naive"], curves["aligned"], curves.get("renormalized"))


def _kinds(way: Made, calibration: Data | None) -> dict[str, dict[str, Any]]:
    """How the curves are merged; the last one in the same way as a model was made."""
    naive = {"matching": "identity", "renormalize": None, "masks": way.masks}
    aligned = {**naive, "matching": way.matching}
    own = {**aligned, "renormalize": way.passes or None, "preserve": way.preserve, "data": calibration}
    return {"naive": naive, "aligned": aligned, "renormalized": own} if way.passes else {"naive": naive, "aligned": own}


def _alphas(alphas: int | Sequence[float]) -> tuple[float, ...]:
    points = [i / max(alphas - 1, 1) for i in range(alphas)] if isinstance(alphas, int) else list(alphas)
    if points != sorted(set(points)) or not {0.0, 0.5, 1.0} <= set(points) or points[0] < 0 or points[-1] > 1:
        raise OptionError(
            explain(
                f"alphas {alphas} do not make a line from source a to source b",
                remedy="pass an odd number of points from 3, or rising values from 0 to 1 with 0.5 among them",
            )
        )
    return tuple(points)


def _curve(alphas: tuple[float, ...], scores: Sequence[Score]) -> Curve:
    return Curve(alphas, tuple(score.accuracy for score in scores), tuple(score.loss for score in scores))


def _largest(values: Iterable[float]) -> float:
    """The maximum, NaN if any value is NaN; ``max`` would let the order of the values decide."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def _cell(accuracy: float, loss: float) -> str:
    return f"{accuracy:>7.2%} {loss:<12.4f}"

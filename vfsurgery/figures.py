"""Figures, drawn without matplotlib's global state, so that a program's own figures and backend are left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfsurgery.checkpoints import atomic

if TYPE_CHECKING:
    from vfsurgery.evaluation import Barrier

COLOURS = {"naive": "#D55E00", "aligned": "#0072B2", "renormalized": "#009E73"}
"""From the palette of Okabe and Ito, told apart by colour-blind readers too."""

GREY = "#666666"

LINE = 0.055
"""Least distance of two labels, as a fraction of the panel's height."""

Label = tuple[float, str, str]
"""Height in data coordinates, text, colour."""


def draw_barrier(found: Barrier, path: str | Path) -> Path:
    """Draw accuracy and loss along alpha, side by side, into ``path``; its ending is the format, PNG without one.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_panel(left, "accuracy", found)
    _draw_panel(right, "loss", found)
    with atomic(path) as partial:
        figure.savefig(partial, format=partial.suffix[1:] or "png", dpi=150)
    return Path(path)


def _draw_panel(axes: Axes, quantity: Literal["accuracy", "loss"], found: Barrier) -> None:
    """Draw the curves, the straight line between the sources, and the ensemble, each with its height at alpha 0.5."""
    scale, unit = (100, "accuracy (%)") if quantity == "accuracy" else (1, "loss (nats)")
    labels: list[Label] = []

    def label(name: str, height: float, colour: str) -> None:
        labels.append((height, f"{name} {height:.1f}" if scale == 100 else f"{name} {height:.2f}", colour))

    for name, curve in found.curves.items():
        heights = [scale * value for value in getattr(curve, quantity)]
        axes.plot(curve.alphas, heights, color=COLOURS[name], marker="o", markersize=4.5, linewidth=2)
        label(name, heights[curve.midpoint], COLOURS[name])
    ends = [scale * getattr(source, quantity) for source in (found.a, found.b)]
    steps = [step / 100 for step in range(101)]  # a straight line is none on a logarithmic axis
    straight = [(1 - step) * ends[0] + step * ends[1] for step in steps]
    axes.plot(steps, straight, color="black", linestyle="--", linewidth=1.2)
    label("sources' mean", sum(ends) / 2, "black")
    ensemble = scale * getattr(found.ensemble, quantity)
    axes.axhline(ensemble, color=GREY, linestyle=":", linewidth=1.8)
    label("ensemble", ensemble, GREY)
    axes.set_title(unit, loc="left", fontsize=12)
    axes.set_xlabel("alpha: 0 is source a, 1 is source b", fontsize=11)
    if quantity == "loss" and _spans_decades([loss for curve in found.curves.values() for loss in curve.loss]):
        axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _write_labels(axes, labels)


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a linear axis would press the small values together: a collapsed average may lose hundreds of nats."""
    positive = [value for value in values if 0 < value < math.inf]
    return bool(positive) and max(positive) > 30 * min(positive)


def _write_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels right of the panel, under a heading, at their heights or, where one is in the way, above it."""
    axes.autoscale_view()  # limits are found lazily, and the heights depend on them
    to_fraction = axes.transScale + axes.transLimits
    heights = [float(to_fraction.transform((0.5, height))[1]) for height, _, _ in labels]
    # What is too bad for the panel, NaN or infinite, is named at its top.
    placed = [(h if math.isfinite(h) else 1.0, *label[1:]) for h, label in zip(heights, labels, strict=True)]
    floor = -LINE
    for height, text, colour in [*sorted(placed), (1.0, "at alpha 0.5", GREY)]:
        floor = max(height, floor + LINE)
        axes.annotate(text, (1.02, floor), xycoords="axes fraction", color=colour, fontsize=10, va="center")

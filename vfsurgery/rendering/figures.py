"""Figures, drawn without matplotlib's global state, so that a program's own figures and backend are left alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.nn.functional import pad

from vfsurgery.checkpoints import atomic
from vfsurgery.scoring.barriers import Barrier
from vfsurgery.scoring.diagnosis import Diagnosis
from vfsurgery.scoring.sweeps import Sweep
from vfsurgery.shown import draw
from vfsurgery.stats.imagined import Imagined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"naive": "#D55E00", "aligned": "#0072B2", "renormalized": "#009E73"}
"""From the palette of Okabe and Ito, told apart by colour-blind readers too."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The same one, for however many curves."""

BEFORE, AFTER = "#D55E00", "#0072B2"

GREY = "#666666"

POINTS: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.8}

LINE = 0.055
"""Least distance of two labels, as a fraction of the panel's height."""

FLAT = 5
"""Above this, a linear axis would press ratios between 0 and 1 flat."""

GRID = 8
"""Images on a side of a grid of them."""

Label = tuple[float, str, str]
"""Height in data coordinates, text, colour."""


@draw.register(Barrier)
def draw_barrier(found: Barrier, path: str | Path) -> Path:
    """Draw accuracy and loss along alpha, side by side, into ``path``; its ending is the format, PNG without one.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    figure = _figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_panel(left, "accuracy", found)
    _draw_panel(right, "loss", found)
    return _save(figure, path)


@draw.register(Diagnosis)
def draw_diagnosis(found: Diagnosis, path: str | Path) -> Path:
    """Draw the panels of :func:`diagnosis_panels` side by side into ``path``; its ending is the format, else PNG.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    return draw_panels(diagnosis_panels(found), path, 15, 4.8)


@draw.register(Sweep)
def draw_sweep(found: Sweep, path: str | Path) -> Path:
    """Draw accuracy along a sweep: curves that go on from others solid, those others dashed.

    Args:
        found: The sweep.
        path: The file; its ending is the format, PNG without one.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    figure = _figure(8.6, 4.8)
    sweep_panel(found)(figure.subplots())
    return _save(figure, path)


@draw.register(Imagined)
def draw_imagined(images: Imagined, path: str | Path) -> Path:
    """Draw the first 64 images as a grid, with the range of their pixels as black to white, into ``path``.

    Of images with other than 1 or 3 channels, the mean of all channels is shown.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    rows = -(-min(len(images), GRID**2) // GRID)
    figure = _figure(0.9 * min(GRID, len(images)), 0.9 * rows)
    grid_panel(images, GRID**2)(figure.subplots())
    return _save(figure, path)


def grid_panel(images: Imagined, count: int) -> Draw:
    """The first images side by side, :data:`GRID` in a row, with nothing around them."""
    shown = images.pixels.to_bytes(images.images[:count])
    if shown.shape[1] not in (1, 3):
        shown = shown.float().mean(1, keepdim=True).round().byte()
    margin = max(shown.shape[3] // 16, 1)
    framed = pad(shown, (margin,) * 4, value=255)
    rows = [torch.cat([*part], 2) for part in framed.split(min(GRID, len(framed)))]
    whole = torch.cat([pad(row, (0, rows[0].shape[2] - row.shape[2]), value=255) for row in rows], 1)

    def panel(axes: Axes) -> None:
        axes.set_axis_off()
        axes.imshow(whole.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")

    return panel


def sweep_panel(found: Sweep) -> Draw:
    """The panel of :func:`draw_sweep`."""
    lifted = any(course.behind for course in found.courses.values())

    def panel(axes: Axes) -> None:
        for label, course in found.courses.items():
            colour, style = PALETTE[course.number % len(PALETTE)], "--" if lifted and not course.behind else "-"
            axes.plot(found.places, _heights(course.accuracies), style, color=colour, marker="o", label=label, **POINTS)
            if course.published:
                mark, heights = "x" if style == "--" else "+", _heights(course.published)
                axes.plot(found.places, heights, mark, color=colour, markersize=8, label=f"{label}, published")
        for label, score in found.first.items():
            axes.axhline(100 * score.accuracy, color="black", linestyle=":", linewidth=1.2, label=label)
        axes.set_xlabel(f"{found.axis} (%)" if found.unit else found.axis, fontsize=11)
        axes.set_ylabel("accuracy (%)", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))

    return panel


def _heights(figures: Sequence[float | None]) -> list[float]:
    return [math.nan if figure is None else figure for figure in figures]


def _figure(width: float, height: float) -> Figure:
    """An empty one, of a size in inches."""
    # Imported here because matplotlib takes half a second, which only those who draw should wait.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> Path:
    with atomic(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:] or "png", dpi=150)
    return Path(path)


Draw: TypeAlias = "Callable[[Axes], None]"


def draw_panels(panels: Mapping[str, Draw], path: str | Path, width: float, height: float) -> Path:
    """Draw panels side by side, each under its title, in inches, into ``path``; its ending is the format, else PNG.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    figure = _figure(width, height)
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=12)
        panel(axes)
    return _save(figure, path)


def svg(panel: Draw, name: str) -> str:
    """Draw one panel as an SVG element to put into a page: no size of its own, all its ids beginning with ``name``.

    The text stays text, so that it can be searched and read aloud.
    """
    import matplotlib

    figure = _figure(5.6, 3.7)
    panel(figure.subplots())
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # the salt makes ids repeatable
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1), count=1
    )
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", drawn)


def diagnosis_panels(found: Diagnosis, before: Diagnosis | None = None) -> Mapping[str, Draw]:
    """The panels of a diagnosis by their titles, each over relative depth."""

    def of_depth(panel: Callable[[Axes, Diagnosis, Diagnosis | None], None]) -> Draw:
        def over_depth(axes: Axes) -> None:
            panel(axes, found, before)
            axes.set_xlabel("relative depth (%)", fontsize=11)
            axes.set_xlim(-2, 102)
            _finish(axes)

        return over_depth

    return {
        "feature norm relative to the sources": of_depth(_draw_ratios),
        "feature and offset": of_depth(_draw_offsets),
        "variance ratio (REPAIR)": of_depth(_draw_variances),
    }


def barrier_panels(found: Barrier) -> Mapping[str, Draw]:
    """Accuracy and loss along alpha, by their titles."""
    return {
        "accuracy between the sources": lambda axes: _draw_panel(axes, "accuracy", found),
        "loss between the sources": lambda axes: _draw_panel(axes, "loss", found),
    }


def draw_costs(axes: Axes, rows: Sequence[tuple[int, float, float, float]]) -> None:
    """Draw accuracy over FLOPs, each point with the number of preserved layers."""
    axes.plot([row[1] for row in rows], [100 * row[3] for row in rows], color=AFTER, marker="o", linewidth=2)
    for preserved, flops, _, accuracy in rows:
        axes.annotate(
            str(preserved), (flops, 100 * accuracy), (0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xlabel("FLOPs relative to one source", fontsize=11)
    axes.set_ylabel("accuracy (%)", fontsize=11)
    axes.margins(y=0.15)
    _finish(axes, legend=False)


def _draw_ratios(axes: Axes, found: Diagnosis, before: Diagnosis | None) -> None:
    if before is not None:
        axes.plot(_depths(before), before.ratios, color=BEFORE, marker="s", label="ratio before", **POINTS)
        axes.plot(_depths(before), before.smoothed(), color=BEFORE, linestyle="--", linewidth=1.2, label="its bound")
    axes.plot(_depths(found), found.ratios, color=AFTER, marker="o", label="ratio", **POINTS)
    axes.plot(_depths(found), found.smoothed(), color=AFTER, linestyle="--", linewidth=1.5, label="smoothed bound")
    if before is None:
        axes.plot(_depths(found), found.bound, color=GREY, linestyle="-.", linewidth=1.2, label="tight bound")
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    if max([height for height in found.smoothed() if math.isfinite(height)], default=1) > FLAT:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _draw_offsets(axes: Axes, found: Diagnosis, before: Diagnosis | None) -> None:
    drawn: list[tuple[Literal["feature", "offset"], str]] = [("feature", "-"), ("offset", ":")]
    for quantity, style in drawn:
        own = [getattr(layer.model, quantity) for layer in found.layers]
        sources = [layer.source(quantity) for layer in found.layers]
        for values, colour, who in ((sources, "black", "sources"), (own, AFTER, "model")):
            shown = [value if value > 0 else math.nan for value in values]  # a logarithmic axis has no 0
            axes.plot(_depths(found), shown, style, color=colour, linewidth=1.8, label=f"{quantity}, {who}")
    axes.set_yscale("log")


def _draw_variances(axes: Axes, found: Diagnosis, before: Diagnosis | None) -> None:
    for which, colour, label in ((before, BEFORE, "before"), (found, AFTER, "model" if before is None else "after")):
        if which is not None:
            ratios = [layer.variance_ratio for layer in which.layers]
            axes.plot(_depths(which), ratios, color=colour, marker="o", label=label, **POINTS)
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    shown = [layer.variance_ratio for which in (found, before) if which is not None for layer in which.layers]
    if _spans_decades(shown):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _depths(found: Diagnosis) -> list[float]:
    return [100 * layer.depth for layer in found.layers]


def _finish(axes: Axes, legend: bool = True) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.17))


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

"""Draws what docs/concepts.md explains, without measuring anything: `python docs/figures/drawn.py`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

IMAGES = Path(__file__).resolve().parents[1] / "images"
UNITS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""One colour per unit, from the palette of Okabe and Ito, told apart by colour-blind readers too."""
GREY, PALE, INK = "#666666", "#DDDDDD", "#222222"


def save(figure: Figure, name: str) -> None:
    """Write ``docs/images/NAME``, the same bytes every time."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(IMAGES / name, metadata={"Date": None, "Creator": None})


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches, with an inch as the unit of both axes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    bare(axes, width, height)
    return figure, axes


def bare(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")


def write(
    axes: Axes, x: float, y: float, text: str, *, size: float = 10, colour: str = INK, at: str = "center"
) -> None:
    axes.text(x, y, text, ha=at, va="center", fontsize=size, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=1.4))


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = PALE) -> None:
    """A rounded box around (x, y) with a text in it."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor=GREY))
    write(axes, x, y, text, size=9.5)


def network(axes: Axes, x: float, y: float, colours: list[tuple[str, ...]]) -> None:
    """A hidden layer between input and output; units of two colours have both, one around the other."""
    columns = [[(GREY,)] * 2, colours, [(GREY,)] * 2]
    places = [
        [(x + 0.75 * column, y + 0.42 * (row - (len(units) - 1) / 2)) for row in range(len(units))]
        for column, units in enumerate(columns)
    ]
    for left, right in pairwise(places):
        for start in left:
            for end in right:
                axes.plot(*zip(start, end, strict=True), color=PALE, linewidth=1, zorder=1)
    for units, column in zip(columns, places, strict=True):
        for unit, (unit_x, unit_y) in zip(units, column, strict=True):
            axes.add_patch(Circle((unit_x, unit_y), 0.14, facecolor=unit[0], edgecolor="white", zorder=2))
            for inner in unit[1:]:
                axes.add_patch(Circle((unit_x, unit_y), 0.075, facecolor=inner, zorder=3))


def matrix(axes: Axes, x: float, y: float, rows: list[str], columns: list[str], name: str) -> tuple[float, float]:
    """A weight as a grid whose rows, or columns, have their units' colours; returns its size."""
    cell = 0.24
    for row, row_colour in enumerate(rows):
        for column, column_colour in enumerate(columns):
            colour = row_colour if column_colour == PALE else column_colour
            corner = (x + column * cell, y - (row + 1) * cell)
            axes.add_patch(Rectangle(corner, cell, cell, facecolor=colour, edgecolor="white", linewidth=1.5))
    width, height = cell * len(columns), cell * len(rows)
    write(axes, x + width / 2, y + 0.17, name, size=9)
    return width, height


def draw_group() -> Figure:
    """One group: the same units are rows of one weight, entries of its bias and columns of the next weight."""
    figure, axes = canvas(8.6, 3.1)
    orders = (("as trained", (0, 1, 2, 3)), ("reordered: computes the same", (2, 0, 3, 1)))
    for panel, (title, order) in enumerate(orders):
        left = 0.35 + 4.45 * panel
        colours = [UNITS[unit] for unit in order]
        write(axes, left + 1.75, 2.85, title, size=11)
        matrix(axes, left, 2.2, colours, [PALE] * 3, "fc1.weight")
        matrix(axes, left + 1.15, 2.2, colours, [PALE], "fc1.bias")
        matrix(axes, left + 1.95, 2.2, [PALE] * 2, colours, "fc2.weight")
        write(axes, left + 0.36, 1.03, "rows", size=9, colour=GREY)
        write(axes, left + 1.27, 1.03, "entries", size=9, colour=GREY)
        write(axes, left + 2.43, 1.5, "columns", size=9, colour=GREY)
    arrow(axes, (3.95, 1.7), (4.6, 1.7))
    text = "one colour is one unit; one permutation group is all places where it lies\n"
    members = "g0 (4 units): fc1.weight[0], fc1.bias[0], fc2.weight[1]"
    write(axes, 4.3, 0.42, text + members, size=9.5)
    return figure


def draw_certificate() -> Figure:
    """What every merge checks before it averages."""
    figure, axes = canvas(8.6, 2.5)
    box(axes, 1.1, 1.85, 1.6, 0.5, "source b")
    box(axes, 1.1, 0.65, 1.6, 0.5, "b, reordered", "#CFE3F1")
    box(axes, 4.1, 1.25, 1.7, 0.5, "same images")
    box(axes, 7.0, 1.25, 2.5, 0.86, "outputs equal but for\nrounding: goes on.\nElse: refused", "#CDEBDF")
    arrow(axes, (1.1, 1.58), (1.1, 0.92))
    write(axes, 1.22, 1.25, "permutations", size=9, colour=GREY, at="left")
    arrow(axes, (1.95, 1.85), (3.2, 1.42))
    arrow(axes, (1.95, 0.65), (3.2, 1.08))
    arrow(axes, (4.98, 1.25), (5.7, 1.25))
    return figure


def draw_preserve() -> Figure:
    """Preserve-first merging between the ensemble and a plain merge."""
    figure, axes = canvas(8.6, 3.0)
    a, b, both = "#CFE3F1", "#FBE3B8", "#CDEBDF"
    for column, (title, kept) in enumerate((("merge", 0), ("preserve=2", 2), ("ensemble", 4))):
        middle = 1.75 + 2.65 * column
        write(axes, middle, 2.75, title, size=11)
        for layer in range(4):
            y = 0.4 + 0.56 * layer
            if layer < kept:
                box(axes, middle - 0.55, y, 0.95, 0.4, "a", a)
                box(axes, middle + 0.55, y, 0.95, 0.4, "b", b)
            else:
                box(axes, middle, y, 2.05, 0.4, "merged", both)
    write(axes, 0.08, 1.25, "depth", size=9, colour=GREY, at="left")
    arrow(axes, (0.25, 1.4), (0.25, 2.2))
    return figure


if __name__ == "__main__":
    save(draw_group(), "group.svg")
    save(draw_certificate(), "certificate.svg")
    save(draw_preserve(), "preserve.svg")

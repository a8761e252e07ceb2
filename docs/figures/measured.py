"""Draws the front page and the curves of docs/concepts.md from a run on scikit-learn's digits, in about a minute:
`python docs/figures/measured.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from drawn import GREY, IMAGES, INK, UNITS, arrow, bare, network, save, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.training import from_seed, train

ROWS = {
    "plain average": {"matching": "identity", "renormalize": None},
    "units matched": {"matching": "activations", "renormalize": None},
    "matched and renormalized": {"matching": "auto", "renormalize": "auto"},
}
COLOURS = {"plain average": UNITS[1], "units matched": UNITS[0], "matched and renormalized": UNITS[2]}


@dataclass(frozen=True)
class Pair:
    """Two trained networks, what they reach (in percent), and their merges by the names in ``ROWS``."""

    title: str
    sources: tuple[nn.Module, nn.Module]
    reached: float
    merges: Mapping[str, nn.Module]
    accuracies: Mapping[str, float]


SPLITS = digits()


def accuracy(model: nn.Module) -> float:
    return 100 * surgery.evaluate(model, SPLITS.test, progress=False).accuracy


def make_pair(title: str, factory: Callable[[], nn.Module], seeds: tuple[int, int], epochs: int, lr: float) -> Pair:
    """As ``recipes/digits.yaml`` trains and merges them."""
    options = {"epochs": epochs, "lr": lr, "progress": False}
    a, b = (train(from_seed(factory, seed), SPLITS.train, seed=seed, **options) for seed in seeds)
    merges = {row: surgery.merge(a, b, data=SPLITS.calibration, progress=False, **ways) for row, ways in ROWS.items()}
    accuracies = {row: accuracy(model) for row, model in merges.items()}
    return Pair(title, (a, b), (accuracy(a) + accuracy(b)) / 2, merges, accuracies)


def finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def draw_bars(axes: Axes, pairs: list[Pair]) -> None:
    for place, pair in enumerate(pairs):
        for number, (row, value) in enumerate(pair.accuracies.items()):
            x = place + 0.27 * (number - 1)
            axes.bar(x, value, 0.25, color=COLOURS[row], label=row if place == 0 else None)
            axes.text(x, value + 1.5, f"{value:.0f}", ha="center", fontsize=9, color=INK)
        axes.plot((place - 0.42, place + 0.42), [pair.reached] * 2, color=INK, linewidth=1.2, linestyle="--")
        axes.text(place - 0.27, pair.reached + 2, f"sources {pair.reached:.0f}", ha="center", fontsize=9, color=INK)
    axes.set(ylim=(0, 112), ylabel="test accuracy, %", xticks=range(len(pairs)))
    axes.set_xticklabels([pair.title for pair in pairs], fontsize=9.5)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, columnspacing=1)
    finish(axes)


def draw_overview(pairs: list[Pair]) -> Figure:
    """What merging does on the left, what it gives on the right."""
    figure = Figure(figsize=(10.4, 3.9))
    left = figure.add_axes((0, 0, 0.5, 1))
    bare(left, 5.2, 3.9)
    orders = ((0, 1, 2, 3), (2, 0, 3, 1))
    for y, name, order in ((2.9, "network a", orders[0]), (1.0, "network b", orders[1])):
        network(left, 0.35, y, [(UNITS[unit],) for unit in order])
        write(left, 1.1, y + 0.92 if y > 2 else y - 0.9, name, size=10.5)
    network(left, 3.3, 1.95, [(UNITS[unit], "white") for unit in orders[0]])
    write(left, 4.05, 0.86, "one network,\nsame size and speed", size=10.5)
    arrow(left, (2.1, 2.75), (3.0, 2.2))
    arrow(left, (2.1, 1.15), (3.0, 1.7))
    write(left, 2.55, 3.15, "match units", size=9.5, colour=GREY)
    write(left, 2.62, 0.72, "average,\nrenormalize", size=9.5, colour=GREY)
    draw_bars(figure.add_axes((0.56, 0.2, 0.43, 0.76)), pairs)
    return figure


def draw_vanishing(pair: Pair) -> Figure:
    """What each layer of a merged network keeps of its sources' features."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, model in pair.merges.items():
        found = surgery.diagnose(model, sources=pair.sources, data=SPLITS.calibration, progress=False)
        axes.plot(range(1, len(found.ratios) + 1), found.ratios, "o-", color=COLOURS[row], label=row, linewidth=1.8)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set(ylim=(0, 1.25), xlabel="layer", ylabel="feature norm, relative to the sources")
    axes.legend(fontsize=9, frameon=False, loc="lower left")
    finish(axes)
    return figure


def deviations(model: nn.Module, layer: str) -> Tensor:
    """Deviation of each unit of a layer over the calibration images and all positions."""
    graph_module = surgery.trace(model, torch.zeros(1, 1, 8, 8))
    (node,) = surgery.select(graph_module, where=lambda node: node.target == layer)
    (moments,) = surgery.measure(graph_module, [node], SPLITS.calibration, progress=False).values()
    return moments.std


def draw_spread(pair: Pair, layer: str) -> Figure:
    """Deviations of one layer's units: the matched merge's, before and after, over its sources' mean."""
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots()
    goal = deviations(pair.sources[0], layer)  # units of the merge are in the order of a
    rescaled = surgery.merge(
        *pair.sources, data=SPLITS.calibration, matching="activations", renormalize="rescale", progress=False
    )
    for label, model, colour in (
        ("averaged", pair.merges["units matched"], COLOURS["units matched"]),
        ("averaged and rescaled", rescaled, COLOURS["matched and renormalized"]),
    ):
        axes.scatter(goal, deviations(model, layer), s=14, color=colour, label=label, alpha=0.8, linewidths=0)
    top = float(goal.max()) * 1.05
    axes.plot((0, top), (0, top), color=INK, linewidth=1, linestyle="--")
    axes.set(xlim=(0, top), ylim=(0, None), xlabel="deviation of a unit in source a", ylabel="in the merged network")
    axes.legend(fontsize=9, frameon=False)
    finish(axes)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain = make_pair("6 convolutions, no norm layers", TinyConvNet, (1, 2), 15, 0.03)
    residual = make_pair("residual, BatchNorm", TinyResNet, (0, 1), 12, 0.1)
    for pair in (plain, residual):
        print(
            pair.title, f"sources {pair.reached:.1f}", {row: round(value, 1) for row, value in pair.accuracies.items()}
        )
    save(draw_overview([plain, residual]), "overview.svg")
    save(draw_vanishing(plain), "vanishing.svg")
    save(draw_spread(plain, "convs.4"), "spread.svg")
    print("written to", IMAGES)

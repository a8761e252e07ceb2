"""Seconds to trace networks and to find their permutation groups, against the number of graph nodes.

Models are built first, with cheap random weights or, the largest, on the meta device: weights play no part. Both steps
are single-threaded Python, so seconds are those of the CPU, which a busy machine changes less than the clock; wall
seconds are printed too. The line of the figure is fitted to the logarithms: a slope of 1 means seconds in proportion to
nodes.

    python docs/benchmarks/discovery.py
    python docs/benchmarks/discovery.py --plot docs/images/discovery.png
    python docs/benchmarks/discovery.py torchvision:resnet50 timm:convnext_tiny
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import Stopwatch, begin, parser
from torch import nn

import vfsurgery as surgery
from vfsurgery.testing.zoo.twins import TooLargeError, build_quickly

MODELS = (
    "torchvision:alexnet",
    "torchvision:vgg16",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:convnext_tiny",
    "torchvision:googlenet",
    "torchvision:resnet50",
    "torchvision:efficientnet_b0",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:regnet_y_400mf",
    "torchvision:inception_v3",
    "torchvision:mnasnet1_0",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "torchvision:densenet121",
    "torchvision:resnet152",
    "torchvision:densenet201",
    "torchvision:efficientnet_b7",
    "torchvision:maxvit_t",
    "torchvision:swin_v2_b",
    "timm:test_vit",
    "timm:resnet18",
    "timm:vit_large_patch16_224",
    "timm:mixer_b16_224",
    "timm:xcit_small_24_p8_224",
    "timm:swin_large_patch4_window7_224",
    "timm:hrnet_w18",
    "timm:tf_efficientnetv2_l",
)
TORCHVISION, TIMM = "#0072B2", "#D55E00"
NAMED = {
    "torchvision:alexnet": (7, -4),
    "torchvision:resnet18": (-7, 3),
    "torchvision:vit_b_16": (-7, -9),
    "torchvision:resnet152": (7, -9),
    "torchvision:densenet121": (-7, 3),
    "torchvision:densenet201": (-7, 3),
    "timm:vit_large_patch16_224": (7, -9),
    "timm:hrnet_w18": (-7, 3),
    "timm:swin_large_patch4_window7_224": (7, -14),
}
"""Models whose names the figure shows, and where: offsets in points, to the left of the dot if negative."""


@dataclass(frozen=True)
class Found:
    """What one model took: graph nodes, and seconds of tracing and of grouping."""

    spec: str
    nodes: int
    groups: int
    coverage: float
    trace: Stopwatch
    group: Stopwatch

    @property
    def seconds(self) -> float:
        """CPU seconds of both steps."""
        return self.trace.cpu + self.group.cpu

    def __str__(self) -> str:
        wall = self.trace.wall + self.group.wall
        seconds = f"trace {self.trace.cpu:.2f}, groups {self.group.cpu:.2f}, together {self.seconds:.2f} s CPU"
        rest = f"{wall:.2f} s wall; {self.groups} groups, {self.coverage:.0%} of parameters"
        return f"{self.spec:<38} {self.nodes:>5} nodes: {seconds}, {rest}"


def measure(spec: str) -> Found:
    """Trace one model and find its groups."""
    model = build(spec)
    tracing, grouping = Stopwatch(), Stopwatch()
    gc.collect()
    with tracing:
        graph = surgery.trace(model)
    with grouping:
        groups = surgery.find_groups(graph)
    return Found(spec, len(graph.graph.nodes), len(groups), groups.coverage, tracing, grouping)


def build(spec: str) -> nn.Module:
    """Build a model with cheap weights, or without any if it is too large for that."""
    try:
        return build_quickly(spec)
    except TooLargeError:
        return build_quickly(spec, meta=True)


def fit(found: Sequence[Found]) -> tuple[float, float]:
    """Slope and offset of log10 seconds over log10 nodes, by least squares."""
    nodes, seconds = (np.log10([getattr(model, name) for model in found]) for name in ("nodes", "seconds"))
    slope, offset = np.polyfit(nodes, seconds, 1)
    return float(slope), float(offset)


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw seconds over nodes, both logarithmic, with the fitted line."""
    slope, offset = fit(found)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for library, colour in (("torchvision", TORCHVISION), ("timm", TIMM)):
        shown = [model for model in found if model.spec.startswith(library)]
        axes.scatter([m.nodes for m in shown], [m.seconds for m in shown], color=colour, label=library, zorder=3)
    ends = np.array([min(model.nodes for model in found), max(model.nodes for model in found)])
    axes.plot(ends, 10**offset * ends**slope, color="#666666", linestyle="--", label=f"fit: nodes ** {slope:.2f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for model in found:
        if model.spec in NAMED:
            place, name = NAMED[model.spec], model.spec.partition(":")[2].partition("_patch")[0]
            side = "left" if place[0] > 0 else "right"
            axes.annotate(name, (model.nodes, model.seconds), place, textcoords="offset points", ha=side, fontsize=9)
    axes.set_xlabel("nodes of the graph")
    axes.set_title("CPU seconds to trace and to find all groups", loc="left")
    axes.set_xticks([20, 50, 100, 200, 500, 1000, 2000])
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the options and print one line per model, then what they have in common."""
    made = parser(__doc__)
    made.add_argument(
        "models", nargs="*", metavar="MODEL", help="timm:NAME or torchvision:NAME (default: 28 of all sizes)"
    )
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure")
    options = made.parse_args()
    begin(options.threads)
    surgery.find_groups(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(2, 2))  # what only a first call imports
    found: list[Found] = []
    for spec in options.models or MODELS:
        found.append(measure(spec))
        print(found[-1], flush=True)
    worst = max(found, key=lambda model: model.seconds)
    print(f"median {statistics.median(m.seconds for m in found):.2f} s, worst {worst.seconds:.2f} s ({worst.spec})")
    if len(found) > 1:
        print(f"slope of log seconds over log nodes: {fit(found)[0]:.2f}")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()

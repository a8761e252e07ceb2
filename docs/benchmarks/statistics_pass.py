"""Statistics of all permutation groups of two sources, in one pass over the data, against the bare forward passes.

The ratio is the price of statistics: 1 would mean that they cost nothing beyond running both networks. Bare and
observed passes alternate, and the fastest of each counts, so that other work on the machine disturbs both alike. The
first ratio is for what activation matching reads (correlations), the second for that and the moments of REPAIR.

    python docs/benchmarks/statistics_pass.py
    python docs/benchmarks/statistics_pass.py --network resnet50@224 --images 8

(Not ``statistics.py``: a script's folder comes first on the path, so it would hide the module of that name in Python's
library from all scripts here.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from timing import Stopwatch, begin, parser
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.stats.collect import Site, group_sites, survey


def vgg11(width: int = 32) -> nn.Module:
    """Eight convolutions without normalization for images of 32x32, then one linear layer."""
    w = width
    features = torchvision.models.vgg.make_layers(
        [w, "M", 2 * w, "M", *[4 * w] * 2, "M", *[8 * w] * 2, "M", *[8 * w] * 2]
    )
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vgg11@32": (vgg11, 32, 500),
    "resnet18@32": (lambda: torchvision.models.resnet18(num_classes=10), 32, 500),
    "resnet18@224": (torchvision.models.resnet18, 224, 16),
    "resnet50@224": (torchvision.models.resnet50, 224, 16),
}
"""By name: how to build the network, its image size, and the images per batch."""


def fastest(passes: dict[str, Callable[[], object]], repeats: int) -> dict[str, Stopwatch]:
    """Run all passes in turn, several times, and return the fastest run of each."""
    runs: dict[str, list[Stopwatch]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, run in passes.items():
            watch = Stopwatch()
            with watch:
                run()
            runs[name].append(watch)
    return {name: min(found, key=lambda watch: watch.wall) for name, found in runs.items()}


@torch.no_grad()
def measure(name: str, count: int | None, repeats: int) -> None:
    """Print the ratios for one network."""
    factory, size, default_count = NETWORKS[name]
    models = [factory().eval() for _ in range(2)]
    images = torch.randn(count or default_count, 3, size, size)
    graphs = [surgery.trace(model, images[:2]) for model in models]
    groups = surgery.find_groups(graphs[0])
    pairs = group_sites(graphs[0], groups, images.device)
    units = dict(surgery.Repair().reads(graphs[0], groups))
    watches = fastest(
        {
            "bare": lambda: [model(images) for model in models],
            "correlations": lambda: _observe(graphs, images, pairs, {}),
            "correlations and moments": lambda: _observe(graphs, images, pairs, units),
        },
        repeats,
    )
    bare = watches.pop("bare")
    print(f"{name}, {len(images)} images, {len(pairs)} groups, bare forward passes of both: {bare}")
    for label, watch in watches.items():
        print(f"  {label}: {watch}; {watch.wall / bare.wall:.2f} x wall, {watch.cpu / bare.cpu:.2f} x CPU")


def _observe(
    graphs: list[fx.GraphModule], images: Tensor, pairs: dict[str, tuple[Site, ...]], units: dict[str, Site]
) -> object:
    return survey(graphs, [images], pairs, units)


def main() -> None:
    """Read the options and print the ratios."""
    made = parser(__doc__)
    made.add_argument("--network", action="append", choices=list(NETWORKS), help="only this one; may be repeated")
    made.add_argument("--images", type=int, help="images per pass (default: 500 of 32x32, 16 of 224x224)")
    made.add_argument("--repeats", type=int, default=5, help="passes of each kind (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    for name in options.network or NETWORKS:
        measure(name, options.images, options.repeats)


if __name__ == "__main__":
    main()

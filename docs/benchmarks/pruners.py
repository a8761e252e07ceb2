"""Accuracy of the trained networks of a shared folder after each pruner, before anything is repaired, and its seconds.

Test accuracy (%) in float32 by sparsity of all convolutions and linear layers. Data is random training images, without
labels. CPU seconds are of one pruning (the mean over the sparsities), and beside them how many forward passes over the
same images take as long. Where the folder is missing, the script says so and stops.

    python docs/benchmarks/pruners.py
    python docs/benchmarks/pruners.py --pair vgg11_half --calibration 1000 --test 2000 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from pairs import Images, folder_parser, is_there, load_images, load_pair
from timing import Stopwatch, begin
from torch import nn

import vfsurgery as surgery
from vfsurgery.pruning import PRUNERS

PAIRS = ("vgg11_half", "tv_resnet18")
SCOPES = {"magnitude": ("global", "layer"), "wanda": ("row", "layer"), "sparsegpt": ("layer", "global")}
"""Scopes of methods that are measured in several; of others in the method's own."""


def forward_seconds(model: nn.Module, images: Images) -> float:
    """One bare pass over the calibration images."""
    watch = Stopwatch()
    with watch, torch.no_grad():
        for batch in images.calibration:
            model(batch)
    return watch.cpu


def measure(name: str, images: Images, options: argparse.Namespace) -> None:
    """Print the table of one network."""
    model, _ = load_pair(options.shared, name)
    bare = forward_seconds(model, images)
    dense = surgery.evaluate(model, images.test, progress=False)
    print(f"\n{name}: {dense}; one pass over {sum(map(len, images.calibration))} images {bare:.1f} CPU s")
    titles = ["method", "scope", *(f"{100 * sparsity:g} %" for sparsity in options.sparsity), "CPU seconds", "passes"]
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for method in options.method or PRUNERS:
        for scope in SCOPES.get(method, (PRUNERS[method]().scope,)):
            watch, cells = Stopwatch(), list[str]()
            for sparsity in options.sparsity:
                with watch:
                    sparse = surgery.prune(
                        model, sparsity, method=method, scope=scope, data=images.calibration, allow_empty=True,
                        progress=False,
                    )  # fmt: skip
                cells.append(f"{100 * surgery.evaluate(sparse, images.test, progress=False).accuracy:.1f}")
            seconds = watch.cpu / len(options.sparsity)
            print(f"| {method} | {scope} | {' | '.join(cells)} | {seconds:.1f} | {seconds / bare:.2f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and print one table per network."""
    options = _parser().parse_args(arguments)
    if not is_there(options.shared):
        return
    begin(options.threads)
    images = load_images(options.shared, options.cache, calibration=options.calibration, test=options.test)
    for name in options.pair or PAIRS:
        measure(name, images, options)


def _parser() -> argparse.ArgumentParser:
    made = folder_parser(__doc__)
    made.add_argument("--pair", action="append", choices=PAIRS, help="measure this network only; may be repeated")
    made.add_argument("--method", action="append", choices=list(PRUNERS), help="this method only; may be repeated")
    made.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    made.add_argument("--calibration", type=int, default=1000, help="images for statistics (default: %(default)s)")
    made.add_argument("--test", type=int, default=10_000, help="images for accuracy (default: %(default)s)")
    return made


if __name__ == "__main__":
    main()

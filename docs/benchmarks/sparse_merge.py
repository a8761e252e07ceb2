"""Merge the trained CIFAR-10 pairs of a shared folder after pruning: what each choice of masks= keeps.

Each source is pruned by itself (global magnitude), so that the masks differ, and repaired by nothing. Pairs are matched
on activations and renormalized as the architecture has it; accuracy (%) is on the 10,000 test images. Where the folder
is missing, the script says so and stops.

    python docs/benchmarks/sparse_merge.py
    python docs/benchmarks/sparse_merge.py --pair vgg11_half --sparsity 0.5 0.9 --test 2000
"""

from __future__ import annotations

from pathlib import Path

import pairs
from timing import Stopwatch, begin
from torch import nn

import vfsurgery as surgery
from vfsurgery.records.results import merge_report_of

ROOT = Path(__file__).resolve().parents[2]
NORMALIZATION = {"vgg11_half": "rescale", "tv_resnet18": "reset"}
CHOICES = ("intersect", "union", "reprune")


def row(sources: list[nn.Module], name: str, sparsity: float, images: pairs.Images) -> str:
    """One line of the table: pruned sources, and their merges by choice with accuracy and sparsity."""
    pruned = [
        surgery.prune(model, sparsity, scope="global", progress=False) if sparsity else model for model in sources
    ]
    options = {"data": images.calibration, "renormalize": NORMALIZATION[name], "progress": False}
    found = surgery.match(*pruned, data=images.calibration, matching="activations", progress=False)
    cells = [" / ".join(f"{100 * accuracy(model, images):.1f}" for model in pruned)]
    for choice in CHOICES:
        watch = Stopwatch()
        with watch:
            merged = surgery.merge(*pruned, masks=choice, matching=surgery.Given(found), **options)
        masks = merge_report_of(merged).masks
        zeros = 0.0 if masks is None else masks.result
        cells.append(f"{100 * accuracy(merged, images):.1f} at {zeros:.0%} | {watch.cpu:.1f}")
    return f"| {name} | {sparsity:.0%} | {' | '.join(cells)} |"


def accuracy(model: nn.Module, images: pairs.Images) -> float:
    """On the test images."""
    return surgery.evaluate(model, images.test, progress=False).accuracy


def main() -> None:
    """Read the options and print the table."""
    made = pairs.folder_parser(__doc__)
    made.add_argument("--pair", nargs="*", choices=NORMALIZATION, default=list(NORMALIZATION))
    made.add_argument("--sparsity", type=float, nargs="*", default=[0.0, 0.5, 0.7, 0.9])
    made.add_argument("--calibration", type=int, default=5000, help="training images (default: %(default)s)")
    made.add_argument("--test", type=int, default=10_000, help="test images (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    if not options.shared.is_dir():
        print(f"skipped: there is no folder {options.shared}")
        return
    images = pairs.load_images(options.shared, options.cache, calibration=options.calibration, test=options.test)
    print(
        f"\n| pair | sparsity | sources | {' | '.join(f'{choice} | CPU s' for choice in CHOICES)} |\n|{'---|' * 9}",
        flush=True,
    )
    for name in options.pair:
        sources = list(pairs.load_pair(options.shared, name))
        for sparsity in options.sparsity:
            print(row(sources, name, sparsity, images), flush=True)


if __name__ == "__main__":
    main()

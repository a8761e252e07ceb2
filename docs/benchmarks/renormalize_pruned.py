"""Prune the trained CIFAR-10 networks of a shared folder by magnitude, repair them, and print what each keeps.

``torch.nn.utils.prune`` sets the smallest weights of all convolutions and linear layers to zero, over the network
(global) or in each layer (layer). A row has the accuracy (%) of the pruned network, then that of the repaired one for
every choice of images: 64 in one batch (mean of ``--draws`` sets, with the lowest), and 5,000. ``lost`` is what
pruning has cost against the dense network, ``won back`` the share of it that 5,000 images bring back. Below each table
stand the bars, and the cost of one repair in forward passes of the dense network over the same images (CPU seconds,
less those of a repair on two images: tracing). Where the folder is missing, the script says so and stops.

    python docs/benchmarks/renormalize_pruned.py --quick
    python docs/benchmarks/renormalize_pruned.py --pair tv_resnet18 --renormalize reset
    python docs/benchmarks/renormalize_pruned.py --output renormalize_pruned.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pairs import BATCH, SOURCES, Images, folder_parser, is_there, load_images, load_pair
from timing import Stopwatch, begin
from torch import Tensor, nn
from torch.nn.utils import prune

import vfsurgery as surgery

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SCOPES = ("global", "layer")
FEW = 64


@dataclass(frozen=True)
class Row:
    """Accuracies (%) of one pruned network: as it is, repaired with few images (once per draw), and with all."""

    scope: str
    sparsity: float
    dense: float
    pruned: float
    few: list[float]
    many: float

    @property
    def won_back(self) -> float:
        """Share of what pruning has cost that the repair brings back."""
        return (self.many - self.pruned) / max(self.dense - self.pruned, 1e-9)

    def __str__(self) -> str:
        lost = self.dense - self.pruned
        won = f"{self.won_back:.0%}" if lost >= 1 else ""
        few = f"{statistics.mean(self.few):.2f} ({min(self.few):.2f})"
        return (
            f"| {self.scope} | {self.sparsity:.0%} | {self.pruned:.2f} | {few} | {self.many:.2f} | {lost:.2f} | {won} |"
        )


def pruned_copy(dense: nn.Module, scope: str, sparsity: float) -> nn.Module:
    """A copy without its smallest weights; biases and norms are left alone."""
    model = copy.deepcopy(dense)
    weights = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if scope == "global":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=sparsity)
    else:
        for module, name in weights:
            prune.l1_unstructured(module, name, amount=sparsity)
    for module, name in weights:
        prune.remove(module, name)
    return model


def accuracy(model: nn.Module, images: Images) -> float:
    """In percent."""
    return 100 * surgery.evaluate(model, images.test, progress=False).accuracy


def measure(
    name: str,
    shared: Path,
    images: Images,
    choice: str,
    draws: int,
    cells: Sequence[tuple[str, float]],
) -> list[Row]:
    """Prune, repair and score one network, printing the table's rows as they come, then what they prove."""
    dense, _ = load_pair(shared, name)
    pixels = torch.cat(images.calibration)
    few = [[pixels[start : start + FEW]] for start in range(0, draws * FEW, FEW)]
    best = accuracy(dense, images)
    print(f"\n### {name}, {choice}: dense {best:.2f}\n")
    print(f"| pruned | sparsity | pruned | {FEW} images (lowest) | {len(pixels)} images | lost | won back |")
    print("|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for scope, sparsity in cells:
        sparse = pruned_copy(dense, scope, sparsity)

        def repaired(data: list[Tensor], sparse: nn.Module = sparse) -> float:
            model = surgery.renormalize(sparse, reference=dense, data=data, renormalize=choice, progress=False)
            return accuracy(model, images)

        scores = [repaired(data) for data in few]
        rows.append(Row(scope, sparsity, best, accuracy(sparse, images), scores, repaired(images.calibration)))
        print(rows[-1], flush=True)
    _judge(rows)
    _time(dense, pruned_copy(dense, "global", 0.9), images.calibration, choice)
    return rows


def _judge(rows: Sequence[Row]) -> None:
    """Say where a bar is missed."""
    all_scores = [(row, score) for row in rows for score in [*row.few, row.many]]
    worst, score = min(all_scores, key=lambda pair: pair[1] - pair[0].pruned)
    print(f"\nworst change by a repair: {score - worst.pruned:+.2f} ({worst.scope} {worst.sparsity:.0%}); bar -0.3")
    behind, score = max(((row, row.many - few) for row in rows for few in row.few), key=lambda pair: pair[1])
    print(f"most that {FEW} images are behind: {score:.2f} ({behind.scope} {behind.sparsity:.0%}); bar 3")
    lost = [row for row in rows if row.dense - row.pruned > 20]
    if lost:
        least = min(lost, key=lambda row: row.won_back)
        print(
            f"least won back of more than 20 points lost: {least.won_back:.0%} ({least.scope} {least.sparsity:.0%}); "
            "bar 50%"
        )


def _time(dense: nn.Module, sparse: nn.Module, batches: list[Tensor], choice: str) -> None:
    """Print what a repair costs in forward passes."""
    watches = [Stopwatch() for _ in range(3)]
    with torch.no_grad(), watches[0]:
        for batch in batches:
            dense(batch)
    for watch, data in zip(watches[1:], ([batches[0][:2]], batches), strict=True):
        with watch:
            surgery.renormalize(sparse, reference=dense, data=data, renormalize=choice, progress=False)
    forward, traced, repair = (watch.cpu for watch in watches)
    print(
        f"one repair: {repair:.1f} CPU s, {traced:.1f} of them tracing; the rest is {(repair - traced) / forward:.2f} "
        f"forward passes of {forward:.1f} CPU s; bar 3"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and print one table per network."""
    options = _parser().parse_args(arguments)
    if not is_there(options.shared):
        return
    begin(options.threads)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    calibration, test, sparsities = (1000, 2000, (0.7, 0.9)) if options.quick else (5000, options.test, SPARSITIES)
    cells = [(scope, share) for scope in options.scope or SCOPES for share in options.sparsity or sparsities]
    images = load_images(options.shared, options.cache, calibration=calibration, test=test)
    found = {
        name: measure(name, options.shared, images, options.renormalize, options.draws, cells)
        for name in options.pair or SOURCES
    }
    if options.output:
        settings = {"renormalize": options.renormalize, "calibration": calibration, "batch": BATCH, "test": test}
        rows = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        options.output.write_text(json.dumps({"settings": settings, "networks": rows}, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    made = folder_parser(__doc__)
    made.add_argument("--pair", action="append", choices=list(SOURCES), help="this network only; may be repeated")
    made.add_argument("--scope", action="append", choices=SCOPES, help="this scope only; may be repeated")
    made.add_argument("--sparsity", action="append", type=float, help="this sparsity only; may be repeated")
    made.add_argument("--renormalize", default="auto", help="how to repair (default: %(default)s)")
    made.add_argument("--draws", type=int, default=3, help=f"sets of {FEW} images (default: %(default)s)")
    made.add_argument("--test", type=int, default=10_000, help="test images (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="two sparsities, fewer images: a look, not a measurement")
    made.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    return made


if __name__ == "__main__":
    main()

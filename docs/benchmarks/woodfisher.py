"""Prune two trained CIFAR-10 networks by WoodFisher, by the diagonal Fisher matrix, by magnitude; print what is left.

Gradients are of one labelled training image each, 400 of them unless ``--samples`` says otherwise; accuracy (%) is of
10,000 test images. Where the network has BatchNorm, the second figure is with its running statistics recomputed on
5,000 training images (RESET). Seconds are of saliencies and of the step of the kept weights each; saliencies are
computed once per method and shared by all sparsities. The peak is that of the whole process so far, as the kernel
counts it, torch and CIFAR-10 included; the line above the table says how much that was before. Without the folder of
networks the script says so and stops.

    python docs/benchmarks/woodfisher.py
    python docs/benchmarks/woodfisher.py --network vgg11_half --sparsity 0.8 --threads 1
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pairs import Images, decoded, folder_parser, is_there, load_images, load_networks, load_pair
from timing import Stopwatch, begin
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.pruning import DiagonalFisher, Magnitude, Masks, Pruner, Pruning, WoodFisher
from vfsurgery.pruning.base import Scope

NETWORKS = ("vgg11_half", "tv_resnet18")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass
class Saliencies:
    """What one method's first run found, and the seconds it took."""

    scores: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    diagonals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    watch: Stopwatch = field(default_factory=Stopwatch)


@dataclass(frozen=True)
class Timed(Pruner):
    """Another pruner, whose saliencies are computed once for all sparsities, and which is timed."""

    name: ClassVar[str] = "timed"
    pruner: Pruner
    saliencies: Saliencies = field(default_factory=Saliencies)
    step: Stopwatch = field(default_factory=Stopwatch)

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """Those of the other pruner."""
        found = self.saliencies
        if not found.scores:
            with found.watch:
                found.scores |= self.pruner.score(work)
            found.diagonals |= work.cache.get("inverse diagonal", {})
        work.cache["inverse diagonal"] = found.diagonals
        yield from found.scores.items()

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        """That of the other pruner."""
        with self.step:
            found = list(self.pruner.update(work, masks))
        yield from found


def pruners(samples: int, batch: int) -> dict[str, tuple[Timed, Scope]]:
    """By label: a pruner and its scope."""
    wood, saliencies = WoodFisher(samples=samples, batch=batch), Saliencies()
    return {
        "magnitude, global": (Timed(Magnitude()), "global"),
        "diagonal Fisher, by layer": (Timed(DiagonalFisher(samples=samples, batch=batch)), "layer"),
        "WoodFisher, global, sum": (Timed(wood, saliencies), "global"),
        "WoodFisher, global, none": (Timed(replace(wood, compensate="none"), saliencies), "global"),
        "WoodFisher, global, joint": (Timed(replace(wood, compensate="joint"), saliencies), "global"),
        "WoodFisher, by layer, joint": (Timed(replace(wood, compensate="joint"), saliencies), "layer"),
    }


def score(model: nn.Module, images: Images) -> str:
    """Accuracy, and where there is BatchNorm also the one after RESET."""
    shown = f"{100 * surgery.evaluate(model, images.test).accuracy:.1f}"
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return shown
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images.calibration:
            model(batch)
    return f"{shown} → {100 * surgery.evaluate(model.eval(), images.test).accuracy:.1f}"


def training_images(shared: Path, cache: Path, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random training images with their labels."""
    pixels = decoded(shared / "data" / "cifar10.tar.gz", cache / "cifar10.safetensors")
    drawn = torch.randperm(len(pixels["train_labels"]), generator=torch.Generator().manual_seed(seed))[:count]
    normalize: Any = load_networks(shared).normalize
    return normalize(pixels["train_images"][drawn]), pixels["train_labels"][drawn].long()


def peak() -> float:
    """GiB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(model: nn.Module, data: tuple[Tensor, Tensor], images: Images, options: Any) -> None:
    """Print a table of accuracies, a row per pruner as it comes."""
    sparsities = options.sparsity or SPARSITIES
    print(f"| | {' | '.join(f'{100 * s:g} %' for s in sparsities)} | saliencies | one step | peak GiB |")
    print(f"|---|{'---|' * len(sparsities)}---|---|---|")
    for label, (pruner, scope) in pruners(options.samples, options.batch).items():
        if options.only and not any(part in label for part in options.only):
            continue
        cells: list[str] = []
        for sparsity in sparsities:
            pruned = surgery.prune(
                model, sparsity, method=pruner, scope=scope, data=data, memory=options.memory, allow_empty=True
            )
            cells.append(score(pruned, images))
        pruner.step.wall, pruner.step.cpu = (total / len(cells) for total in (pruner.step.wall, pruner.step.cpu))
        print(
            f"| {label} | {' | '.join(cells)} | {pruner.saliencies.watch} | {pruner.step} | {peak():.2f} |", flush=True
        )


def main() -> None:
    """Read the options and print one table per network."""
    made = folder_parser(__doc__)
    made.add_argument("--network", action="append", choices=NETWORKS, help="this one only; may be repeated")
    made.add_argument("--sparsity", action="append", type=float, help="this one only; may be repeated")
    made.add_argument("--only", action="append", metavar="TEXT", help="rows with this in their label; may be repeated")
    made.add_argument("--samples", type=int, default=400, help="gradients (default: %(default)s)")
    made.add_argument("--batch", type=int, default=1, help="images per gradient (default: %(default)s)")
    made.add_argument("--memory", type=float, default=2.0, help="GiB for gradients (default: %(default)s)")
    made.add_argument("--test", type=int, default=10_000, help="test images (default: %(default)s)")
    options = made.parse_args()
    if not is_there(options.shared):
        return
    begin(options.threads)
    images = load_images(options.shared, options.cache, test=options.test)
    data = training_images(options.shared, options.cache, options.samples * options.batch)
    for name in options.network or NETWORKS:
        model, _ = load_pair(options.shared, name)
        print(f"\n### {name}: {score(model, images)}, {peak():.2f} GiB before pruning\n")
        measure(load_pair(options.shared, name)[0], data, images, options)


if __name__ == "__main__":
    main()

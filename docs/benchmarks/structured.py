"""Structured pruning: what `prune_units` removes from models of torchvision and timm, and what trained networks keep.

The first table is about size: cheap random weights, `fraction` of the units of every group, no data. Units, parameters
and FLOPs are shares of the original's; seconds are of the whole call (tracing, groups, rehearsal, certificate, costs).
The second is about accuracy, on the trained CIFAR-10 pairs of a shared folder: saliencies, dropping against folding,
with and without renormalization. Where the folder is missing, the script says so and stops.

    python docs/benchmarks/structured.py sizes
    python docs/benchmarks/structured.py sizes torchvision:resnet50 timm:test_vit --fraction 0.5
    python docs/benchmarks/structured.py accuracy vgg11_half tv_resnet18 --test 2000
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import pairs
import torch
from timing import Stopwatch, begin, parser
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.groups import PermutationGroup
from vfsurgery.passes.costs import Cost
from vfsurgery.pruning.units import UnitPruneReport
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.testing.zoo.twins import build_quickly

MODELS = tuple(f"torchvision:{name}" for name in (
    "resnet18", "resnet50", "vgg11_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
    "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "inception_v3",
    "convnext_tiny", "vit_b_16", "swin_t",
)) + tuple(f"timm:test_{name}" for name in (
    "byobnet", "convnext", "convnext2", "convnext3", "efficientnet", "efficientnet_evos", "efficientnet_gn",
    "efficientnet_ln", "mambaout", "nfnet", "resnet", "vit", "vit2", "vit3", "vit4",
))  # fmt: skip


def sizes(options: Namespace) -> None:
    """Print one row per model."""
    print("| model | units | parameters | FLOPs | s | error | groups cut / whole | why the first of them is whole |")
    print("|---|---|---|---|---|---|---|---|")
    for spec in options.names or MODELS:
        model, watch = build_quickly(spec), Stopwatch()
        with watch:
            smaller = surgery.prune_units(model, options.fraction, scope=options.scope, progress=False)
        found = report(smaller)
        before, after = found.units
        ratio: Cost = found.after / found.before
        why = found.left_whole[0].reason.replace("|", "\\|")[:90] if found.left_whole else ""
        certificate = f"{found.certificate.error:.0e}" + " *" * found.certificate.random_weights
        print(
            f"| {spec} | {after / before:.2f} | {ratio.parameters:.2f} | {ratio.flops:.2f} | {watch.wall:.1f} | "
            f"{certificate} | {len(found.groups)} / {len(found.left_whole)} | {why} |",
            flush=True,
        )
    print("\n`*` the outputs do not show the units: proven on random weights in float64.")


def chance(group: PermutationGroup, state: Mapping[str, Tensor]) -> Tensor:
    """Random numbers."""
    return torch.rand(group.units, generator=torch.Generator().manual_seed(0))


def accuracy(options: Namespace) -> None:
    """Print one table per network."""
    root = pairs.ROOT.parent / "shared" if options.shared is None else options.shared
    if not root.is_dir():
        print(f"there is no folder {root} with trained pairs")
        return
    found = pairs.load_images(root, options.cache, calibration=options.calibration, test=options.test)
    for name in options.names or ("vgg11_half", "tv_resnet18"):
        model, _ = pairs.load_pair(root, name)
        print(f"\n{name}: {score(model, found.test)} %, {options.test} images; fraction {options.fraction}")
        print("| saliency | scope | dropped | + renormalized | folded | + renormalized | parameters | FLOPs |")
        print("|---|---|---|---|---|---|---|---|")
        for saliency in ("magnitude", "activation", chance):
            for scope in ("group", "global"):
                row: list[str] = []
                for removed in ("drop", "fold"):
                    for renormalize in (None, "auto"):
                        smaller = surgery.prune_units(
                            model, options.fraction, saliency=saliency, scope=scope, removed=removed,
                            renormalize=renormalize, data=found.calibration, progress=False,
                        )  # fmt: skip
                        row.append(score(smaller, found.test))
                ratio: Cost = report(smaller).after / report(smaller).before
                label = saliency if isinstance(saliency, str) else saliency.__name__.replace("_", " ")
                costs = f"{ratio.parameters:.2f} | {ratio.flops:.2f}"
                print(f"| {label} | {scope} | {' | '.join(row)} | {costs} |", flush=True)


def score(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> str:
    """Accuracy in percent."""
    return f"{100 * evaluate(model, batches, progress=False).accuracy:.1f}"


def report(model: nn.Module) -> UnitPruneReport:
    """The report of a model that was made smaller."""
    found = surgery.report_of(model)
    assert isinstance(found, UnitPruneReport)
    return found


def main() -> None:
    """Read the options and print the table asked for."""
    made = parser(__doc__)
    made.add_argument("table", choices=("sizes", "accuracy"))
    made.add_argument("names", nargs="*", metavar="NAME", help="models as in timm:NAME, or trained pairs")
    made.add_argument("--fraction", type=float, default=0.3, help="share of units to remove (default: %(default)s)")
    made.add_argument("--scope", choices=("group", "global"), default="group", help="for sizes (default: %(default)s)")
    made.add_argument("--shared", type=Path, help="the folder of trained pairs (default: ../shared)")
    made.add_argument("--cache", type=Path, default=Path("out/cache"), help="where images are kept unpacked")
    made.add_argument("--calibration", type=int, default=1000, help="images for statistics (default: %(default)s)")
    made.add_argument("--test", type=int, default=10000, help="images for accuracy (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    {"sizes": sizes, "accuracy": accuracy}[options.table](options)


if __name__ == "__main__":
    main()

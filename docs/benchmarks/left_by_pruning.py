"""Ask what layer-wise pruning leaves for a repair: what a linear layer reads in the features, which layer lost them.

The trained CIFAR-10 networks of a shared folder are pruned by magnitude in each layer. Accuracies (%) are of 2,000 test
images: pruned; repaired by one REPAIR, by one pass per layer, and, where there is BatchNorm, by RESET. ``readout`` is
that of a new last layer for the repaired network: a ridge regression of the labels of the 2,000 calibration images on
its features, the best of four penalties on the test images themselves. ``half`` is where half of the loss is won back.
The last columns leave the first layer dense. Where the folder is missing, the script says so and stops.

    python docs/benchmarks/left_by_pruning.py
    python docs/benchmarks/left_by_pruning.py --pair tv_resnet18 --sparsity 0.9
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from pairs import SOURCES, Images, folder_parser, is_there, load_images, load_pair
from timing import begin
from torch import Tensor, nn
from torch.nn import functional
from woodfisher import training_images

import vfsurgery as surgery
from vfsurgery.pruning.layers import prunable

PENALTIES = (1, 10, 100, 1000)
IMAGES = 2000


def features(model: nn.Module, head: str, batches: Sequence[Tensor]) -> Tensor:
    """What the last linear layer reads, ``(images, features)``, with a column of ones."""
    found: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    read = torch.cat(found).double()
    return torch.cat([read, torch.ones(len(read), 1, dtype=read.dtype)], 1)


def readout(model: nn.Module, head: str, images: Images, labels: Tensor) -> float:
    """Accuracy (%) of the best linear classifier of the last features."""
    seen = features(model, head, images.calibration)
    unseen = features(model, head, [batch for batch, _ in images.test])
    scale = seen.std(0).clamp_min(1e-6)
    scale[-1] = 1
    seen, unseen = seen / scale, unseen / scale
    right = torch.cat([given for _, given in images.test])
    goals, gram = functional.one_hot(labels).double(), seen.T @ seen
    eye = torch.eye(len(gram), dtype=gram.dtype)
    weights = [torch.linalg.solve(gram + penalty * eye, seen.T @ goals) for penalty in PENALTIES]
    return max(100 * float((unseen @ weight).argmax(1).eq(right).double().mean()) for weight in weights)


def cells(dense: nn.Module, sparsity: float, images: Images, labels: Tensor) -> Iterator[str]:
    """The columns of one sparsity."""
    names = list(prunable(dense))
    first, head = names[0], names[-1].removesuffix(".weight")

    def accuracy(model: nn.Module) -> float:
        return 100 * surgery.evaluate(model, images.test, progress=False).accuracy

    def repaired(sparse: nn.Module, choice: surgery.Pass | str = "auto") -> nn.Module:
        return surgery.renormalize(sparse, reference=dense, data=images.calibration, renormalize=choice, progress=False)

    sparse = surgery.prune(dense, sparsity, scope="layer", progress=False)
    units = sparse.get_parameter(first).detach().flatten(1).ne(0).sum(1)
    restored = repaired(sparse)
    yield f"{int(units.eq(0).sum())} of {len(units)}"
    yield f"{accuracy(sparse):.1f}"
    yield f"{accuracy(restored):.1f}"
    yield f"{accuracy(repaired(sparse, surgery.Repair(include_output=True, sequential=True))):.1f}"
    normed = any(isinstance(module, nn.BatchNorm2d) for module in dense.modules())
    yield f"{accuracy(repaired(sparse, 'reset')):.1f}" if normed else ""
    yield f"{readout(restored, head, images, labels):.1f}"
    yield f"{(accuracy(dense) + accuracy(sparse)) / 2:.1f}"
    sparse = surgery.prune(dense, sparsity, scope="layer", exclude=first, progress=False)
    yield f"{100 * surgery.Masks.of(sparse).sparsity:.2f}"
    yield f"{accuracy(sparse):.1f}"
    yield f"{accuracy(repaired(sparse)):.1f}"


COLUMNS = (
    *("sparsity", "first layer's units without weights", "pruned", "REPAIR", "a pass per layer", "RESET", "readout"),
    *("half", "first layer dense: sparsity", "pruned", "REPAIR"),
)


def main() -> None:
    """Read the options and print one table per network."""
    options = _parser().parse_args()
    if not is_there(options.shared):
        return
    begin(options.threads)
    images = load_images(options.shared, options.cache, calibration=IMAGES, test=IMAGES)
    labels = training_images(options.shared, options.cache, IMAGES)[1]  # of the same images, drawn by the same seed
    for name in options.pair or SOURCES:
        dense, _ = load_pair(options.shared, name)
        print(f"\n### {name}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for sparsity in options.sparsity or (0.8, 0.9, 0.95):
            print(f"| {sparsity:.0%} | {' | '.join(cells(dense, sparsity, images, labels))} |", flush=True)


def _parser() -> argparse.ArgumentParser:
    made = folder_parser(__doc__)
    made.add_argument("--pair", action="append", choices=list(SOURCES), help="this network only; may be repeated")
    made.add_argument("--sparsity", action="append", type=float, help="this sparsity only; may be repeated")
    return made


if __name__ == "__main__":
    main()

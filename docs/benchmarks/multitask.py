"""Two tasks in one network, on digits: methods, statistics of BatchNorm layers, and whether the task is told.

The base knows the classes 0 to 5. One expert learns 0 to 4, the other 5 to 9, each with a new head: from the base, or
from seeds of their own. All settings are fixed beforehand; test images are looked at once.

    python docs/benchmarks/multitask.py --seeds 3
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timing import begin, parser
from torch import nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.networks.demo import TinyResNet
from vfsurgery.training import from_seed, train

TASKS = {"low": (0, 5), "high": (5, 10)}
KNOWN = (0, 6)
"""Classes of the base."""
OF_ONE_BASE: dict[str, dict[str, Any]] = {
    "mean": {},
    "task arithmetic, 0.3": {"method": "task-arithmetic", "scale": 0.3},
    "TIES": {"method": "ties"},
    "AdaMerging": {"method": "adamerging"},
}
OF_SEEDS: dict[str, dict[str, Any]] = {
    "matched on images": {},
    "matched by weights": {"matching": "weights"},
    "not matched": {"matching": "identity"},
}
STATISTICS = "average", "joint", "per-task"


def part(images: TensorDataset, low: int, high: int) -> TensorDataset:
    """The images of some classes, counted from 0."""
    pixels, labels = images.tensors
    chosen = (labels >= low) & (labels < high)
    return TensorDataset(pixels[chosen], labels[chosen] - low)


def share(right: torch.Tensor) -> float:
    return 100 * float(right.double().mean())


def scores(network: surgery.Multitask, test: TensorDataset) -> list[float]:
    """Accuracy of each task, of all classes without being told the task, and how often the task was guessed."""
    pixels, labels = test.tensors
    with torch.no_grad():
        found = [
            share(network(own.tensors[0], task=task).argmax(1) == own.tensors[1])
            for task, bounds in TASKS.items()
            for own in [part(test, *bounds)]
        ]
        guess = network.concat()(pixels).argmax(1)
    border = TASKS["high"][0]
    return [*found, share(guess == labels), share((guess >= border) == (labels >= border))]


def experts_of(seed: int, base: nn.Module | None, images: TensorDataset) -> dict[str, nn.Module]:
    """Trained from a base, or each from a seed of its own."""
    found: dict[str, nn.Module] = {}
    for number, (task, (low, high)) in enumerate(TASKS.items()):
        own = 100 + 10 * seed + number
        model = from_seed(TinyResNet, own) if base is None else copy.deepcopy(base)
        model.fc = from_seed(partial(nn.Linear, model.fc.in_features, high - low), own)
        epochs, lr = (5, 0.1) if base is None else (3, 0.05)
        found[task] = train(model, part(images, low, high), epochs=epochs, lr=lr, seed=own, progress=False)
    return found


def rows_of(seed: int) -> dict[tuple[str, str], list[float]]:
    splits = digits(seed=seed)
    known = part(splits.train, *KNOWN)
    base = train(from_seed(lambda: TinyResNet(num_classes=6), seed), known, epochs=2, lr=0.1, seed=seed, progress=False)
    data = {task: part(splits.calibration, *bounds) for task, bounds in TASKS.items()}
    rows: dict[tuple[str, str], list[float]] = {}
    for told, origin, ways in (("one base", base, OF_ONE_BASE), ("other seeds", None, OF_SEEDS)):
        experts = experts_of(seed, origin, splits.train)
        rows[f"experts, {told}", ""] = [accuracy_of(experts, splits.test, task) for task in TASKS]
        for name, options in ways.items():
            for statistics in STATISTICS:
                given: Mapping[str, Any] = {"base": origin, "batchnorm": statistics, "data": data, **options}
                rows[f"{told}: {name}", statistics] = scores(
                    surgery.multitask(experts, progress=False, **given), splits.test
                )
    return rows


def accuracy_of(experts: Mapping[str, nn.Module], test: TensorDataset, task: str) -> float:
    own = part(test, *TASKS[task])
    with torch.no_grad():
        return share(experts[task](own.tensors[0]).argmax(1) == own.tensors[1])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=3, help="of the whole pipeline (default: %(default)s)")
    arguments = made.parse_args()
    begin(arguments.threads)
    found = [rows_of(seed) for seed in range(arguments.seeds)]
    print(
        "| trunk | statistics | low | high | mean | of own | joint | task guessed |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    own: list[float] = []
    for key in found[0]:
        values = [sum(column) / len(column) for column in zip(*(each[key] for each in found), strict=True)]
        own = values if not key[1] else own
        mean = sum(values[:2]) / 2
        ratio = 50 * sum(value / best for value, best in zip(values[:2], own, strict=True))
        cells = [*values[:2], mean, ratio, *values[2:]]
        print("|", " | ".join([*key, *(f"{value:.1f}" for value in cells), *[""] * (6 - len(cells))]), "|", flush=True)


if __name__ == "__main__":
    main()

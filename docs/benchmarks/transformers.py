"""Merge small transformers, ConvNeXts and GroupNorm nets trained on digits, and print what each merge keeps.

Four networks of each architecture learn scikit-learn's 8x8 digits from different seeds; three pairs are merged in every
way. Accuracy (%) is on 500 test images, statistics come from 297 others; a cell is the mean over the pairs with the
lowest and the highest. A second table says what nested groups add: orders of heads (or of groups of channels), of the
dims inside them, or of both are left out of one and the same matching. Trained weights are kept for the next time.

    python docs/benchmarks/transformers.py
    python docs/benchmarks/transformers.py --network vit --epochs 5 --pairs 1
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timing import Stopwatch, begin, parser
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.groups import GroupSet, Permutations
from vfsurgery.matching import Given, Matching, Problem
from vfsurgery.matching.nested import BlockAssignment, families
from vfsurgery.matching.weights import match_rest
from vfsurgery.passes import Repair
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.scoring.evaluation import compare
from vfsurgery.training import from_seed

ROOT = Path(__file__).resolve().parents[2]
BATCH = 50
RATE = 2e-3


def vit() -> nn.Module:
    """16 tokens of 2x2 pixels and a class token; four blocks with four heads of 12 dims: 115,000 parameters."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4, weight_init="jax"
    )


def convnext() -> nn.Module:
    """Four stages of two blocks, from 8x8 maps of 24 channels to one place with 64: 170,000 parameters."""
    return ConvNeXt(in_chans=1, num_classes=10, depths=(2, 2, 2, 2), dims=(24, 32, 48, 64), patch_size=1)


class Block(nn.Module):
    """Two convolutions, each with a GroupNorm of four groups, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps of one shape in and out."""
        y = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(x + self.norms[1](self.convs[1](y)))


def groupnorm() -> nn.Module:
    """A stem and three residual blocks of 32 channels, pooled once: 56,000 parameters."""
    stem = (nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.GroupNorm(4, 32), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(*stem, Block(32), nn.MaxPool2d(2), Block(32), Block(32), *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "convnext": convnext, "groupnorm": groupnorm}
PAIRS = ((0, 1), (2, 3), (0, 2))
NORMALIZATIONS: dict[str, Renormalization] = {
    "none": None,
    "REPAIR, output layer as it is": "repair",
    "REPAIR (the default)": Repair(include_output=True),
    "RESCALE": "rescale",
}


def learn(model: nn.Module, train: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """Train in place with AdamW and one learning-rate cycle, on images with noise of half their deviation."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = train.tensors
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * -(-len(images) // BATCH))
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            noise = 0.5 * torch.randn(images[index].shape, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images[index] + noise), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def sources_of(name: str, count: int, epochs: int, cache: Path, train: TensorDataset) -> list[nn.Module]:
    """Networks trained from seeds 0, 1, ..., or their weights from the last time."""
    models: list[nn.Module] = []
    for seed in range(count):
        model = from_seed(NETWORKS[name], seed)
        path = cache / f"{name}_{epochs}_epochs_seed{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            watch = Stopwatch()
            with watch:
                learn(model, train, epochs, seed)
            print(f"trained {name} from seed {seed}: {watch}", flush=True)
            cache.mkdir(parents=True, exist_ok=True)
            save_file(dict(model.state_dict()), path)
        models.append(model.eval())
    return models


@dataclass(frozen=True)
class Data:
    """Unlabelled batches for statistics, labelled ones to score on."""

    calibration: list[Tensor]
    test: list[tuple[Tensor, Tensor]]


Accuracies = dict[tuple[str, str], float]
"""By row and column of a table."""


def measure(a: nn.Module, b: nn.Module, data: Data) -> tuple[Accuracies, Accuracies]:
    """All merges of one pair: by matching and normalization, and by which nested orders were kept."""
    groups = surgery.find_groups(a, data.calibration[0][:2])
    scores = compare({"a": a, "b": b}, data.test, progress=False)
    sources = {"sources": (scores["a"].accuracy + scores["b"].accuracy) / 2, "ensemble": scores["ensemble"].accuracy}
    table: Accuracies = {(name, "none"): accuracy for name, accuracy in sources.items()}
    nested: Accuracies = {}
    for matching in ("identity", "weights", "activations"):
        orders = surgery.match(a, b, data=data.calibration, matching=matching, progress=False)
        for column in NORMALIZATIONS:
            table[matching, column] = accuracy_of(a, b, orders, column, data)
        if matching == "identity" or not any(group.outer for group in groups):
            continue
        heads_kept = HeadsKept(matching, orders)
        dims_only = surgery.match(a, b, data=data.calibration, matching=heads_kept, progress=False)
        for row, chosen in nested_orders(orders, dims_only, groups).items():
            for column in ("none", "REPAIR (the default)"):
                nested[f"{matching}: {row}", column] = accuracy_of(a, b, chosen, column, data)
    return table, nested


def accuracy_of(a: nn.Module, b: nn.Module, orders: Permutations, normalization: str, data: Data) -> float:
    """Accuracy of one merge under given orders."""
    renormalize = NORMALIZATIONS[normalization]
    merged = surgery.merge(a, b, data=data.calibration, matching=Given(orders), renormalize=renormalize, progress=False)
    return surgery.evaluate(merged, data.test, progress=False).accuracy


def nested_orders(orders: Permutations, dims_only: Permutations, groups: GroupSet) -> dict[str, Permutations]:
    """What to keep of a matching: everything outside attention always, and heads, the dims inside them, or both."""
    inner = {group.name for group in groups if group.outer}
    heads = {group.outer for group in groups if group.outer}

    def picked(found: Permutations, names: set[str]) -> Permutations:
        return {name: order for name, order in found.items() if name in names}

    outside = picked(orders, {group.name for group in groups} - inner - heads)
    return {
        "neither heads nor dims": outside,
        "dims only": {**outside, **picked(dims_only, inner)},
        "heads only": {**outside, **picked(orders, heads)},
        "heads and dims": orders,
    }


@dataclass(frozen=True)
class HeadsKept:
    """Finds the best orders of the dims inside heads if no head moves, by the criterion of ``matching``.

    ``orders`` are those of all other groups.
    """

    matching: str
    orders: Permutations
    name: str = "heads kept"

    @property
    def needs_data(self) -> bool:
        """Whether the criterion is the correlation of activations."""
        return self.matching == "activations"

    def match(self, problem: Problem) -> list[Matching]:
        """Assign the dims of each head to those of the same head."""
        nested = [family for family in families(problem.groups) if family.inners]
        inner = {group.name for family in nested for group in family.inners}
        known = {name: order for name, order in self.orders.items() if name not in inner}
        known |= {family.outer.name: family.outer.identity() for family in nested}
        if not self.needs_data:
            return [match_rest(problem, 1, known)]
        (moments,) = problem.correlations()
        for family in nested:
            correlations = {
                group.name: torch.stack([place.correlation() for place in moments[group.name]]).mean(0)
                for group in family.inners
            }
            stay = torch.eye(family.outer.size) * len(inner) * family.units  # outweighs all that heads could gain
            found = BlockAssignment(family.outer.size, stay, correlations).solve()
            known |= {group.name: found[group.name] for group in family.inners}
        return [Matching(known)]


def look_closer(a: nn.Module, b: nn.Module, data: Data) -> None:
    """Print for one pair how well each group's units correlate, and what merges nearer to the first source keep."""
    print("\n### first pair, on activations\n\n| share of b | accuracy |\n|---|---|")
    for alpha in (0.1, 0.2, 0.3, 0.5):
        merged = surgery.merge(a, b, alpha=alpha, data=data.calibration, progress=False)
        print(f"| {alpha} | {100 * surgery.evaluate(merged, data.test, progress=False).accuracy:.1f} |", flush=True)
    print("\n| group | mean correlation of paired units |\n|---|---|")
    report = surgery.report_of(merged)
    for found in report.matches:
        print(f"| {report.groups[found.group]} | {found.after:.2f} |")


def print_table(title: str, found: Sequence[Accuracies]) -> None:
    """Print mean, lowest and highest of each cell over the pairs."""
    columns = list(dict.fromkeys(column for _, column in found[0]))
    print(f"\n### {title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row in dict.fromkeys(row for row, _ in found[0]):
        cells = (cell([table[row, column] for table in found if (row, column) in table]) for column in columns)
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def cell(accuracies: Sequence[float]) -> str:
    """``mean (lowest to highest)`` in percent; empty without any."""
    if not accuracies:
        return ""
    spread = f" ({100 * min(accuracies):.1f} to {100 * max(accuracies):.1f})" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.1f}{spread}"


def main() -> None:
    """Read the options, train what is missing, and print the tables."""
    made = parser(__doc__)
    made.add_argument("--network", action="append", choices=list(NETWORKS), help="only this one; may be repeated")
    made.add_argument("--epochs", type=int, default=40, help="of training (default: %(default)s)")
    made.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs (default: %(default)s)")
    made.add_argument(
        "--cache", type=Path, default=ROOT / "out" / "cache", metavar="DIR", help="for weights (default: out/cache)"
    )
    options = made.parse_args()
    begin(options.threads)
    splits = digits()
    images, (test, labels) = splits.calibration.tensors[0], splits.test.tensors
    data = Data(list(images.split(BATCH)), list(zip(test.split(BATCH), labels.split(BATCH), strict=True)))
    for name in options.network or NETWORKS:
        pairs = PAIRS[: options.pairs]
        models = sources_of(name, 1 + max(map(max, pairs)), options.epochs, options.cache, splits.train)
        found = [measure(models[a], models[b], data) for a, b in pairs]
        print_table(name, [table for table, _ in found])
        if found[0][1]:
            print_table(f"{name}, orders of nested groups", [nested for _, nested in found])
            look_closer(models[pairs[0][0]], models[pairs[0][1]], data)


if __name__ == "__main__":
    main()

"""Merge small transformers, ConvNeXts and GroupNorm nets from different seeds in every way; time ViT-B/16.

``train``: four networks of each architecture learn scikit-learn's 8x8 digits from seeds 0 to 3, two ViTs CIFAR-10.
Their weights are kept in the folder ``--cache``, and those that are there are not trained again; the other parts train
what they miss. ``merge``: three pairs on digits (0, 1), (2, 3), (0, 2), and one on CIFAR-10, merged half and half by
each matching and each renormalization, and by each choice of ``symmetries`` where ``merge`` has that option. Accuracy
(%) is on 500 test images of digits, with statistics from 297 others, and on the 10,000 of CIFAR-10, with statistics
from 5,000 training images. A cell is the mean over the pairs with the lowest and the highest. A second table has the
CPU seconds of one merge, tracing included, a third what ``renormalize="auto"`` kept beside the best that there was.
``planted``: a network of random weights and the same function in other weights, made with random members of all its
symmetries, are merged on weights alone; how many of ``--count`` merges compute that function to 1e-4 in float32.
``nested``: what nested groups add, when orders of heads (or of groups of channels), of the dims inside them, or of both
are left out of one and the same matching. ``prune``: of the first three networks a share of the residual stream is
removed, unit by unit or by principal directions, which leaves as many parameters; ``prune-all`` removes that share of
all other groups, too. ``speed``: seconds that matching two ViT-B/16 of random weights takes with
and without all symmetries.

CIFAR-10 comes from a shared folder; without it, only digits are measured.

    python docs/benchmarks/transformers.py train merge
    python docs/benchmarks/transformers.py merge --networks vit swin --matchings weights --pairs 1
    python docs/benchmarks/transformers.py merge --networks vit --images 100
    python docs/benchmarks/transformers.py planted --count 100
    python docs/benchmarks/transformers.py prune --networks vit
    python docs/benchmarks/transformers.py speed --threads 2
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pairs import decoded, folder_parser, load_images, load_networks
from safetensors.torch import load_file, save_file
from timing import Stopwatch, begin
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.discovery.canonical import canonical, drawn_map
from vfsurgery.discovery.maps import map_tensor, permutations_of
from vfsurgery.discovery.verification import randomize, relative_error
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet, Permutations
from vfsurgery.matching import Given, Matcher, Matching, Problem
from vfsurgery.matching.nested import BlockAssignment, families
from vfsurgery.matching.weights import match_rest
from vfsurgery.networks.architectures import build_model
from vfsurgery.passes import Repair
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.scoring.evaluation import compare
from vfsurgery.training import from_seed, train

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


def swin() -> nn.Module:
    """Two stages of two blocks, windows of 4x4, shifted in the first: 8x8 places of 32 units, then 4x4 of 64."""
    sizes: dict[str, Any] = {"patch_size": 1, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    return SwinTransformer(img_size=8, in_chans=1, num_classes=10, drop_path_rate=0.0, **sizes)


class Encoder(nn.Module):
    """torch's ``nn.TransformerEncoder``, norms first, over 16 patches of 2x2 pixels; the mean token is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 48, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, 48))
        layer = nn.TransformerEncoderLayer(
            48, 4, 192, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens + self.positions).mean(1))


def cifar_vit() -> nn.Module:
    """16 tokens of 8x8 pixels of CIFAR-10 and a class token; four blocks with four heads of 24 dims."""
    return VisionTransformer(img_size=32, patch_size=8, num_classes=10, embed_dim=96, depth=4, num_heads=4)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "convnext": convnext,
    "groupnorm": groupnorm,
    "swin": swin,
    "encoder": Encoder,
}
"""Those that learn digits."""
CIFAR = "cifar_vit"
PAIRS = ((0, 1), (2, 3), (0, 2))
MATCHINGS = ("identity", "weights", "activations", "auto")
NORMALIZATIONS: dict[str, Renormalization] = {
    "none": None,
    "RESCALE": "rescale",
    "REPAIR": "repair",
    "REPAIR, output layer too": Repair(include_output=True),
    "regress": "regress",
    "auto": "auto",
}
"""None of the networks has BatchNorm, which RESET is for."""
PLANTED: dict[str, Callable[[], nn.Module]] = {
    "ViT": partial(build_model, "timm:vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2),
    "DeiT": partial(
        build_model, "timm:deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2
    ),
    "DeiT III": partial(
        build_model, "timm:deit3_small_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
    ),
    "Swin": partial(
        build_model,
        "timm:swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        drop_path_rate=0.0,
    ),
}
"""timm's own constructors, with small sizes; DeiT III has layer scales."""
CLOSE = 1e-4
"""Relative difference of outputs up to which two networks compute the same in float32."""
LARGE, SIDE = "timm:vit_base_patch16_224", 224


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


def learn_cifar(model: nn.Module, images: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """Train in place with AdamW and one learning-rate cycle, on images that are shifted and mirrored."""
    options: dict[str, Any] = {"lr": 1e-3, "batch_size": 100, "optimizer": "adamw", "weight_decay": 0.05}
    return train(model, images, epochs=epochs, seed=seed, augment=True, progress=False, **options)


def sources_of(name: str, count: int, epochs: int, cache: Path, images: TensorDataset) -> list[nn.Module]:
    """Networks trained from seeds 0, 1, ..., or their weights from the last time."""
    factory, teach = (cifar_vit, learn_cifar) if name == CIFAR else (NETWORKS[name], learn)
    models: list[nn.Module] = []
    for seed in range(count):
        model = from_seed(factory, seed)
        path = cache / f"{name}_{epochs}_epochs_seed{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            watch = Stopwatch()
            with watch:
                teach(model, images, epochs, seed)
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


@dataclass(frozen=True)
class Case:
    """Trained networks, which of them are merged, and the data."""

    models: list[nn.Module]
    pairs: Sequence[tuple[int, int]]
    data: Data


def load(name: str, options: argparse.Namespace) -> Case:
    """The networks of one architecture, trained unless their weights are kept."""
    pairs = PAIRS[:1] if name == CIFAR else PAIRS[: options.pairs]
    count = 1 + max(map(max, pairs))
    if name == CIFAR:
        images = load_images(options.shared, options.cache, test=options.images or 10_000)
        data, learnt, epochs = Data(images.calibration, images.test), cifar_images(options), options.cifar_epochs
    else:
        splits, epochs = digits(), options.epochs
        learnt, calibration, test = (tensors(part) for part in (splits.train, splits.calibration, splits.test))
        tested = [part[: options.images].split(BATCH) for part in test.tensors]
        data = Data([*calibration.tensors[0].split(BATCH)], [*zip(*tested, strict=True)])
    return Case(sources_of(name, count, epochs, options.cache / "transformers", learnt), pairs, data)


def tensors(part: object) -> TensorDataset:
    """A part of digits, which lies in tensors."""
    assert isinstance(part, TensorDataset)
    return part


def cifar_images(options: argparse.Namespace) -> TensorDataset:
    """CIFAR-10's 50,000 training images and labels, standardised."""
    pixels = decoded(options.shared / "data" / "cifar10.tar.gz", options.cache / "cifar10.safetensors")
    images: Tensor = load_networks(options.shared).normalize(pixels["train_images"])
    return TensorDataset(images, pixels["train_labels"].long())


Cells = dict[tuple[str, str], float]
"""By row and column of a table."""


def measure(a: nn.Module, b: nn.Module, data: Data, matchings: Sequence[str]) -> tuple[Cells, Cells, list[str]]:
    """All merges of one pair: accuracies, CPU seconds, and what ``renormalize="auto"`` kept in each row."""
    scores = compare({"a": a, "b": b}, data.test, progress=False)
    sources = {"sources": (scores["a"].accuracy + scores["b"].accuracy) / 2, "ensemble": scores["ensemble"].accuracy}
    table: Cells = {(name, "none"): accuracy for name, accuracy in sources.items()}
    seconds: Cells = {}
    told: list[str] = []
    for matching in matchings:
        for symmetries in choices(surgery.merge, matching):
            row = ", ".join([matching, *symmetries.values()])
            for column, renormalize in NORMALIZATIONS.items():
                watch = Stopwatch()
                try:
                    with watch:
                        merged = merged_of(a, b, data, matching, renormalize, **symmetries)
                except SurgeryError as error:  # a hole in the table, not the end of the others
                    print(f"failed, {row}, {column}: {error}", flush=True)
                    continue
                table[row, column] = surgery.evaluate(merged, data.test, progress=False).accuracy
                seconds[row, column] = watch.cpu
                if renormalize == "auto":
                    told.append(chosen(merged, table, row))
    return table, seconds, told


def choices(function: Callable[..., object], matching: str) -> list[dict[str, str]]:
    """What to hand to ``symmetries=``: nothing where a function has no such option, or where nothing is matched."""
    if matching == "identity" or "symmetries" not in inspect.signature(function).parameters:
        return [{}]
    names = ("permutations", "all", "auto") if matching == "auto" else ("permutations", "all")
    return [{"symmetries": name} for name in names]


def merged_of(
    a: nn.Module, b: nn.Module, data: Data, matching: str | Given, renormalize: Renormalization, **symmetries: Any
) -> nn.Module:
    """Merge half and half."""
    options: Mapping[str, Any] = {"matching": matching, "renormalize": renormalize, **symmetries}
    return surgery.merge(a, b, data=data.calibration, progress=False, **options)


def chosen(merged: nn.Module, table: Cells, row: str) -> str:
    """What was kept in a row, beside the best that could have been: of the row, or of the whole table.

    The agreement with the sources' ensemble of all that was tried follows, by which one was kept.
    """
    report = surgery.report_of(merged)
    fixed = [place for place in table if place[1] != "auto" and place[0] not in ("sources", "ensemble")]
    rivals = {place: table[place] for place in fixed if place[0] == row or row.startswith("auto")}
    best = max(rivals, key=lambda place: rivals[place])
    tried = ", ".join(f"{trial.way} {100 * trial.agreement:.1f}" for trial in report.trials)
    kept = " + ".join([report.matching, *report.renormalize])
    accuracies = f"{100 * table[row, 'auto']:.1f} | {' + '.join(best)} | {100 * rivals[best]:.1f}"
    return f"{row} | {kept} | {accuracies} | {tried}"


def measure_merges(name: str, case: Case, matchings: Sequence[str]) -> None:
    """Print the tables of one architecture."""
    found = [measure(case.models[a], case.models[b], case.data, matchings) for a, b in case.pairs]
    print_table(name, [table for table, _, _ in found])
    print_table(f"{name}, CPU seconds of one merge", [seconds for _, seconds, _ in found], mean_seconds)
    print(f"\n### {name}, what auto kept\n")
    print("| pair | matching | kept | accuracy | best | accuracy | agreement of all tried |")
    print(f"|{'---|' * 7}")
    for (a, b), (_, _, told) in zip(case.pairs, found, strict=True):
        for line in told:
            print(f"| {a}, {b} | {line} |", flush=True)


def measure_nested(name: str, case: Case) -> None:
    """Print what the orders of heads and of the dims inside them add, where there are any."""
    found: list[Cells] = []
    for a, b in ((case.models[a], case.models[b]) for a, b in case.pairs):
        groups = surgery.find_groups(a, case.data.calibration[0][:2])
        if any(group.outer for group in groups):
            found.append(nested_merges(a, b, case.data, groups))
    if found:
        print_table(f"{name}, orders of nested groups", found)
        (a, b), *_ = case.pairs
        look_closer(case.models[a], case.models[b], case.data)


def nested_merges(a: nn.Module, b: nn.Module, data: Data, groups: GroupSet) -> Cells:
    """Accuracy of one pair by which nested orders were kept."""
    nested: Cells = {}
    options: Mapping[str, Any] = choices(surgery.match, "weights")[0]  # orders are of permutations
    for matching in ("weights", "activations"):
        orders = orders_of(a, b, data, matching, **options)
        dims_only = orders_of(a, b, data, HeadsKept(matching, orders), **options)
        for row, kept in nested_orders(orders, dims_only, groups).items():
            for column in ("none", "REPAIR, output layer too"):
                merged = merged_of(a, b, data, Given(kept), NORMALIZATIONS[column])
                nested[f"{matching}: {row}", column] = surgery.evaluate(merged, data.test, progress=False).accuracy
    return nested


def orders_of(a: nn.Module, b: nn.Module, data: Data, matching: str | Matcher, **options: Any) -> Permutations:
    """What a matching finds."""
    found = surgery.match(a, b, data=data.calibration, matching=matching, progress=False, **options)
    assert isinstance(found, Mapping)
    return permutations_of(found)


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
                if group.name in moments  # torch's attention does not show all of them
            }
            if not correlations:
                continue
            stay = torch.eye(family.outer.size) * len(inner) * family.units  # outweighs all that heads could gain
            found = BlockAssignment(family.outer.size, stay, correlations).solve()
            known |= {name: found[name] for name in correlations}
        return [match_rest(problem, 1, known)]


def look_closer(a: nn.Module, b: nn.Module, data: Data) -> None:
    """Print for one pair how well each group's units correlate, and what merges nearer to the first source keep."""
    print("\n### first pair, on activations\n\n| share of b | accuracy |\n|---|---|")
    for alpha in (0.1, 0.2, 0.3, 0.5):
        merged = surgery.merge(a, b, alpha=alpha, data=data.calibration, matching="activations", progress=False)
        print(f"| {alpha} | {100 * surgery.evaluate(merged, data.test, progress=False).accuracy:.1f} |", flush=True)
    print("\n| group | mean correlation of paired units (similarity of weights inside torch's attention) |\n|---|---|")
    report = surgery.report_of(merged)
    for found in report.matches:
        print(f"| {report.groups[found.group]} | {found.after:.2f} |")


PRUNINGS: dict[str, dict[str, Any]] = {
    "units, magnitude, REPAIR": {},
    "units, activation, REPAIR": {"saliency": "activation"},
    "units, activation, fold": {"saliency": "activation", "removed": "fold", "renormalize": None},
    "units, activation, fold, REPAIR": {"saliency": "activation", "removed": "fold"},
    "directions of weights, no data": {"saliency": "magnitude", "data": None, "rotate": True},
    "directions": {"saliency": "activation", "rotate": True, "renormalize": None},
    "directions, REPAIR": {"saliency": "activation", "rotate": True},
    "directions, fold": {"saliency": "activation", "removed": "fold", "rotate": True, "renormalize": None},
    "directions, fold, REPAIR": {"saliency": "activation", "removed": "fold", "rotate": True},
}
"""Options of ``prune_units``; with data ``renormalize="auto"`` is REPAIR here."""
FRACTIONS = (0.25, 0.5)


def measure_pruning(name: str, case: Case, whole: bool) -> None:
    """Print what is left of the accuracy without a share of the stream, or of the units of all groups."""
    tables: list[Cells] = []
    for model in case.models[:3]:
        groups = surgery.find_groups(model, case.data.calibration[0][:2])
        others = [group.name for group in groups if not str(group.symmetry).startswith("orthogonal")]
        first = surgery.evaluate(model, case.data.test, progress=False)
        tables.append({("whole", "0 % of units"): first.accuracy})
        for fraction in FRACTIONS:
            for row, options in PRUNINGS.items():
                given = {"data": case.data.calibration, "example_inputs": case.data.calibration[0][:2], **options}
                smaller = surgery.prune_units(model, fraction, exclude=() if whole else others, progress=False, **given)
                report = surgery.report_of(smaller)
                column = f"{fraction:.0%}, parameters x {report.after.parameters / report.before.parameters:.2f}"
                accuracy = surgery.evaluate(smaller, case.data.test, progress=False).accuracy
                tables[-1][row, column] = accuracy
                print(f"network {len(tables)}, {row}, {column}: {100 * accuracy:.1f}", flush=True)
    print_table(f"{name}, a share of {'all groups' if whole else 'the stream'} removed", tables)


def measure_speed(count: int) -> None:
    """Print the seconds that matching two large ViTs takes, and their ratio to those of permutations."""
    a, b = (from_seed(lambda: build_model(LARGE), seed).eval() for seed in (0, 1))
    images = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    watch = Stopwatch()
    with watch:
        surgery.find_groups(a, images[:2])
    print(f"\n{LARGE}, random weights of two seeds, {count} images; groups of one network: {watch}")
    print("\n| matching | symmetries | wall s | CPU s | times permutations, wall | CPU |\n|---|---|--:|--:|--:|--:|")
    for matching in ("weights", "activations"):
        first: Stopwatch | None = None
        for symmetries in choices(surgery.match, matching):
            options: Mapping[str, Any] = {"matching": matching, **symmetries}
            watch = Stopwatch()
            with watch:
                surgery.match(a, b, data=[images], progress=False, **options)
            first = first or watch
            name = symmetries.get("symmetries", "permutations")
            ratios = f"{watch.wall / first.wall:.2f} | {watch.cpu / first.cpu:.2f}"
            print(f"| {matching} | {name} | {watch.wall:.1f} | {watch.cpu:.1f} | {ratios} |", flush=True)


def measure_planted(name: str, count: int, begin_at: int) -> None:
    """Print how many of the planted symmetries are recovered, by weights with all symmetries and with orders alone."""
    errors: dict[str, list[float]] = {"all": [], "permutations": []}
    worst = 0.0
    for seed in range(begin_at, begin_at + count):
        model = from_seed(PLANTED[name], seed).eval()
        generator = torch.Generator().manual_seed(seed)
        randomize(model, generator)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        other = planted(model, surgery.find_groups(model, images[:2]), generator)
        with torch.no_grad():
            expected = model(images)
            worst = max(worst, relative_error((other(images),), (expected,)))
            for symmetries in errors if seed == begin_at else ("all",):
                options: Mapping[str, Any] = {"matching": "weights", "renormalize": None, "imagine": False}
                merged = surgery.merge(
                    model, other, example_inputs=images[:2], symmetries=symmetries, progress=False, **options
                )
                errors[symmetries].append(relative_error((merged(images),), (expected,)))
    found = sum(error < CLOSE for error in errors["all"])
    missed = [begin_at + place for place, error in enumerate(errors["all"]) if error >= CLOSE]
    seeds = f"{begin_at} to {begin_at + count - 1}"
    alone = f"{errors['permutations'][0]:.1f}"
    figures = " | ".join(f"{x:.0e}" for x in (statistics.median(errors["all"]), max(errors["all"]), worst))
    print(f"| {name} | {seeds} | {found} of {count} | {figures} | {alone} | {missed or ''} |", flush=True)


def planted(model: nn.Module, groups: GroupSet, generator: torch.Generator) -> nn.Module:
    """The same function in other weights: random members of all symmetries, orders where there is no more."""
    other = copy.deepcopy(model)
    found = canonical({name: tensor.detach().double() for name, tensor in model.state_dict().items()}, groups)
    orders = {
        group.name: drawn_map(group, generator) if found.maps(group) else group.random(generator) for group in groups
    }
    other.load_state_dict({name: map_tensor(name, tensor, groups, orders) for name, tensor in found.state.items()})
    return other


def print_table(title: str, found: Sequence[Cells], show: Callable[[Sequence[float]], str] | None = None) -> None:
    """Print each cell over the pairs: mean, lowest and highest in percent, or as ``show`` has it."""
    columns = list(dict.fromkeys(column for table in found for _, column in table))
    print(f"\n### {title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row in dict.fromkeys(row for table in found for row, _ in table):
        cells = (
            (show or cell)([table[row, column] for table in found if (row, column) in table]) for column in columns
        )
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def cell(accuracies: Sequence[float]) -> str:
    """``mean (lowest to highest)`` in percent; empty without any."""
    if not accuracies:
        return ""
    spread = f" ({100 * min(accuracies):.1f} to {100 * max(accuracies):.1f})" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.1f}{spread}"


def mean_seconds(seconds: Sequence[float]) -> str:
    """Their mean."""
    return f"{statistics.mean(seconds):.1f}" if seconds else ""


PARTS = ("train", "merge", "nested", "planted", "prune", "prune-all", "speed")


def main() -> None:
    """Read the options, train what is missing, and print the tables."""
    made = folder_parser(__doc__)
    made.set_defaults(threads=1)
    names = [*NETWORKS, CIFAR]
    made.add_argument("parts", nargs="+", choices=PARTS)
    made.add_argument("--networks", nargs="+", choices=names, default=names, help="only these")
    made.add_argument("--matchings", nargs="+", choices=MATCHINGS, default=MATCHINGS, help="only these")
    made.add_argument("--pairs", type=int, default=len(PAIRS), help="how many on digits (default: %(default)s)")
    made.add_argument("--count", type=int, default=100, help="planted symmetries (default: %(default)s)")
    made.add_argument("--from", dest="start", type=int, default=0, help="first seed of them (default: %(default)s)")
    made.add_argument("--planted", nargs="+", choices=PLANTED, default=[*PLANTED], help="only in these networks")
    made.add_argument("--images", type=int, help="test images; for speed, images of a batch (default: all; 16)")
    made.add_argument("--epochs", type=int, default=40, help="of training on digits (default: %(default)s)")
    made.add_argument("--cifar-epochs", type=int, default=5, help="of training on CIFAR-10 (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    there = options.shared.is_dir()
    if not there and CIFAR in options.networks:
        print(f"there is no folder {options.shared}: CIFAR-10 is left out")
    for name in options.networks:
        if {*options.parts} <= {"planted", "speed"} or (name == CIFAR and not there):
            continue
        case = load(name, options)
        if "merge" in options.parts:
            measure_merges(name, case, options.matchings)
        if "nested" in options.parts:
            measure_nested(name, case)
        for part in ("prune", "prune-all"):
            if part in options.parts:
                measure_pruning(name, case, part == "prune-all")
    if "planted" in options.parts:
        print("\n| | seeds | recovered | median error | largest | of the planted one | orders alone | missed |")
        print(f"|{'---|' * 8}")
        for name in options.planted:
            measure_planted(name, options.count, options.start)
    if "speed" in options.parts:
        measure_speed(options.images or 16)


if __name__ == "__main__":
    main()

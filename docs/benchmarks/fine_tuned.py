"""Combine models that were fine-tuned from one checkpoint, by every registered method, and print what each keeps.

``A``: one label set, and each task changes the images (inverted, turned, ...); the head is frozen while tasks are
trained. ``B``: two tasks of five classes each, with a new head for each, from a base that knows six classes; ``joint``
is the accuracy over all ten, by the largest logit of both heads. A cell is the mean over seeds of the whole pipeline
(training included), in percent; ``mean`` is that over tasks, with its lowest and highest seed, ``of own`` the mean over
tasks of the accuracy divided by that of the task's own model.

The scale of a task vector is chosen for each method on validation images, one for all tasks, by the accuracy divided by
that of the tasks' own models; test images are looked at once. Where there are BatchNorm layers, their statistics are
estimated again on images of all tasks (``mean``), and two columns say what averaged ones and ones estimated for each
task give. Methods that look at data see training images without labels.

``--small`` takes scikit-learn's digits and small networks; else CIFAR-10 in 16x16 pixels from a shared folder. Trained
weights are kept in ``--cache``.

    python docs/benchmarks/fine_tuned.py --small
    python docs/benchmarks/fine_tuned.py --benchmarks A --networks vit --seeds 1 --epochs 6
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pairs import decoded, folder_parser
from safetensors.torch import load_file, save_file
from timing import begin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.combining import COMBINERS, Combiner, combine_states
from vfsurgery.combining.base import Trait
from vfsurgery.combining.traits import traits_of_graph, with_heads
from vfsurgery.data import digits
from vfsurgery.errors import SurgeryError
from vfsurgery.stats.batch_norms import OnBatches, batch_norm_nodes, calls_of, set_running
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.sources import Source, eval_mode
from vfsurgery.training import from_seed, train

EPOCHS = {"vit": (60, 20), "resnet": (20, 8)}
"""On digits, of the base and of each task."""
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
RE_ESTIMATED = 512
"""Images that statistics of BatchNorm layers are estimated on."""
KNOWN = range(6)
"""Classes that the base of B knows."""
State = Mapping[str, Tensor]
Labelled = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps of one shape in and out."""
        y = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(x + self.norms[1](self.convs[1](y)))


class ResNet(nn.Module):
    """A stem, three blocks, of which the second halves the map, and a head."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first, self.down = Block(width), nn.Conv2d(width, 2 * width, 2, 2, bias=False)
        self.second, self.third = Block(2 * width), Block(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.first(F.relu(self.norm(self.stem(x))))
        return self.head(self.third(self.second(self.down(x))).mean((2, 3)))


def resnet(channels: int, side: int, classes: int) -> nn.Module:
    """30,000 parameters for digits, 65,000 for CIFAR-10."""
    return ResNet(channels, classes, 12 if side == 8 else 16)


def vit(channels: int, side: int, classes: int) -> nn.Module:
    """16 tokens and a class token, three blocks: 87,000 parameters for digits, 155,000 for CIFAR-10."""
    sizes = {"embed_dim": 48, "num_heads": 4} if side == 8 else {"embed_dim": 64, "num_heads": 4}
    return VisionTransformer(
        img_size=side, patch_size=side // 4, in_chans=channels, num_classes=classes, depth=3, **sizes
    )


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {"vit": vit, "resnet": resnet}
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: -x.roll(1, 1),
    "turned": lambda x: x.rot90(1, (2, 3)),
    "folded": lambda x: 1.5 * x.abs() - 1,
    "quadrants": lambda x: x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3)),
}
"""Tasks of A."""


@dataclass(frozen=True)
class Split:
    """Images with their labels, and what one training costs."""

    train: Labelled
    validation: Labelled
    test: Labelled
    epochs: tuple[int, int]
    """Of the base, and of each task."""


@dataclass(frozen=True)
class Task:
    """What one model is fine-tuned for."""

    name: str
    parts: Mapping[str, Labelled]
    model: nn.Module
    classes: Sequence[int]


@dataclass(frozen=True)
class Family:
    """A base and the models that were fine-tuned from it."""

    base: nn.Module
    tasks: Sequence[Task]
    joint: bool

    def __post_init__(self) -> None:
        example = self.tasks[0].parts["train"][0][:2]
        sources = [Source.of(task.model, surgery.trace(task.model, example)) for task in self.tasks]
        object.__setattr__(self, "sources", sources)

    sources: Sequence[Source] = ()

    @property
    def own(self) -> list[float]:
        """Test accuracy of the tasks' own models."""
        return [accuracy(task.model, task.parts["test"]) for task in self.tasks]

    def combine(self, combiner: Combiner, notes: list[str]) -> dict[str, Tensor]:
        """The state of the combined model, with a scale of 1."""
        states, base = [source.state for source in self.sources], self.base.state_dict()

        def images(number: int) -> Iterator[Tensor]:
            return iter(self.tasks[number].parts["train"][0].split(128))

        return combine_states(
            states, combiner.scaled(1.0), base=base, traits=self.traits, traced=self.sources, images=images,
            notes=notes,
        )  # fmt: skip

    @property
    def traits(self) -> Mapping[str, Trait]:
        """What the tensors are."""
        source = self.sources[0]
        return with_heads(traits_of_graph(source.graph_module), source.state, self.base.state_dict())

    def scaled(self, state: State, scale: float) -> dict[str, Tensor]:
        """The same with its task vector times ``scale``; statistics as they are."""
        base, names = self.base.state_dict(), {name for name, _ in self.base.named_parameters()}
        return {
            name: base[name] + scale * (value - base[name])
            if name in names and base[name].shape == value.shape
            else value
            for name, value in state.items()
        }

    def models(self, state: State) -> list[nn.Module]:
        """For each task the combined trunk with the task's own head."""
        found: list[nn.Module] = []
        for task in self.tasks:
            model = copied(task.model)
            own = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
            model.load_state_dict({**state, **own})
            found.append(model)
        return found

    def scores(self, models: Sequence[nn.Module], part: str) -> list[float]:
        """Accuracy of each task, and over all classes of all tasks where they have different ones."""
        found = [accuracy(model, task.parts[part]) for model, task in zip(models, self.tasks, strict=True)]
        if self.joint:
            images, labels = (torch.cat(each) for each in zip(*(task.parts[part] for task in self.tasks), strict=True))
            offsets = [task.classes[0] for task in self.tasks]
            labels = labels + torch.cat(
                [torch.full_like(task.parts[part][1], o) for task, o in zip(self.tasks, offsets, strict=True)]
            )
            found.append(agreement(torch.cat([logits(model, images) for model in models], 1), labels))
        return found

    def mixed(self) -> Tensor:
        """Training images of all tasks in equal share."""
        count = RE_ESTIMATED // len(self.tasks)
        return torch.cat([task.parts["train"][0][:count] for task in self.tasks])

    def of_own(self, scores: Sequence[float], own: Sequence[float]) -> float:
        """Mean over tasks of the accuracy in shares of that of their own models."""
        return statistics.mean(100 * score / best for score, best in zip(scores, own, strict=False))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of all images, in eval mode."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(500)])


def agreement(odds: Tensor, labels: Tensor) -> float:
    """Per cent of images whose largest logit is that of their label."""
    return 100 * float((odds.argmax(1) == labels).float().mean())


def accuracy(model: nn.Module, part: Labelled) -> float:
    """In per cent."""
    return agreement(logits(model, part[0]), part[1])


def re_estimated(traced: Source, state: State, images: Tensor) -> dict[str, Tensor]:
    """Statistics of BatchNorm layers from these images, as the pass ``reset`` has them, without tracing anew."""
    source = traced.clone()
    source.model.load_state_dict(state)
    norms = batch_norm_nodes(source.graph_module)
    work = OnBatches(source.graph_module, norms)
    with eval_mode(source.graph_module):
        work.run(images)
        for norm, calls in calls_of(norms).items():
            set_running(norm, [work.moments[call] for call in calls])
    return {name: value for name, value in source.state.items() if "running" in name}


def has_statistics(model: nn.Module) -> bool:
    """Whether there are BatchNorm layers."""
    return any(name.endswith("running_var") for name, _ in model.named_buffers())


def load(network: str, small: bool, shared: Path, cache: Path, seed: int, epochs: int | None) -> Split:
    """Digits, or CIFAR-10 in 16x16 pixels."""
    if small:
        splits = digits(seed=seed)
        parts = [part.tensors for part in (splits.train, splits.calibration, splits.test)]  # type: ignore[attr-defined]
        spent = EPOCHS[network] if epochs is None else (epochs, max(epochs // 2, 1))
        return Split(*((images, labels) for images, labels in parts), spent)
    pixels = decoded(shared / "data" / "cifar10.tar.gz", cache / "cifar10.safetensors")
    order = torch.randperm(len(pixels["train_labels"]), generator=torch.Generator().manual_seed(seed))
    train_on, validate = order[:30_000], order[30_000:32_000]

    def part(images: Tensor, labels: Tensor) -> Labelled:
        return (F.avg_pool2d(images.float() / 255, 2) - 0.47) / 0.24, labels.long()

    known, told = pixels["train_images"], pixels["train_labels"]
    tested = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:3_000]
    return Split(
        part(known[train_on], told[train_on]),
        part(known[validate], told[validate]),
        part(pixels["test_images"][tested], pixels["test_labels"][tested]),
        (14, 4) if epochs is None else (epochs, max(epochs // 2, 1)),
    )


def kept(path: Path, model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with the weights of a file, or trained and written there."""
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        model = make(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return model.eval()


def learnt(model: nn.Module, part: Labelled, epochs: int, rate: float, seed: int) -> nn.Module:
    """Train what is not frozen."""
    options = {"optimizer": "adamw", "weight_decay": 0.01, "batch_size": 64, "progress": False}
    return train(model, TensorDataset(*part), epochs=epochs, lr=rate, seed=seed, **options)  # type: ignore[arg-type]


def only(part: Labelled, classes: Sequence[int]) -> Labelled:
    """Images of some classes, numbered from the first of these."""
    images, labels = part
    chosen = (labels >= classes[0]) & (labels <= classes[-1])
    return images[chosen], labels[chosen] - classes[0]


def family(benchmark: str, network: str, split: Split, cache: Path, seed: int) -> Family:
    """Train a base and its tasks, or read them."""
    channels, side = split.train[0].shape[1:3]
    build = NETWORKS[network]
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    classes = range(10) if benchmark == "A" else KNOWN
    rate = 2e-3
    base = kept(
        cache / f"base_{seed}.safetensors",
        from_seed(lambda: build(channels, side, len(classes)), seed),
        lambda model: learnt(model, only(split.train, classes), split.epochs[0], rate, seed),
    )
    tasks: list[Task] = []
    ways = [*SHIFTS] if benchmark == "A" else ["0 to 4", "5 to 9"]
    for number, name in enumerate(ways):
        own = range(10) if benchmark == "A" else range(5 * number, 5 * number + 5)
        shift = SHIFTS.get(name, lambda x: x)
        seen = {
            key: (shift(images), labels)
            for key, (images, labels) in ((key, only(part, own)) for key, part in parts.items())
        }
        model = copied(base)
        if benchmark == "A":
            model.head.requires_grad_(False)  # type: ignore[union-attr]
        else:
            width = model.head.in_features  # type: ignore[union-attr]
            model.head = from_seed(lambda width=width: nn.Linear(width, 5), seed + number)
        model = kept(
            cache / f"{name.replace(' ', '_')}_{seed}.safetensors",
            model,
            lambda model, seen=seen: learnt(model, seen["train"], split.epochs[1], rate / 4, seed),
        )
        tasks.append(Task(name, seen, model.requires_grad_(True), [*own]))
    return Family(base, tasks, benchmark == "B")


def judged(found: Family, state: State, part: str) -> list[float]:
    """Scores of a combined state, statistics estimated on images of all tasks where there are any."""
    if has_statistics(found.base):
        state = {**state, **re_estimated(found.sources[0], state, found.mixed())}
    return found.scores(found.models(state), part)


@dataclass(frozen=True)
class Row:
    """What one method gives on one seed; ``statistics`` are means with averaged statistics and with each task's."""

    scale: float
    scores: list[float]
    of_own: float
    statistics: tuple[float, ...]


def measure(found: Family, state: State, scales: Sequence[float]) -> Row:
    """Choose a scale on validation images and score it once on test images."""
    best = [accuracy(task.model, task.parts["validation"]) for task in found.tasks]
    judge = {
        scale: found.of_own(judged(found, found.scaled(state, scale), "validation"), best)
        for scale in (scales if len(scales) > 1 else ())
    }
    scale = max(judge, key=judge.__getitem__) if judge else scales[0]
    chosen = found.scaled(state, scale)
    scores, others, count = judged(found, chosen, "test"), (), len(found.tasks)
    models = found.models(chosen)
    if has_statistics(models[0]):
        own = [
            found.models({**chosen, **re_estimated(found.sources[0], chosen, task.parts["train"][0][:RE_ESTIMATED])})[i]
            for i, task in enumerate(found.tasks)
        ]
        others = tuple(statistics.mean(found.scores(each, "test")[:count]) for each in (models, own))
    return Row(scale, scores, found.of_own(scores[:count], found.own), others)


def rows(found: Family) -> Iterator[tuple[str, Row | str]]:
    """One for each method, or why it has none."""
    average = {name: value.clone() for name, value in found.base.state_dict().items()}
    first = found.sources[0].state
    average |= {name: value for name, value in first.items() if average[name].shape != value.shape}
    yield "base", measure(found, average, (1.0,))
    own = found.scores([task.model for task in found.tasks], "test")
    yield "own models", Row(1.0, own, 100.0, ())
    for name in COMBINERS:
        try:
            state = found.combine(COMBINERS[name](), [])
        except (SurgeryError, TypeError) as error:
            yield name, str(error).split("\n")[0]
            continue
        yield name, measure(found, state, (1.0,) if name == "mean" else SCALES)
        if name == "task-arithmetic":
            yield "task-arithmetic, scale 0.3", measure(found, state, (0.3,))


def table(benchmark: str, network: str, families: Sequence[Family]) -> None:
    """One row for each method, over the seeds."""
    results: dict[str, list[Row]] = {}
    refused: dict[str, str] = {}
    for found in families:
        for name, row in rows(found):
            print(f"{benchmark} {network} {name}: {row}", file=sys.stderr, flush=True)
            if isinstance(row, str):
                refused[name] = row
            else:
                results.setdefault(name, []).append(row)
    first = families[0]
    extra = ["joint"] if first.joint else []
    more = ["averaged statistics", "each task's statistics"] if has_statistics(first.base) else []
    heads = ["method", "scale", *(task.name for task in first.tasks), *extra, "mean", "of own", *more]
    print(f"\n{benchmark}, {network}, {len(families)} seeds\n\n| {' | '.join(heads)} |")
    print(f"|---|{'--:|' * (len(heads) - 1)}")
    for name, found in results.items():
        count = len(first.tasks)
        means = [statistics.mean(row.scores[:count]) for row in found]
        cells = [
            name,
            " ".join(sorted({f"{row.scale:g}" for row in found})),
            *(f"{statistics.mean(column):.1f}" for column in zip(*(row.scores for row in found), strict=True)),
            f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f})",
            f"{statistics.mean(row.of_own for row in found):.1f}",
            *(f"{statistics.mean(column):.1f}" for column in zip(*(row.statistics for row in found), strict=True)),
        ]
        print(f"| {' | '.join(cells + [''] * (len(heads) - len(cells)))} |", flush=True)
    for name, reason in refused.items():
        print(f"\n{name}: {reason}", flush=True)


def main() -> None:
    """Run what is asked for."""
    made = folder_parser(__doc__)
    made.add_argument("--small", action="store_true", help="digits instead of CIFAR-10")
    made.add_argument("--benchmarks", nargs="+", choices=("A", "B"), default=["A", "B"])
    made.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, help="of the base; tasks get half of that (default: by data)")
    options = made.parse_args()
    begin(options.threads)
    for benchmark in options.benchmarks:
        for network in options.networks:
            families: list[Family] = []
            for seed in range(options.seeds):
                split = load(network, options.small, options.shared, options.cache, seed, options.epochs)
                size = "digits" if options.small else "cifar10"
                place = (
                    options.cache / "fine_tuned" / f"{size}_{network}_{benchmark}_{split.epochs[0]}_{split.epochs[1]}"
                )
                families.append(family(benchmark, network, split, place, seed))
            table(benchmark, network, families)


if __name__ == "__main__":
    main()

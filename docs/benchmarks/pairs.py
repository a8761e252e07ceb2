"""Merge the two trained CIFAR-10 pairs of a shared folder in every way, and print what each merge keeps.

Statistics come from 5,000 random training images, accuracy and loss from the 10,000 test images, all in float32. Weight
matching is run with several seeds, which decide the order of its sweeps, activation matching with ``--draws`` random
sets of images: mean and standard deviation are given. Seconds are of one merge, matching and tracing included. Where
the folder is missing, the script says so and stops.

    python docs/benchmarks/pairs.py --quick
    python docs/benchmarks/pairs.py --pair vgg11_half --output pairs.json
    python docs/benchmarks/pairs.py --pair tv_resnet18 --draws 5 --seeds 1
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timing import Stopwatch, begin, parser
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.scoring.evaluation import Score, compare

ROOT = Path(__file__).resolve().parents[2]
BATCH = 500


@dataclass(frozen=True)
class Step:
    """One row of the table: a merge, or a source, with its scores (one per seed) and the seconds one run took."""

    name: str
    accuracy: list[float]
    loss: float
    wall: float = 0.0
    cpu: float = 0.0

    def row(self, public: str) -> str:
        """The row, with the accuracy that public codes reach."""
        spread = f" ± {100 * statistics.stdev(self.accuracy):.2f}" if len(self.accuracy) > 1 else ""
        accuracy = f"{100 * statistics.mean(self.accuracy):.2f}{spread}"
        seconds = f"{self.wall:.1f} | {self.cpu:.1f}" if self.wall else " | "
        return f"| {self.name} | {accuracy} | {public} | {self.loss:.3f} | {seconds} |"


@dataclass(frozen=True)
class Merge:
    """Options of one merge, and the accuracy (%) that public codes reach with it on these checkpoints."""

    name: str
    matching: str
    renormalize: Renormalization
    public: str = ""


MERGES: dict[str, tuple[Merge, ...]] = {
    "vgg11_half": (
        Merge("naive", "identity", None, "10.0"),
        Merge("weights", "weights", None, "10.0"),
        Merge("weights + bias calibration", "weights", "bias-calibration"),
        Merge("weights + RESCALE", "weights", "rescale", "54.6"),
        Merge("weights + REPAIR", "weights", "repair", "58.3"),
        Merge("activations", "activations", None, "29.5"),
        Merge("activations + bias calibration", "activations", "bias-calibration", "52.0"),
        Merge("activations + RESCALE", "activations", "rescale", "71.4"),
        Merge("activations + REPAIR", "activations", "repair", "71.3"),
        Merge("activations + bias removal", "activations", "bias-removal"),
        Merge("activations + closed-form REPAIR", "activations", "closed-form-repair"),
        Merge("activations + RESCALE, sequential", "activations", surgery.Rescale(sequential=True)),
        Merge("activations + REPAIR, sequential", "activations", surgery.Repair(sequential=True)),
        Merge("activations + RESCALE, average goals", "activations", surgery.Rescale(average=True)),
        Merge("activations + REPAIR, average goals", "activations", surgery.Repair(average=True)),
        Merge("activations + REPAIR, goals of a", "activations", surgery.Repair(reference=0)),
        Merge("activations + regression", "activations", "regress"),
        Merge("ZipIt!", "zipit", None, "24.6"),
        Merge("ZipIt! + RESCALE", "zipit", "rescale", "70.3"),
        Merge("ZipIt! + REPAIR", "zipit", "repair", "69.0"),
        Merge("CCA", "cca", None, "68.1"),
        Merge("CCA + REPAIR, goals of a", "cca", surgery.Repair(reference=0), "74.35"),
        Merge("auto", "auto", "auto"),
    ),
    "tv_resnet18": (
        Merge("naive", "identity", None, "10.3"),
        Merge("naive + RESET", "identity", "reset", "34.9"),
        Merge("weights", "weights", None, "12.0"),
        Merge("weights + RESET in closed form", "weights", "closed-form-reset"),
        Merge("weights + RESET", "weights", "reset", "57.1"),
        Merge("activations", "activations", None, "21.9"),
        Merge("activations + RESET", "activations", "reset", "67.5"),
        Merge("activations + RESET, REPAIR", "activations", ("reset", "repair"), "68.4"),
        Merge("activations + regression", "activations", "regress"),
        Merge("ZipIt!", "zipit", None, "18.7"),
        Merge("ZipIt! + RESET", "zipit", "reset", "66.4"),
        Merge("CCA + RESET", "cca", "reset", "66.5"),
        Merge("auto", "auto", "auto"),
    ),
}
SOURCES = {"vgg11_half": ("80.15", "80.03", "81.62"), "tv_resnet18": ("79.55", "79.95", "81.40")}
"""Accuracy (%) of source a, source b and their ensemble, as the checkpoints' makers measured it."""


@dataclass(frozen=True)
class Images:
    """CIFAR-10 as float batches, normalized as the networks were trained."""

    calibration: list[Tensor]
    test: list[tuple[Tensor, Tensor]]


def load_pair(shared: Path, name: str) -> tuple[nn.Module, nn.Module]:
    """Build the two networks of one pair and load their weights."""
    networks = load_networks(shared)
    models = [getattr(networks, name)() for _ in range(2)]
    for seed, model in enumerate(models):
        model.load_state_dict(load_file(shared / "checkpoints" / f"{name}_s{seed}.safetensors"), strict=True)
    return models[0].eval(), models[1].eval()


def load_networks(shared: Path) -> ModuleType:
    """Import the shared folder's own definition of the networks and of their normalization."""
    spec = importlib.util.spec_from_file_location("shared_networks", shared / "checkpoints" / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all scripts on the trained pairs share: where the pairs are, and where images are kept."""
    made = parser(description)
    made.add_argument(
        "--shared", type=Path, default=ROOT.parent / "shared", metavar="DIR",
        help="folder with checkpoints/ and data/cifar10.tar.gz (default: ../shared beside the repository)",
    )  # fmt: skip
    made.add_argument(
        "--cache", type=Path, default=ROOT / "out" / "cache", metavar="DIR",
        help="where decoded images are kept, 185 MB (default: out/cache)",
    )  # fmt: skip
    return made


def is_there(shared: Path) -> bool:
    """Whether the folder with the pairs exists; if not, say so."""
    if not shared.is_dir():
        print(f"there is no folder {shared}: nothing to measure. Name it with --shared.")
    return shared.is_dir()


def load_images(shared: Path, cache: Path, *, calibration: int = 5000, test: int = 10_000, seed: int = 0) -> Images:
    """Draw random training images for statistics and random test images for scores.

    Args:
        shared: The folder with ``data/cifar10.tar.gz``.
        cache: Where the decoded images are kept for the next time.
        calibration: How many training images to draw.
        test: How many test images to draw; all 10,000 by default.
        seed: Decides which are drawn. The archive is sorted by class, so the first ones would not do.
    """
    pixels = decoded(shared / "data" / "cifar10.tar.gz", cache / "cifar10.safetensors")
    normalize: Callable[[Tensor], Tensor] = load_networks(shared).normalize
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        part: torch.randperm(len(pixels[f"{part}_labels"]), generator=generator)[:count]
        for part, count in (("train", calibration), ("test", test))
    }
    images = {part: normalize(pixels[f"{part}_images"][index]).split(BATCH) for part, index in drawn.items()}
    labels = pixels["test_labels"][drawn["test"]].long().split(BATCH)
    return Images(list(images["train"]), list(zip(images["test"], labels, strict=True)))


def decoded(archive: Path, cache: Path) -> dict[str, Tensor]:
    """Decode the archive's JPEGs once: uint8 images (N, 3, 32, 32) and labels (N,) of both parts."""
    if not cache.exists():
        print(f"decoding {archive.name} into {cache}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        save_file(_decode(archive), partial)
        partial.replace(cache)
    return load_file(cache)


def _read_jpeg(content: bytes) -> Tensor:
    """Decode one image to uint8, ``(3, height, width)``."""
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode(archive: Path) -> dict[str, Tensor]:
    """All images and labels, by part, in the archive's order; classes are numbered alphabetically."""
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    for part, name, content in _files(archive):
        images[part].append(_read_jpeg(content))
        names[part].append(name)
    classes = sorted(set(names["train"]))
    found: dict[str, Tensor] = {}
    for part in images:
        found[f"{part}_images"] = torch.stack(images[part])
        found[f"{part}_labels"] = torch.tensor([classes.index(name) for name in names[part]], dtype=torch.uint8)
    return found


def _files(archive: Path) -> Iterator[tuple[str, str, bytes]]:
    """Part, class and content of every image in ``PART/CLASS/NNNN.jpg``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and member.name.endswith(".jpg"):
                part, name, _ = member.name.removeprefix("./").split("/")
                yield part, name, file.read()


Run: TypeAlias = tuple[list[Tensor], int]
"""The calibration images and the seed of one merge."""


def measure_pair(name: str, shared: Path, images: list[Images], seeds: Sequence[int]) -> list[Step]:
    """Score the sources, their ensemble and all merges of one pair, printing the table's rows as they come.

    Weight matching runs once per seed, matching on images once per set of them; the test images are the first set's.
    """
    by_images = [(drawn.calibration, 0) for drawn in images]
    runs: dict[str, list[Run]] = {
        "identity": [(images[0].calibration, 0)],
        "weights": [(images[0].calibration, seed) for seed in seeds],
    }
    a, b = load_pair(shared, name)
    print(f"\n### {name}\n\n| | accuracy (%) | public codes (%) | loss | wall s | CPU s |\n|---|---|---|---|---|---|")
    steps: list[Step] = []
    scores = compare({"source a": a, "source b": b}, images[0].test)
    for (label, score), public in zip(scores.items(), SOURCES[name], strict=True):
        _add(steps, Step(label, [score.accuracy], score.loss), public)
    for merge in MERGES[name]:
        _add(steps, measure_merge(a, b, merge, images[0].test, runs.get(merge.matching, by_images)), merge.public)
    return steps


def _add(steps: list[Step], step: Step, public: str) -> None:
    print(step.row(public), flush=True)
    steps.append(step)


def measure_merge(
    a: nn.Module, b: nn.Module, merge: Merge, test: list[tuple[Tensor, Tensor]], runs: Sequence[Run]
) -> Step:
    """Merge once per run and score each result."""
    scores: list[Score] = []
    watch = Stopwatch()
    for calibration, seed in runs:
        with watch:
            merged = surgery.merge(
                a, b, data=calibration, matching=merge.matching, renormalize=merge.renormalize, seed=seed
            )
        scores.append(surgery.evaluate(merged, test))
    loss = statistics.mean(score.loss for score in scores)
    return Step(merge.name, [score.accuracy for score in scores], loss, watch.wall / len(runs), watch.cpu / len(runs))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and print one table per pair."""
    options = _parser().parse_args(arguments)
    if not is_there(options.shared):
        return
    begin(options.threads)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)  # rather fail now than after the measurements
    seeds, test = (range(1), 2000) if options.quick else (range(options.seeds), 10_000)
    images = [
        load_images(options.shared, options.cache, calibration=options.calibration, test=test, seed=draw)
        for draw in range(options.draws)
    ]
    results = {name: measure_pair(name, options.shared, images, seeds) for name in options.pair or MERGES}
    if options.output:
        settings = {"seeds": len(seeds), "draws": options.draws, "test": test, "calibration": options.calibration}
        settings["torch"] = torch.__version__
        steps = {name: [asdict(step) for step in found] for name, found in results.items()}
        options.output.write_text(json.dumps({"settings": settings, "pairs": steps}, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    made = folder_parser(__doc__)
    made.add_argument("--pair", action="append", choices=list(MERGES), help="measure this pair only; may be repeated")
    made.add_argument("--seeds", type=int, default=5, help="runs of each weight matching (default: %(default)s)")
    made.add_argument(
        "--draws", type=int, default=1, help="sets of images for activation matching (default: %(default)s)"
    )
    made.add_argument("--calibration", type=int, default=5000, help="images for statistics (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="one seed and 2,000 test images: a look, not a measurement")
    made.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    return made


if __name__ == "__main__":
    main()

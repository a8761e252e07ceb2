"""Planted permutations: reorder the units of ten networks at random, and count how often matching finds all of them.

Each network gets random weights, normalization parameters and buffers; a copy has the units of every group, nested ones
included, in a random order. Matching succeeds if the copy, brought into the order found, equals the original bit for
bit in every entry of its state. Activation matching sees a few random images; units that are constant on them cannot be
told apart by it, so the function on other images is compared too, to a relative error of 1e-4 in float32.

    python docs/benchmarks/planted.py
    python docs/benchmarks/planted.py --seeds 1 torchvision:resnet18 timm:test_vit
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timing import Stopwatch, begin, parser
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import keep_signals_alive, outputs_of, randomize, relative_error
from vfsurgery.groups import GroupSet, Permutations, permute_tensor, random_permutations
from vfsurgery.networks.architectures import build_model
from vfsurgery.stats.collect import group_sites, survey
from vfsurgery.stats.correlation import CONSTANT
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.training import from_seed

NETWORKS = {
    "torchvision:resnet18": 64,
    "torchvision:densenet121": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:resnext50_32x4d": 64,
    "torchvision:regnet_y_400mf": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:efficientnet_b0_gn": 64,
    "timm:seresnet18": 64,
}
"""Models and the side of the images they are shown; transformers take one size only."""
SIDE = 64
IMAGES = 16
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trial:
    """One network with one seed: what each matching has found, and the seconds of the one on weights, tracing included.

    ``wrong`` names the entries that matching on weights left different.
    """

    groups: int
    nested: int
    wrong: tuple[str, ...]
    by_activations: bool
    same_function: bool
    constant: int
    seconds: float


def measure(spec: str, seed: int) -> Trial:
    """Plant random orders in one network and look for them."""
    side = NETWORKS.get(spec, SIDE)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(IMAGES, 3, side, side, generator=generator)
    model = lively(spec, images, seed)
    graph = surgery.trace(model, images[:2])
    groups = surgery.find_groups(graph)
    other = reordered(model, groups, random_permutations(groups, generator))
    watch = Stopwatch()
    with watch:
        by_weights = surgery.match(model, other, matching="weights", example_inputs=images[:2], progress=False)
    by_activations = surgery.match(model, other, data=[images], matching="activations", progress=False)
    found = reordered(other, groups, by_activations)
    fresh = (torch.randn(2, 3, side, side, generator=generator),)
    outputs = [outputs_of(m, canonical_state(m), fresh) for m in (found, model)]
    return Trial(
        groups=len(groups),
        nested=sum(1 for group in groups if group.outer),
        wrong=differences(reordered(other, groups, by_weights), model),
        by_activations=not differences(found, model),
        same_function=relative_error(outputs[0], outputs[1]) < TOLERANCE,
        constant=constant_units(graph, groups, images),
        seconds=watch.wall,
    )


def lively(spec: str, images: Tensor, seed: int) -> nn.Module:
    """A network in which every parameter and buffer is random and signals reach the end."""
    model = from_seed(lambda: build_model(spec), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        randomize(model, generator)
        keep_signals_alive(model, (images,), generator)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum, norm.num_batches_tracked = 0.1, torch.tensor(seed)
    return model


def reordered(model: nn.Module, groups: GroupSet, orders: Permutations) -> nn.Module:
    """A copy of a model with its units in another order."""
    state = {name: permute_tensor(name, tensor, groups, orders) for name, tensor in canonical_state(model).items()}
    result = copy.deepcopy(model)
    result.load_state_dict(state)
    return result


def differences(found: nn.Module, expected: nn.Module) -> tuple[str, ...]:
    """Names of the entries in which two models differ in any bit."""
    state: Mapping[str, Tensor] = found.state_dict()
    return tuple(name for name, tensor in expected.state_dict().items() if not torch.equal(state[name], tensor))


@torch.no_grad()
def constant_units(graph: torch.fx.GraphModule, groups: GroupSet, images: Tensor) -> int:
    """How many units have one value on all images wherever matching reads them."""
    places = group_sites(graph, groups, images.device)
    sites = {f"{name} {number}": site for name, found in places.items() for number, site in enumerate(found)}
    (moments,) = survey([graph], [images], {}, sites).moments
    constant = {name: unit.var <= CONSTANT * (unit.mean**2 + 1) for name, unit in moments.items()}
    return sum(
        int(torch.stack([constant[f"{name} {number}"] for number in range(len(found))]).all(0).sum())
        for name, found in places.items()
    )


def row(spec: str, trials: Sequence[Trial]) -> str:
    """One network's row of the table."""
    runs = len(trials)
    cells = [
        spec,
        trials[0].groups,
        trials[0].nested,
        f"{sum(not trial.wrong for trial in trials)}/{runs}",
        f"{sum(trial.by_activations for trial in trials)}/{runs}",
        f"{sum(trial.same_function for trial in trials)}/{runs}",
        f"{statistics.mean(trial.constant for trial in trials):.1f}",
        f"{statistics.median(trial.seconds for trial in trials):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


HEADER = """\
| network | groups | nested | weights: state | activations: state | activations: function | constant units | seconds |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Read the options and print one row per network."""
    made = parser(__doc__)
    made.add_argument("networks", nargs="*", metavar="MODEL", help="timm:NAME or torchvision:NAME (default: ten)")
    made.add_argument("--seeds", type=int, default=10, help="trials of each network (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    print(HEADER)
    recovered = 0
    failures: list[str] = []
    specs = options.networks or list(NETWORKS)
    for spec in specs:
        trials = [measure(spec, seed) for seed in range(options.seeds)]
        print(row(spec, trials), flush=True)
        recovered += sum(not trial.wrong for trial in trials)
        failures += [f"{spec} under seed {n}: {', '.join(t.wrong[:4])}" for n, t in enumerate(trials) if t.wrong]
    print(f"\nrecovered bit for bit by weights: {recovered}/{len(specs) * options.seeds}", *failures, sep="\n")


if __name__ == "__main__":
    main()

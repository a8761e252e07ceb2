"""Weight matching of two randomly initialized networks to convergence, against the public package rebasin.

Only the matching is timed: tracing and finding groups come before. If rebasin (MIT licence) can be imported it runs on
the same two networks in the same process, likewise without its tracing, and the ratio is printed. Distances of the
matched parameters are printed too, since stopping early would also be fast: rebasin stops sooner and farther away, so a
second ratio counts only the sweeps that bring vfsurgery as near. To have rebasin:

    pip install --no-deps rebasin torchview graphviz
    python docs/benchmarks/weight_matching.py
    python docs/benchmarks/weight_matching.py --model resnet18 --runs 3
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torchvision
from timing import Stopwatch, begin, parser
from torch import nn

import vfsurgery as surgery
from vfsurgery.groups import Permutations, permute_tensor
from vfsurgery.matching import Problem, WeightMatching


def random_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Build one architecture twice, each with its own random weights."""
    models: list[nn.Module] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(torchvision.models.get_model(name, weights=None).eval())
    return models[0], models[1]


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return the Euclidean distance of all parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((x - y).detach().double().square().sum()) for x, y in pairs) ** 0.5


def aligned(b: nn.Module, groups: surgery.GroupSet, orders: Permutations) -> nn.Module:
    """Return a copy of ``b`` with its units in the order found."""
    other = copy.deepcopy(b)
    state = {name: permute_tensor(name, tensor, groups, orders) for name, tensor in b.state_dict().items()}
    other.load_state_dict(state)
    return other


@dataclass(frozen=True)
class Run:
    """How long one matching took and how near it brought the networks."""

    watch: Stopwatch
    distance: float

    def __str__(self) -> str:
        return f"{self.watch}, distance {self.distance:.2f}"


def run_ours(a: nn.Module, b: nn.Module, groups: surgery.GroupSet, seed: int, max_sweeps: int = 100) -> Run:
    """Match once; the seed decides the order of visits."""
    states = [{name: tensor.detach() for name, tensor in model.state_dict().items()} for model in (a, b)]
    problem = Problem(groups, states, correlations=list, seed=seed)
    watch = Stopwatch()
    with watch:
        (matching,) = WeightMatching(max_sweeps=max_sweeps).match(problem)
    return Run(watch, distance(a, aligned(b, groups, matching.permutations)))


def run_rebasin(a: nn.Module, b: nn.Module, example: torch.Tensor) -> Run | None:
    """Run the public package once, or say why it cannot run."""
    try:
        from rebasin import PermutationCoordinateDescent
    except ImportError as error:
        print(f"  rebasin is not here to compare with: {error}. See --help.")
        return None
    other = copy.deepcopy(b)
    descent = PermutationCoordinateDescent(copy.deepcopy(a), other, example)
    watch = Stopwatch()
    with watch:
        descent.calculate_permutations()
    descent.apply_permutations()
    return Run(watch, distance(a, other))


def measure(name: str, runs: int) -> None:
    """Run both on the same pair and print the ratios, to convergence and to the distance where rebasin stops."""
    a, b = random_pair(name)
    groups = surgery.find_groups(a)
    print(f"weight matching of two random {name}, distance before {distance(a, b):.2f}")
    ours = [run_ours(a, b, groups, seed) for seed in range(runs)]
    for seed, run in enumerate(ours):
        print(f"  vfsurgery, seed {seed}: {run}")
    theirs = run_rebasin(a, b, torch.randn(1, 3, 224, 224))
    if theirs is None:
        return
    print(f"  rebasin: {theirs}")
    sweeps, near = 1, run_ours(a, b, groups, 0, 1)
    while near.distance > theirs.distance and near.distance > ours[0].distance:
        sweeps, near = sweeps + 1, run_ours(a, b, groups, 0, sweeps + 1)
    print(f"  vfsurgery, seed 0, stopped after {sweeps} sweeps: {near}")
    median = sorted(ours, key=lambda run: run.watch.wall)[(runs - 1) // 2]
    for label, run in (("to convergence", median), ("to rebasin's distance", near)):
        wall, cpu = theirs.watch.wall / run.watch.wall, theirs.watch.cpu / run.watch.cpu
        print(f"{label}: rebasin takes {wall:.1f} x the wall and {cpu:.1f} x the CPU time of vfsurgery")


def main() -> None:
    """Read the options and run."""
    made = parser(__doc__)
    made.add_argument("--model", default="resnet50", help="a torchvision architecture (default: %(default)s)")
    made.add_argument("--runs", type=int, default=3, help="runs of vfsurgery; the median counts (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    measure(options.model, options.runs)


if __name__ == "__main__":
    main()

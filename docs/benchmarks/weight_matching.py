"""Weight matching of two randomly initialized networks to convergence, against the public package rebasin.

Only the matching is timed: tracing and finding groups come before. If rebasin (MIT licence) can be imported it runs on
the same two networks in the same process, likewise without its tracing, and the ratio is printed. How near the matched
parameters come is printed for both, since stopping early would be fast too. To have rebasin:

    pip install --no-deps rebasin torchview graphviz
    python docs/benchmarks/weight_matching.py
    python docs/benchmarks/weight_matching.py --model resnet18 --runs 3
"""

from __future__ import annotations

import copy

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


def measure_ours(a: nn.Module, b: nn.Module, runs: int) -> Stopwatch:
    """Match ``runs`` times with different orders of visits; the stopwatch is of one run."""
    groups = surgery.find_groups(a)
    states = [{name: tensor.detach() for name, tensor in model.state_dict().items()} for model in (a, b)]
    watches: list[Stopwatch] = []
    for seed in range(runs):
        problem = Problem(groups, states, correlations=list, seed=seed)
        watches.append(Stopwatch())
        with watches[-1]:
            (matching,) = WeightMatching().match(problem)
        near = distance(a, aligned(b, groups, matching.permutations))
        print(f"  vfsurgery, seed {seed}: {watches[-1]}, distance {near:.2f}")
    return sorted(watches, key=lambda watch: watch.wall)[(runs - 1) // 2]


def measure_rebasin(a: nn.Module, b: nn.Module, example: torch.Tensor) -> Stopwatch | None:
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
    print(f"  rebasin: {watch}, distance {distance(a, other):.2f}")
    return watch


def main() -> None:
    """Read the options, run both, print the ratio."""
    made = parser(__doc__)
    made.add_argument("--model", default="resnet50", help="a torchvision architecture (default: %(default)s)")
    made.add_argument("--runs", type=int, default=3, help="runs of vfsurgery; the median counts (default: %(default)s)")
    options = made.parse_args()
    begin(options.threads)
    a, b = random_pair(options.model)
    print(f"weight matching of two random {options.model}, distance before {distance(a, b):.2f}")
    ours = measure_ours(a, b, options.runs)
    theirs = measure_rebasin(a, b, torch.randn(1, 3, 224, 224))
    if theirs is not None:
        print(f"rebasin takes {theirs.wall / ours.wall:.1f} x the wall and {theirs.cpu / ours.cpu:.1f} x the CPU time")


if __name__ == "__main__":
    main()

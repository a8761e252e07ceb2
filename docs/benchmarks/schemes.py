"""Compare the schemes of matching more than two sources: how similar sources become, and what their merge keeps.

Networks of both kinds of ``recipes/digits.yaml`` learn scikit-learn's digits from different seeds and are merged in
disjoint sets. Similarity is the pooled cosine of two sources' weights, correlation that of corresponding units on the
297 calibration images, both over all pairs in a set; accuracy (%) is on 500 test images. A cell is the mean over the
sets with the lowest and the highest. A second table has the mean gain in accuracy of the iterative scheme over each
other one, set by set, with its standard error. Trained weights are kept for the next time.

    python docs/benchmarks/schemes.py
    python docs/benchmarks/schemes.py --sources 5 --sets 4
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file
from timing import Stopwatch, begin, parser
from torch import nn

import vfsurgery as surgery
from vfsurgery.data import Splits, digits
from vfsurgery.discovery.maps import permutations_of
from vfsurgery.groups import GroupSet, Permutations
from vfsurgery.matching import ActivationMatching, Given, Identity, Matcher, WeightMatching
from vfsurgery.matching.pairwise import Crossed, pairwise_correlation, pairwise_similarity
from vfsurgery.matching.schemes import Scheme
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.scoring.evaluation import compare
from vfsurgery.stats.collect import group_sites, survey
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.training import from_seed, train

ROOT = Path(__file__).resolve().parents[2]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "plain": (TinyConvNet, 15, 0.03),  # epochs and learning rate as in the recipe
    "residual": (TinyResNet, 12, 0.1),
}
NORMALIZATIONS: dict[str, dict[str, Renormalization]] = {
    "plain": {"none": None, "RESCALE": "rescale", "REPAIR": "repair"},
    "residual": {"none": None, "RESET": "reset", "RESET, REPAIR": ["reset", "repair"]},
}
MATCHERS: dict[str, Matcher] = {
    "identity": Identity(),
    **{f"weights, {scheme}": WeightMatching(scheme=scheme) for scheme in get_args(Scheme)},
    **{f"activations, {scheme}": ActivationMatching(scheme=scheme) for scheme in get_args(Scheme)},
}


def sources_of(name: str, seeds: Sequence[int], cache: Path, splits: Splits) -> list[nn.Module]:
    """Networks trained from these seeds, or their weights from the last time."""
    factory, epochs, rate = NETWORKS[name]
    models: list[nn.Module] = []
    for seed in seeds:
        model = from_seed(factory, seed)
        path = cache / f"{name}_seed{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            train(model, splits.train, epochs=epochs, lr=rate, seed=seed, progress=False)
            cache.mkdir(parents=True, exist_ok=True)
            save_file(dict(model.state_dict()), path)
        models.append(model.eval())
    return models


def crossed(models: Sequence[nn.Module], groups: GroupSet, splits: Splits) -> Crossed:
    """Cross moments of all pairs on the calibration images."""
    images = splits.calibration.tensors[0]
    traced = [surgery.trace(model, images[:2]) for model in models]
    sites = group_sites(traced[0], groups, torch.device("cpu"))
    with torch.no_grad():
        return survey(traced, [images], sites, {}, all_pairs=True).crossed


def accuracy(model: nn.Module, splits: Splits) -> float:
    """In percent, on the test images."""
    return 100 * next(iter(compare({"merged": model}, splits.test, progress=False).values())).accuracy


def measure(name: str, models: Sequence[nn.Module], splits: Splits) -> dict[str, Mapping[str, float]]:
    """One set of sources: for each matcher all figures by column."""
    images = splits.calibration.tensors[0]
    groups = surgery.find_groups(models[0], images[:2])
    pairs, states = crossed(models, groups, splits), [canonical_state(model) for model in models]
    rows: dict[str, Mapping[str, float]] = {}
    for label, matcher in MATCHERS.items():
        watch = Stopwatch()
        with watch:
            found = surgery.match(list(models), data=splits.calibration, matching=matcher, progress=False)
        given = found if isinstance(found, tuple) else (found,)
        orders: list[Permutations] = [{}, *map(permutations_of, given)]
        row = {
            "similarity": pairwise_similarity(groups, states, orders),
            "correlation": pairwise_correlation(groups, pairs, orders),
        }
        for kind, choice in NORMALIZATIONS[name].items():
            merged = surgery.merge(
                list(models), data=splits.calibration, matching=Given(given), renormalize=choice, progress=False
            )
            row[kind] = accuracy(merged, splits)
        rows[label] = {**row, "seconds": watch.cpu}
    return rows


def cell(column: str, values: Sequence[float]) -> str:
    """The mean, with the lowest and the highest where there are several."""
    digits_shown = {"similarity": 4, "correlation": 4, "seconds": 2}.get(column, 1)
    mean, low, high = (f"{f(values):.{digits_shown}f}" for f in (statistics.fmean, min, max))
    return mean if len(values) == 1 or column == "seconds" else f"{mean} ({low} to {high})"


def with_error(differences: Sequence[float]) -> str:
    """Their mean and its standard error, sets being compared with themselves."""
    mean = f"{statistics.fmean(differences):+.1f}"
    spread = statistics.stdev(differences) if len(differences) > 1 else float("nan")
    return f"{mean} ± {spread / len(differences) ** 0.5:.1f}"


def main() -> None:
    """Read the options and print the tables."""
    made = parser(__doc__)
    made.set_defaults(threads=1)
    made.add_argument("--sources", type=int, default=3, help="sources of a merge (default: %(default)s)")
    made.add_argument("--sets", type=int, default=8, help="disjoint sets of sources (default: %(default)s)")
    made.add_argument("--cache", type=Path, default=ROOT / "out" / "schemes", help="where trained weights are kept")
    options = made.parse_args()
    begin(options.threads)
    splits = digits()
    for name in NETWORKS:
        models = sources_of(name, range(options.sources * options.sets), options.cache, splits)
        sets = [models[options.sources * i : options.sources * (i + 1)] for i in range(options.sets)]
        found = [measure(name, chosen, splits) for chosen in sets]
        columns = list(found[0]["identity"])
        own = cell("", [accuracy(model, splits) for model in models])
        print(f"\n{name}, {options.sets} sets of {options.sources} sources of {own}")
        print(f"\n| matching | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for label in MATCHERS:
            cells = (cell(column, [rows[label][column] for rows in found]) for column in columns)
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
        kinds = list(NORMALIZATIONS[name])
        print(f"\n| iterative minus | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
        for label in MATCHERS:
            best = f"{label.partition(',')[0]}, iterative"
            if label not in ("identity", best):
                gained = ([rows[best][kind] - rows[label][kind] for rows in found] for kind in kinds)
                print(f"| {label} | {' | '.join(map(with_error, gained))} |", flush=True)


if __name__ == "__main__":
    main()

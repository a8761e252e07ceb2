"""CPU seconds to zip two sources, against the same rule with the best pair looked for in the whole matrix each time.

Units of a are random over 1,000 samples; those of b are the same in another order, with as much noise again. Both find
the same clusters, which is checked. Then come similarities that a search by cached partners may fear: many ties,
blocks, one common factor, and hubs, where one unit of b after the other is the best partner of all of a. A plain run
takes ten seconds at 2,048 units; ``--plain 0`` leaves all of them out.

    python docs/benchmarks/zipping.py
    python docs/benchmarks/zipping.py --units 128 512 --plain 256
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timing import Stopwatch, begin, parser
from torch import Tensor

from vfsurgery.matching.zipping import Zip, zip_units

ALPHA, BETA = 0.3, 0.125
SAMPLES = 1000


def noisy_copies(units: int) -> Tensor:
    """Correlations of units that b has in another order, and with as much noise."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(units, SAMPLES, generator=generator, dtype=torch.float64)
    noise = torch.randn(units, SAMPLES, generator=generator, dtype=torch.float64)
    return torch.corrcoef(torch.cat([a, a[torch.randperm(units, generator=generator)] + noise]))


def hubs(units: int) -> Tensor:
    """Every unit of a is equally similar to one of b, more than to the next one of b, and so on."""
    across = torch.linspace(1, 0.5, units).expand(units, units)
    nothing = torch.zeros(units, units)
    return torch.cat([torch.cat([nothing, across], 1), torch.cat([across.T, nothing], 1)])


def one_factor(units: int) -> Tensor:
    """Products of loadings on the only thing that all units share."""
    loadings = torch.rand(2 * units, generator=torch.Generator().manual_seed(0))
    return loadings.outer(loadings)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "noisy copies": noisy_copies,
    "all equal": lambda units: torch.ones(2 * units, 2 * units),
    "all zero": lambda units: torch.zeros(2 * units, 2 * units),
    "blocks of 32": lambda units: torch.block_diag(*[torch.ones(32, 32)] * (units // 16)),
    "one factor": one_factor,
    "hubs": hubs,
}


def plain(similarity: Tensor, units: int) -> tuple[tuple[int, ...], ...]:
    """The clusters of two sources by the rule alone, O(n^3): every step compares all pairs. In order of first units."""
    s = similarity.double().numpy().copy()
    np.fill_diagonal(s, -np.inf)
    source = np.arange(2 * units) // units
    budgets = [int(units // 2 * BETA)] * 2
    clusters = {unit: [unit] for unit in range(2 * units)}
    while len(clusters) > units:
        i, j = divmod(int(s.argmax()), 2 * units)
        clusters[i] += clusters.pop(j)
        s[i] = s[:, i] = ALPHA * np.minimum(s[i], s[j])
        s[j] = s[:, j] = -np.inf
        if source[i] == source[j]:
            budgets[source[i]] -= 1
            if budgets[source[i]] <= 0:
                s[np.ix_(source == source[i], source == source[i])] = -np.inf
    return tuple(sorted(tuple(sorted(cluster)) for cluster in clusters.values()))


def fastest(similarity: Tensor, runs: int) -> tuple[float, Zip]:
    """Least CPU seconds of several runs, and what they find."""
    seconds: list[float] = []
    for _ in range(runs):
        watch = Stopwatch()
        with watch:
            found = zip_units(similarity, 2, alpha=ALPHA, beta=BETA)
        seconds.append(watch.cpu)
    return min(seconds), found


def measure(kind: str, units: int, runs: int, compare: bool) -> str:
    """One row of a table."""
    similarity = KINDS[kind](units)
    ours, found = fastest(similarity, runs)
    if not compare:
        return f"| {kind} | {units} | {ours:.3f} | | |"
    watch = Stopwatch()
    with watch:
        clusters = plain(similarity, units)
    assert clusters == tuple(sorted(found.clusters)), "the clusters differ"
    return f"| {kind} | {units} | {ours:.3f} | {watch.cpu:.3f} | {watch.cpu / ours:.1f} |"


def main() -> None:
    """Read the options and print the table."""
    made = parser(__doc__)
    made.set_defaults(threads=1)
    made.add_argument("--units", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="units of each source")
    made.add_argument("--plain", type=int, default=2048, help="units up to which to compare (default: %(default)s)")
    made.add_argument(
        "--runs", type=int, default=5, help="runs of vfsurgery; the fastest counts (default: %(default)s)"
    )
    options = made.parse_args()
    begin(options.threads)
    zip_units(torch.eye(4), 2)  # what only a first call sets up
    print("\n| similarities | units per source | vfsurgery, s CPU | plain, s CPU | ratio |\n|---|---|---|---|---|")
    for units in options.units:
        print(measure("noisy copies", units, options.runs, units <= options.plain), flush=True)
    for kind in [kind for kind in KINDS if kind != "noisy copies"]:
        for units in options.units[2::2]:
            print(measure(kind, units, options.runs, units <= options.plain), flush=True)


if __name__ == "__main__":
    main()

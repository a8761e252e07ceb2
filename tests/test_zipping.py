"""Zipping merges the pairs that the published rule, written plainly, merges; its matrices take means and undo it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vfsurgery.errors import InvalidWeightsError, OptionError
from vfsurgery.groups import Permutation
from vfsurgery.matching import zipping
from vfsurgery.matching.zipping import Zip, zip_units

Linkage = Callable[[np.ndarray, np.ndarray], np.ndarray]
Merges = list[tuple[int, int, float]]
TOLERANCE = 1e-12
"""Relative, of a sum of at most a hundred terms in float64."""


def greedy(
    similarity: np.ndarray, origins: list[int], count: int, alpha: float, budget: int, linkage: Linkage = np.minimum
) -> tuple[list[list[int]], Merges]:
    """The rule of the text, step by step, O(n^3): columns shrink, the best pair is looked for in all that is left."""
    s, origins, merges = similarity.copy(), list(origins), []
    np.fill_diagonal(s, -np.inf)
    columns = [[index] for index in range(len(s))]
    budgets = dict.fromkeys(origins, budget)
    while len(columns) > count and s.max() > -np.inf:
        i, j = divmod(int(s.argmax()), len(s))
        assert i < j
        merges.append((columns[i][0], columns[j][0], float(s[i, j])))
        row = linkage(s[i], s[j])
        if alpha > 0:
            row = alpha * row
        else:
            row[[origin in (origins[i], origins[j]) for origin in origins]] = -np.inf
        row[i] = -np.inf
        s[i, :] = s[:, i] = row
        columns[i] += columns[j]
        origin, within = origins[i], origins[i] == origins[j]
        s = np.delete(np.delete(s, j, 0), j, 1)
        del columns[j], origins[j]
        if within:
            budgets[origin] -= 1
            if budgets[origin] <= 0:
                own = np.array(origins) == origin
                s[np.ix_(own, own)] = -np.inf
    return columns, merges


def plain(similarity: Tensor, sources: int, alpha: float, beta: float, linkage: Linkage = np.minimum) -> Zip:
    """A zip by :func:`greedy`, and what it leaves over merged without restrictions."""
    s = similarity.double().numpy()
    joint, units = len(s), len(s) // sources
    origins = [index // units for index in range(joint)]
    budget = int(((sources * units - units) // sources) * beta)
    columns, merges = greedy(s, origins, units, alpha, budget, linkage)
    forced = len(columns) - units
    if forced:
        least = np.array([[s[np.ix_(a, b)].min() for b in columns] for a in columns])
        unions, more = greedy(least, list(range(len(columns))), units, alpha, budget, linkage)
        columns = [[member for index in union for member in columns[index]] for union in unions]
        merges += more
    places: list[tuple[int, ...] | None] = [None] * units
    for column in sorted(map(sorted, columns)):  # those with units of source 0 come first
        places[column[0] if column[0] < units else places.index(None)] = tuple(column)
    return Zip(tuple(place for place in places if place), sum(value for _, _, value in merges), forced)


def correlation(joint: int, seed: int, samples: int = 12) -> Tensor:
    """Of random units over so few samples that correlations are large and of both signs."""
    drawn = torch.randn(joint, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.atleast_2d(torch.corrcoef(drawn))
    return (found + found.T) / 2


def with_ties(similarity: Tensor) -> Tensor:
    """Rounded to quarters: most pairs are as similar as others."""
    return (similarity * 4).round() / 4


OPTIONS = [(alpha, beta) for alpha in (-1.0, 0.0, 1e-4, 0.3, 1.0) for beta in (0.0, 0.125, 1.0)]


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("sources", [2, 3, 4])
@pytest.mark.parametrize(("alpha", "beta"), OPTIONS)
def test_zipping_makes_the_merges_of_the_plain_rule(alpha: float, beta: float, sources: int, tied: bool) -> None:
    for seed in range(4):
        similarity = correlation(sources * 9, seed)
        similarity = with_ties(similarity) if tied else similarity
        found, expected = (
            zip_units(similarity, sources, alpha=alpha, beta=beta),
            plain(similarity, sources, alpha, beta),
        )
        assert found.clusters == expected.clusters
        assert found.forced == expected.forced
        assert math.isclose(found.total, expected.total, rel_tol=TOLERANCE)


def hubs(units: int) -> Tensor:
    """One unit of b after the other is the best partner of all units of a."""
    across = torch.linspace(1, 0.5, units).expand(units, units)
    return torch.cat([torch.cat([0 * across, across], 1), torch.cat([across.T, 0 * across], 1)])


DEGENERATE = {
    "all equal": torch.ones(48, 48),
    "all zero": torch.zeros(48, 48),
    "all opposed": -torch.ones(48, 48),
    "blocks": torch.block_diag(*[torch.ones(8, 8)] * 6),
    "one factor": torch.linspace(0.1, 1, 48).outer(torch.linspace(0.1, 1, 48)),
    "twins": correlation(24, 0).tile(2, 2),
    "negative": -with_ties(correlation(48, 0).abs()),  # times alpha these rise, often to what others are
    "hubs": hubs(24),
}


@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_similarities_give_the_merges_of_the_plain_rule(kind: str, sources: int, alpha: float) -> None:
    found = zip_units(DEGENERATE[kind], sources, alpha=alpha)
    expected = plain(DEGENERATE[kind], sources, alpha, 0.125)
    assert (found.clusters, found.forced) == (expected.clusters, expected.forced)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.125), (1e-4, 1.0), (0.3, 0.125), (0.5, 1.0), (1.0, 0.0)])
def test_rows_searched_at_once_give_the_same_merges(
    alpha: float, beta: float, sources: int, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [correlation(48, seed) for seed in range(3)]
    similarities = [*drawn, *map(with_ties, drawn), *[-s.abs() for s in drawn], *DEGENERATE.values()]
    expected = [zip_units(similarity, sources, alpha=alpha, beta=beta) for similarity in similarities]
    monkeypatch.setattr(zipping, "PATIENCE", patience)
    monkeypatch.setattr(zipping, "BLOCK", 5)
    assert [zip_units(similarity, sources, alpha=alpha, beta=beta) for similarity in similarities] == expected


def test_no_merge_searches_more_rows_one_by_one_than_patience_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, units, searched = hubs(160), 160, []
    search_row, search_rows = zipping._Search._search_row, zipping._Search._search_rows
    monkeypatch.setattr(zipping._Search, "_search_row", lambda s, row: (searched.append(1), search_row(s, row)))
    monkeypatch.setattr(zipping._Search, "_search_rows", lambda s, rows: (searched.append(0), search_rows(s, rows)))
    assert zip_units(similarity, 2).clusters == plain(similarity, 2, 0.3, 0.125).clusters
    assert 0 in searched
    assert sum(searched) < 2 * units + units * zipping.PATIENCE < units**2 / 2  # what one by one takes


def test_another_linkage_gives_other_clusters() -> None:
    different = [
        zip_units(correlation(24, seed), 2, alpha=1.0).clusters
        != plain(correlation(24, seed), 2, 1.0, 0.125, np.maximum).clusters
        for seed in range(8)
    ]
    assert all(different)


def test_alpha_and_beta_change_the_clusters() -> None:
    similarity = correlation(40, 0)
    options = [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0), (1.0, 1.0)]
    found = {zip_units(similarity, 2, alpha=alpha, beta=beta).clusters for alpha, beta in options}
    assert len(found) == len(options)


def within(zipped: Zip, source: int) -> int:
    """Units of a source that share their cluster with an earlier one of it."""
    owned = [sum(member // zipped.units == source for member in cluster) for cluster in zipped.clusters]
    return sum(count - 1 for count in owned if count)


@pytest.mark.parametrize("beta", [0.0, 0.4, 0.5])
def test_merges_within_a_source_stay_within_the_budget(beta: float) -> None:
    units = 15
    similarity = torch.block_diag(correlation(units, 1), correlation(units, 2)) + 0.01  # nothing in common across
    budget = int(units // 2 * beta)
    zipped = zip_units(similarity, 2, alpha=1.0, beta=beta)
    assert [within(zipped, source) for source in range(2)] == [max(budget, 1)] * 2  # one is always let through
    assert within(zip_units(similarity, 2, alpha=1.0, beta=1.0), 0) > max(budget, 1)


def test_a_cluster_belongs_to_the_source_of_its_first_unit() -> None:
    # units 0 to 3 are a's, 4 to 7 b's. 0 + 4, 1 + 5, then the pair of both unions: it is within a, and only a, and uses
    # its budget up. So 2 + 3 is forbidden and 6 + 7 is not.
    s = torch.full((8, 8), 0.1)
    s[[0, 1, 0, 0, 1, 4], [4, 5, 1, 5, 4, 5]] = torch.tensor([1.0, 1.0, 0.8, 0.8, 0.8, 0.8])
    s[[2, 6], [3, 7]] = torch.tensor([0.7, 0.6])
    s = s.triu(1) + s.triu(1).T
    zipped = zip_units(s, 2, alpha=1.0, beta=0.0)
    assert zipped.clusters == plain(s, 2, 1.0, 0.0).clusters == ((0, 1, 4, 5), (6, 7), (2,), (3,))


@pytest.mark.parametrize("beta", [0.0, 0.125])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_permutation_is_found_exactly(alpha: float, beta: float, seed: int) -> None:
    units = 20
    planted = Permutation.random(units, torch.Generator().manual_seed(seed))
    order = [*range(units), *(units + planted.inverse().order[unit] - units for unit in range(units))]
    similarity = correlation(units, seed)[order][:, order]
    zipped = zip_units(similarity, 2, alpha=alpha, beta=beta)
    assert torch.equal(zipped.merge(0), torch.eye(units, dtype=torch.float64))
    assert torch.equal(zipped.merge(1), torch.eye(units, dtype=torch.float64)[list(planted.inverse().order)].T)
    assert not torch.equal(zipped.merge(1), torch.eye(units, dtype=torch.float64))
    assert zipped.total == pytest.approx(units)


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_identical_sources_give_the_identity(sources: int) -> None:
    zipped = zip_units(correlation(10, 3).tile(sources, sources), sources, alpha=1.0)
    assert zipped.clusters == tuple(tuple(range(unit, 10 * sources, 10)) for unit in range(10))


def test_clusters_stand_where_the_reference_has_their_first_unit() -> None:
    for seed in range(8):
        zipped = zip_units(correlation(36, seed), 3, beta=1.0)
        others = [cluster for place, cluster in enumerate(zipped.clusters) if cluster[0] != place]
        assert all(cluster[0] >= zipped.units for cluster in others)
        assert others == sorted(others)
    assert others


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([-1.0, 0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.125, 0.5, 1.0]),
)
def test_every_zip_is_a_partition_whose_matrices_undo_each_other(
    sources: int, units: int, seed: int, tied: bool, alpha: float, beta: float
) -> None:
    similarity = correlation(sources * units, seed)
    similarity = with_ties(similarity) if tied else similarity
    zipped = zip_units(similarity, sources, alpha=alpha, beta=beta)
    assert sorted(sum(zipped.clusters, ())) == list(range(sources * units))
    assert (zipped.sources, zipped.units) == (sources, units)
    merges, unmerges = ([of(source) for source in range(sources)] for of in (zipped.merge, zipped.unmerge))
    mean = sum(merge @ unmerge for merge, unmerge in zip(merges, unmerges, strict=True)) / sources
    torch.testing.assert_close(mean, torch.eye(units, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE)
    assert all((unmerge.sum(1) == 1).all() for unmerge in unmerges)


def test_a_merged_unit_is_the_mean_of_its_members() -> None:
    zipped = zip_units(correlation(24, 1), 2, beta=1.0)
    assert max(map(len, zipped.clusters)) > 2
    outputs = torch.randn(24, 5, dtype=torch.float64)
    merged = sum(zipped.merge(source) @ outputs[12 * source : 12 * (source + 1)] for source in range(2)) / 2
    means = torch.stack([outputs[list(cluster)].mean(0) for cluster in zipped.clusters])
    torch.testing.assert_close(merged, means, rtol=TOLERANCE, atol=TOLERANCE)
    for source in range(2):
        own = [next(p for p, cluster in enumerate(zipped.clusters) if 12 * source + u in cluster) for u in range(12)]
        assert torch.equal(zipped.unmerge(source) @ means, means[own])


def test_the_input_stays_as_it_is_and_its_dtype_and_strides_do_not_matter() -> None:
    similarity = with_ties(correlation(24, 5))
    before = similarity.clone()
    expected = zip_units(similarity, 2)
    assert torch.equal(similarity, before)
    for other in (similarity.half(), similarity.float(), similarity.T, similarity.repeat(2, 2)[::2, ::2]):
        same = torch.equal(other.double(), similarity)
        assert (zip_units(other, 2) == expected) == same


def test_equally_similar_pairs_are_merged_in_order() -> None:
    assert zip_units(torch.ones(6, 6), 2, alpha=0.0, beta=0.0).clusters == ((0, 1, 3), (5,), (2, 4))


def test_a_pair_that_becomes_as_similar_as_another_comes_in_its_order() -> None:
    s = torch.full((6, 6), -1.0)
    s[1, 3] = 0.5  # merged first: 0 and 1 + 3 are then as similar as 0 and 4, which were so before
    s[0, 1] = s[0, 3] = -0.5
    s[0, 4] = -0.25
    s[2, 5] = -0.2
    s = s.triu(1) + s.triu(1).T
    clusters = zip_units(s, 2, alpha=0.5, beta=1.0).clusters
    assert clusters == plain(s, 2, 0.5, 1.0).clusters == ((0, 1, 3), (4,), (2, 5))


def test_restrictions_that_leave_no_pair_are_lifted() -> None:
    three = correlation(36, 0)
    zipped = zip_units(three, 3, alpha=0.0, beta=0.0)
    assert zipped.forced > 0
    assert math.isfinite(zipped.total)
    assert max(map(len, zipped.clusters)) <= 6  # no cluster swallows the rest
    assert zip_units(three[:24, :24], 2, alpha=0.0, beta=0.0).forced == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_similarities_that_are_no_numbers_are_refused(value: float) -> None:
    similarity = correlation(8, 0)
    similarity[2, 5] = value
    message = rf"matrix of \(8, 8\) holds {value}, first at \(2, 5\)\n.*constant unit"
    with pytest.raises(InvalidWeightsError, match=message):
        zip_units(similarity, 2)


@pytest.mark.parametrize(("shape", "sources"), [((4, 6), 2), ((6,), 2), ((5, 5), 2), ((0, 0), 1), ((4, 4), 0)])
def test_matrices_that_are_not_joint_are_refused(shape: tuple[int, ...], sources: int) -> None:
    with pytest.raises(OptionError, match=r"similarities of \(.*\) are not those of \d sources(.|\n)*source by source"):
        zip_units(torch.zeros(shape), sources)


@pytest.mark.parametrize("alpha", [1.5, math.nan, -math.inf])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(OptionError, match=rf"alpha is {alpha}\n.*at most 1"):
        zip_units(torch.eye(4), 2, alpha=alpha)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_a_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(OptionError, match=rf"beta is {beta}\n.*from 0 to 1"):
        zip_units(torch.eye(4), 2, beta=beta)


@pytest.mark.parametrize(
    "clusters", [(), ((),), ((0, 1), ()), ((0,), (2,)), ((0, 1), (1, 2)), ((1, 0), (2, 3)), ((0, 1), (2,))]
)
def test_a_zip_that_is_no_partition_is_refused(clusters: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(OptionError, match=rf"^{len(clusters)} clusters of \d members are not a zip\n"):
        Zip(clusters)


@pytest.mark.parametrize("source", [-1, 2])
def test_a_source_that_is_not_zipped_is_refused(source: int) -> None:
    zipped = Zip(((0, 2), (1, 3)))
    for matrix in (zipped.merge, zipped.unmerge):
        with pytest.raises(OptionError, match=rf"no source {source} in a zip of 2\n.*0 to 1"):
            matrix(source)

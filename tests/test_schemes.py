"""Schemes for more than two sources: all find what was planted, agree around cycles, and none loses similarity."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from test_matching import problem
from test_nested import build
from tiny_nets import groups_of, images, net, permuted, planted, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.groups import GroupSet, Permutation, random_permutations
from vfsurgery.maps import permutations_of
from vfsurgery.matching import ActivationMatching, Matcher, Matching, WeightMatching
from vfsurgery.matching.pairwise import Crossed, pairwise_correlation, pairwise_similarity
from vfsurgery.matching.schemes import relative
from vfsurgery.sources import canonical_state
from vfsurgery.stats.collect import group_sites, survey

SCHEMES = ["iterative", "reference", "sequential"]
MATCHERS = {"weights": WeightMatching, "activations": ActivationMatching}
RELATIVE = 1e-6
"""Error of a cosine or a correlation whose sums were taken in float32."""
NESTED = ["unbind", "norms in heads", "multi-query", "MultiheadAttention", "grouped convolution"]

Orders = Mapping[str, Permutation]


def orders_of(models: Sequence[nn.Module], matcher: Matcher, data: Tensor | None = None, seed: int = 0) -> list[Orders]:
    """The orders of all sources, the first one's left out as the identity."""
    inputs = images(2) if data is None else data[:2]
    given = data if matcher.needs_data else None
    found = surgery.match(list(models), data=given, matching=matcher, example_inputs=inputs, seed=seed, progress=False)
    return [{}, *map(permutations_of, found if isinstance(found, tuple) else (found,))]


def crossed(models: Sequence[nn.Module], groups: GroupSet, data: Tensor) -> Crossed:
    traced = [surgery.trace(model, data[:2]) for model in models]
    with torch.no_grad():
        sites = group_sites(traced[0], groups, torch.device("cpu"))
        return survey(traced, [data], sites, {}, all_pairs=True).crossed


def reached(models: Sequence[nn.Module], groups: GroupSet, matcher: Matcher, data: Tensor, seed: int = 0) -> float:
    """What the matcher maximises, under the orders that it finds."""
    orders = orders_of(models, matcher, data, seed)
    if matcher.needs_data:
        return pairwise_correlation(groups, crossed(models, groups, data), orders)
    return pairwise_similarity(groups, [canonical_state(model) for model in models], orders)


def noisy(model: nn.Module, share: float = 0.05) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(share * parameter.std(correction=0) * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("name", "count"), [("chain", 3), ("residual", 4), ("dense", 3)])
def test_planted_permutations_of_noisy_copies_are_found(name: str, count: int, scheme: str, matching: str) -> None:
    model = net(name, 1)
    groups = groups_of(model)
    copies = [planted(model, groups, seed) for seed in range(count)]
    orders = orders_of([noisy(copied) for copied in copies], MATCHERS[matching](scheme=scheme), images(48))
    for copied, own in zip(copies, orders, strict=True):
        assert same_state(permuted(copied, groups, own).state_dict(), copies[0].state_dict())
    assert not same_state(copies[1].state_dict(), copies[0].state_dict())


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("scheme", ["iterative", "sequential"])
@pytest.mark.parametrize("name", NESTED)
def test_planted_nested_permutations_are_found(name: str, scheme: str, matching: str) -> None:
    model, x, groups = build(name)
    copies = [planted(model, groups, seed) for seed in (1, 2, 3)]
    data = torch.randn(96, *x.shape[1:])
    orders = orders_of(copies, MATCHERS[matching](scheme=scheme), data)
    for copied, own in zip(copies, orders, strict=True):
        back = canonical_state(permuted(copied, groups, own))
        assert all(torch.equal(back[key], tensor) for key, tensor in canonical_state(copies[0]).items())


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "dense"])
def test_rounds_never_lose_similarity_and_end_above_the_reference_scheme(name: str, matching: str) -> None:
    models = [net(name, seed) for seed in (1, 2, 3)]
    groups, data, make = groups_of(models[0]), images(48), MATCHERS[matching]
    steps = [make(scheme="reference"), *(make(scheme="iterative", max_rounds=rounds) for rounds in (1, 2, 100))]
    sums = [reached(models, groups, matcher, data) for matcher in steps]
    assert all(later >= earlier - RELATIVE for earlier, later in itertools.pairwise(sums))
    assert sums[-1] > sums[0] + RELATIVE
    assert reached(models, groups, make(scheme="sequential"), data) < sums[-1]


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("name", NESTED)
def test_rounds_never_lose_similarity_of_nested_groups(name: str, matching: str) -> None:
    models, data = [build(name, seed)[0] for seed in (1, 2, 3)], torch.randn(96, *build(name)[1].shape[1:])
    groups, make = build(name, 1)[2], MATCHERS[matching]
    steps = [make(scheme="reference"), *(make(scheme="iterative", max_rounds=rounds) for rounds in (1, 2, 100))]
    sums = [reached(models, groups, matcher, data) for matcher in steps]
    assert all(later >= earlier - RELATIVE for earlier, later in itertools.pairwise(sums))
    assert sums[-1] > sums[0] + RELATIVE


def around(model: nn.Module, groups: GroupSet, to_a: Orders, to_b: Orders, to_c: Orders) -> nn.Module:
    """Source a brought to the order of c, from there to that of b, and back to that of a."""
    for orders in (to_c, to_b, to_a):
        model = permuted(model, groups, orders)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("matching", MATCHERS)
def test_orders_agree_around_a_cycle_and_those_found_pair_by_pair_do_not(scheme: str, matching: str) -> None:
    a, b, c = models = [net("residual", seed) for seed in (1, 2, 3)]
    groups, data, matcher = groups_of(a), images(48), MATCHERS[matching](scheme=scheme)
    _, of_b, of_c = orders_of(models, matcher, data)
    unmoved = {group.name: group.identity() for group in groups}
    back = around(a, groups, of_b, relative(of_c, of_b, groups), relative(unmoved, of_c, groups))
    assert same_state(back.state_dict(), a.state_dict())
    of_b, of_c, of_a = (orders_of(pair, matcher, data)[1] for pair in ([a, b], [b, c], [c, a]))
    assert not same_state(around(a, groups, of_b, of_c, of_a).state_dict(), a.state_dict())


@pytest.mark.parametrize("name", NESTED)
def test_relative_orders_go_by_way_of_the_common_frame(name: str) -> None:
    model, _, groups = build(name)
    generator = torch.Generator().manual_seed(0)
    orders, frame = (random_permutations(groups, generator) for _ in range(2))
    unmoved = {group.name: group.identity() for group in groups}
    two_steps = permuted(permuted(model, groups, orders), groups, relative(unmoved, frame, groups))
    found = relative(orders, frame, groups)
    assert all(group.accepts(found[group.name]) for group in groups)
    assert same_state(permuted(model, groups, found).state_dict(), two_steps.state_dict())
    there = permuted(permuted(model, groups, frame), groups, relative(unmoved, frame, groups))
    assert same_state(there.state_dict(), model.state_dict())
    singly = {  # without regard to the blocks that have moved
        group: Permutation(tuple(order.order[place] for place in frame[group].inverse().order))
        for group, order in orders.items()
    }
    if any(group.blocks > 1 for group in groups):
        assert not same_state(permuted(model, groups, singly).state_dict(), two_steps.state_dict())


def pair_by_pair(models: Sequence[nn.Module], matching: str, data: Tensor) -> list[Orders]:
    """Every source matched to the first one, by itself."""
    matcher = MATCHERS[matching](scheme="reference")
    return [{}, *(orders_of([models[0], other], matcher, data)[1] for other in models[1:])]


@pytest.mark.parametrize("matching", MATCHERS)
def test_two_sources_are_matched_alike_under_all_schemes(matching: str) -> None:
    models, data = [net("residual", 1), net("residual", 2)], images(48)
    found = [orders_of(models, MATCHERS[matching](scheme=scheme), data) for scheme in SCHEMES]
    assert found == [pair_by_pair(models, matching, data)] * len(SCHEMES)


@pytest.mark.parametrize("matching", MATCHERS)
def test_only_under_the_reference_scheme_all_sources_are_matched_to_the_first(matching: str) -> None:
    models, data = [net("residual", seed) for seed in (1, 2, 3)], images(48)
    found = {scheme: orders_of(models, MATCHERS[matching](scheme=scheme), data) for scheme in SCHEMES}
    expected = pair_by_pair(models, matching, data)
    assert found["reference"] == expected
    assert found["sequential"][1] == expected[1] and found["sequential"][2] != expected[2]
    assert found["iterative"] != expected


@pytest.mark.parametrize("matching", MATCHERS)
def test_the_sequential_scheme_matches_each_source_to_the_aligned_one_before_it(matching: str) -> None:
    a, b, c = models = [net("chain", seed) for seed in (1, 2, 3)]
    groups, data, matcher = groups_of(a), images(48), MATCHERS[matching](scheme="sequential")
    _, of_b, of_c = orders_of(models, matcher, data)
    aligned = permuted(b, groups, of_b)
    assert of_c == orders_of([aligned, c], matcher, data)[1]
    assert of_c != orders_of([b, c], matcher, data)[1]


@pytest.mark.parametrize("matching", MATCHERS)
def test_one_seed_gives_one_result(matching: str) -> None:
    models, data, matcher = (
        [net("chain", seed) for seed in range(4)],
        images(32),
        MATCHERS[matching](scheme="iterative"),
    )
    found = [orders_of(models, matcher, data, seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_gains_say_how_similar_a_source_is_to_all_others() -> None:
    models = [net("chain", seed) for seed in (1, 2, 3)]
    groups, states = groups_of(models[0]), [canonical_state(model) for model in models]
    found = WeightMatching(scheme="iterative").match(problem(models))
    aligned = [states[0], *(canonical_state(permuted(m, groups, f.permutations)) for m, f in zip(models[1:], found))]

    def product(states: Sequence[Mapping[str, Tensor]]) -> float:  # g0's parameters, of source 1 with both others
        names = ("0.weight", "2.weight")
        return sum(float((states[1][name] * (states[0][name] + states[2][name]) / 2).sum()) for name in names)

    gain = next(gain for gain in found[0].gains if gain.group == "g0")
    assert gain.before == pytest.approx(product(states), rel=1e-4)
    assert gain.after == pytest.approx(product(aligned), rel=1e-4)
    assert gain.moved == found[0].permutations["g0"].moved


class Counted:
    """Images that note how often they are read."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield images(32)


def test_every_scheme_reads_the_data_as_often_as_the_reference_scheme() -> None:
    models, passes = [net("chain", seed) for seed in (1, 2, 3)], {}
    for scheme in SCHEMES:
        data = Counted()
        matcher = ActivationMatching(scheme=scheme)
        surgery.match(models, data=data, matching=matcher, example_inputs=images(2), progress=False)
        passes[scheme] = data.passes
    assert len(set(passes.values())) == 1


@pytest.mark.parametrize("matching", MATCHERS)
def test_pinned_units_stay_where_they_are(matching: str) -> None:
    models = [net("chain", seed) for seed in (1, 2, 3)]
    options = {"data": images(32), "matching": MATCHERS[matching](scheme="iterative"), "progress": False}
    free, pinned = surgery.match(models, **options), surgery.match(models, pins="2", **options)
    assert [order.size for order in free[0].values()].count(10) == 1
    assert all(order.size != 10 for orders in pinned for order in orders.values()) and pinned[0]


def test_similarity_and_correlation_are_means_over_all_pairs() -> None:
    models, data = [net("chain", seed).double() for seed in (1, 2, 3)], images(32, dtype=torch.float64)
    groups = surgery.find_groups(models[0], data[:2])
    generator = torch.Generator().manual_seed(0)
    orders = [random_permutations(groups, generator) for _ in models]
    aligned = [permuted(model, groups, own) for model, own in zip(models, orders, strict=True)]
    flat = [torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1]) for model in aligned]
    pairs = list(itertools.combinations(flat, 2))
    expected = sum(float(x @ y) for x, y in pairs) / sum(float(x.norm() * y.norm()) for x, y in pairs)
    states = [canonical_state(model) for model in models]
    assert pairwise_similarity(groups, states, orders) == pytest.approx(expected, rel=1e-9)
    assert pairwise_similarity(groups, states, [{}] * 3) != pytest.approx(expected, rel=1e-3)
    found = pairwise_correlation(groups, crossed(models, groups, data), orders)
    assert found == pytest.approx(pairwise_correlation(groups, crossed(aligned, groups, data), [{}] * 3), rel=1e-9)
    assert found != pytest.approx(pairwise_correlation(groups, crossed(models, groups, data), [{}] * 3), rel=1e-3)


def told(merged: nn.Module) -> list[str]:
    return [note for note in surgery.report_of(merged).notes if note.startswith("mean ")]


def test_the_report_says_how_similar_more_than_two_sources_are() -> None:
    models = [net("residual", seed) for seed in (1, 2, 3)]
    options = {"data": images(32), "matching": ActivationMatching(scheme="iterative"), "renormalize": None}
    merged = surgery.merge(models, **options, progress=False)
    weights, units = told(merged)
    for note, what in ((weights, "mean similarity of two sources' weights"), (units, "mean correlation of two")):
        assert note.startswith(what)
        before, after = (float(word) for word in note.replace(",", "").split() if "0." in word)
        assert after > before + 0.01
    assert all(surgery.report_of(merged).certificates)
    overwritten = surgery.merge([copy.deepcopy(model) for model in models], **options, inplace=True, progress=False)
    assert told(overwritten) == [weights, units]
    assert told(surgery.merge(models[:2], **options, progress=False)) == []
    assert told(surgery.merge(models, **{**options, "matching": "identity"}, progress=False)) == []


@pytest.mark.parametrize("make", MATCHERS.values())
def test_unknown_schemes_and_no_rounds_are_refused(make: type[WeightMatching]) -> None:
    with pytest.raises(OptionError, match=r"(?s)unknown scheme 'iterativ'.*did you mean 'iterative'\? accepted: iter"):
        make(scheme="iterativ")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"(?s)max_rounds is 0.*remedy  pass 1 or more"):
        make(max_rounds=0)


def test_matchings_hold_nothing_of_the_first_source() -> None:
    found = WeightMatching(scheme="iterative").match(problem([net("chain", seed) for seed in (1, 2, 3)]))
    assert len(found) == 2 and all(isinstance(matching, Matching) for matching in found)

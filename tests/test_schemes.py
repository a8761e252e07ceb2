"""Schemes for more than two sources: all find what was planted, agree around cycles, and none loses similarity."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import pytest
import torch
from test_nested import build
from tiny_nets import groups_of, images, net, permuted, planted, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.maps import permutations_of
from vfsurgery.errors import OptionError
from vfsurgery.groups import GroupSet, Permutation, random_permutations
from vfsurgery.matching import ActivationMatching, Matcher, Matching, Problem, WeightMatching
from vfsurgery.matching.activations import match_on
from vfsurgery.matching.pairwise import Crossed, pairwise_correlation, pairwise_similarity
from vfsurgery.matching.schemes import relative
from vfsurgery.matching.weights import match_rest, match_rest_of_all
from vfsurgery.stats.collect import group_sites, survey
from vfsurgery.tracing.sources import canonical_state

SCHEMES = ["iterative", "reference", "sequential"]
MATCHERS = {"weights": WeightMatching, "activations": ActivationMatching}
RELATIVE = 1e-6
"""Error of a cosine or a correlation whose sums were taken in float32."""
NESTED = ["unbind", "norms in heads", "multi-query", "MultiheadAttention", "grouped convolution"]

Orders = Mapping[str, Permutation]


@dataclass(frozen=True)
class Sources:
    """Networks of one architecture, and what matchers ask about them."""

    models: Sequence[nn.Module]
    data: Tensor

    @cached_property
    def groups(self) -> GroupSet:
        return surgery.find_groups(self.models[0], self.data[:2]).only_ordered()

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        return [canonical_state(model) for model in self.models]

    @cached_property
    def pairs(self) -> Crossed:
        traced = [surgery.trace(model, self.data[:2]) for model in self.models]
        with torch.no_grad():
            sites = group_sites(traced[0], self.groups, torch.device("cpu"))
            return survey(traced, [self.data], sites, {}, all_pairs=True).crossed

    def orders(self, matcher: Matcher, seed: int = 0) -> list[Orders]:
        """Of all sources, the first one's left out as the identity."""
        correlations = lambda: [self.pairs[0, source] for source in range(1, len(self.models))]  # noqa: E731
        found = matcher.match(Problem(self.groups, self.states, correlations, seed, joint=lambda: self.pairs))
        return [{}, *(permutations_of(matching.permutations) for matching in found)]

    def reached(self, matcher: Matcher, seed: int = 0) -> float:
        """What the matcher maximises, under the orders that it finds."""
        orders = self.orders(matcher, seed)
        if matcher.needs_data:
            return pairwise_correlation(self.groups, self.pairs, orders)
        return pairwise_similarity(self.groups, self.states, orders)


@cache
def strangers(name: str, count: int = 3) -> Sources:
    """Networks that have nothing in common."""
    return Sources([net(name, seed) for seed in range(1, count + 1)], images(48))


@cache
def nested_strangers(name: str) -> Sources:
    found = [build(name, seed) for seed in (1, 2, 3)]
    return Sources([model for model, _, _ in found], torch.randn(96, *found[0][1].shape[1:]))


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
    orders = Sources([noisy(copied) for copied in copies], images(48)).orders(MATCHERS[matching](scheme=scheme))
    for copied, own in zip(copies, orders, strict=True):
        assert same_state(permuted(copied, groups, own).state_dict(), copies[0].state_dict())
    assert not same_state(copies[1].state_dict(), copies[0].state_dict())


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("scheme", ["iterative", "sequential"])
@pytest.mark.parametrize("name", NESTED)
def test_planted_nested_permutations_are_found(name: str, scheme: str, matching: str) -> None:
    model, x, groups = build(name)
    copies = [planted(model, groups, seed) for seed in (1, 2, 3)]
    orders = Sources(copies, torch.randn(96, *x.shape[1:])).orders(MATCHERS[matching](scheme=scheme))
    for copied, own in zip(copies, orders, strict=True):
        back = canonical_state(permuted(copied, groups, own))
        assert all(torch.equal(back[key], tensor) for key, tensor in canonical_state(copies[0]).items())


@pytest.mark.parametrize("matching", MATCHERS)
@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "dense", *NESTED])
def test_rounds_never_lose_similarity_and_end_above_the_reference_scheme(name: str, matching: str) -> None:
    sources, make = nested_strangers(name) if name in NESTED else strangers(name), MATCHERS[matching]
    steps = [make(scheme="reference"), *(make(scheme="iterative", max_rounds=rounds) for rounds in (1, 2, 100))]
    sums = [sources.reached(matcher) for matcher in steps]
    assert all(later >= earlier - RELATIVE for earlier, later in itertools.pairwise(sums))
    assert sums[-1] > sums[0] + RELATIVE
    assert sources.reached(make(scheme="sequential")) < sums[-1]


def test_rounds_improve_the_groups_inside_known_ones_and_leave_the_known_ones_alone() -> None:
    sources = nested_strangers("MultiheadAttention")
    known = {group.name: group.random(torch.Generator().manual_seed(0)) for group in sources.groups if not group.outer}
    start = [{name: sources.groups[name].identity() for name in known}, known, known]
    sums: list[float] = []
    for scheme in ("reference", "iterative"):
        found = match_rest_of_all(Problem(sources.groups, sources.states, list), start, scheme)
        orders = [permutations_of(matching.permutations) for matching in found]
        assert all(own | of_start == own for own, of_start in zip(orders, start, strict=True))
        sums.append(pairwise_similarity(sources.groups, sources.states, orders))
    assert sums[1] > sums[0] + RELATIVE


def around(model: nn.Module, groups: GroupSet, to_a: Orders, to_b: Orders, to_c: Orders) -> nn.Module:
    """Source a brought to the order of c, from there to that of b, and back to that of a."""
    for orders in (to_c, to_b, to_a):
        model = permuted(model, groups, orders)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("matching", MATCHERS)
def test_orders_agree_around_a_cycle_and_those_found_pair_by_pair_do_not(scheme: str, matching: str) -> None:
    sources, matcher = strangers("residual"), MATCHERS[matching](scheme=scheme)
    (a, b, c), groups = sources.models, sources.groups
    _, of_b, of_c = sources.orders(matcher)
    unmoved = {group.name: group.identity() for group in groups}
    back = around(a, groups, of_b, relative(of_c, of_b, groups), relative(unmoved, of_c, groups))
    assert same_state(back.state_dict(), a.state_dict())
    of_b, of_c, of_a = (Sources(pair, sources.data).orders(matcher)[1] for pair in ([a, b], [b, c], [c, a]))
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


def pair_by_pair(sources: Sources, matching: str) -> list[Orders]:
    """Every source matched to the first one, by itself, as if there were no schemes."""
    a, *others = sources.models
    found: list[Matching] = []
    for other in others:
        pair = Sources([a, other], sources.data)
        asked = Problem(pair.groups, pair.states, list)
        found.append(match_rest(asked, 1, {}) if matching == "weights" else match_on(asked, 1, pair.pairs[0, 1]))
    return [{}, *(permutations_of(matching.permutations) for matching in found)]


@pytest.mark.parametrize("matching", MATCHERS)
def test_two_sources_are_matched_alike_under_all_schemes(matching: str) -> None:
    sources = strangers("residual", 2)
    found = [sources.orders(MATCHERS[matching](scheme=scheme)) for scheme in SCHEMES]
    assert found == [pair_by_pair(sources, matching)] * len(SCHEMES)


@pytest.mark.parametrize("matching", MATCHERS)
def test_only_under_the_reference_scheme_all_sources_are_matched_to_the_first(matching: str) -> None:
    sources = strangers("residual")
    found = {scheme: sources.orders(MATCHERS[matching](scheme=scheme)) for scheme in SCHEMES}
    expected = pair_by_pair(sources, matching)
    assert found["reference"] == expected
    assert found["sequential"][1] == expected[1] and found["sequential"][2] != expected[2]
    assert found["iterative"] != expected


@pytest.mark.parametrize("matching", MATCHERS)
def test_the_sequential_scheme_matches_each_source_to_the_aligned_one_before_it(matching: str) -> None:
    sources, matcher = strangers("chain"), MATCHERS[matching](scheme="sequential")
    _, b, c = sources.models
    _, of_b, of_c = sources.orders(matcher)
    aligned = permuted(b, sources.groups, of_b)
    assert of_c == Sources([aligned, c], sources.data).orders(matcher)[1]
    assert of_c != Sources([b, c], sources.data).orders(matcher)[1]


@pytest.mark.parametrize("matching", MATCHERS)
def test_one_seed_gives_one_result(matching: str) -> None:
    sources, matcher = strangers("chain", 4), MATCHERS[matching](scheme="iterative")
    found = [sources.orders(matcher, seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_gains_say_how_similar_a_source_is_to_all_others() -> None:
    sources = strangers("chain")
    groups, states = sources.groups, sources.states
    found = WeightMatching(scheme="iterative").match(Problem(groups, states, list))
    orders = [{}, *(permutations_of(matching.permutations) for matching in found)]
    aligned = [canonical_state(permuted(m, groups, own)) for m, own in zip(sources.models, orders, strict=True)]

    def product(states: Sequence[Mapping[str, Tensor]]) -> float:  # g0's parameters, of source 1 with both others
        names = ("0.weight", "2.weight")
        return sum(float((states[1][name] * (states[0][name] + states[2][name]) / 2).sum()) for name in names)

    gain = next(gain for gain in found[0].gains if gain.group == "g0")
    assert gain.before == pytest.approx(product(states), rel=1e-4)
    assert gain.after == pytest.approx(product(aligned), rel=1e-4)
    assert gain.moved == found[0].permutations["g0"].moved


def test_all_pairs_are_the_joint_statistics_without_those_of_a_source_with_itself() -> None:
    sources = strangers("chain")
    traced = [surgery.trace(model, images(2)) for model in sources.models]
    sites = group_sites(traced[0], sources.groups, torch.device("cpu"))
    with torch.no_grad():
        joint = survey(traced, [sources.data], sites, {}, joint=True).crossed
        alone = survey(traced, [sources.data], sites, {}).crossed
    assert list(sources.pairs) == [(0, 1), (0, 2), (1, 2)] == [(i, j) for i, j in joint if i < j]
    assert list(alone) == [(0, 1), (0, 2)]
    for pair, found in sources.pairs.items():
        for name, (reading, *_) in found.items():
            assert torch.equal(reading.products, joint[pair][name][0].products)


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
    sources = Sources([net("chain", seed).double() for seed in (1, 2, 3)], images(32, dtype=torch.float64))
    groups, generator = sources.groups, torch.Generator().manual_seed(0)
    orders = [random_permutations(groups, generator) for _ in sources.models]
    aligned = Sources([permuted(m, groups, own) for m, own in zip(sources.models, orders, strict=True)], sources.data)
    flat = [torch.cat([tensor.flatten() for tensor in state.values() if tensor.ndim > 1]) for state in aligned.states]
    pairs = list(itertools.combinations(flat, 2))
    expected = sum(float(x @ y) for x, y in pairs) / sum(float(x.norm() * y.norm()) for x, y in pairs)
    assert pairwise_similarity(groups, sources.states, orders) == pytest.approx(expected, rel=1e-9)
    assert pairwise_similarity(groups, sources.states, [{}] * 3) != pytest.approx(expected, rel=1e-3)
    expected = pairwise_correlation(groups, aligned.pairs, [{}] * 3)
    assert pairwise_correlation(groups, sources.pairs, orders) == pytest.approx(expected, rel=1e-9)
    assert pairwise_correlation(groups, sources.pairs, [{}] * 3) != pytest.approx(expected, rel=1e-3)


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

"""Matching finds planted permutations, never loses similarity, and depends on nothing but its seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_nets import groups_of, images, net, permuted, planted, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.errors import InvalidWeightsError, OptionError
from vfsurgery.groups import GroupSet, Permutation, permute_tensor, random_permutations
from vfsurgery.matching import MATCHERS, ActivationMatching, Given, Identity, Matching, Problem, WeightMatching
from vfsurgery.matching.assignment import assign
from vfsurgery.matching.pairwise import pairwise_similarity
from vfsurgery.matching.similarity import Similarity
from vfsurgery.stats.correlation import Centred, CrossMoments
from vfsurgery.tracing.sources import canonical_state

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Error of sums of products, relative to their size."""


def no_data() -> list[dict[str, object]]:
    raise AssertionError("this matcher needs no data")


def problem(models: list[nn.Module], seed: int = 0, groups: GroupSet | None = None) -> Problem:
    return Problem(groups or groups_of(models[0]), [canonical_state(m) for m in models], no_data, seed)  # type: ignore[arg-type]


def weight_matching(a: nn.Module, b: nn.Module, seed: int = 0, **options: float) -> Matching:
    (found,) = WeightMatching(**options).match(problem([a, b], seed))  # type: ignore[arg-type]
    return found


def objective(a: nn.Module, b: nn.Module) -> float:
    """``<a, b>`` over all matrices and kernels of the permutation groups."""
    members = groups_of(a).by_parameter
    pairs = zip(canonical_state(a).items(), canonical_state(b).values(), strict=True)
    return float(sum((x.double() * y.double()).sum() for (name, x), y in pairs if name in members and x.ndim > 1))


PLANTED = [("chain", 0), ("residual", 1), ("dense", 2)]


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize(("name", "seed"), PLANTED)
def test_a_planted_permutation_is_found_exactly(name: str, seed: int, matching: str) -> None:
    a = net(name, seed)
    groups = groups_of(a)
    b = planted(a, groups, seed)
    orders = surgery.match(a, b, data=images(48), matching=matching, example_inputs=images(2), progress=False)
    assert set(orders) == {group.name for group in groups}
    assert same_state(permuted(b, groups, orders).state_dict(), a.state_dict())
    assert not same_state(b.state_dict(), a.state_dict())
    truth = random_permutations(groups, torch.Generator().manual_seed(seed))
    assert orders == {group: order.inverse() for group, order in truth.items()}


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped"])
def test_noise_does_not_hide_a_planted_permutation(name: str) -> None:
    a = net(name)
    groups = groups_of(a)
    truth = random_permutations(groups, torch.Generator().manual_seed(3))
    if name == "grouped":
        truth.pop("g0")
    b = permuted(a, groups, truth)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    found = weight_matching(a, b)
    for group, order in truth.items():
        assert found.permutations[group] == order.inverse()


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "dense"])
def test_weight_matching_ends_no_lower_than_it_began_and_never_falls(name: str) -> None:
    a, b = net(name, 1), net(name, 2)
    groups = groups_of(a)
    found = [Matching({}), *(weight_matching(a, b, max_sweeps=sweeps) for sweeps in (1, 2, 3, 100))]
    sums = [objective(a, permuted(b, groups, matching.permutations)) for matching in found]
    slack = RELATIVE[torch.float32] * max(map(abs, sums))
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(sums))
    assert sums[-1] > sums[0] + slack
    worse = random_permutations(groups, torch.Generator().manual_seed(0))
    assert objective(a, permuted(b, groups, worse)) < sums[-1] - slack


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_no_single_group_can_be_improved_in_the_end(name: str) -> None:
    a, b = net(name, 1), net(name, 2)
    groups = groups_of(a)
    found = weight_matching(a, b, tolerance=0.0)
    best = objective(a, permuted(b, groups, found.permutations))
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for _ in range(5):
            other = {**found.permutations, group.name: Permutation.random(group.size, generator)}
            assert objective(a, permuted(b, groups, other)) <= best + RELATIVE[torch.float32] * abs(best)


def test_gains_tell_what_each_group_reached() -> None:
    a, b = net("chain", 1), net("chain", 2)
    found = weight_matching(a, b)
    assert [gain.group for gain in found.gains] == ["g0", "g1", "g2", "g3"]
    for gain in found.gains:
        assert gain.moved == found.permutations[gain.group].moved
        assert gain.after >= gain.before
    assert any(gain.after > gain.before for gain in found.gains)


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_one_seed_gives_one_result_and_the_global_random_state_is_left_alone(matching: str) -> None:
    a, b = net("residual", 1), net("residual", 2)
    options = {"data": images(16), "matching": matching, "progress": False}
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = surgery.match(a, b, seed=4, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert surgery.match(a, b, seed=4, **options) == first


def test_the_seed_decides_the_order_of_visits() -> None:
    a, b = net("residual", 1), net("residual", 2)
    visits: list[list[str]] = []
    for seed in (0, 1, 2):
        visits.append([])
        groups = groups_of(a)
        states = [canonical_state(model) for model in (a, b)]
        WeightMatching(max_sweeps=2, starts=0).match(Problem(groups, states, no_data, seed, visits[-1].append))  # type: ignore[arg-type]
    count = len(groups)
    assert all(len(visit) == len(set(visit)) == 2 * count for visit in visits)
    assert visits[0][:count] == visits[1][:count] == visits[2][:count]  # the first sweep follows the model
    assert not visits[0][count:] == visits[1][count:] == visits[2][count:]


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "dense"])
def test_a_similarity_kept_up_to_date_is_the_one_computed_afresh(name: str) -> None:
    a, b = net(name, 1).double(), net(name, 2).double()
    groups, states = groups_of(net(name)), [canonical_state(model) for model in (a, b)]
    generator = torch.Generator().manual_seed(0)
    for group in (group for group in groups if not group.outer):  # families: tests/test_nested.py
        kept = Similarity(group, groups, tuple(states))
        orders = {other.name: other.identity() for other in groups}
        kept.bring_up_to_date(orders, orders.get(kept.group.name))
        assert kept.total is not None
        solved = Permutation.random(group.size, generator)
        orders[group.name], kept.headroom = solved, 0.0
        started = kept.total.clone()
        others = [other for other in groups if other.name != group.name]
        for step in range(6):
            moving = others[int(torch.randint(len(others), (1,), generator=generator))]
            order = list(orders[moving.name].order)
            order[:2] = order[1::-1]  # a small move, then a big one
            orders[moving.name] = Permutation(tuple(order)) if step % 2 else moving.random(generator)
            kept.bring_up_to_date(orders, orders.get(kept.group.name))
        fresh = Similarity(group, groups, tuple(states))
        fresh.bring_up_to_date(orders, None)
        assert fresh.total is not None
        scale = float(fresh.total.abs().max())
        assert float((kept.total - fresh.total).abs().max()) <= RELATIVE[torch.float64] * scale
        change = kept.total - started
        best = assign(change)
        at_solved = float(change[range(group.size), list(solved.order)].sum())
        assert best.total - at_solved <= kept.headroom + RELATIVE[torch.float64] * scale * group.size
        expected = naive_similarity(group.name, groups, states, orders)
        assert float((kept.total - expected).abs().max()) <= RELATIVE[torch.float64] * scale


def naive_similarity(
    name: str, groups: GroupSet, states: list[dict[str, Tensor]], orders: dict[str, Permutation]
) -> Tensor:
    """Sum over members of ``mat(a) mat(P_others(b))^T``, unit by unit."""
    a, b = states
    group, others = groups[name], {key: order for key, order in orders.items() if key != name}
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for member in group.members:
        if a[member.parameter].ndim > 1:
            moved = permute_tensor(member.parameter, b[member.parameter], groups, others)
            places = torch.from_numpy(member.positions())
            rows = [x.movedim(member.dim, 0)[places].flatten(1) for x in (a[member.parameter], moved)]
            total += rows[0] @ rows[1].T
    return total


def test_a_similarity_has_nothing_to_do_while_nothing_moves() -> None:
    a, b = net("chain", 1), net("chain", 2)
    groups, states = groups_of(a), [canonical_state(model) for model in (a, b)]
    orders = {group.name: Permutation.identity(group.size) for group in groups}
    kept = Similarity(groups["g1"], groups, tuple(states))
    kept.bring_up_to_date(orders, orders.get(kept.group.name))
    assert kept.total is not None
    started, kept.headroom = kept.total.clone(), 0.0
    orders["g3"] = Permutation(tuple(reversed(range(12))))  # shares no parameter with g1
    kept.bring_up_to_date(orders, orders.get(kept.group.name))
    assert kept.headroom == 0 and bool((kept.total == started).all())
    orders["g0"] = Permutation(tuple(reversed(range(8))))
    kept.bring_up_to_date(orders, orders.get(kept.group.name))
    assert kept.headroom > 0 and not bool((kept.total == started).all())


def test_every_source_is_matched_to_the_first() -> None:
    a = net("chain", 1)
    groups = groups_of(a)
    others = [planted(a, groups, seed) for seed in (3, 4, 5)]
    found = WeightMatching().match(problem([a, *others]))
    assert len(found) == 3
    for other, matching in zip(others, found, strict=True):
        assert same_state(permuted(other, groups, matching.permutations).state_dict(), a.state_dict())
    assert found[0].permutations != found[1].permutations


def test_identity_moves_nothing() -> None:
    a, b, c = (net("chain", seed) for seed in range(3))
    assert Identity().match(problem([a, b, c])) == [Matching({}), Matching({})]
    assert surgery.match(a, b, matching="identity", example_inputs=images(2)) == {}


def test_given_orders_are_used_as_they_are() -> None:
    a = net("chain", 1)
    groups = groups_of(a)
    orders = random_permutations(groups, torch.Generator().manual_seed(0))
    assert Given(orders).match(problem([a, a])) == [Matching(orders)]
    assert Given((orders, {})).match(problem([a, a, a])) == [Matching(orders), Matching({})]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({}, {}, {}), r"3 sets of permutations given for 1 sources"),
        ({"g0": Permutation((1, 0))}, r"a permutation of 2 units was given for group 'g0'\n  units +8"),
        ({"h0": Permutation((1, 0))}, r"(?s)group 'h0'\n  units +no such group.*remedy  accepted: g0, g1"),
    ],
)
def test_given_orders_that_do_not_fit_are_refused(given: object, message: str) -> None:
    a, b = net("chain", 1), net("chain", 2)
    with pytest.raises(OptionError, match=message):
        Given(given).match(problem([a, b]))  # type: ignore[arg-type]


def test_assignment_takes_the_largest_sum() -> None:
    similarity = torch.tensor([[9.0, 8.0, 1.0], [8.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    found = assign(similarity)
    assert found.permutation.order == (1, 0, 2)  # the largest entry alone would be (0, 0)
    assert (found.total, found.unmatched) == (16.0, 10.0)


@pytest.mark.parametrize("seed", range(3))
def test_assignment_finds_a_permutation_matrix(seed: int) -> None:
    order = Permutation.random(7, torch.Generator().manual_seed(seed))
    similarity = torch.zeros(7, 7)
    similarity[range(7), order.order] = 1
    assert assign(similarity).permutation == order
    assert assign(-similarity).permutation != order


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assignment_refuses_what_is_not_finite(value: float) -> None:
    similarity = torch.eye(3)
    similarity[1, 2] = value
    with pytest.raises(InvalidWeightsError, match=r"(?s)no assignment exists .*\(3, 3\).*remedy  look for NaN"):
        assign(similarity)


def test_unknown_matchers_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match=r"(?s)unknown matching 'weigths'.*did you mean 'weights'\?"):
        MATCHERS["weigths"]
    assert {"weights", "activations", "identity"} <= set(MATCHERS)


@pytest.mark.parametrize("strong", [0, 1], ids=["where it begins", "where it ends"])
def test_a_group_is_matched_on_the_mean_correlation_of_its_readings(strong: int) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    groups = surgery.find_groups(model, torch.randn(2, 3))
    samples = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))

    def reading(b: Tensor) -> CrossMoments:
        return CrossMoments.of(Centred.of(samples, None, 0), Centred.of(b, None, 0))

    readings = [reading(samples + 2 * noise)] * 2  # weakly for the units as they are
    readings[strong] = reading(samples.flip(0))  # strongly for the swap
    states = [canonical_state(model)] * 2
    (found,) = ActivationMatching().match(Problem(groups, states, lambda: [{"g0": tuple(readings)}]))
    assert found.permutations["g0"].order == (1, 0)
    assert 0.4 < found.gains[0].after < 0.6  # the strong reading gives 1, the weak one about nothing


class Stuck(nn.Module):
    """Units that two layers read, one of which nobody reads: none of its units says which is which, at first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.unread = nn.Linear(8, 8), nn.Linear(4, 4)
        self.two, self.three, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        read, _ = self.one(x).chunk(2, -1)
        self.unread(read)
        return self.head(self.three(self.two(read)))


def test_networks_of_few_units_are_recovered_from_several_starts() -> None:
    recovered = {0: 0, 12: 0}
    for seed in range(20):
        torch.manual_seed(seed)
        a = Stuck()
        groups = surgery.find_groups(a, torch.randn(2, 8)).only_ordered()
        orders = random_permutations(groups, torch.Generator().manual_seed(seed))
        states = [canonical_state(model) for model in (a, permuted(a, groups, orders))]
        for starts in recovered:
            found = WeightMatching(starts=starts).match(Problem(groups, states, no_data))[0].permutations  # type: ignore[arg-type]
            recovered[starts] += pairwise_similarity(groups, states, [{}, found]) > 1 - 1e-6
    assert recovered[12] == 20 > recovered[0]

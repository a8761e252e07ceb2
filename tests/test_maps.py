"""Linear maps of units: where they may go, what they keep, and the matchers that find them."""

from __future__ import annotations

import pytest
import torch
from tiny_nets import NETS, Grouped, LayerNormed, Residual, groups_of, images, lively, net, planted, state_of
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.maps import UnitMap, balanced, map_tensor, map_units
from vfsurgery.discovery.verification import outputs_of, relative_error
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet, permute_tensor, random_permutations
from vfsurgery.tracing.sources import canonical_state

EXACT = 1e-9


class Linear(nn.Module):
    """A network without non-linearity: convolutions, a sum, a concatenation, a pool, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.wide, self.pool = nn.Conv2d(11, 4, 1), nn.AdaptiveAvgPool2d(2)
        self.hidden, self.head = nn.Linear(16, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.inner(x)
        x = torch.cat([x + self.back(inner), inner], 1)
        return self.head(self.hidden(self.pool(self.wide(x)).flatten(1)))


def rotations(groups: GroupSet, inverse: bool = True) -> dict[str, UnitMap]:
    """A random invertible map for every group, with its inverse or, wrongly, its transpose as the way back."""
    generator = torch.Generator().manual_seed(3)
    maps: dict[str, UnitMap] = {}
    for group in groups:
        matrix = torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
        maps[group.name] = UnitMap(matrix, matrix.inverse() if inverse else matrix.T)
    return maps


def error(model: nn.Module, groups: GroupSet, maps: dict[str, UnitMap]) -> float:
    x = images(2, dtype=torch.float64)
    state = canonical_state(model)
    mapped = {name: map_tensor(name, tensor, groups, maps) for name, tensor in state.items()}
    return relative_error(outputs_of(model, mapped, (x,)), outputs_of(model, state, (x,)))


def test_any_invertible_map_keeps_what_a_linear_network_computes_and_the_transpose_does_not():
    model = Linear().eval()
    groups = groups_of(model)
    model.double()
    assert all(group.mappable for group in groups)
    assert error(model, groups, rotations(groups)) < EXACT
    assert error(model, groups, rotations(groups, inverse=False)) > 0.1


@pytest.mark.parametrize("name", ["chain", "residual", "dense"])
def test_a_permutation_is_the_special_case(name):
    model = net(name)
    groups = groups_of(model)
    orders = random_permutations(groups, torch.Generator().manual_seed(1))
    maps = {group: UnitMap.of(order) for group, order in orders.items()}
    for entry, tensor in canonical_state(model).items():
        assert torch.equal(map_tensor(entry, tensor, groups, maps), permute_tensor(entry, tensor, groups, orders))
    assert maps["g0"].moved == orders["g0"].moved


def test_roles_say_which_weights_write_read_and_scale():
    model = Residual()
    roles = {str(member): member.role for group in groups_of(model) for member in group.members}
    assert roles["stem.weight[0]"] == "writes"
    assert roles["block1.conv1.weight[1]"] == "reads"
    assert roles["fc.weight[1]"] == "reads"
    assert roles["norm.running_var[0]"] == "scales"


class Gated(nn.Module):
    """Channels multiplied by gates that are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc((x * gate[:, :, None, None]).mean((2, 3)))


class Standardized(nn.Module):
    """A convolution whose weight is standardized before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return self.fc(torch.relu(nn.functional.conv2d(x, weight)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "mappable"),
    [
        (Gated(), {"squeeze": True, "stem": False}),
        (Grouped(), {"conv": False, "grouped": False, "point": False, "last": True}),
        (LayerNormed(), {"first": False}),
        (Standardized(), {"weight": False}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_products_grouped_convolutions_and_norms_across_units_let_only_permutations_through(model, mappable):
    found = {group.label: group.mappable for group in groups_of(model)}
    for label, expected in mappable.items():
        assert found[label] is expected, label


def test_units_are_mapped_as_the_weight_that_writes_them():
    model = Linear()
    groups = groups_of(model)
    model.double()
    maps = rotations(groups)
    weight = canonical_state(model)["inner.weight"]
    only = {name: order for name, order in maps.items() if groups[name].label == "inner"}
    writes = map_units(weight, "inner.weight", 0, groups, only)
    assert torch.allclose(writes, map_tensor("inner.weight", weight, groups, only))
    assert not torch.allclose(writes, weight)


def test_unequal_weights_are_balanced_so_that_merged_units_come_back_as_they_were():
    maps = [{"g": UnitMap(2 * torch.eye(2), torch.eye(2))}, {"g": UnitMap(torch.eye(2), torch.eye(2))}]
    weights = (0.25, 0.75)
    found = [source["g"] for source in balanced(maps, weights)]
    total = sum(w * m.merge @ m.unmerge for w, m in zip(weights, found, strict=True) if isinstance(m, UnitMap))
    assert torch.allclose(torch.as_tensor(total), torch.eye(2))
    assert found[0].merge[0, 0] == 2 * found[1].merge[0, 0]


@pytest.mark.parametrize(
    ("merge", "unmerge", "message"),
    [
        (torch.eye(2), torch.eye(3), "two square matrices of one size"),
        (torch.ones(2, 3), torch.ones(2, 3), "two square matrices of one size"),
        (torch.full((2, 2), torch.nan), torch.eye(2), "NaN or infinite"),
    ],
)
def test_matrices_that_are_no_map_are_refused(merge, unmerge, message):
    with pytest.raises(SurgeryError, match=message):
        UnitMap(merge, unmerge)


MATCHERS = {"zipit": surgery.ZipMatching(), "cca": surgery.CCAMatching(gamma=1e-9)}


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped"])
def test_a_planted_permutation_is_found_by_matchers_of_maps_too(matcher, name):
    a = net(name)
    b = planted(a, groups_of(a))
    data = [images(400)]
    merged = surgery.merge(a, b, data=data, matching=MATCHERS[matcher], renormalize=None, progress=False)
    naive = surgery.merge(a, b, data=data, matching="identity", renormalize=None, progress=False)
    x = images(16, seed=9)
    with torch.no_grad():
        assert relative_error((merged(x),), (a(x),)) < 1e-2
        assert relative_error((naive(x),), (a(x),)) > 5e-2


def test_the_rotation_of_cca_takes_one_covariance_to_the_other():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    samples = mixing @ torch.randn(8, 500, generator=generator, dtype=torch.float64)
    joint = _joint_of(samples[:4], samples[4:])
    (first, second), *_ = surgery.CCAMatching(gamma=0.0).maps(joint)
    covariance = samples.cov(correction=0)
    assert torch.allclose(first.merge, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(second.merge @ covariance[4:, 4:] @ second.merge.T, covariance[:4, :4])
    assert torch.allclose(second.merge @ second.unmerge, torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert not torch.allclose(covariance[4:, 4:], covariance[:4, :4], rtol=0.1)


def _joint_of(a: Tensor, b: Tensor):
    from vfsurgery.matching.mapped import Joint
    from vfsurgery.stats.correlation import Centred, CrossMoments

    x, y = Centred.of(a, None, 0), Centred.of(b, None, 0)
    pairs = {(0, 0): CrossMoments.of(x, x), (0, 1): CrossMoments.of(x, y), (1, 1): CrossMoments.of(y, y)}
    return Joint(2, {pair: (moments,) for pair, moments in pairs.items()})


@pytest.mark.parametrize("matcher", MATCHERS)
def test_three_sources_and_unequal_weights(matcher):
    """ZipIt! scales what is merged already by alpha: only with 1 do three copies of a unit find each other."""
    a = net("chain")
    groups = groups_of(a)
    sources = [a, planted(a, groups, 1), planted(a, groups, 2)]
    merged = surgery.merge(
        sources,
        weights=(0.5, 0.3, 0.2),
        data=[images(400)],
        matching=surgery.ZipMatching(alpha=1.0, beta=0.0) if matcher == "zipit" else MATCHERS[matcher],
        renormalize=None,
        progress=False,
    )
    x = images(16, seed=9)
    with torch.no_grad():
        assert relative_error((merged(x),), (a(x),)) < 1e-2


@pytest.mark.parametrize("matcher", MATCHERS)
def test_dead_units_do_no_harm(matcher):
    a, b = net("chain"), net("chain", 1)
    with torch.no_grad():
        for model in (a, b):
            model[0].bias[:3] = -1e3
    merged = surgery.merge(a, b, data=[images(200)], matching=matcher, progress=False)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.state_dict().values())


def test_what_maps_do_to_a_source_is_measured_and_said_and_the_sources_stay_as_they_were():
    a, b = net("chain"), net("chain", 1)
    before = [state_of(model) for model in (a, b)]
    merged = surgery.merge(a, b, data=[images(200)], matching="cca", renormalize=None, progress=False)
    text = str(surgery.report_of(merged))
    assert "source 1: not certified: 4 groups are mapped by matrices, which do not preserve its function" in text
    assert "source 0" not in text
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_running_variances_stay_positive_under_maps():
    a, b = net("residual"), net("residual", 1)
    merged = surgery.merge(a, b, data=[images(200)], matching="cca", renormalize=None, progress=False)
    assert all(bool((t >= 0).all()) for name, t in merged.state_dict().items() if name.endswith("running_var"))


def test_every_net_of_the_tests_merges_with_every_map_matcher():
    for name in NETS:
        for matcher in MATCHERS:
            merged = surgery.merge(net(name), net(name, 1), data=[images(64)], matching=matcher, progress=False)
            with torch.no_grad():
                assert bool(torch.isfinite(merged(images(4))).all()), (name, matcher)


def test_a_matching_found_once_serves_several_merges():
    a, b = net("chain"), net("chain", 1)
    options = {"data": [images(200)], "progress": False}
    found = surgery.match(a, b, matching="zipit", **options)
    assert isinstance(found, tuple)
    assert len(found) == 2
    again = surgery.merge(a, b, matching=surgery.Given(found), renormalize="rescale", **options)
    direct = surgery.merge(a, b, matching="zipit", renormalize="rescale", **options)
    for name, tensor in direct.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], atol=1e-6)


def test_a_map_for_a_group_that_lets_only_permutations_through_is_refused():
    a, b = lively(LayerNormed()), lively(LayerNormed(), 1)
    (group,) = groups_of(a)
    given = surgery.Given({group.name: UnitMap(torch.eye(group.size), torch.eye(group.size))})
    with pytest.raises(SurgeryError, match="lets only permutations through"):
        surgery.merge(a, b, data=[images(16)], matching=given, progress=False)

"""TIES, DARE, DELLA, Breadcrumbs, consensus, EMR, SCE and LiNeS: what they give number by number."""

from __future__ import annotations

import math

import pytest
import torch
from ancestry import CASES, SMALL, Case, assert_same, case, differ, traced, two

from vfsurgery.combining import (
    Breadcrumbs,
    Consensus,
    Dare,
    Della,
    Emr,
    Entry,
    Kind,
    Lines,
    Mean,
    Sce,
    TaskArithmetic,
    Ties,
    Trait,
    combine_states,
)
from vfsurgery.combining.base import PART
from vfsurgery.combining.dropping import uniform
from vfsurgery.combining.magnitudes import largest

# TIES


def test_ties_of_agreeing_sources_is_their_mean_or_sum():
    net = two([1.0, -2.0, 4.0], [3.0, -2.0, 8.0])
    assert net.combine(Ties(density=1.0))["w"].tolist() == [2.0, -2.0, 6.0]
    assert net.combine(Ties(density=1.0, aggregate="sum"))["w"].tolist() == [4.0, -4.0, 12.0]
    assert net.combine(Mean())["w"].tolist() == [2.0, -2.0, 6.0]


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_ties_gives_the_greater_of_opposite_numbers(aggregate):
    net = two([3.0, 1.0], [-2.0, -5.0])
    assert net.combine(Ties(density=1.0, aggregate=aggregate))["w"].tolist() == [3.0, -5.0]
    assert net.combine(TaskArithmetic(scale=1.0))["w"].tolist() == [1.0, -4.0]


@pytest.mark.parametrize("net", CASES)
@pytest.mark.parametrize("density", [0.2, 0.29, 1.0])
def test_ties_keeps_the_very_share_of_largest_numbers(net, density):
    net = case(net)
    found = net.moved(Ties(density=density), 1)
    all_of_it = torch.cat([(net.sources[0][name] - net.base[name]).reshape(-1) for name in net.trained])
    kept = torch.cat([found[name].reshape(-1) for name in net.trained])
    count = math.floor(round(density * 100) * len(all_of_it) / 100)
    assert int((kept != 0).sum()) == count  # the authors' code keeps one more
    smallest = all_of_it.abs().sort(descending=True).values[count - 1]
    assert bool((all_of_it[kept != 0].abs() >= smallest * (1 - 1e-6)).all())


@pytest.mark.parametrize("keep", [0, 1, 7, 50, 99, 100])
def test_two_passes_of_counting_find_what_sorting_finds(keep):
    values = torch.randint(-4, 5, (100,), generator=torch.Generator().manual_seed(keep)).float()
    parts = [(("a", 0), values[:60]), (("b", 0), values[60:])]
    found = largest(lambda: parts, keep)
    kept = torch.cat([found.keep(place, part) for place, part in parts])
    order = values.abs().sort(descending=True, stable=True).indices
    expected = torch.zeros(100, dtype=torch.bool).index_fill(0, order[:keep], True)
    assert torch.equal(kept & (values != 0), expected & (values != 0))  # zeros may all be kept
    at_least = values.abs() >= values.abs().sort(descending=True).values[max(keep, 1) - 1]
    assert keep in (0, 100) or int(at_least.sum()) > keep  # ties: comparing alone keeps more


# dropping


def test_dare_and_della_of_density_one_are_task_arithmetic():
    net = case("resnet18")
    expected = net.combine(TaskArithmetic())
    assert_same(net.combine(Dare(density=1.0)), expected, 1e-14)
    assert_same(net.combine(Della(density=1.0, epsilon=0.0)), expected, 1e-14)
    assert_same(net.combine(Dare(1.0, "ties", scale=1.0)), net.combine(Ties(density=1.0)), 1e-14)
    assert differ(net.combine(Dare(density=0.9)), expected)


@pytest.mark.parametrize("net", CASES)
def test_della_without_epsilon_is_dare_to_the_bit(net):
    net = case(net)
    assert_same(net.combine(Della(density=0.3, epsilon=0.0)), net.combine(Dare(density=0.3)), 0)
    assert differ(net.combine(Della(density=0.3, epsilon=0.2)), net.combine(Dare(density=0.3)))


@pytest.mark.parametrize("method", [Dare(0.3, scale=1.0), Della(0.3, epsilon=0.2, scale=1.0)])
def test_draws_have_the_task_vector_as_their_mean(method):
    net = two([1.0, -2.0, 3.0, 0.5, 4.0, -1.5])
    draws, expected = 2000, net.sources[0]["w"]
    found = torch.stack([net.combine(method, 1, seed=seed)["w"] for seed in range(draws)])
    spread = found.std(0) / draws**0.5
    assert bool(((found.mean(0) - expected).abs() < 4 * spread).all())
    assert not bool(((0.5 * found.mean(0) - expected).abs() < 4 * spread).any())
    share = (found != 0).double().mean(0)
    if isinstance(method, Dare):
        assert bool(((share - 0.3).abs() < 4 * (0.21 / draws) ** 0.5).all())
    else:  # the larger, the likelier
        assert share[expected.abs().argsort()].diff().min() > 0


def test_draws_do_not_depend_on_the_order_of_tensors_or_on_what_else_there_is():
    net = case("vit_tiny_patch16_224")
    turned = dict(reversed(net.traits.items()))
    alone = {net.trained[3]: net.traits[net.trained[3]]}
    for method in (Dare(), Della()):
        found = net.combine(method)
        assert_same(net.combine(method, traits=turned), found, 0)
        one = combine_states(net.sources[:3], method, base=net.base, traits=alone)
        assert_same(one, {name: found[name] for name in one}, 0)
        assert differ(net.combine(method, seed=1), found)


def test_draws_of_a_tensor_in_parts_are_those_of_the_whole():
    state = {"w": torch.zeros(PART + 9)}
    net = Case(state, [state], {"w": Trait(Kind.REST)})
    whole = Entry("w", (PART + 9,), net.traits["w"], (1.0,), torch.float32, [], None, 0, PART + 9)
    parts = [uniform(part, 0, 0) for part in whole.parts()]
    assert len(parts) == 2 and torch.equal(torch.cat(parts), uniform(whole, 0, 0))
    assert not torch.equal(parts[0][:9], parts[1])


@pytest.mark.parametrize("net", CASES)
def test_breadcrumbs_without_outliers_trims_tensor_by_tensor(net):
    net = case(net)
    trimmed = net.moved(Ties(density=0.5, scope="tensor"), 1)
    assert_same(net.moved(Breadcrumbs(density=0.5, outliers=0.0, scale=1.0), 1), trimmed, 0)
    assert differ(net.moved(Breadcrumbs(density=0.5, outliers=0.1, scale=1.0), 1), trimmed)


def test_breadcrumbs_drops_both_ends_and_keeps_small_tensors():
    net = case("odd")
    own = net.sources[0]["bias"] - net.base["bias"]
    kept = net.moved(Breadcrumbs(density=0.5, outliers=0.1, scale=1.0), 1)["bias"] != 0
    order = own.abs().argsort(descending=True)
    assert kept[order].tolist() == [False] * 6 + [True] * 32 + [False] * 26
    few = net.moved(Breadcrumbs(), 1)
    assert int((few["bias"] != 0).sum()) == 57  # 64 numbers survive outliers of 1 %
    assert few["one"] != 0 and few["scalar"] != 0


# consensus, EMR, SCE


def test_consensus_of_none_and_of_more_than_there_are():
    net, notes = case("resnet18"), list[str]()
    assert_same(net.combine(Consensus(agree=0)), net.combine(TaskArithmetic()), 0)
    assert_same(net.combine(Consensus(agree=4), notes=notes), {name: net.base[name] for name in net.trained}, 0)
    assert notes == ["consensus of 4 is more than 3 tasks can reach: the base"]
    assert differ(net.combine(Consensus(agree=2)), net.combine(TaskArithmetic()))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_tasks_need_every_number_up_to_a_threshold(count):
    net = two(*[[1.0, -2.0, 4.0]] * count)
    for threshold in (1 / (count - 1), 1.001 / (count - 1)):
        found = net.combine(Consensus(threshold=threshold, agree=1, scale=1.0), count)["w"]
        kept = threshold == 1 / (count - 1)
        assert found.tolist() == ([count * x for x in (1.0, -2.0, 4.0)] if kept else [0.0] * 3)


def test_emr_of_equal_sources_is_the_source_and_else_the_largest_that_agrees():
    net = case("odd")
    assert_same(net.combine(Emr(), states=[net.sources[0]] * 3), net.combine(TaskArithmetic(scale=1.0), 1), 1e-12)
    assert two([1.0, -5.0, 0.0], [3.0, 2.0, 0.0], [-2.0, 1.0, 0.0]).combine(Emr())["w"].tolist() == [3.0, -5.0, 0.0]


def test_sce_weighs_by_energy_and_selects_by_variance():
    net = two([1.0, 1.0, 2.0], [2.0, -4.0, 2.0])
    assert_same(net.combine(Sce()), {"w": torch.tensor([(6 * 1 + 24 * 2) / 30, -4.0, 2.0], dtype=torch.float64)})
    chosen = net.combine(Sce(density=1 / 3))["w"]
    assert chosen.tolist() == [0.0, -4.0, 0.0]


# LiNeS


@pytest.mark.parametrize("net", SMALL)
def test_lines_without_beta_is_the_mean_and_with_it_grows_with_depth(net):
    assert all(0 <= t.depth <= 1 for t in traced(net)[1].values() if t.kind in (Kind.MATRIX, Kind.REST))
    net = case(net)
    assert_same(net.combine(Lines(beta=0.0)), net.combine(Mean()), 1e-12)
    found, plain = net.moved(Lines(alpha=0.2, beta=0.5)), net.moved(TaskArithmetic(scale=1.0))
    for name in net.trained:
        factor = 0.2 + 0.5 * net.traits[name].depth
        assert_same({name: found[name]}, {name: factor * plain[name]}, 1e-9)


@pytest.mark.parametrize("of", ["task-arithmetic", "ties"])
def test_the_alpha_of_lines_brings_sums_to_one_size(of):
    net = case("vit_tiny_patch16_224")
    found = [net.moved(method) for method in (Lines(of, beta=0.0), Mean())]
    sizes = [sum(float(tensor.abs().sum()) for tensor in moved.values()) for moved in found]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-9)
    assert_same(
        net.moved(Lines(of, alpha=1.0, beta=0.0)),
        net.moved(TaskArithmetic(scale=1.0) if of != "ties" else Ties()),
        1e-9,
    )


STAGED = {
    "resnet18": "conv1.weight layer1.0.conv1.weight layer1.1.bn1.weight layer2.0.conv1.weight layer4.0.conv2.weight",
    "convnext_atto": "stem.0.weight stages.0.blocks.0.mlp.fc1.weight stages.2.blocks.1.mlp.fc1.weight "
    "stages.3.blocks.0.mlp.fc2.weight head.fc.weight",
    "swin_tiny_patch4_window7_224": "patch_embed.proj.weight layers.0.blocks.0.attn.qkv.weight "
    "layers.2.blocks.1.mlp.fc1.weight layers.3.blocks.0.mlp.fc2.weight norm.weight",
    "vit_tiny_patch16_224": "patch_embed.proj.weight blocks.0.norm1.weight blocks.1.mlp.fc2.weight norm.weight",
}


@pytest.mark.parametrize("net", STAGED)
def test_depth_grows_along_the_graph_of_staged_networks(net):
    names = STAGED[net].split()
    depths = [traced(net)[1][name].depth for name in names]
    assert depths == sorted(depths) and len(set(depths)) == len(depths)
    by_name = [next((int(word) for word in name.split(".") if word.isdigit()), 0) for name in names]
    assert by_name != sorted(by_name) or len(set(by_name)) < len(names)  # what the authors' rule makes of it


def test_a_network_of_one_layer_has_one_factor():
    net = two([1.0, 2.0])
    net.traits["w"] = Trait(Kind.REST, depth=0.0)  # type: ignore[index]
    assert net.combine(Lines(alpha=0.25, beta=9.0), 1)["w"].tolist() == [0.25, 0.5]

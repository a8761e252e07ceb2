"""Nested groups: which blocks may order their units by themselves, and assignments from the inside out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_rules import Apply, conv, parameter
from tiny_nets import images, net, permuted, planted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import OptionError
from vfsurgery.groups import GroupSet, Permutation, permute_tensor, random_permutations
from vfsurgery.matching import Given
from vfsurgery.matching.assignment import assign
from vfsurgery.matching.family_orders import FamilyProblem
from vfsurgery.matching.nested import BlockAssignment, families, whole_order
from vfsurgery.stats.collect import group_sites
from vfsurgery.tracing.sources import canonical_state

TOKENS = (3, 7, 6)
MAP = (2, 3, 8, 8)
HEADS, WIDTH = 3, 5
INNER = HEADS * WIDTH


def attention_net(attend: Callable[[nn.Module, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> nn.Module:
    """Tokens into a residual stream of 8, attention, a layer, and the mean over tokens."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.proj(attend(m, m.norm(x)))
        return m.head(x.relu().mean(1))

    given = {
        "embed": nn.Linear(6, 8),
        "norm": nn.LayerNorm(8),
        "qkv": nn.Linear(8, 3 * INNER),
        "proj": nn.Linear(INNER, 8),
    }
    return Apply(forward, head=nn.Linear(8, 4), **{**given, **members})


def dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def unbound(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    return dot_product(*m.qkv(x).reshape(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0))


def indexed(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    qkv = m.qkv(x).reshape(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return dot_product(qkv[0], qkv[1], qkv[2])


def picked_inside(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    qkv = m.qkv(x).view(b, n, HEADS, 3, WIDTH).transpose(1, 2)
    return dot_product(qkv[:, :, :, 0], qkv[:, :, :, 1], qkv.select(3, 2))


def chunked(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (part.view(b, n, HEADS, WIDTH).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) / WIDTH**0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, INNER)


def einsummed(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.qkv(x).view(b, n, 3, HEADS, WIDTH).unbind(2)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def with_norms_in_heads(m: nn.Module, x: Tensor) -> Tensor:
    """One norm for all heads: queries and keys have one order for all of them."""
    b, n, _ = x.shape
    q, k, v = m.qkv(x).view(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    return dot_product(m.q_norm(q), m.k_norm(k), v)


def multi_query(m: nn.Module, x: Tensor) -> Tensor:
    """Two query heads for each of three key heads."""
    b, n, _ = x.shape
    q = m.q(x).view(b, n, 2 * HEADS, WIDTH).transpose(1, 2)
    k, v = m.kv(x).view(b, n, 2, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def torch_attention(m: nn.Module, x: Tensor) -> Tensor:
    return m.mix(x, x, x, need_weights=False)[0]


Nest = list[tuple[int, int]]
"""Size and blocks of each nested group."""

SEPARATE = [(WIDTH, HEADS), (WIDTH, HEADS)]
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Nest]] = {
    "unbind": (lambda: attention_net(unbound), TOKENS, SEPARATE),
    "index": (lambda: attention_net(indexed), TOKENS, SEPARATE),
    "index inside a head": (lambda: attention_net(picked_inside), TOKENS, SEPARATE),
    "chunk": (lambda: attention_net(chunked), TOKENS, SEPARATE),
    "einsum": (lambda: attention_net(einsummed), TOKENS, SEPARATE),
    "norms in heads": (
        lambda: attention_net(with_norms_in_heads, q_norm=nn.LayerNorm(WIDTH), k_norm=nn.LayerNorm(WIDTH)),
        TOKENS,
        [(WIDTH, 1), (WIDTH, HEADS)],
    ),
    "multi-query": (
        lambda: attention_net(
            multi_query, q=nn.Linear(8, 2 * INNER), kv=nn.Linear(8, 2 * INNER), proj=nn.Linear(2 * INNER, 8)
        ),
        TOKENS,
        [(2, HEADS), *SEPARATE],
    ),
    "MultiheadAttention": (
        lambda: attention_net(
            torch_attention, mix=nn.MultiheadAttention(12, 3, batch_first=True), norm=nn.Linear(8, 12),
            proj=nn.Linear(12, 8),
        ),
        TOKENS,
        [(4, 3), (4, 3)],
    ),
    "grouped convolution": (
        lambda: conv(nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), width=12),
        MAP,
        [(4, 2), (6, 2)],
    ),
    "group norm": (lambda: conv(nn.GroupNorm(2, 8), nn.ReLU()), MAP, [(4, 2)]),
    "two outputs a channel": (
        lambda: conv(nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), width=16),
        MAP,
        [(2, 8)],
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, GroupSet]:
    make, shape, _ = NETS[name]
    torch.manual_seed(seed)
    model = make().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.bias.abs_()  # no unit is dead
    x = torch.randn(shape)
    return model, x, surgery.find_groups(model, x, strict=True)


def nested_of(groups: GroupSet) -> list[tuple[int, int]]:
    return sorted((group.size, group.blocks) for group in groups if group.outer)


@pytest.mark.parametrize("name", NETS)
def test_nested_groups_are_found_and_proven(name: str) -> None:
    model, x, groups = build(name)
    assert nested_of(groups) == sorted(NETS[name][2]), str(groups)
    assert all(groups[group.outer].outer == "" for group in groups if group.outer)
    assert surgery.verify(model, groups, x), str(surgery.verify(model, groups, x))
    assert all(f" in {group.outer}" in groups.listing() for group in groups if group.outer)


def softmax_over_heads(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    return m.q(x).view(b, n, HEADS, WIDTH).softmax(2).flatten(2)


def heads_meet(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = m.q(x).view(b, n, HEADS, WIDTH)
    return ((q @ q.transpose(2, 3)).softmax(-1) @ q).flatten(2)


def sum_of_heads(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = m.q(x).view(b, n, HEADS, WIDTH)
    return (q * q.mean(2, keepdim=True)).flatten(2)


def scaled_alike(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    return (m.q(x).view(b, n, HEADS, WIDTH).relu() * m.scale).flatten(2)


def rolled_heads(m: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = m.q(x).view(b, n, HEADS, WIDTH)
    return (q * q.roll(1, 2)).flatten(2)


@pytest.mark.parametrize("attend", [softmax_over_heads, heads_meet, sum_of_heads, scaled_alike, rolled_heads])
def test_blocks_whose_units_meet_have_one_order(attend: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = attention_net(attend, q=nn.Linear(8, INNER), scale=parameter(WIDTH))
    x = torch.randn(TOKENS)
    groups = surgery.find_groups(model, x, strict=True)
    (inner,) = [group for group in groups if group.size == WIDTH]
    assert inner.blocks == 1
    assert surgery.verify(model, groups, x)


def test_a_softmax_over_heads_lets_each_dim_order_the_heads() -> None:
    model, x = attention_net(softmax_over_heads, q=nn.Linear(8, INNER)), torch.randn(TOKENS)
    groups = surgery.find_groups(model, x)
    assert nested_of(groups) == [(HEADS, WIDTH)]
    assert surgery.verify(model, groups, x)


def test_an_order_for_each_block_is_refuted_where_heads_meet() -> None:
    model, x = attention_net(heads_meet, q=nn.Linear(8, INNER)), torch.randn(TOKENS)
    groups = surgery.find_groups(model, x)
    wrong = tuple(replace(g, blocks=HEADS) if g.size == WIDTH else g for g in groups)
    assert not surgery.verify(model, replace(groups, groups=wrong), x)


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("name", NETS)
def test_planted_nested_permutations_are_found(name: str, matching: str) -> None:
    model, x, groups = build(name)
    data = torch.randn(96, *x.shape[1:]) if matching == "activations" else None
    for seed in range(3):
        other = planted(model, groups, seed)
        orders = surgery.match(
            model, other, data=data, matching=matching, symmetries="permutations", example_inputs=x, progress=False
        )
        back = canonical_state(permuted(other, groups, orders))
        for key, tensor in canonical_state(model).items():
            assert torch.equal(back[key], tensor), f"{key} under seed {seed}"


@pytest.mark.parametrize("name", ["unbind", "multi-query", "grouped convolution"])
def test_noise_does_not_hide_planted_nested_permutations(name: str) -> None:
    model, x, groups = build(name)
    other = planted(model, groups, 5)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.05 * tensor.std() * torch.randn_like(tensor))
    orders = surgery.match(
        model, other, matching="weights", symmetries="permutations", example_inputs=x, progress=False
    )
    back = canonical_state(permuted(planted(model, groups, 5), groups, orders))
    assert all(torch.equal(back[key], tensor) for key, tensor in canonical_state(model).items())


def test_attention_is_read_where_heads_and_dims_lie_on_one_axis_and_streams_at_both_ends() -> None:
    model, x, groups = build("unbind")
    sites = group_sites(surgery.trace(model, x), groups, torch.device("cpu"))
    inner = {
        group.name: [
            (site.node, site.dim, site.places[0].tolist()) for site in sites[group.name] if site.places is not None
        ]
        for group in groups
        if group.outer
    }
    queries_and_keys = [("qkv", 2, [0]), ("qkv", 2, [INNER])]
    assert queries_and_keys in inner.values()
    (heads,) = {group.outer for group in groups if group.outer}
    assert heads not in sites  # whole heads can be compared only once their dims are paired
    stream = next(group for group in groups if group.size == 8)
    assert [site.node for site in sites[stream.name]] == ["relu"]


def test_three_sources_with_nested_groups_merge_into_the_first() -> None:
    model, x, groups = build("unbind")
    merged = surgery.merge(
        [model, planted(model, groups, 1), planted(model, groups, 2)],
        matching="weights", renormalize=None, example_inputs=x, progress=False,
    )  # fmt: skip
    assert torch.allclose(merged(x), model(x), atol=1e-5)
    plain = surgery.merge(
        [model, planted(model, groups, 1), planted(model, groups, 2)],
        matching="identity", renormalize=None, example_inputs=x, progress=False,
    )  # fmt: skip
    assert not torch.allclose(plain(x), model(x), atol=1e-2)


@pytest.mark.parametrize("name", NETS)
def test_weight_matching_of_strangers_never_loses_similarity(name: str) -> None:
    a, _, groups = build(name, 1)
    b, _, _ = build(name, 2)
    states = (canonical_state(a), canonical_state(b))
    orders = {group.name: group.identity() for group in groups}
    for family in families(groups):
        problem = FamilyProblem(family, groups, states)
        assert problem.bring_up_to_date(orders, None)
        present = {group.name: orders[group.name] for group in family.groups}
        before = problem.total(present, orders)
        found = problem.solve(present, orders)
        assert all(groups[name].accepts(order) for name, order in found.items())
        after = problem.total(found, orders)
        assert after >= before - 1e-4 * abs(before)
        worse = {group.name: group.random(torch.Generator().manual_seed(0)) for group in family.groups}
        assert problem.total(worse, orders) < after


def brute_force(blocks: int, outer: Tensor, inner: dict[str, Tensor], shared: set[str]) -> float:
    best = float("-inf")
    size = {name: len(matrix) // blocks for name, matrix in inner.items()}
    pairs = {name: m.reshape(blocks, size[name], blocks, size[name]).transpose(1, 2) for name, m in inner.items()}
    for order in itertools.permutations(range(blocks)):
        total = sum(float(outer[i, j]) for i, j in enumerate(order))
        for name, matrix in pairs.items():
            chosen = [matrix[i, j] for i, j in enumerate(order)]
            total += assign(sum(chosen)).total if name in shared else sum(assign(m).total for m in chosen)  # type: ignore[arg-type]
        best = max(best, total)
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_block_assignment_is_optimal(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(4, 4, generator=generator)
    inner = {name: torch.randn(4 * size, 4 * size, generator=generator) for name in ("q", "v")}
    assignment = BlockAssignment(4, outer, inner)
    orders = assignment.solve()
    assert assignment.total(orders) == pytest.approx(brute_force(4, outer, inner, set()))
    assert all(new // size == old // size for new, old in enumerate(orders["q"].order))
    outer_order, values = orders[""], []
    for name, matrix in inner.items():  # the total is that of the whole orders
        values.append(float(matrix[range(4 * size), list(whole_order(outer_order, orders[name], size).order)].sum()))
    values.append(float(outer[range(4), list(outer_order.order)].sum()))
    assert sum(values) == pytest.approx(assignment.total(orders), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_one_order_for_all_blocks_is_never_better_than_the_optimum_and_recovers_a_planted_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outer, matrix = torch.zeros(4, 4), torch.randn(12, 12, generator=generator)
    assignment = BlockAssignment(4, outer, {"d": matrix}, {"d": None})
    found = assignment.total(assignment.solve())
    assert found <= brute_force(4, outer, {"d": matrix}, {"d"}) + 1e-5
    blocks, inner = Permutation.random(4, generator), Permutation.random(3, generator)
    whole = whole_order(blocks, inner, 3)
    matrix = 0.1 * torch.randn(12, 12, generator=generator)
    matrix[range(12), list(whole.order)] += 1
    orders = BlockAssignment(4, outer, {"d": matrix}, {"d": None}).solve()
    assert (orders[""], orders["d"]) == (blocks, inner)


def test_outer_blocks_move_first_then_the_units_inside_each() -> None:
    _, _, groups = build("grouped convolution")
    outer = next(group for group in groups if not group.outer and group.size == 2)
    inner = next(group for group in groups if group.blocks == 2 and group.size == 4)
    weight = torch.arange(8.0)[:, None, None, None].expand(8, 3, 1, 1)
    swapped = Permutation((1, 0))
    turned = Permutation((1, 2, 3, 0, 4, 5, 6, 7))
    moved = permute_tensor("0.weight", weight, groups, {outer.name: swapped, inner.name: turned})
    assert moved[:, 0, 0, 0].tolist() == [5, 6, 7, 4, 0, 1, 2, 3]
    grouped = torch.arange(12.0)[:, None, None, None] * 10 + torch.arange(4.0)[None, :, None, None]
    moved = permute_tensor("2.weight", grouped, groups, {outer.name: swapped, inner.name: turned})
    assert moved[:, :, 0, 0][0].tolist() == [61, 62, 63, 60] and moved[:, :, 0, 0][6].tolist() == [0, 1, 2, 3]


def test_orders_that_leave_their_block_are_refused() -> None:
    model, x, groups = build("unbind")
    nested = next(group for group in groups if group.outer)
    assert nested.accepts(nested.random(torch.Generator().manual_seed(0)))
    out = Permutation((*range(1, nested.units), 0))
    assert not nested.accepts(out)
    with pytest.raises(OptionError, match=r"(?s)moves units of group 'g\d' out of their block.*3 x 5 units"):
        surgery.merge(model, build("unbind", 1)[0], matching=Given({nested.name: out}), example_inputs=x)


def test_random_orders_stay_inside_their_blocks_and_differ_between_them() -> None:
    _, _, groups = build("unbind")
    nested = next(group for group in groups if group.outer)
    order = random_permutations(groups, torch.Generator().manual_seed(1))[nested.name]
    inside = {
        tuple(unit % WIDTH for unit in order.order[block * WIDTH : (block + 1) * WIDTH]) for block in range(HEADS)
    }
    assert len(inside) > 1


def test_images_still_reach_grouped_nets() -> None:
    model = net("grouped")
    merged = surgery.merge(model, net("grouped", 1), data=images(32), progress=False)
    assert surgery.report_of(merged).certificates[0]

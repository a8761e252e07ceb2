"""Groups and permutations as values: where units lie, how they are reordered, how they print."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_nets import Outputs

from vfsurgery.groups import (
    GroupSet,
    Member,
    Permutation,
    PermutationGroup,
    PinnedAxis,
    permute_tensor,
    random_permutations,
)


def group(name: str, *members: Member) -> PermutationGroup:
    return PermutationGroup(name, members[0].size, members)


PRODUCT = GroupSet((group("g0", Member("w", 0, 3, inner=4)), group("g1", Member("w", 0, 4, outer=3))))
"""Two groups that share an axis of 12 = 3 x 4 units."""


@pytest.mark.parametrize(
    ("member", "positions"),
    [
        (Member("w", 0, 3), [[0], [1], [2]]),
        (Member("w", 0, 2, start=5), [[5], [6]]),
        (Member("w", 1, 2, inner=3), [[0, 1, 2], [3, 4, 5]]),
        (Member("w", 0, 2, outer=3), [[0, 2, 4], [1, 3, 5]]),
        (Member("w", 0, 2, start=1, inner=2, outer=2), [[1, 2, 5, 6], [3, 4, 7, 8]]),
        (Member("w", 0, 3, indices=(4, 0, 2)), [[4], [0], [2]]),
        (Member("w", 0, 2, inner=2, indices=(3, 1, 0, 2)), [[3, 1], [0, 2]]),
    ],
    ids=str,
)
def test_positions(member: Member, positions: list[list[int]]) -> None:
    assert member.positions().tolist() == positions
    if not member.indices:
        assert member.end == max(map(max, positions)) + 1


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (Member("w", 0, 3), "w[0]"),
        (Member("w", 0, 3, start=4), "w[0] from 4: 3"),
        (Member("w", 0, 3, inner=2), "w[0] from 0: 3x2"),
        (Member("w", 1, 3, start=1, inner=2, outer=5), "w[1] from 1: 5x3x2"),
        (Member("w", 0, 2, indices=(1, 0)), "w[0] at 1,0"),
        (Member("w", 0, 7, indices=(6, 5, 4, 3, 2, 1, 0)), "w[0] at 6,5,4,3,2,1…"),
    ],
)
def test_a_member_prints_its_place(member: Member, text: str) -> None:
    assert str(member) == text


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (-1, 0), (0, 2, 3)])
def test_what_is_no_permutation_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"not a permutation of {len(order)} units"):
        Permutation(order)


@pytest.mark.parametrize("order", [(), (0,), (1, 0), (2, 0, 1), (0, 2, 1, 3)])
def test_the_inverse_undoes(order: tuple[int, ...]) -> None:
    permutation = Permutation(order)
    units = torch.arange(permutation.size)
    there = units[list(order)]
    assert torch.equal(there[list(permutation.inverse().order)], units)
    assert permutation.inverse().inverse() == permutation
    assert permutation.moved == sum(a != b for a, b in enumerate(order))
    assert permutation.is_identity == (permutation.moved == 0)


def test_a_three_cycle_is_not_its_own_inverse() -> None:
    assert Permutation((1, 2, 0)).inverse() == Permutation((2, 0, 1)) != Permutation((1, 2, 0))


def test_random_permutations_come_from_their_generator_alone() -> None:
    state = torch.get_rng_state()
    orders = [random_permutations(PRODUCT, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert {name: order.size for name, order in orders[0].items()} == {"g0": 3, "g1": 4}
    assert torch.equal(torch.get_rng_state(), state)


def test_every_order_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {Permutation.random(3, generator).order for _ in range(100)}
    assert drawn == set(itertools.permutations(range(3)))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_whole_axis_is_reordered_as_index_select_does(dim: int) -> None:
    tensor = torch.randn(4, 4, 4)
    order = (2, 0, 3, 1)
    groups = GroupSet((group("g0", Member("w", dim, 4)),))
    permuted = permute_tensor("w", tensor, groups, {"g0": Permutation(order)})
    assert torch.equal(permuted, tensor.index_select(dim, torch.tensor(order)))
    assert not torch.equal(permuted, tensor)


def test_blocks_move_as_blocks_and_the_rest_stays() -> None:
    groups = GroupSet((group("g0", Member("w", 0, 2, start=1, inner=2)),))
    permuted = permute_tensor("w", torch.arange(6), groups, {"g0": Permutation((1, 0))})
    assert permuted.tolist() == [0, 3, 4, 1, 2, 5]


def test_irregular_units_exchange_their_places() -> None:
    groups = GroupSet((group("g0", Member("w", 0, 2, inner=2, indices=(0, 3, 4, 1))),))
    permuted = permute_tensor("w", torch.arange(5), groups, {"g0": Permutation((1, 0))})
    assert permuted.tolist() == [4, 3, 2, 1, 0]


def test_groups_on_two_dims_are_both_applied() -> None:
    groups = GroupSet((group("g0", Member("w", 0, 3)), group("g1", Member("w", 1, 3))))
    tensor = torch.randn(3, 3)
    permuted = permute_tensor("w", tensor, groups, {"g0": Permutation((1, 2, 0)), "g1": Permutation((0, 2, 1))})
    assert torch.equal(permuted, tensor[[1, 2, 0]][:, [0, 2, 1]])


def test_dims_that_are_no_neighbours_are_both_applied() -> None:
    groups = GroupSet((group("g0", Member("w", 1, 3)), group("g1", Member("w", 3, 2))))
    tensor = torch.randn(2, 3, 4, 2, 5)
    permuted = permute_tensor("w", tensor, groups, {"g0": Permutation((1, 2, 0)), "g1": Permutation((1, 0))})
    assert torch.equal(permuted, tensor[:, [1, 2, 0]][:, :, :, [1, 0]])


def test_two_dims_are_reordered_without_a_second_tensor_of_that_size() -> None:
    groups = GroupSet((group("g0", Member("w", 0, 30)), group("g1", Member("w", 1, 20))))
    tensor = torch.randn(30, 20, 9)
    with Outputs() as outputs:
        permute_tensor("w", tensor, groups, random_permutations(groups, torch.Generator().manual_seed(0)))
    assert len([size for size in outputs.sizes if size >= tensor.numel()]) == 1


def test_one_group_on_both_dims_permutes_rows_and_columns() -> None:
    groups = GroupSet((group("g0", Member("w", 0, 3), Member("w", 1, 3)),))
    tensor = torch.randn(3, 3)
    permuted = permute_tensor("w", tensor, groups, {"g0": Permutation((1, 2, 0))})
    assert torch.equal(permuted, tensor[[1, 2, 0]][:, [1, 2, 0]])


def test_products_commute() -> None:
    tensor = torch.randn(12, 2)
    outer, inner = Permutation((1, 2, 0)), Permutation((3, 0, 2, 1))
    both = permute_tensor("w", tensor, PRODUCT, {"g0": outer, "g1": inner})
    expected = tensor.reshape(3, 4, 2)[list(outer.order)][:, list(inner.order)].reshape(12, 2)
    assert torch.equal(both, expected)
    for names in itertools.permutations(("g0", "g1")):
        stepwise = tensor
        for name in names:
            stepwise = permute_tensor("w", stepwise, PRODUCT, {name: {"g0": outer, "g1": inner}[name]})
        assert torch.equal(stepwise, expected)


def test_permuting_by_an_order_and_its_inverse_restores() -> None:
    tensor = torch.randn(12)
    orders = random_permutations(PRODUCT, torch.Generator().manual_seed(1))
    there = permute_tensor("w", tensor, PRODUCT, orders)
    back = permute_tensor("w", there, PRODUCT, {name: order.inverse() for name, order in orders.items()})
    assert torch.equal(back, tensor) and not torch.equal(there, tensor)


@pytest.mark.parametrize(
    ("name", "orders"),
    [("v", {"g0": Permutation((1, 0, 2))}), ("w", {}), ("w", {"g0": Permutation.identity(3)})],
    ids=["other tensor", "no order", "identity"],
)
def test_a_tensor_in_which_nothing_moves_is_returned_itself(name: str, orders: dict[str, Permutation]) -> None:
    tensor = torch.randn(12)
    assert permute_tensor(name, tensor, PRODUCT, orders) is tensor


def test_the_input_of_a_permutation_is_left_alone() -> None:
    tensor = torch.arange(12)
    assert permute_tensor("w", tensor, PRODUCT, {"g0": Permutation((2, 1, 0))}) is not tensor
    assert torch.equal(tensor, torch.arange(12))


def test_a_group_set_is_a_hashable_value() -> None:
    twin = GroupSet((group("g0", Member("w", 0, 3, inner=4)), group("g1", Member("w", 0, 4, outer=3))))
    assert twin == PRODUCT and hash(twin) == hash(PRODUCT)
    changed = GroupSet((group("g0", Member("w", 0, 3, inner=4)), group("g1", Member("w", 1, 4, outer=3))))
    assert changed != PRODUCT


def test_a_group_set_is_iterated_counted_and_indexed() -> None:
    assert len(PRODUCT) == 2
    assert [entry.name for entry in PRODUCT] == ["g0", "g1"]
    assert PRODUCT["g1"].size == 4
    with pytest.raises(KeyError, match="g7"):
        PRODUCT["g7"]


def test_by_parameter_lists_the_groups_of_each_tensor() -> None:
    groups = GroupSet((group("g0", Member("a.weight", 0, 3), Member("b.weight", 1, 3)),))
    assert set(groups.by_parameter) == {"a.weight", "b.weight"}
    assert groups.by_parameter["b.weight"] == ((groups["g0"], Member("b.weight", 1, 3)),)


def test_members_and_groups_sort_by_place() -> None:
    members = [Member("b", 0, 3), Member("a", 1, 3), Member("a", 0, 3)]
    assert sorted(members) == [members[2], members[1], members[0]]
    groups = [group("g1", members[0]), group("g0", members[1])]
    assert sorted(groups) == groups[::-1]


@pytest.mark.parametrize(("parameter", "label"), [("layer1.0.conv1.weight", "layer1.0.conv1"), ("weight", "weight")])
def test_a_group_is_labelled_by_the_module_of_its_first_member(parameter: str, label: str) -> None:
    assert str(group("g0", Member(parameter, 0, 3))) == f"g0 ({label}, 3 units)"


def test_a_group_set_prints_groups_pins_and_unknown_ops() -> None:
    groups = GroupSet(
        (group("g0", Member("a.weight", 0, 3), Member("b.weight", 1, 3)),),
        (PinnedAxis("b.weight", 0, 2, "network output"),),
        ("cumsum at node cumsum",),
    )
    text = str(groups)
    for part in ("g0", "a.weight[0]", "b.weight[1]", "b.weight[0]", "network output", "cumsum"):
        assert part in text
    assert "cumsum" not in str(GroupSet(groups.groups, groups.pinned))
    assert text == repr(groups) == groups.listing()


@pytest.mark.parametrize("count", [0, 1, 30, 500])
def test_a_printed_group_set_fits_on_a_screen_and_its_listing_has_all(count: int) -> None:
    many = range(count)
    groups = GroupSet(
        tuple(group(f"g{i}", Member(f"a{i}.weight", 0, 3), Member(f"b{i}.weight", 1, 3)) for i in many),
        tuple(PinnedAxis(f"b{i}.weight", 0, 2, "network output") for i in many),
        tuple(f"cumsum at node cumsum_{i}" for i in many),
        notes=tuple(f"note {i}" for i in many),
    )
    lines, whole = repr(groups).splitlines(), groups.listing().splitlines()
    assert len(whole) >= 6 * count and all(f"a{i}.weight[0]" in "".join(whole) for i in many)
    assert len(lines) <= 45 and lines[0] == whole[0]
    if len(whole) <= 40:
        assert lines == whole
    else:
        assert "g7 (a7, 3 units), 2 members" in lines and not any(line.startswith("g8") for line in lines)
        assert f"    ... and {count - 8} more groups" in lines and lines[-1] == "all of it: .listing()"


def test_a_pinned_axis_prints_how_much_and_why() -> None:
    assert str(PinnedAxis("fc.weight", 0, 10, "network output")) == "fc.weight[0] x10: network output"

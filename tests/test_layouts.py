"""The algebra of axes: whatever is tied, both sides end up as the same arrangement of the same units."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsurgery.errors import SurgeryError
from vfsurgery.groups.axes import Concat, Fixed, Fresh, Product, Take, TensorRef, mentioned, pin, tie, tie_all
from vfsurgery.groups.layouts import Layout, Layouts, concat, product


def sizes(layouts: Layouts, layout: Layout) -> list[tuple[int, ...]]:
    """Sizes of the factors of each run."""
    return [run.grid for run in layouts.resolve(layout)]


def units(layouts: Layouts, layout: Layout) -> list[tuple[tuple[int, int], ...]]:
    """For every position the units that meet there, ``(atom, index)`` slowest first; what cannot move is left out."""
    runs = layouts.resolve(layout)
    found: dict[int, tuple[tuple[int, int], ...]] = {}
    for run in runs:
        for position, indices in zip(run.at.tolist(), np.ndindex(*run.grid), strict=True):
            assert position not in found
            found[position] = tuple(
                (atom.serial, index)
                for atom, index in zip(run.atoms, indices, strict=True)
                if atom.pin is None and atom.size > 1
            )
    assert sorted(found) == list(range(len(found)))
    return [found[position] for position in sorted(found)]


def free(layouts: Layouts, layout: Layout) -> bool:
    """Whether every unit of the axis can move."""
    return all(atom.pin is None for run in layouts.resolve(layout) for atom in run.atoms)


def reasons(layouts: Layouts, layout: Layout) -> set[str | None]:
    return {atom.pin for run in layouts.resolve(layout) for atom in run.atoms if atom.size > 1}


def shuffle(groups: int, width: int) -> np.ndarray:
    return np.arange(groups * width).reshape(groups, width).T.reshape(-1)


@pytest.fixture
def space() -> Layouts:
    return Layouts()


@pytest.mark.parametrize("size", [1, 2, 12])
def test_two_axes_become_one(space: Layouts, size: int) -> None:
    left, right = space.axis(size), space.axis(size)
    if size > 1:
        assert units(space, left) != units(space, right)
    space.unify(left, right)
    assert units(space, left) == units(space, right)
    assert sizes(space, left) == [(size,)]


def test_an_axis_is_factored(space: Layouts) -> None:
    axis, slow, fast = space.axis(12), space.axis(3), space.axis(4)
    space.unify(axis, product([slow, fast]))
    assert sizes(space, axis) == [(3, 4)]
    assert units(space, axis) == units(space, product([slow, fast]))
    assert units(space, axis) != units(space, space.take(product([fast, slow]), np.arange(12)))
    assert free(space, axis)


def test_two_factorings_have_a_common_refinement(space: Layouts) -> None:
    axis = space.axis(12)
    space.unify(axis, product([space.axis(3), space.axis(4)]))
    space.unify(axis, product([space.axis(6), space.axis(2)]))
    assert sizes(space, axis) == [(3, 2, 2)]
    assert free(space, axis)


def test_incompatible_factors_are_pinned(space: Layouts) -> None:
    axis = space.axis(12)
    space.unify(axis, product([space.axis(3), space.axis(4)]))
    space.unify(axis, product([space.axis(4), space.axis(3)]))
    assert reasons(space, axis) == {"incompatible factors"}


def test_concatenations_with_other_cuts_share_all_cuts(space: Layouts) -> None:
    left = concat([space.axis(3), space.axis(5)])
    right = concat([space.axis(4), space.axis(4)])
    space.unify(left, right)
    assert sizes(space, left) == sizes(space, right) == [(3,), (1,), (4,)]
    assert units(space, left) == units(space, right)
    assert free(space, left)


def test_one_cut_in_a_shared_axis_shows_everywhere(space: Layouts) -> None:
    shared = space.axis(8)
    twin = space.axis(8)
    space.unify(shared, twin)
    space.unify(twin, concat([space.axis(2), space.axis(6)]))
    assert sizes(space, shared) == [(2,), (6,)]


def test_a_concatenation_of_products_is_cut_within_its_factors(space: Layouts) -> None:
    channels = space.axis(4)
    flat = product([channels, space.axis(9, "a map")])
    space.unify(flat, concat([space.axis(9), space.axis(27)]))
    assert sizes(space, channels) == [(1,), (3,)]


def test_a_shuffle_carries_units_along(space: Layouts) -> None:
    axis, result = space.axis(6), space.axis(6)
    space.unify(result, space.take(axis, shuffle(2, 3)))
    before, after = units(space, axis), units(space, result)
    assert after == [before[position] for position in shuffle(2, 3)] != before
    assert free(space, axis) and len({atom for unit in before for atom, _ in unit}) == 1


def test_a_shuffle_tied_back_to_its_axis_pins(space: Layouts) -> None:
    axis = space.axis(6)
    space.unify(axis, space.take(axis, shuffle(2, 3)))
    assert reasons(space, axis) == {"tied to a reordering of itself"}


def test_a_shuffle_and_its_inverse_are_no_reordering(space: Layouts) -> None:
    axis = space.axis(6)
    space.unify(axis, space.take(space.take(axis, shuffle(2, 3)), shuffle(3, 2)))
    assert free(space, axis) and sizes(space, axis) == [(6,)]


def test_a_swap_of_halves_tied_back_makes_them_one(space: Layouts) -> None:
    first, second = space.axis(4), space.axis(4)
    space.unify(concat([first, second]), concat([second, first]))
    assert units(space, first) == units(space, second)
    assert free(space, first)


def test_a_pin_wins_over_freedom_from_either_side(space: Layouts) -> None:
    for pinned_first in (True, False):
        pinned, other = space.axis(4, "network output"), space.axis(4)
        space.unify(*((pinned, other) if pinned_first else (other, pinned)))
        assert reasons(space, other) == {"network output"}


def test_pins_reach_what_was_tied_before_and_after(space: Layouts) -> None:
    axes = [space.axis(4) for _ in range(4)]
    bystander = space.axis(4)
    space.unify(axes[0], axes[1])
    space.pin(axes[1], "fixed")
    space.unify(axes[2], axes[0])
    space.unify(axes[3], axes[2])
    assert all(reasons(space, axis) == {"fixed"} for axis in axes)
    assert free(space, bystander)


def test_the_first_reason_stays(space: Layouts) -> None:
    axis = space.axis(4)
    space.pin(axis, "first")
    space.pin(axis, "second")
    assert reasons(space, axis) == {"first"}


def test_a_pinned_part_leaves_the_other_part_free(space: Layouts) -> None:
    axis = space.axis(6)
    space.unify(axis, concat([space.axis(2, "padding"), space.axis(4)]))
    assert [run.atoms[0].pin for run in space.resolve(axis)] == ["padding", None]


def test_taking_an_index_twice_pins(space: Layouts) -> None:
    axis = space.axis(4)
    taken = space.take(axis, np.array([0, 1, 1]))
    assert reasons(space, axis) == reasons(space, taken) == {"indices are used more than once"}
    assert sum(len(run.at) for run in taken) == 3


def test_a_slice_cuts_its_axis(space: Layouts) -> None:
    axis = space.axis(6)
    part = space.take(axis, np.arange(2, 5))
    assert units(space, part) == units(space, axis)[2:5]
    assert free(space, axis)
    assert len({unit[0][0] for unit in units(space, axis)}) == 2


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [3, 2, 1, 0]])
def test_split_makes_runs_of_one_label(space: Layouts, labels: list[int]) -> None:
    axis = space.axis(4)
    runs = space.split(axis, np.array(labels))
    assert all(len({labels[position] for position in run.at}) == 1 for run in runs)
    assert len(runs) == len(set(labels))
    assert sorted(position for run in runs for position in run.at) == [0, 1, 2, 3]


def test_split_keeps_a_product_where_labels_follow_a_factor(space: Layouts) -> None:
    axis = product([space.axis(4), space.axis(3)])
    runs = space.split(axis, np.arange(12) // 6)
    assert [run.grid for run in runs] == [(2, 3), (2, 3)]


def test_empty_axes(space: Layouts) -> None:
    assert space.axis(0) == ()
    space.unify(space.axis(0), space.axis(0))
    assert concat([space.axis(0), space.axis(2)])[0].at.tolist() == [0, 1]
    assert product([space.axis(0), space.axis(2)]) == ()
    assert space.take(space.axis(3), np.arange(0)) == ()


def test_a_factor_of_size_one_says_nothing(space: Layouts) -> None:
    axis, channels = space.axis(4), space.axis(4)
    space.unify(axis, product([space.axis(1, "pinned"), channels, space.axis(1, "pinned")]))
    assert sizes(space, axis) == [(4,)]
    assert free(space, channels) and units(space, axis) == units(space, channels)


@st.composite
def layout_of(draw: st.DrawFn, space: Layouts, pool: dict[int, list[Layout]], size: int, depth: int = 2) -> Layout:
    """An axis of the pool, a new one, or a concatenation, product or reordering of such."""
    kinds = ["axis", "take", "concat", "product"] if depth and size > 1 else ["axis"]
    kind = draw(st.sampled_from(kinds))
    if kind == "take":
        inner = draw(layout_of(space, pool, size, depth - 1))
        order = draw(st.one_of(st.permutations(range(size)), st.sampled_from([list(range(size))[::-1]])))
        return space.take(inner, np.array(order))
    if kind == "concat":
        cut = draw(st.integers(0, size))
        return concat([space.resolve(draw(layout_of(space, pool, part, depth - 1))) for part in (cut, size - cut)])
    if kind == "product":
        slow = draw(st.sampled_from([factor for factor in range(1, size + 1) if size % factor == 0]))
        parts = (slow, size // slow)
        return product([space.resolve(draw(layout_of(space, pool, part, depth - 1))) for part in parts])
    known = pool.setdefault(size, [])
    number = draw(st.integers(0, 3))
    while len(known) <= number:
        known.append(space.axis(size, draw(st.sampled_from([None, None, None, "pinned"]))))
    return known[number]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_all_ties_hold_in_the_end(data: st.DataObject) -> None:
    space, pool = Layouts(), dict[int, list[Layout]]()
    size = data.draw(st.sampled_from([4, 6, 8, 12]))
    ties: list[tuple[Layout, Layout]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        left, right = data.draw(layout_of(space, pool, size)), data.draw(layout_of(space, pool, size))
        space.unify(left, right)
        ties.append((left, right))
    for left, right in ties:
        assert units(space, left) == units(space, right)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_concat_against_concat_cuts_where_either_does_and_nowhere_else(mine: list[int], other: list[int]) -> None:
    mine, other = [*mine, max(sum(other) - sum(mine), 0)], [*other, max(sum(mine) - sum(other), 0)]
    space = Layouts()
    left, right = (concat([space.axis(size) for size in parts]) for parts in (mine, other))
    space.unify(left, right)
    cuts = sorted({0, *np.cumsum(mine).tolist(), *np.cumsum(other).tolist()})
    assert [int(run.at[0]) for run in space.resolve(left)] == cuts[:-1]
    assert units(space, left) == units(space, right)
    assert free(space, left)


TENSOR = TensorRef("parameter", "fc.weight", (3, 4))


@pytest.mark.parametrize(
    ("expression", "size"),
    [
        (TENSOR.axis(0), 3),
        (TENSOR.axis(-1), 4),
        (Fresh("group", 5), 5),
        (Fixed(2, "padding"), 2),
        (Concat((TENSOR.axis(0), TENSOR.axis(1))), 7),
        (Product((TENSOR.axis(0), TENSOR.axis(1))), 12),
        (Take(TENSOR.axis(1), (3, 1)), 2),
    ],
)
def test_the_size_of_an_expression(expression: object, size: int) -> None:
    assert expression.size == size  # type: ignore[attr-defined]


@pytest.mark.parametrize("dim", [2, -3])
def test_a_missing_dim_is_named(dim: int) -> None:
    with pytest.raises(SurgeryError, match=rf"fc\.weight \(3, 4\) has no dim {dim}"):
        TENSOR.axis(dim)


def test_axes_of_other_sizes_cannot_be_tied() -> None:
    with pytest.raises(SurgeryError, match=r"cannot tie axes of 3 and 4 indices: fc\.weight\[0\], fc\.weight\[1\]"):
        tie(TENSOR.axis(0), TENSOR.axis(1))


def test_tie_all_pairs_dims_as_broadcasting_does() -> None:
    wide = TensorRef("node", "x", (2, 3, 1, 5))
    narrow = TensorRef("node", "y", (3, 4, 5))
    pairs = [(entry.left, entry.right) for entry in tie_all(wide, narrow)]
    assert pairs == [(wide.axis(3), narrow.axis(2)), (wide.axis(1), narrow.axis(0))]
    assert [entry.left for entry in tie_all(wide, narrow, skip=(1,))] == [wide.axis(3)]


def test_every_axis_inside_an_expression_is_mentioned() -> None:
    group = Fresh("group", 2)
    nested = Concat((Product((group, TENSOR.axis(0))), Take(TENSOR.axis(1), (0, 1)), Fixed(4, "padding")))
    assert list(mentioned(pin(nested, "why"))) == [group, TENSOR.axis(0), TENSOR.axis(1)]
    assert list(mentioned(tie(TENSOR.axis(0), Fixed(3, "why")))) == [TENSOR.axis(0)]


def test_a_tensor_prints_its_name_shape_and_item() -> None:
    assert str(TENSOR) == "fc.weight (3, 4)"
    assert str(TensorRef("node", "chunk", (2,), 1)) == "chunk#1 (2,)"


def test_a_chain_of_ties_of_any_length_is_followed() -> None:
    layouts = Layouts()
    axes = [layouts.axis(4) for _ in range(3000)]
    for before, after in itertools.pairwise(axes):
        layouts.unify(before, after)
    layouts.pin(axes[-1], "the end")
    assert not free(layouts, axes[0])
    apart = layouts.axis(4)
    assert free(layouts, apart)

"""SLERP and its kin, and Model Stock: what angles between task vectors decide."""

from __future__ import annotations

import math

import pytest
import torch
from ancestry import EXACT, assert_same, differ, two
from torch import Tensor

from vfsurgery.combining import (
    Karcher,
    Mean,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Slerp,
)
from vfsurgery.errors import OptionError

# spheres


def unit(count: int, seed: int, size: float = 1.0) -> list[float]:
    vector = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vector / vector.norm() * size).tolist()


def test_slerp_of_equal_vectors_and_its_ends():
    a, b = unit(9, 0, 2.0), unit(9, 1, 3.0)
    assert_same(two(a, a).combine(Slerp()), {"w": torch.tensor(a, dtype=torch.float64)})
    for weights, end in (([1, 0], a), ([0, 1], b)):
        assert_same(two(a, b).combine(Slerp(), weights=weights), {"w": torch.tensor(end, dtype=torch.float64)})


@pytest.mark.parametrize("method", [Slerp(), NuSlerp(), MultiSlerp(), Karcher()])
def test_half_way_along_a_sphere_is_on_the_sphere(method):
    net = two(unit(9, 0, 3.0), unit(9, 1, 3.0))
    found = net.combine(method, 2)["w"]
    assert abs(float(found.norm()) - 3) < EXACT
    assert_same({"w": found}, net.combine(Slerp(), 2))
    assert net.combine(Mean(), 2)["w"].norm() < 2.9


def test_slerp_is_a_straight_line_for_parallel_vectors_and_rows_have_their_own_angles():
    a = unit(9, 0)
    parallel = two(a, [3 * x for x in a])
    assert_same(parallel.combine(Slerp(), weights=[0.25, 0.75]), {"w": 2.5 * torch.tensor(a, dtype=torch.float64)})
    rows = [[unit(4, seed) for seed in pair] for pair in ((0, 1), (2, 3))]
    found = two(*rows).combine(NuSlerp(by_row=True), 2)["w"]
    for row in range(2):
        alone = two(rows[0][row], rows[1][row]).combine(Slerp(), 2)["w"]
        assert_same({"w": found[row]}, {"w": alone})
    assert differ({"w": two(*rows).combine(NuSlerp(), 2)["w"]}, {"w": found})


def test_karcher_means_have_no_pull_left():
    vectors = [torch.tensor(unit(6, seed), dtype=torch.float64).abs() for seed in range(4)]
    net = two(*[v.tolist() for v in vectors])

    def pull(mean: Tensor) -> float:
        angles = [math.acos(v @ mean) for v in vectors]
        ways = [(v - math.cos(a) * mean) * a / math.sin(a) for v, a in zip(vectors, angles, strict=True)]
        return float(torch.stack(ways).sum(0).norm())

    assert pull(net.combine(Karcher(tolerance=1e-12, iterations=50), 4)["w"]) < 1e-7
    assert pull(net.combine(MultiSlerp(), 4)["w"]) > 1e-4


@pytest.mark.parametrize("method", [Slerp(), NuSlerp(), MultiSlerp(), Karcher()])
def test_opposite_directions_are_refused_and_single_numbers_averaged(method):
    a = unit(9, 0)
    with pytest.raises(OptionError, match=r"(?s)no way between opposite directions.*w \(9,\)"):
        two(a, [-x for x in a]).combine(method, 2)
    assert two([3.0], [-1.0]).combine(method, 2)["w"].tolist() == [1.0]


# model stock


def test_model_stock_goes_by_the_angle():
    equal = two([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    assert_same(equal.combine(ModelStock()), equal.combine(Mean()), 1e-12)
    assert two([1.0, 0.0], [0.0, 5.0]).combine(ModelStock())["w"].tolist() == [0.0, 0.0]
    cosine = math.cos(0.5)
    between = two([1.0, 0.0], [2 * cosine, 2 * math.sin(0.5)])
    ratio = 2 * cosine / (1 + cosine)
    assert_same(between.combine(ModelStock()), {"w": ratio * between.combine(Mean())["w"]}, 1e-12)
    notes: list[str] = []
    assert two([1.0, 0.0], [-0.4, 0.5]).combine(ModelStock(), notes=notes)["w"].tolist() == [0.0, 0.0]
    assert len(notes) == 1 and notes[0].startswith("model-stock keeps 1 of 1 tensors of the base, where task vectors")
    assert notes[0].endswith("(first: w, mean cosine -0.62)")

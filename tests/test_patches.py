"""Moments of patches without unfolding them: what unfolding them one by one gives, whatever the convolution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.stats.patches import Box, Geometry, PatchMoments, PatchSums, _steps
from vfsurgery.tracing.ops import OpReader

CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padded": nn.Conv2d(3, 4, 3, padding=1),
    "wide": nn.Conv2d(3, 4, 5, padding=2),
    "even": nn.Conv2d(3, 4, (4, 2), padding=(2, 1)),
    "pointwise": nn.Conv2d(3, 4, 1),
    "pointwise with stride": nn.Conv2d(3, 4, 1, stride=2),
    "one by three": nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
    "three by one": nn.Conv2d(3, 4, (3, 1), padding=(1, 0)),
    "stride": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "strides": nn.Conv2d(3, 4, (3, 2), stride=(3, 2), dilation=(1, 2)),
    "stride beyond the kernel": nn.Conv2d(3, 4, 2, stride=3, padding=1),
    "stem": nn.Conv2d(3, 4, 7, stride=2, padding=3),
    "dilation": nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "stride and dilation": nn.Conv2d(3, 4, 3, stride=2, dilation=3, padding=3),
    "same": nn.Conv2d(3, 4, 4, padding="same", dilation=2),
    "valid": nn.Conv2d(3, 4, 2, padding="valid"),
    "reflect": nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
    "circular": nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"),
    "replicate": nn.Conv2d(3, 4, (5, 3), padding=(2, 1), padding_mode="replicate"),
    "sequence": nn.Conv1d(3, 4, 5, padding=2, stride=2),
    "volume": nn.Conv3d(3, 4, 3, padding=1),
    "volume with strides": nn.Conv3d(3, 4, (3, 2, 3), padding=(1, 0, 1), stride=(1, 2, 2)),
}


def images(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Maps with a large mean that differs from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    means = 5 * torch.arange(1.0, shape[1] + 1, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + means


def geometry_of(conv: nn.Module, x: Tensor) -> Geometry:
    (op,) = OpReader(surgery.trace(nn.Sequential(conv).eval(), x.float()))
    return Geometry.of(op)


def unfolded(x: Tensor, conv: nn.Conv2d, box: Box) -> Tensor:
    """Patches that the outputs in a box see, ``(columns, outputs * images)``, one by one."""
    flat = list(conv._reversed_padding_repeated_twice)
    x = functional.pad(x, flat, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    patches = []
    for output in itertools.product(*(range(first, first + count) for first, count in box)):
        places = [
            [place * stride + tap * dilation for tap in range(kernel)]
            for place, stride, dilation, kernel in zip(
                output, conv.stride, conv.dilation, conv.kernel_size, strict=True
            )
        ]
        patch = x
        for dim, taken in enumerate(places, start=2):
            patch = patch.index_select(dim, torch.tensor(taken))
        patches.append(patch.flatten(1))
    return torch.cat(patches).T


def reference(patches: Tensor, goals: Tensor) -> tuple[Tensor, ...]:
    mean, goal_mean = patches.mean(1), goals.mean(1)
    x, z = patches - mean[:, None], goals - goal_mean[:, None]
    return mean, x @ x.T / x.shape[1], goal_mean, z.square().mean(1), z @ x.T / x.shape[1]


def gathered(geometry: Geometry, batches: Sequence[tuple[Tensor, Tensor, Box]], positions: Sequence[int]) -> PatchSums:
    sums = PatchSums(geometry, [(x.shape, (0, 0, *positions)) for x, _, _ in batches])
    for x, goals, box in batches:
        sums.add(x, goals, box)
    return sums


def case(conv: nn.Conv2d, size: int, box: Box | None = None) -> tuple[PatchMoments, tuple[Tensor, ...]]:
    """Moments of two batches of maps, and what unfolding gives."""
    spatial = len(conv.kernel_size)
    made = [images((count, 3, *(size + dim for dim in range(spatial))), count) for count in (3, 4)]
    positions = conv.double()(made[0]).shape[2:]
    box = tuple((0, count) for count in positions) if box is None else box
    generator = torch.Generator().manual_seed(1)
    sizes = [count for _, count in box]
    goals = [torch.randn(4, sizes[0], len(x), *sizes[1:], generator=generator, dtype=torch.float64) + 3 for x in made]
    sums = gathered(geometry_of(conv.float(), made[0]), list(zip(made, goals, [box, box], strict=True)), positions)
    patches = torch.cat([unfolded(x, conv, box) for x in made], 1)
    flat = [z.movedim(2, -1).flatten(1) for z in goals]  # outputs in order, images inside
    return sums.moments(), reference(patches, torch.cat(flat, 1))


def whole(moments: PatchMoments, columns: int) -> tuple[Tensor, ...]:
    """Moments with the columns that see nothing but padding as zeros."""
    mean = torch.zeros(columns, dtype=torch.float64)
    covariance = torch.zeros(columns, columns, dtype=torch.float64)
    cross = torch.zeros(len(moments.cross), columns, dtype=torch.float64)
    mean[moments.columns] = moments.mean
    covariance[moments.columns[:, None], moments.columns] = moments.covariance
    cross[:, moments.columns] = moments.cross
    return mean, covariance, moments.goal_mean, moments.goal_variance, cross


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_of_all_patches_are_those_of_unfolded_ones(name):
    conv = CONVOLUTIONS[name]
    moments, expected = case(conv, 7 if len(conv.kernel_size) < 3 else 4)
    for found, other in zip(whole(moments, conv.weight[0].numel()), expected, strict=True):
        assert torch.allclose(found, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["padded", "stem", "stride and dilation", "circular", "same", "even"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_moments_of_the_patches_in_a_box_are_those_of_unfolded_ones(name, first):
    conv = CONVOLUTIONS[name]
    moments, expected = case(conv, 9, ((first, 2), (max(first - 1, 0), 3)))
    for found, other in zip(whole(moments, conv.weight[0].numel()), expected, strict=True):
        assert torch.allclose(found, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "seen"), [(1, 1), (2, 9), (3, 9)])
def test_columns_that_see_nothing_but_padding_are_left_out(size, seen):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = images((5, 3, size, size))
    goals = torch.randn(4, size, 5, size, dtype=torch.float64)
    box = ((0, size), (0, size))
    moments = gathered(geometry_of(conv, x), [(x, goals, box)], (size, size)).moments()
    assert len(moments.columns) == 3 * seen
    found, expected = whole(moments, 27), reference(unfolded(x, conv, box), goals.movedim(2, -1).flatten(1))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_batches_of_other_sizes_count_together():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    maps = [images((5, 3, size, size), size) for size in (1, 4)]
    goals = [torch.randn(4, size, 5, size, dtype=torch.float64) for size in (1, 4)]
    sums = PatchSums(geometry_of(conv, maps[1]), [(x.shape, x.shape) for x in maps])
    for x, z in zip(maps, goals, strict=True):
        sums.add(x, z, ((0, x.shape[2]),) * 2)
    patches = torch.cat([unfolded(x, conv, ((0, x.shape[2]),) * 2) for x in maps], 1)
    expected = reference(patches, torch.cat([z.movedim(2, -1).flatten(1) for z in goals], 1))
    for found, other in zip(whole(sums.moments(), 27), expected, strict=True):
        assert torch.allclose(found, other, rtol=1e-9, atol=1e-9)


def test_float32_maps_with_a_large_mean_lose_nothing():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = images((40, 3, 8, 8)).add(1000).float()
    goals = torch.randn(4, 8, 40, 8) + 1000
    box = ((0, 8), (0, 8))
    moments = gathered(geometry_of(conv, x), [(x, goals, box)], (8, 8)).moments()
    exact = reference(unfolded(x.double(), conv, box), goals.double().movedim(2, -1).flatten(1))
    centre = [column for column in range(27) if column % 9 == 4]  # padding alone makes others vary by thousands
    found = whole(moments, 27)[1][centre][:, centre]
    assert torch.allclose(found, exact[1][centre][:, centre], rtol=1e-4, atol=1e-4)
    assert torch.allclose(moments.goal_variance, exact[3], rtol=1e-4)
    patches = unfolded(x, conv, box)
    naive = patches @ patches.T / patches.shape[1] - torch.outer(patches.mean(1), patches.mean(1))
    assert not torch.allclose(naive[centre][:, centre].double(), exact[1][centre][:, centre], rtol=1e-4, atol=1e-4)


def test_a_product_that_is_given_to_a_wrong_block_is_noticed(monkeypatch):
    def broken(*given: Any) -> Any:
        found = _steps(*given)
        products = tuple((*places, taps[: max(len(taps) - 1, 1)]) for *places, taps in found.products)
        return replace(found, products=products)

    monkeypatch.setattr("vfsurgery.stats.patches._steps", broken)
    moments, expected = case(CONVOLUTIONS["padded"], 7)
    assert not torch.allclose(whole(moments, 27)[1], expected[1], rtol=1e-2, atol=1e-2)

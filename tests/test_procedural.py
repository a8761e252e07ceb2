"""Dead leaves: what they look like in numbers, any size and number of channels, seeded, within a network's range."""

from __future__ import annotations

import pytest
import torch

from vfsurgery.data.procedural import Leaves, Pixels, falling_noise
from vfsurgery.errors import OptionError


def draw(count: int = 60, size: tuple[int, int, int] = (3, 16, 16), seed: int = 0, **family: float) -> torch.Tensor:
    return Leaves(**family).draw(count, size, torch.Generator().manual_seed(seed))


def test_a_seed_decides_and_torchs_own_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = draw(), draw(), draw(seed=1)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 1, 1), (4, 7, 12), (12, 5, 1)], ids=str)
def test_any_size_and_number_of_channels(size):
    images = draw(50, size)
    assert images.shape == (50, *size) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 2.5
    assert images.std((0, 2, 3)).min() > 0.8


def test_one_image_of_one_pixel():
    assert torch.equal(draw(1, (3, 1, 1)), torch.zeros(1, 3, 1, 1))


def test_the_set_has_the_mean_and_deviation_asked_for_and_stays_in_range():
    pixels = Pixels((0.1, -0.2), (0.5, 2.0), (-9.0, -9.0), (9.0, 2.0))
    images = Leaves().draw(400, (2, 8, 8), torch.Generator().manual_seed(0), pixels)
    assert torch.allclose(images.mean((0, 2, 3))[:1], torch.tensor([0.1]), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3))[:1], torch.tensor([0.5]), atol=1e-3)
    assert images[:, 1].max() == 2.0  # clipped
    assert pixels.to_bytes(images).max() == 255


def test_leaves_are_flat_without_texture_and_colours_go_together():
    flat = draw(20, texture=0.0, shapes=10)
    assert all(len(image.flatten(1).T.unique(dim=0)) <= 11 for image in flat)
    assert all(len(image.flatten(1).T.unique(dim=0)) > 11 for image in draw(20, texture=1.0, shapes=10))
    together, apart = (
        torch.corrcoef(draw(300, correlation=share).movedim(1, 0).flatten(1))[0, 1] for share in (0.9, 0.0)
    )
    assert together > 0.8 > 0.2 > apart.abs()


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_sizes_follow_their_law(power):
    family = Leaves(power=power, smallest=0.1, largest=0.8)
    sizes = family._sizes((torch.arange(10_000) + 0.5) / 10_000)
    counts = torch.histc(sizes, 7, 0.1, 0.8)
    edges = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    share = edges.log() if power == 1 else edges ** (1 - power)
    expected = share.diff() / (share[-1] - share[0])
    assert torch.allclose(counts.double() / 10_000, expected, atol=2e-3)
    assert sizes.min() >= 0.1 - 1e-6 and sizes.max() <= 0.8 + 1e-6


def test_shapes_have_the_area_of_a_disc_of_their_size():
    family = Leaves(shapes=4, smallest=0.2, largest=0.2)
    top = family._on_top(400, 64, 64, torch.Generator().manual_seed(0))
    # the one on top hides nothing of itself; those that reach over the border are smaller
    areas = (top == 4).float().sum(1) / 64**2
    assert areas.max() == pytest.approx(3.1416 * 0.2**2, rel=0.05)
    assert areas.median() > 0.5 * areas.max()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_falls_with_frequency(slope):
    noise = falling_noise(300, 32, 32, torch.Generator().manual_seed(0), slope)
    assert torch.allclose(noise.std((1, 2), correction=0), torch.ones(300), atol=1e-4)
    power = torch.fft.rfft2(noise).abs().square().mean(0)
    assert (power[0, 2] / power[0, 8]).log2() / 2 == pytest.approx(2 * slope, abs=0.5)


@pytest.mark.parametrize(("count", "size"), [(0, (3, 8, 8)), (2, (3, 8)), (2, (0, 8, 8)), (2, (3, 0, 8))])
def test_nothing_to_draw_is_an_error(count, size):
    with pytest.raises(OptionError, match="nothing to draw"):
        draw(count, size)


@pytest.mark.parametrize("family", [{"shapes": 0}, {"shapes": 256}, {"smallest": 0.0}, {"smallest": 0.7}])
def test_families_without_leaves_are_refused(family):
    with pytest.raises(OptionError, match="no leaves can be drawn"):
        Leaves(**family)

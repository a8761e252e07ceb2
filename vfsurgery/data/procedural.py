"""Images made by a recipe instead of a camera: dead leaves, to calibrate on where there is no data.

A dead-leaves image is what a forest floor shows: shapes of many sizes and colours that cover each other. It has what
early layers of any vision network answer to: edges of all directions, corners, flat and textured areas, occlusion, and
colours that go together (Lee, Mumford & Huang, "Occlusion models for natural images", 2001; Baradad et al., "Learning
to see by looking at noise", 2021). Each leaf is of one colour and has a texture whose spectrum falls as in photographs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.errors import OptionError, explain

CHUNK = 2**21
"""Pixels that are drawn together, so that what is needed on the way takes a few dozen MiB."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a network's input is made of, channel by channel, in its own units: after normalization.

    ``mean`` and ``std`` are those that images shall have over a whole set; ``low`` and ``high`` what no pixel exceeds.

    >>> Pixels.standard(1)
    Pixels(mean=(0.0,), std=(1.0,), low=(-2.5,), high=(2.5,))
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def standard(channels: int) -> Pixels:
        """Of a network of which nothing is known: mean 0, deviation 1, and 2.5 deviations as in photographs."""
        return Pixels(*((value,) * channels for value in (0.0, 1.0, -2.5, 2.5)))

    def clip(self, images: Tensor) -> Tensor:
        """Images ``(N, channels, height, width)`` with no pixel out of range."""
        return images.clamp(self.column(self.low, images), self.column(self.high, images))

    def scale(self, images: Tensor) -> Tensor:
        """Images brought to mean and deviation over the set, channel by channel, then clipped."""
        dims = (0, *range(2, images.ndim))
        spread, middle = torch.std_mean(images, dim=dims, correction=0, keepdim=True)
        images = (images - middle) / spread.clamp_min(1e-12)
        return self.clip(images * self.column(self.std, images) + self.column(self.mean, images))

    def to_bytes(self, images: Tensor) -> Tensor:
        """Images as uint8, 0 for the lowest value and 255 for the highest."""
        low, high = self.column(self.low, images), self.column(self.high, images)
        return ((images - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def column(values: Sequence[float], images: Tensor) -> Tensor:
        """Values per channel, shaped to be computed with images."""
        return images.new_tensor(values).view(1, -1, *[1] * (images.ndim - 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """A family of dead-leaves images.

    Sizes are radii of discs of the same area, as shares of the image's side (the square root of its area).

    Args:
        shapes: Leaves in an image, from the bottom to the top; in turn ellipses and polygons.
        smallest: Least size.
        largest: Greatest size.
        power: How much more frequent small leaves are: sizes ``r`` with a density of ``r ** -power``; 0 is uniform, 3
            the law of natural images, of which little can be seen on small ones.
        correlation: Of the channels of a colour with each other, as those of photographs are.
        texture: Greatest amplitude of a leaf's texture, in deviations of the colours.
        slope: Of the texture's amplitude over frequency: ``1 / f ** slope``.
    """

    shapes: int = 40
    smallest: float = 0.05
    largest: float = 0.6
    power: float = 0.0
    correlation: float = 0.7
    texture: float = 0.5
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.shapes <= 255 or not 0 < self.smallest <= self.largest:
            raise OptionError(
                explain(
                    "no leaves can be drawn",
                    shapes=self.shapes,
                    sizes=f"{self.smallest} to {self.largest}",
                    expected="1 to 255 shapes, and 0 < smallest <= largest",
                )
            )

    def draw(self, count: int, size: Sequence[int], generator: torch.Generator, pixels: Pixels | None = None) -> Tensor:
        """Draw a set of images.

        Args:
            count: How many.
            size: ``(channels, height, width)``, each at least 1.
            generator: All randomness; on the CPU.
            pixels: What the set is scaled to, by default :meth:`Pixels.standard`.

        Returns:
            float32, ``(count, channels, height, width)``, on the CPU.

        Raises:
            OptionError: there is nothing to draw: no image, or a size that is none.

        >>> images = Leaves().draw(5, (4, 8, 6), torch.Generator().manual_seed(0))
        >>> images.shape, bool(images.abs().max() <= 2.5)
        (torch.Size([5, 4, 8, 6]), True)
        """
        if count < 1 or len(size) != 3 or min(size) < 1:
            raise OptionError(
                explain(
                    "there is nothing to draw",
                    images=count,
                    size=tuple(size),
                    expected="at least one image of (channels, height, width), each at least 1",
                )
            )
        channels, height, width = size
        most = max(CHUNK // (height * width), 1)
        images = torch.empty(count, channels, height, width)
        for part in images.split(most):
            part.copy_(self._part(len(part), channels, height, width, generator))
        return (pixels or Pixels.standard(channels)).scale(images)

    def _part(self, count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Some images, of no particular scale."""
        top = self._on_top(count, height, width, generator).long()
        colours, grains = self._colours(count, channels, generator), self._colours(count, channels, generator)
        grains *= self.texture * torch.rand(count, 1, self.shapes + 1, generator=generator)
        places = top.unsqueeze(1).expand(-1, channels, -1)
        noise = falling_noise(count, height, width, generator, self.slope).view(count, 1, -1)
        seen = colours.gather(2, places).addcmul_(grains.gather(2, places), noise)
        return seen.view(count, channels, height, width)

    def _on_top(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Which leaf is seen where, ``(count, height * width)`` of uint8; 0 is the ground.

        Inside a leaf are the points where some polynomials of their coordinates are negative, so each leaf takes a
        matrix product per polynomial for all images.
        """
        side = math.sqrt(height * width)
        y, x = ((torch.arange(length) + 0.5) / side for length in (height, width))
        y, x = y.view(-1, 1).expand(height, width).flatten(), x.view(1, -1).expand(height, width).flatten()
        points = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])  # (6, height * width)
        extent = torch.tensor([width / side, height / side])
        top = torch.zeros(count, height * width, dtype=torch.uint8)
        for number in range(1, self.shapes + 1):
            centre = (torch.rand(count, 2, generator=generator) * 1.2 - 0.1) * extent
            angle = torch.rand(count, generator=generator) * (2 * math.pi)
            radius = self._sizes(torch.rand(count, generator=generator))
            corners = (0, 3, 0, 4)[number % 4]
            stretch = torch.rand(count, generator=generator) + 1
            edges = _polygon(centre, angle, radius, corners) if corners else [_ellipse(centre, angle, radius, stretch)]
            inside = edges[0] @ points < 0
            for edge in edges[1:]:
                inside &= edge @ points < 0
            top.masked_fill_(inside, number)
        return top

    def _sizes(self, uniform: Tensor) -> Tensor:
        """Sizes of the family's density, from numbers between 0 and 1."""
        if self.power == 1:
            return self.smallest * (self.largest / self.smallest) ** uniform
        power = 1 - self.power
        low, high = self.smallest**power, self.largest**power
        return (low + (high - low) * uniform) ** (1 / power)

    def _colours(self, count: int, channels: int, generator: torch.Generator) -> Tensor:
        """A colour for each leaf and the ground, ``(count, channels, shapes + 1)``."""
        own = torch.randn(count, channels, self.shapes + 1, generator=generator)
        common = torch.randn(count, 1, self.shapes + 1, generator=generator)
        return math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own


def falling_noise(count: int, height: int, width: int, generator: torch.Generator, slope: float) -> Tensor:
    """Noise whose amplitude falls with frequency as ``1 / f ** slope``, of deviation 1 in each image.

    An image of one pixel has none: zeros.

    >>> falling_noise(2, 1, 1, torch.Generator().manual_seed(0), 1.0).count_nonzero()
    tensor(0)
    """
    spectrum = torch.fft.rfft2(torch.randn(count, height, width, generator=generator))
    frequency = (torch.fft.fftfreq(height).view(-1, 1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    frequency[0, 0] = math.inf  # no mean
    noise = torch.fft.irfft2(spectrum / frequency**slope, s=(height, width))
    return noise / noise.std((1, 2), correction=0, keepdim=True).clamp_min(1e-12)


def _ellipse(centre: Tensor, angle: Tensor, radius: Tensor, stretch: Tensor) -> Tensor:
    """Coefficients of 1, x, y, x x, x y, y y, negative inside, ``(N, 6)``."""
    cos, sin = angle.cos(), angle.sin()
    long, short = 1 / stretch, stretch
    xx, yy, xy = long * cos**2 + short * sin**2, long * sin**2 + short * cos**2, 2 * (long - short) * cos * sin
    x, y = centre.unbind(1)
    constant = xx * x * x + xy * x * y + yy * y * y - radius**2
    return torch.stack([constant, -2 * xx * x - xy * y, -2 * yy * y - xy * x, xx, xy, yy], 1)


def _polygon(centre: Tensor, angle: Tensor, radius: Tensor, corners: int) -> list[Tensor]:
    """One set of coefficients per edge of a regular polygon with the area of a disc, negative on the inner side."""
    step = math.pi / corners
    inner = radius * math.sqrt(step / math.tan(step))  # the area of a polygon is corners * tan(step) * inner ** 2
    edges: list[Tensor] = []
    for number in range(corners):
        cos, sin = (angle + 2 * step * number).cos(), (angle + 2 * step * number).sin()
        distance = centre[:, 0] * cos + centre[:, 1] * sin + inner
        nothing = torch.zeros_like(cos)
        edges.append(torch.stack([-distance, cos, sin, nothing, nothing, nothing], 1))
    return edges

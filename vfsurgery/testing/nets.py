"""The smallest networks that differ in what passes and matchers stumble over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vfsurgery.discovery.verification import keep_signals_alive, randomize

SIDE, CLASSES = 12, 5
"""Height and width of the images, and classes."""


class Chain(nn.Sequential):
    """Convolutions, a flattened map and linear layers, without norm layers; activations work in place."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(54, 12), nn.ReLU(inplace=True), nn.Linear(12, CLASSES)),
        )


class Residual(nn.Module):
    """A stem and a block with a shortcut, BatchNorm throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.norm2 = nn.Conv2d(7, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = torch.relu(self.norm(self.stem(x)))
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.head(torch.relu(x + inner).mean((2, 3)))


class LayerNormed(nn.Module):
    """Linear layers with LayerNorm, and a parameter that no module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3 * SIDE * SIDE, 10), nn.LayerNorm(10)
        self.shift = nn.Parameter(torch.zeros(10))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.head(nn.functional.gelu(self.norm(self.embed(x.flatten(1)) + self.shift)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point, self.depthwise = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = torch.relu(self.point(torch.relu(self.grouped(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain, "residual": Residual, "layer-norm": LayerNormed, "grouped": Grouped,
}  # fmt: skip
"""By name, what makes each network."""


def make_net(name: str, seed: int = 0) -> nn.Module:
    """A network in eval mode in which all weights and buffers matter; the global random state stays as it is.

    At initialization BatchNorm computes next to nothing and biases are small: mistakes would not show.

    >>> make_net("residual").training
    False
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = NETS[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                spread = (2 / parameter[0].numel()) ** 0.5  # keeps the signal's size through ReLU (He et al., 2015)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    randomize(model, generator)
    keep_signals_alive(model, (example_images(16, seed),), generator)
    return model


def example_images(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images of the size that the networks take, ``(count, 3, 12, 12)``, each with a brightness of its own.

    >>> example_images(2).shape
    torch.Size([2, 3, 12, 12])
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return (noise + torch.randn(count, 3, 1, 1, generator=generator)).to(dtype)

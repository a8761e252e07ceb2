"""Two tiny networks for 8x8 grayscale digits: what ``recipes/digits.yaml`` trains and merges in seconds."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class TinyConvNet(nn.Module):
    """Six 3x3 convolutions with biases and no normalization layer, then a linear classifier.

    Deep enough that averaging two of them unaligned, or aligned but not renormalized, loses the signal on its way.

    Args:
        width: Units of the first two convolutions; the next two have twice, the last two four times as many.
        num_classes: Length of the output.

    >>> import torch
    >>> TinyConvNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        widths = [1, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        convs = [nn.Conv2d(width_in, width_out, 3, padding=1) for width_in, width_out in pairwise(widths)]
        self.convs = nn.ModuleList(convs)
        self.fc = nn.Linear(4 * width, num_classes)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # torch's default shrinks the signal sixfold

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, num_classes)."""
        x = images
        for index, conv in enumerate(self.convs):
            x = conv(x).relu()
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to their input; a 1x1 convolution fits it where widths differ."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, H, W) to (N, width, H / stride, W / stride)."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class TinyResNet(nn.Module):
    """A convolution and three stages of one residual block, all with BatchNorm, then a linear classifier.

    Args:
        width: Units of the first stage; the next have twice and four times as many.
        num_classes: Length of the output.

    >>> import torch
    >>> TinyResNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, num_classes)."""
        x = self.blocks(self.bn(self.conv(images)).relu())
        return self.fc(x.mean(dim=(2, 3)))

"""The networks of Qu & Horvath (CPAL 2025) for 32x32 images, of any width, as ``recipes/paper/`` train them."""

from __future__ import annotations

from torch import Tensor, nn

from vfsurgery.networks.demo import ResidualBlock

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
"""Of VGG16: units of every convolution as multiples of the width; a max-pool stands between two stages."""


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions with biases in five stages, then one linear classifier.

    As the paper has it: no max-pool after the fifth stage, no dropout, Kaiming-normal weights (fan-out), zero biases,
    and a classifier of N(0, 0.01^2). The mean over the last map is AvgPool2d(2) for 32x32 images.

    Args:
        width: Units of the first convolution; 64 in the paper.
        num_classes: Length of the output.
        in_channels: Channels of the images.
        batch_norm: Whether a BatchNorm follows every convolution, as in VGG16-BN.

    >>> import torch
    >>> sum(parameter.numel() for parameter in VGG16().parameters())
    14719818
    >>> VGG16(width=4, num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """

    def __init__(
        self, width: int = 64, num_classes: int = 10, in_channels: int = 3, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in STAGES:
            for multiple in stage:
                layers.append(nn.Conv2d(channels, multiple * width, 3, padding=1))
                channels = multiple * width
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.classifier = nn.Linear(channels, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes); H and W are at least 16."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class ResNet20(nn.Module):
    """A 3x3 convolution and three stages of three residual blocks, all with BatchNorm, then a linear classifier.

    Args:
        width: Units of the first stage, 16 in the paper; the next have twice and four times as many.
        num_classes: Length of the output.
        in_channels: Channels of the images.

    >>> import torch
    >>> sum(parameter.numel() for parameter in ResNet20().parameters())
    272474
    >>> ResNet20(width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage, multiple in enumerate((1, 2, 4)):
            for block in range(3):
                stride = 2 if stage and not block else 1
                blocks.append(ResidualBlock(channels, multiple * width, stride))
                channels = multiple * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.blocks(self.bn(self.conv(images)).relu())
        return self.fc(x.mean(dim=(2, 3)))


def vision_transformer(
    width: int = 384,
    depth: int = 7,
    num_heads: int = 12,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> nn.Module:
    """Return timm's ``VisionTransformer`` in the paper's size: patches of 4x4, MLPs four times as wide as the stream.

    The paper prints 12.44 M parameters and, for every block more that is preserved, 1.77 M. Seven blocks of width 384
    have these with their patches, last norm and head, where the class token and the table of positions are left out,
    as tools do that count layer by layer. The number of heads changes no count and is not published.

    Args:
        width: Units of the residual stream.
        depth: Blocks.
        num_heads: Of every attention; divides the width.
        num_classes: Length of the output.
        in_channels: Channels of the images.
        image_size: Height and width of the images, a multiple of 4.

    >>> model = vision_transformer()
    >>> sum(parameter.numel() for parameter in model.parameters())
    12470026
    >>> 12470026 - model.cls_token.numel() - model.pos_embed.numel()
    12444682
    """
    # Imported here because timm takes a second, which those who build other networks should not wait for.
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=4,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
    )

"""Which images a network takes: their size, and the range of their pixels after normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfsurgery.data.procedural import Pixels
from vfsurgery.errors import DataError, explain
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of, normalization_of

PHOTOGRAPHS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation, per channel, of ImageNet's pixels in [0, 1]."""


def pixels_of(model: nn.Module, channels: int) -> Pixels:
    """What a network's configuration says about its pixels: photographs of range [0, 1], normalized as it wants them.

    Where the configuration has another number of channels, as for a network built for one or twelve, all channels get
    the mean of what it says; where there is none, :meth:`Pixels.standard`.

    >>> import torchvision
    >>> pixels = pixels_of(torchvision.models.resnet18(), 3)
    >>> pixels.mean, round(pixels.low[0], 3), round(pixels.high[2], 3)
    ((0.0, 0.0, 0.0), -2.118, 2.64)
    """
    said = normalization_of(model)
    if said is None or 0 in said[1]:
        return Pixels.standard(channels)
    columns = [torch.tensor(values, dtype=torch.float64) for values in (*said, *PHOTOGRAPHS)]
    if any(len(column) != channels for column in columns):
        columns = [column.mean().expand(channels) for column in columns]
    mean, std, own_mean, own_std = columns
    found = (own_mean - mean) / std, own_std / std, -mean / std, (1 - mean) / std
    return Pixels(*(tuple(column.tolist()) for column in found))


def example_of(model: nn.Module, given: ExampleInputs | None) -> Tensor:
    """A batch of the images that a network takes, ``(N, channels, height, width)``; its values mean nothing.

    Raises:
        ExampleInputError: nothing was given and the model says nothing.
        DataError: it takes several inputs, or something else than images.
    """
    inputs = example_inputs_of(model, given)
    if len(inputs) != 1:
        raise DataError(
            explain(
                f"{type(model).__name__} takes {len(inputs)} inputs, and what is imagined are images alone",
                remedy="pass data of your own; or imagine for the part of the model that takes images",
            )
        )
    (example,) = inputs
    if example.ndim != 4 or not example.is_floating_point() or not example.numel():
        raise DataError(
            explain(
                f"{type(model).__name__} takes no images, and nothing else is imagined",
                found=f"{str(example.dtype).removeprefix('torch.')} of shape {tuple(example.shape)}",
                expected="floating-point numbers of shape (N, channels, height, width)",
                remedy="pass data of your own; or example_inputs= of images, if the model takes them",
            )
        )
    return example

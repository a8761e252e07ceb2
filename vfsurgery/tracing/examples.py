"""An example input for a model, from what timm's or torchvision's configuration says about it."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.errors import (
    ExampleInputError,
    explain,
)
from vfsurgery.tracing.precision import is_inexact, real

ExampleInputs: TypeAlias = Tensor | Sequence[Tensor]
"""One tensor per positional argument of a forward; a single one alone."""

BATCH = 2
"""Images in an example: more than one, so that a batch dim is not mistaken for a broadcast one."""

FRAMES = 16
"""Frames of a video in an example, as torchvision's video networks were trained with."""

FLOW_SIZE = (3, 128, 128)
"""Size of the two frames that torchvision's optical flow networks take: the smallest that they allow."""


def example_inputs_of(model: nn.Module, given: Tensor | Iterable[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The given example inputs as a tuple, else random images of the size that the model is configured for.

    Args:
        model: timm models carry their configuration; for torchvision's, the configuration of the weights published
            for the model's module counts.
        given: One tensor, or one per positional argument.

    Raises:
        ExampleInputError: nothing was given and the model says nothing.
    """
    if isinstance(given, Tensor):
        return (given,)
    if given is not None:
        return tuple(given)
    size = _timm_size(model) or _torchvision_size(model)
    if size is None:
        raise ExampleInputError(
            explain(
                f"{type(model).__name__} does not say what input it takes",
                remedy="pass example_inputs=torch.randn(2, 3, 224, 224), or of the shape that it takes; or data=",
            )
        )
    images = 2 if type(model).__module__.startswith("torchvision.models.optical_flow") else 1
    return tuple(random_images((BATCH, *size), model, seed) for seed in range(images))


def random_images(shape: tuple[int, ...], model: nn.Module, seed: int = 0) -> Tensor:
    """Standard normal images on the model's device and in its highest precision, from a generator of their own."""
    inexact = [p for p in model.parameters() if is_inexact(p)] or [torch.empty(0)]
    dtype = max((real(p.dtype) for p in inexact), key=lambda dtype: dtype.itemsize)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inexact[0].device, dtype)


def normalization_of(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation, per channel, that pixels in [0, 1] are normalized with, from the model's configuration.

    ``None`` where the model does not say. There may be another number of channels than the model has been built for.

    >>> import torchvision
    >>> normalization_of(torchvision.models.resnet18(num_classes=3))
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    said = [_timm_config(model, name) for name in ("mean", "std")]
    if None in said:
        presets = [weight.value.transforms() for weight in _torchvision_weights(model)[:1]]
        said = [getattr(preset, name, None) for preset in presets for name in ("mean", "std")]
    found = [tuple(map(float, values)) for values in said if values is not None]
    return (found[0], found[1]) if len(found) == 2 else None


def _timm_config(model: nn.Module, name: str) -> Any:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _timm_size(model: nn.Module) -> tuple[int, ...] | None:
    size = _timm_config(model, "input_size")
    return tuple(size) if size else None


def _torchvision_weights(model: nn.Module) -> list[Any]:
    """The published weights in the model's module, those with the most similar number of parameters first."""
    module = sys.modules.get(type(model).__module__)
    if module is None or not module.__name__.startswith("torchvision.models"):
        return []
    weights = [
        member
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, enum.Enum) and value.__name__.endswith("_Weights")
        for member in value
    ]
    count = sum(p.numel() for p in model.parameters())
    return sorted(weights, key=lambda weight: abs(weight.value.meta.get("num_params", 0) - count))


def _torchvision_size(model: nn.Module) -> tuple[int, ...] | None:
    """The crop size of the published weights with the most similar number of parameters in the model's module."""
    name = type(model).__module__
    if name.startswith("torchvision.models.optical_flow"):  # pairs of frames, of no fixed size
        return FLOW_SIZE
    for weight in _torchvision_weights(model):
        keywords = getattr(weight.value.transforms, "keywords", {})
        crop = keywords.get("crop_size", keywords.get("resize_size"))  # segmentation takes images whole
        if crop is not None:
            side = min(crop) if isinstance(crop, list | tuple) else crop
            frames = (max(FRAMES, weight.value.meta.get("min_temporal_size", 0)),) if "video" in name else ()
            return (3, *frames, side, side)
    return None

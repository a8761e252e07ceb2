"""Which class a model and the ensemble of its sources find: what choices on held-out images are judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vfsurgery.stats.collect import image_dtype


def first_output(model: nn.Module, images: Tensor) -> Tensor | None:
    """The first tensor that a model returns, if it returns any."""
    leaves = tree_leaves(model(images.to(image_dtype(model))))
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)


def class_logits(model: nn.Module, images: Tensor) -> Tensor | None:
    """A model's first output, ``(N, classes, ...)``, as float64; ``None`` if it does not tell classes apart."""
    logits = first_output(model, images)
    return None if logits is None or logits.ndim < 2 or logits.shape[1] < 2 else logits.double()


def ensemble_classes(models: Sequence[nn.Module], weights: Sequence[float], images: Tensor) -> Tensor | None:
    """The class with the largest weighted mean logit of all models; ``None`` if one has no logits."""
    each = [class_logits(model, images) for model in models]
    shares = [weight * logits for weight, logits in zip(weights, each, strict=True) if logits is not None]
    return torch.stack(shares).sum(0).argmax(1) if len(shares) == len(each) else None

"""Weights and statistics that let an error anywhere in a network be seen at its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.precision import as_real, is_inexact
from vfsurgery.tracing.sources import canonical_state

FAINT = 1e-3
"""A matrix whose largest number is smaller (a class token at initialization) changes too little where it is moved."""


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Give vectors (norm parameters, biases, buffers) and constant or faint matrices values that permutations change.

    What is positive (scales, variances) comes to lie in [0.5, 1.5], the rest in [-0.5, 0.5]. Other matrices keep their
    values but for a factor: the small ones of transformers, whose attention would hardly depend on queries and keys,
    come to be as large as torch draws them by default.
    """
    for value in canonical_state(model).values():
        if not is_inexact(value) or not value.numel():
            continue
        tensor = as_real(value)
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        if value.ndim <= 1:
            positive = bool((tensor > 0).all())  # scales and variances
            tensor.copy_(0.5 + noise if positive else noise - 0.5)
        elif bool((tensor == tensor.flatten()[0]).all()) or float(tensor.abs().max()) < FAINT:
            tensor.copy_(noise - 0.5)
        else:
            usual = (3 * tensor.numel() / tensor.shape[0]) ** -0.5  # as torch draws linear layers by default
            tensor.mul_((usual / tensor.std()).clamp_min(1.0))


@torch.no_grad()
def keep_signals_alive(model: nn.Module, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
    """Set the running statistics of BatchNorm layers near those of ``inputs``, each unit off by a factor of its own.

    With statistics far from the activations, what depends on the input fades from layer to layer, and an error in a
    deep group would hide below the tolerance; or it grows, and rounding with it. Each layer is set when its turn comes,
    on what the layers before it, set already, make of the inputs.
    """
    found: dict[Any, tuple[Tensor, Tensor]] = {}

    def set_statistics(norm: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x.numel() == x.shape[1]:  # one value per channel: such statistics do not exist, the random ones stay
            return
        var, mean = torch.var_mean(x, dim=[dim for dim in range(x.ndim) if dim != 1], correction=0)
        var = var.clamp_min(FAINT * float(var.mean()))
        noise = torch.rand((2, len(var)), generator=generator, dtype=torch.float64).to(var)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean + 0.2 * (noise[0] - 0.5) * var.sqrt())
        norm.running_var.copy_(var * (0.9 + 0.2 * noise[1]))
        found[norm] = norm.running_mean.clone(), norm.running_var.clone()

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    try:
        with borrowed(model, {}):  # what a forward keeps would be stale when weights are permuted
            model.eval()
            model(*(x.clone() for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (mean, var) in found.items():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

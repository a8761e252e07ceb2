"""Weights that a module does not hold but computes: pruning hooks, weight norm, parametrizations, fake quantization.

Surgery reads and writes weights as plain parameters. :func:`plain_copy` gives a model that has them so, and says which
layers had them otherwise: what surgery finds out on the copy can then be brought to the model itself.

Where what is stored is itself averaged, as in a merge, :func:`settle` restores what its parts must be to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm

from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import HOOKS, copied

POWER_STEPS = 100
"""Steps of the power method after which singular vectors count as found; torch takes 15 for new layers."""
SAME = 1e-5
"""Relative difference up to which stored tensors count as unchanged."""


@dataclass(frozen=True)
class PlainCopy:
    """A copy of a model whose weights are plain parameters.

    ``masked`` has the names of weights that were stored weight times mask, as ``torch.nn.utils.prune`` leaves them;
    ``computed`` says for all other names of tensors that were no plain parameters what computes them.
    """

    model: nn.Module
    masked: frozenset[str]
    computed: Mapping[str, str]

    @property
    def is_exact(self) -> bool:
        """Whether the original had nothing but plain parameters, so that the copy may take its place."""
        return not self.masked and not self.computed


@torch.no_grad()
def plain_copy(model: nn.Module) -> PlainCopy:
    """A copy with the weights that the next forward of ``model`` would use, as plain parameters.

    Fake quantization that a module does in its own forward is none of its weights and stays.

    >>> plain = plain_copy(nn.Sequential(prune.random_unstructured(nn.Linear(4, 2), "weight", amount=0.5)))
    >>> sorted(plain.masked), list(plain.model.state_dict())
    (['0.weight'], ['0.bias', '0.weight'])
    """
    plain = copied(model)
    masked: set[str] = set()
    computed: dict[str, str] = {}
    for path, module in list(plain.named_modules()):
        prefix = f"{path}." if path else ""
        for name in _without_parametrizations(module):
            computed[f"{prefix}{name}"] = "a parametrization computes it"
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                prune.remove(module, name)
                masked.add(f"{prefix}{name}")
        for name in _hooked(module):
            weight = getattr(module, name).detach().clone()
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(weight))
            computed[f"{prefix}{name}"] = "a hook computes it"
    return PlainCopy(plain, frozenset(masked), computed)


def is_plain(model: nn.Module) -> bool:
    """Whether all weights of a model are plain parameters."""
    return not any(parametrize.is_parametrized(module) or _known_hooks(module) for module in model.modules())


def fake_quantized(model: nn.Module) -> list[str]:
    """Paths of the modules that round weights or activations in their forward, by what torch's fake quantization is."""
    found: list[str] = []
    for path, module in model.named_modules():
        names = {base.__name__ for part in (module, *module.children()) for base in type(part).__mro__}
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if "FakeQuantizeBase" in names and not inside and path:
            found.append(path)
    return found


def refresh(module: nn.Module) -> None:
    """Let pruning hooks set the module's weight anew, after what they compute it from has changed."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())


@torch.no_grad()
def settle(model: nn.Module, reference: nn.Module | None = None) -> None:
    """Make what weights are computed of consistent again, after all of it has been changed one by one.

    Means of singular vectors are no singular vectors of the mean weight: spectral norm, whose layers would be scaled by
    chance, gets them anew. The mean of orthogonal bases becomes the nearest orthogonal matrix. Weights that torch's
    hooks keep as attributes are brought up.

    Args:
        model: Any module; its buffers change, and no parameter.
        reference: A module of the same structure: where all that is stored equals what it stores, nothing changes.

    >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    >>> _ = layer.parametrizations.weight.original.data.mul_(torch.arange(16.0).view(4, 4))
    >>> settle(layer)
    >>> round(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)), 3)
    1.0
    """
    partners = dict(reference.named_modules()) if reference is not None else {}
    modes = [(module, module.training) for module in model.modules()]
    try:
        set_mode(model, False)
        for path, module in model.named_modules():
            hooks = _known_hooks(module).values()
            if not hooks and not isinstance(module, parametrize.ParametrizationList):
                continue
            changed = path not in partners or not _stores_the_same(module, partners[path])
            if changed and isinstance(module, parametrize.ParametrizationList):
                _settle_parametrizations(module)
            for hook in hooks:
                for _ in range(POWER_STEPS if changed and isinstance(hook, SpectralNorm) else 0):
                    hook.compute_weight(module, do_power_iteration=True)
                hook(module, ())
    finally:
        for module, training in modes:
            module.training = training


def _stores_the_same(module: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.allclose(tensor, theirs[name], rtol=SAME) for name, tensor in module.state_dict().items())


def _settle_parametrizations(own: parametrize.ParametrizationList) -> None:
    """Settle one parametrization after the other, each on what those before it make of what is stored."""
    names = ["original"] if own.is_tensor else [f"original{place}" for place in range(own.ntensors)]
    given: Any = tuple(getattr(own, name) for name in names)
    for part in own:
        if isinstance(part, parametrizations._SpectralNorm) and given[0].ndim > 1:
            part._power_method(part._reshape_weight_to_matrix(given[0]), POWER_STEPS)
        base = getattr(part, "base", None) if isinstance(part, parametrizations._Orthogonal) else None
        if base is not None:
            left, _, right = torch.linalg.svd(base)
            base.copy_(left @ right)
        given = (part(*given),)


def _known_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks of a module that set a weight of it, by their handle's id."""
    hooks: dict[int, Any] = module._forward_pre_hooks  # type: ignore[assignment]
    return {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith(HOOKS)}


def _without_parametrizations(module: nn.Module) -> list[str]:
    """Names of the tensors that parametrizations compute, which become plain parameters.

    Not by torch's function: it takes the property away from the class, which copies share with the original.
    """
    if not parametrize.is_parametrized(module):
        return []
    values = {name: getattr(module, name).detach().clone() for name in module._modules["parametrizations"]}  # type: ignore[union-attr, attr-defined]
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
    return list(values)


def _hooked(module: nn.Module) -> list[str]:
    """Names of tensors that torch's other hooks set (weight and spectral norm of old); their values are brought up."""
    known = _known_hooks(module)
    for key, hook in known.items():
        hook(module, ())
        del module._forward_pre_hooks[key]
    return [name for name, value in vars(module).items() if isinstance(value, Tensor)] if known else []

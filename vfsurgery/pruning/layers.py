"""Which weights can be pruned: those of convolutions and linear layers, by module and not by name.

Biases, norms and embeddings are left alone, as in every method that :mod:`vfsurgery.pruning` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vfsurgery.errors import OptionError, did_you_mean, explain

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that ``nn.MultiheadAttention`` applies itself, as linear layers would."""


def prunable(model: nn.Module, exclude: str | Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights of all convolutions and linear layers, by name; the tensors that the forward uses.

    A weight that hooks of ``torch.nn.utils.prune`` or a parametrization compute is found under the name that it has
    without them, with the values that the next forward would use. A weight tied between modules appears once, under its
    first name.

    Args:
        model: Any module.
        exclude: Module paths, names of weights, or patterns of either, as in ``("conv1", "*.downsample.*")``.

    Raises:
        OptionError: an entry of ``exclude`` matches no such layer.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> {name: tuple(weight.shape) for name, weight in prunable(net, exclude="2").items()}
    {'0.weight': (8, 4)}
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name in _names(module):
            weight = effective_weight(module, name)
            stored = id(module._parameters.get(name, module))  # ties are ties of parameters
            if weight is not None and not (stored != id(module) and stored in seen):
                found[f"{path}.{name}" if path else name] = weight
                seen.add(stored)
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in found):
            paths = [name.rpartition(".")[0] for name in found]
            raise OptionError(
                explain(
                    f"exclude={pattern!r} matches no convolution or linear layer", remedy=did_you_mean(pattern, paths)
                )
            )
    return {name: weight for name, weight in found.items() if not any(matches(name, pattern) for pattern in patterns)}


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """What the next forward of ``module`` uses as ``name``: with pruning hooks, stored weight times mask."""
    stored, mask = (module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask"))
    if stored is not None and mask is not None:  # the attribute itself may be as old as the last forward
        return stored.detach() * mask
    weight = getattr(module, name, None)
    return weight.detach() if isinstance(weight, Tensor) else None


def stored_weight(model: nn.Module, name: str, *, excludable: bool = True) -> nn.Parameter:
    """The parameter of this name, to be written to.

    Args:
        model: Any module.
        name: A weight that :func:`prunable` finds.
        excludable: Whether the caller has an ``exclude=`` that would leave it alone.

    Raises:
        OptionError: hooks or a parametrization compute the weight; says how to make it a parameter.
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(own)
    if parameter is None:
        because, remedy = _computed(module, own, f"model.{path}" if path else "model")
        other = f", or exclude={path!r}" if excludable else ""
        raise OptionError(explain(f"{name} cannot be written", because=because, remedy=f"{remedy}{other}"))
    return parameter


def _computed(module: nn.Module, name: str, place: str) -> tuple[str, str]:
    """What computes a weight, and how it is made a parameter again."""
    hooks = list(module._forward_pre_hooks.values())
    if f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers:
        return "pruning hooks compute it", f"torch.nn.utils.prune.remove({place}, {name!r}) makes its mask permanent"
    if parametrize.is_parametrized(module, name):
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations({place}, {name!r})"
        return "a parametrization computes it", remedy
    for hook in hooks:
        kind = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}.get(type(hook).__name__)
        if kind is not None and getattr(hook, "name", None) == name:
            return f"a hook of {kind} computes it", f"torch.nn.utils.remove_{kind}({place}, {name!r})"
    named = ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks)
    return f"a hook computes it: {named}", f"remove the hook and register {name} as a parameter of {place}"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a weight, its module, or a module around it.

    >>> matches("layer1.0.conv1.weight", "layer1"), matches("layer1.0.conv1.weight", "*.conv2")
    (True, False)
    """
    path = name
    while path:
        if fnmatchcase(path, pattern):
            return True
        path = path.rpartition(".")[0]
    return False


def _names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return PROJECTIONS
    return ("weight",) if isinstance(module, LAYERS) else ()

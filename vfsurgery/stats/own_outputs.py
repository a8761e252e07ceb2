"""What a layer computes with its own weight, where its module goes on after that.

Norm layers with an activation built in, as timm's, and layers with hooks return something else than ``w * n(x) + b``:
a scale and a shift per unit can be folded into weight and bias, but they act before the rest. While a module runs, a
``TorchFunctionMode`` shows the very call that is given its weight (``F.batch_norm``, ``F.conv2d``, ...), whose result
can be replaced, so that the rest goes on from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vfsurgery.tracing.ops import canonical_key

OWN_CALLS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"),
    *("batch_norm", "layer_norm", "group_norm"),
)
"""Calls whose output units a scale in their weight and a shift in their bias act on."""

Extent: TypeAlias = Literal["whole", "inside"]


class OwnCall(TorchFunctionMode):
    """While active, shows what ``module`` computes with its weight to ``see``, and takes what that returns instead.

    >>> class Both(nn.BatchNorm1d):
    ...     def forward(self, x):
    ...         return super().forward(x).relu()
    >>> with torch.no_grad(), OwnCall(Both(2).eval(), lambda value: value - 1) as call:
    ...     call.module(torch.tensor([[0.5, 2.0]])).round(decimals=2)
    tensor([[0., 1.]])
    """

    def __init__(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.module, self.see = module, see
        self.weight = cast(Tensor, module.weight)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any torch function; show its result if it is the layer's own."""
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if canonical_key(func) not in OWN_CALLS or not any(x is self.weight for x in (*args, *kwargs.values())):
            return value
        replacement = self.see(value)
        return value if replacement is None else replacement


class _Probe(TorchFunctionMode):
    """Notes the calls that a module makes: its own, others with its weight or bias, and those that come later."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = [p for name, p in module.named_parameters(recurse=False) if name in ("weight", "bias")]
        self.found: Tensor | None = None
        self.strange = self.goes_on = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if not isinstance(value, Tensor) or any(value is mine for mine in self.own):  # a size; a cast of no effect
            return value
        given = tree_leaves((args, kwargs))
        used = sum(any(x is mine for x in given) for mine in self.own)
        if canonical_key(func) in OWN_CALLS and used == len(self.own) and self.found is None:
            self.found = value
        else:
            self.goes_on |= self.found is not None
            self.strange |= used > 0
        return value


def own_extent(module: nn.Module, shape: Sequence[int]) -> Extent | None:
    """Whether what a layer returns is what it computes with its weight, or whether that lies ``"inside"`` it.

    Args:
        module: A layer with ``weight`` and ``bias``, which may be ``None``.
        shape: Of its input. It runs on shapes alone.

    Returns:
        ``None`` where weight and bias do more than to scale and shift the units once.

    >>> class Both(nn.BatchNorm2d):
    ...     def forward(self, x):
    ...         return super().forward(x).relu_()
    >>> own_extent(nn.BatchNorm2d(4), (2, 4, 8, 8)), own_extent(Both(4), (2, 4, 8, 8))
    ('whole', 'inside')
    """
    extent: Extent | None = "whole"
    if not type(module).forward.__module__.startswith("torch.nn.") or "forward" in vars(module):
        extent = _extent_of_forward(module, shape)
    return "inside" if extent == "whole" and module._forward_hooks else extent


def _extent_of_forward(module: nn.Module, shape: Sequence[int]) -> Extent | None:
    weight, probe = cast(Tensor, module.weight), _Probe(module)
    module = copy.copy(module)  # what a forward keeps is not kept in the layer itself
    module.training = False  # or counters would count
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x = torch.empty(tuple(shape), dtype=weight.dtype, device=weight.device)
            with probe:
                result = module.forward(x)
    except Exception:  # whatever a forward may raise that looks at values
        return None
    if probe.found is None or probe.strange:
        return None
    return "whole" if result is probe.found and not probe.goes_on else "inside"

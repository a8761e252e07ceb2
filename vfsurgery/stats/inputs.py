"""What weights read, seen in the very call that uses each: inputs laid out as columns, and their second moments.

The calls are ``F.conv2d``, ``F.linear`` and the like, whoever makes them, so every module will do, also one that cannot
be traced or calls its layers as functions. For each entry of a unit's row (one input at one kernel position) there is
one input per output place; all of them together are the columns of ``X``, ``(columns, places)``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vfsurgery.tracing.ops import canonical_key

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
SIGNATURES: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": CONVOLUTION for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": TRANSPOSED for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "weight"),
    "mm": ("input", "weight"),
    "addmm": ("bias", "input", "weight"),
}
"""Arguments, in order, of the calls that use a weight."""

PRODUCTS = ("matmul", "mm", "addmm")
"""Those whose weight is stored as ``(inputs, units)``."""

CHUNK = 1 << 24
"""Inputs laid out as columns at a time: 64 MB."""


@dataclass(frozen=True)
class Layout:
    """Which entries of a weight belong to one output unit, and in which order these read their inputs.

    Of a convolution in groups, ``(units, inputs / groups, *kernel)``, each unit reads the inputs of its group; a
    ``transposed`` one is stored as ``(inputs, units / groups, *kernel)``. Linear layers have no kernel.
    """

    groups: int = 1
    transposed: bool = False

    @staticmethod
    def of(model: nn.Module, name: str) -> Layout:
        """That of the weight called ``name``."""
        module = model.get_submodule(name.rpartition(".")[0])
        return Layout(module.groups, module.transposed) if isinstance(module, nn.modules.conv._ConvNd) else Layout()

    def rows(self, weight: Tensor) -> Tensor:
        """One row per unit: ``(groups, units / groups, positions * inputs / groups)``, inputs running fastest.

        Positions are those of the kernel, flipped if transposed: then the layer is the plain convolution with these
        rows of an input with zeros between its pixels.

        >>> import torch
        >>> Layout(groups=2).rows(torch.zeros(6, 4, 3, 3)).shape
        torch.Size([2, 3, 36])
        """
        kernel = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
        kernel = kernel.unflatten(0, (self.groups, -1))
        order = (0, 2, 3, 1) if self.transposed else (0, 1, 3, 2)
        return (kernel.flip(3) if self.transposed else kernel).permute(order).flatten(2)

    def weight(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of ``shape`` that has these rows: the inverse of :meth:`rows`."""
        inputs = shape[0] // self.groups if self.transposed else shape[1]
        kernel = rows.unflatten(2, (-1, inputs))  # (groups, units / groups, positions, inputs / groups)
        kernel = kernel.permute((0, 3, 1, 2) if self.transposed else (0, 1, 3, 2))
        return (kernel.flip(3) if self.transposed else kernel).reshape(tuple(shape))

    def inputs(self, weight: Tensor) -> int:
        """How many inputs (channels) a unit reads."""
        return len(weight) // self.groups if self.transposed else weight.shape[1]


@dataclass(frozen=True)
class Call:
    """One use of a weight: its input, ``(batch, channels, *pixels)`` or ``(..., features)``, and its settings."""

    name: str
    input: Tensor
    kernel: tuple[int, ...]
    layout: Layout
    settings: Mapping[str, Any]

    @property
    def inputs(self) -> Tensor:
        """The input with exactly one batch dim; in float32 at least."""
        x = self.input.to(torch.promote_types(self.input.dtype, torch.float32))
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        return x.unsqueeze(0) if x.ndim == len(self.kernel) + 1 else x

    def columns(self, inputs: Tensor, most: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``X``, ``(groups, columns, places)``: what each entry of a unit's row reads, in the order of the rows.

        A transposed convolution is the plain one of its input with zeros between the pixels. Of each image ``most``
        pixels of the output are looked at, drawn by ``generator``, the same of all images.
        """
        if not self.kernel:
            return inputs.T.unflatten(0, (self.layout.groups, -1))
        dims = len(self.kernel)
        stride, dilation = self._per_dim("stride", 1), self._per_dim("dilation", 1)
        spread = [step * (size - 1) for step, size in zip(dilation, self.kernel, strict=True)]
        if self.layout.transposed:
            inputs, stride = _with_zeros_between(inputs, stride), (1,) * dims
        inputs = functional.pad(inputs, [end for ends in reversed(self._padding(spread)) for end in ends])
        for dim in range(dims):
            inputs = inputs.unfold(2 + dim, spread[dim] + 1, stride[dim])[..., :: dilation[dim]]
        inputs = inputs.unflatten(1, (self.layout.groups, -1))  # (batch, groups, channels, *places, *kernel)
        sizes = inputs.shape[3 : 3 + dims]
        if most is not None and most < math.prod(sizes):
            drawn = torch.randperm(math.prod(sizes), generator=generator)[:most].to(inputs.device)
            inputs = inputs[(slice(None), slice(None), slice(None), *torch.unravel_index(drawn, sizes))]
        spatial = inputs.ndim - 3 - dims
        kernel, places = range(3 + spatial, 3 + spatial + dims), range(3, 3 + spatial)
        arranged = inputs.permute(1, *kernel, 2, 0, *places)
        return arranged.flatten(1 + dims + 1).flatten(1, 1 + dims)

    def square_sums(self) -> Tensor:
        """The diagonal of ``X X^T``, ``(groups, columns)`` float64: batches are summed before pixels are laid out."""
        squares = self.inputs.square()
        summed = squares.sum(0, keepdim=True, dtype=torch.float64)
        return self.columns(summed).sum(2)

    def second_moments(self, most: int | None = None, generator: torch.Generator | None = None) -> tuple[Tensor, int]:
        """``X X^T``, ``(groups, columns, columns)``, and how many places it is the sum of; see :meth:`columns`."""
        inputs, places = self.inputs, 0
        size = self.layout.groups * self._columns_per_place(inputs)
        total: Tensor | None = None
        for part in inputs.split(max(1, CHUNK // max(size, 1))):
            x = self.columns(part, most, generator)
            places += x.shape[2]
            total = torch.bmm(x, x.mT) if total is None else total.baddbmm_(x, x.mT)
        assert total is not None
        return total, places

    def _columns_per_place(self, inputs: Tensor) -> int:
        """Numbers that one image (or one vector) makes in ``X``, for each group."""
        return self.columns(inputs[:1].to("meta")).shape[1:].numel()

    def _padding(self, spread: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each dim; negative ones cut off."""
        padding = self.settings.get("padding", 0)
        if padding == "same":
            return [(total // 2, total - total // 2) for total in spread]
        sides = (0,) * len(spread) if padding == "valid" else self._per_dim("padding", 0)
        if not self.layout.transposed:
            return [(side, side) for side in sides]
        extra = self._per_dim("output_padding", 0)
        return [(all_ - side, all_ - side + more) for all_, side, more in zip(spread, sides, extra, strict=True)]

    def _per_dim(self, name: str, default: int) -> tuple[int, ...]:
        value = self.settings.get(name, default)
        values = tuple(cast("Sequence[int]", value)) if isinstance(value, Sequence) else (int(value),)
        return values * len(self.kernel) if len(values) == 1 else values


def _with_zeros_between(inputs: Tensor, stride: Sequence[int]) -> Tensor:
    """``stride - 1`` zeros after each pixel but the last, in each dim."""
    pixels = [step * (size - 1) + 1 for step, size in zip(stride, inputs.shape[2:], strict=True)]
    spaced = inputs.new_zeros(*inputs.shape[:2], *pixels)
    spaced[(..., *(slice(None, None, step) for step in stride))] = inputs
    return spaced


class WeightCalls(TorchFunctionMode):
    """While active, shows each use of the watched weights to ``see``, laid out as the call uses it.

    Args:
        weights: By name.
        see: Takes the calls.
        attention: Whether to look into ``F.multi_head_attention_forward``, too, which ``nn.MultiheadAttention`` is
            made of, and which calls no layer. What its output projection reads is found by running it with the
            identity in that one's place.
    """

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[Call], None], attention: bool = False) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.see, self.attention = see, attention

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any torch function; show it first if it is a layer with a watched weight."""
        kwargs = kwargs or {}
        key = canonical_key(func)
        signature = SIGNATURES.get(key) if isinstance(key, str) else None
        if signature is not None:
            given = {**dict(zip(signature, args, strict=False)), **kwargs}
            name = self.names.get(id(given.get("weight")))
            if name is not None and not (key in PRODUCTS and given["weight"].ndim != 2):
                self._show(name, str(key), given)
        elif self.attention and func is functional.multi_head_attention_forward:
            self._attend(_ATTENTION.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _show(self, name: str, key: str, given: dict[str, Any]) -> None:
        kernel = tuple(given["weight"].shape[2:])
        layout = Layout(int(given.get("groups", 1)), "transpose" in key or key in PRODUCTS)
        self.see(Call(name, given["input"].detach(), kernel, layout, given))

    def _attend(self, given: dict[str, Any]) -> None:
        inputs = [given[name].detach() for name in ("query", "key", "value")]
        packed = self.names.get(id(given["in_proj_weight"]))
        if packed is not None:
            same = given["query"] is given["key"] is given["value"]
            together = inputs[0] if same else torch.cat(_as_many([x.flatten(0, -2) for x in inputs]), -1)
            self.see(Call(packed, together, (), Layout(1 if same else 3), {}))
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs, strict=True):
            separate = self.names.get(id(given.get(name)))
            if separate is not None:
                self.see(Call(separate, x, (), Layout(), {}))
        last = self.names.get(id(given["out_proj_weight"]))
        if last is not None:
            weight = given["out_proj_weight"]
            same_size = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            plain: dict[str, Any] = {**given, "out_proj_weight": same_size, "out_proj_bias": None, "training": False}
            values, _ = functional.multi_head_attention_forward(**plain)
            self.see(Call(last, values.detach(), (), Layout(), {}))


_ATTENTION = inspect.signature(functional.multi_head_attention_forward)


def _as_many(rows: Sequence[Tensor]) -> list[Tensor]:
    """As many rows of each as the shortest has, evenly spread."""
    count = min(map(len, rows))
    return [x[torch.linspace(0, len(x) - 1, count, device=x.device).long()] for x in rows]

"""What the weights of each layer read on the data: norms of inputs, and their second moments.

A weight's inputs are seen in the very call that uses it (``F.conv2d``, ``F.linear``, ...), so every module will do,
also one that cannot be traced or calls its layers as functions. For each entry of a unit's row (one input at one kernel
position) there is one input per output place; all of them together are the columns of ``X``, ``(columns, places)``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vfsurgery.errors import DataError, explain
from vfsurgery.pruning.base import Pruning
from vfsurgery.pruning.layers import Layout
from vfsurgery.tracing.ops import canonical_key

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
SIGNATURES: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": CONVOLUTION for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": TRANSPOSED for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
}
"""Arguments, in order, of the calls that use a weight."""

CHUNK = 1 << 24
"""Inputs laid out as columns at a time: 64 MB."""

UNSEEN = "no convolution or linear call on the data uses it as it is"
"""Why a pruner that needs inputs cannot judge a weight: fused attention, a weight standardized on the fly, ..."""


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

    def columns(self, inputs: Tensor) -> Tensor:
        """``X``, ``(groups, columns, places)``: what each entry of a unit's row reads, in the order of the rows.

        A transposed convolution is the plain one of its input with zeros between the pixels.
        """
        if not self.kernel:
            return inputs.T.unsqueeze(0)
        dims = len(self.kernel)
        stride, dilation = self._per_dim("stride", 1), self._per_dim("dilation", 1)
        spread = [step * (size - 1) for step, size in zip(dilation, self.kernel, strict=True)]
        if self.layout.transposed:
            inputs, stride = _with_zeros_between(inputs, stride), (1,) * dims
        inputs = functional.pad(inputs, [end for ends in reversed(self._padding(spread)) for end in ends])
        for dim in range(dims):
            inputs = inputs.unfold(2 + dim, spread[dim] + 1, stride[dim])[..., :: dilation[dim]]
        inputs = inputs.unflatten(1, (self.layout.groups, -1))  # (batch, groups, channels, *places, *kernel)
        kernel, places = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
        arranged = inputs.permute(1, *kernel, 2, 0, *places)
        return arranged.flatten(1 + dims + 1).flatten(1, 1 + dims)

    def square_sums(self) -> Tensor:
        """The diagonal of ``X X^T``, ``(groups, columns)`` float64: batches are summed before pixels are laid out."""
        squares = self.inputs.square()
        summed = squares.sum(0, keepdim=True, dtype=torch.float64)
        return self.columns(summed).sum(2)

    def second_moments(self) -> Tensor:
        """``X X^T``, ``(groups, columns, columns)``."""
        inputs = self.inputs
        size = self.layout.groups * self._columns_per_place(inputs)
        total: Tensor | None = None
        for part in inputs.split(max(1, CHUNK // max(size, 1))):
            x = self.columns(part)
            total = torch.bmm(x, x.mT) if total is None else total.baddbmm_(x, x.mT)
        assert total is not None
        return total

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
    """While active, shows each use of the watched weights to ``see``."""

    def __init__(self, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], see: Callable[[Call], None]):
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.layouts, self.see = layouts, see

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
            if name is not None:
                self._show(name, key == "linear", given)
        return func(*args, **kwargs)

    def _show(self, name: str, linear: bool, given: dict[str, Any]) -> None:
        kernel = () if linear else tuple(given["weight"].shape[2:])
        layout = self.layouts[name]
        if int(given.get("groups", 1)) == layout.groups:  # else it is used against its module's own settings
            self.see(Call(name, given["input"].detach(), kernel, layout, given))


@contextmanager
def watched(work: Pruning, names: Sequence[str], see: Callable[[Call], None]) -> Generator[None]:
    """Show the uses of these weights to ``see``; what the network cannot compute is said to be the data's fault.

    Raises:
        DataError: the network cannot take the images.
    """
    try:
        with WeightCalls({name: work.weights[name] for name in names}, work.layouts, see):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        network, cause = type(work.model).__name__, str(error).split("\n")[0]
        raise DataError(explain(f"{network} cannot take these images", cause=cause)) from error


def input_norms(work: Pruning, label: str) -> dict[str, Tensor]:
    """``||x_j||_2`` of each input of each weight over all data, ``(groups, columns)`` float64; one pass.

    Weights that no call uses are left out, and are noted in ``work.dense``.
    """
    sums: dict[str, Tensor] = {}

    def see(call: Call) -> None:
        found = call.square_sums()
        sums[call.name] = sums[call.name] + found if call.name in sums else found

    for images in work.images(label):
        with watched(work, list(work.weights), see):
            work.model(images)
    _note_unseen(work, list(work.weights), sums)
    return {name: sums[name].sqrt() for name in work.weights if name in sums}


def second_moments(work: Pruning, label: str, names: Sequence[str], most: int | None) -> dict[str, Tensor]:
    """``X X^T`` of the inputs of these weights per image, ``(groups, columns, columns)``; one pass over the data.

    Weights that no call uses are left out, and are noted in ``work.dense``.
    """
    sums: dict[str, Tensor] = {}
    seen = 0

    def see(call: Call) -> None:
        found = call.second_moments()
        sums[call.name] = sums[call.name].add_(found) if call.name in sums else found

    for images in work.images(label, most):
        with watched(work, names, see):
            work.model(images)
        seen += len(images)
    _note_unseen(work, names, sums)
    return {name: sums[name].div_(seen) for name in names if name in sums}


def _note_unseen(work: Pruning, names: Sequence[str], seen: Mapping[str, Tensor]) -> None:
    work.dense.update({name: UNSEEN for name in names if name not in seen})


def in_parts(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, as many together as have at most ``limit`` in sum; a larger one stands alone.

    >>> list(in_parts({"a": 2, "b": 2, "c": 5, "d": 1}, 4))
    [['a', 'b'], ['c'], ['d']]
    """
    part: list[str] = []
    for name, size in sizes.items():
        if part and sum(sizes[other] for other in part) + size > limit:
            yield part
            part = []
        part.append(name)
    if part:
        yield part

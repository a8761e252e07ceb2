"""Running a model in a higher precision than it holds or casts to, to see more than rounding.

A model in half precision, or one that casts in its forward (``x.bfloat16()`` before one layer, ``x.float()`` before a
norm), computes outputs in which a wrong permutation may look like rounding. Here all that it holds is raised, and so is
every cast that it writes, however it is spelled.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vfsurgery.tracing.borrowed import contents_of, put
from vfsurgery.tracing.copies import plain_tensors

Model = TypeVar("Model", bound=nn.Module)

CASTS: dict[Any, torch.dtype] = {
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.float: torch.float32,
    Tensor.chalf: torch.complex32,
    Tensor.cfloat: torch.complex64,  # type: ignore[attr-defined]
}
"""Methods that cast, by name of the precision."""

COMPLEX = {
    torch.float16: torch.complex32,
    torch.bfloat16: torch.complex64,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}


def is_inexact(tensor: Tensor) -> bool:
    """Whether a tensor holds rounded numbers, real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: Tensor) -> Tensor:
    """Real and imaginary parts along a dim of their own at the end, sharing memory; a real tensor itself.

    >>> as_real(torch.tensor([1 + 2j])), as_real(torch.tensor([3.0]))
    (tensor([[1., 2.]]), tensor([3.]))
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of real and imaginary parts.

    >>> real(torch.complex64), real(torch.float16)
    (torch.float32, torch.float16)
    """
    return dtype.to_real() if dtype.is_complex else dtype


def raised_dtype(dtype: torch.dtype, lowest: torch.dtype) -> torch.dtype:
    """The dtype itself, or ``lowest`` (or its complex counterpart) where that is more precise.

    >>> raised_dtype(torch.bfloat16, torch.float32), raised_dtype(torch.complex64, torch.float64)
    (torch.float32, torch.complex128)
    """
    inexact = dtype.is_floating_point or dtype.is_complex
    if not inexact or real(dtype).itemsize >= lowest.itemsize:
        return dtype
    return COMPLEX[lowest] if dtype.is_complex else lowest


def raised(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in at least a precision; the tensor itself if it is, or holds no rounded numbers."""
    return tensor.to(raised_dtype(tensor.dtype, dtype))


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """The model itself, with all that it holds in at least a precision; complex and plain tensors too."""
    model._apply(lambda tensor: raised(tensor, dtype))
    for plain in list(plain_tensors(model)):
        contents = contents_of(plain.container.items)
        higher = [(key, _raised(value, dtype) if key == plain.key else value) for key, value in contents]
        put(plain.container.items, higher)
    return model


def _raised(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_raised(item, dtype) for item in value)
    return raised(value, dtype) if isinstance(value, Tensor) else value


class Precise(TorchFunctionMode):
    """Turns casts to a lower precision into casts to ``dtype``, and does without ``torch.autocast``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # a shape or a dtype: most calls, and nothing is computed
            return func(*args, **(kwargs or {}))
        if func in CASTS:
            return args[0].to(raised_dtype(CASTS[func], self.dtype))
        if func is Tensor.type and len(args) > 1:
            args = (args[0], _named(args[1]), *args[2:])
        if func in (Tensor.to, Tensor.type_as):  # a tensor may say the dtype
            others, kwargs = args[1:], kwargs or {}
            args = (args[0], *(_raised(x, self.dtype) for x in others))
            kwargs = {name: _raised(x, self.dtype) for name, x in kwargs.items()}
        args = tuple(self._raise(x) for x in args)
        kwargs = {name: self._raise(x) for name, x in (kwargs or {}).items()}
        enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not enabled:
            return func(*args, **kwargs)
        with _without_autocast(enabled):
            return func(*args, **kwargs)

    def _raise(self, value: Any) -> Any:
        return raised_dtype(value, self.dtype) if isinstance(value, torch.dtype) else value


def _named(kind: Any) -> Any:
    """The dtype of ``"torch.HalfTensor"`` and of the class of that name."""
    if isinstance(kind, str):
        kind = getattr(torch, kind.rpartition(".")[2], kind)
    return getattr(kind, "dtype", kind)


@contextmanager
def _without_autocast(enabled: Sequence[str]) -> Generator[None]:
    try:
        for device in enabled:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in enabled:
            torch.set_autocast_enabled(device, True)

"""In which precision a network takes images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data, are_tokens
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.precision import is_inexact, real

Kind = TypeVar("Kind", bound=Batches)


def image_dtype(module: nn.Module) -> torch.dtype | None:
    """What a module's images should be: the dtype of its parameters.

    ``None``, which is that they stay as they are, for a module whose parameters have several: it casts by itself.

    >>> image_dtype(nn.Linear(2, 2).half()), image_dtype(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2)))
    (torch.float16, None)
    """
    dtypes = _dtypes(module)
    return None if len(dtypes) > 1 else next(iter(dtypes), torch.float32)


def taken_by(module: nn.Module, images: Tensor) -> Tensor:
    """Images in the dtype that a module takes; tokens as they are.

    >>> taken_by(nn.Linear(2, 2).double(), torch.ones(1, 2)).dtype, taken_by(nn.Embedding(2, 2), torch.tensor([[1]]))
    (torch.float64, tensor([[1]]))
    """
    return images if are_tokens(images) else images.to(image_dtype(module))


def accepted_dtype(module: nn.Module, images: Tensor) -> torch.dtype | None:
    """As :func:`image_dtype`; where several dtypes leave that open, the first that the module runs on.

    The images' own comes first, then those of the parameters.

    >>> accepted_dtype(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2)), torch.ones(1, 2))  # runs on neither
    """
    found = image_dtype(module)
    if found is not None:
        return found
    for dtype in dict.fromkeys((images.dtype, *_dtypes(module))):
        try:
            with borrowed(module, {}), torch.no_grad(), torch.random.fork_rng([]):
                module.eval()
                module(images.to(dtype))
        except Exception:  # whatever a forward may raise
            continue
        return dtype
    return None


def batches_for(module: nn.Module, data: Data, device: torch.device, kind: type[Kind] = Batches) -> Kind:
    """Data as batches on a device, in the precision that a module takes; where it has several, read once to try.

    Raises:
        DataError: as :class:`~vfsurgery.data.batches.Batches`.
    """
    batches = kind(data, device=device, dtype=image_dtype(module))
    if batches.dtype is None:
        batches.dtype = accepted_dtype(module, next(iter(batches))[0][:2])
    return batches


def _dtypes(module: nn.Module) -> Sequence[torch.dtype]:
    """The real dtypes of a module's parameters, in order."""
    return [*dict.fromkeys(real(parameter.dtype) for parameter in module.parameters() if is_inexact(parameter))]

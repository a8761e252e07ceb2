"""Classes that a network is asked for: what counts as logits, and labels drawn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from vfsurgery.errors import DataError, InvalidWeightsError, explain


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class per image from the softmax of its logits, (batch, classes) -> (batch,); on the CPU for any device."""
    odds = logits.double().softmax(1).cpu()
    if not odds.isfinite().all():
        raise InvalidWeightsError(explain("the logits are NaN or infinite", remedy="check the model on these images"))
    return torch.multinomial(odds, 1, generator=generator).flatten().to(logits.device)


def check_logits(logits: object, count: int, instead: str) -> None:
    """Refuse what are no logits of ``count`` images.

    Args:
        logits: What a model returned.
        count: Images that it was given.
        instead: What needs none, for the message.

    Raises:
        DataError: it is no real tensor ``(count, classes)``.
    """
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == count and logits.is_floating_point():
        return
    found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise DataError(
        explain(
            "the Fisher matrix is that of a classifier, and this model's output is not logits",
            found=found,
            expected=f"a tensor ({count}, classes)",
            remedy=f"wrap the model in a module that returns its logits, or {instead}",
        )
    )

"""Letting the transformer modules of ``torch.nn`` be run on proxies, and on tensors without data.

In eval mode they compute what they compute in training by fused kernels, if nobody looks. The plain way is taken here:
attention, norms and linear layers one by one. Two things look at values, which a recording cannot follow:

- ``nn.TransformerEncoder`` drops padded positions by a nested tensor in eval mode, and fills them with zeros in the
  end; on the plain way they hold what the layers make of them, as in training;
- masks are compared with a causal one, which only chooses a faster kernel.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import transformer

TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of ``torch.nn`` that are made of others, and are traced through."""
PADDED = "nn.TransformerEncoder computes padded positions, where it gives zeros in eval mode"


@contextmanager
def one_by_one(guards: list[str] | None = None) -> Generator[None]:
    """Have transformers call their parts one by one; notes in ``guards`` where that differs from what they do."""
    encode = nn.TransformerEncoder.forward

    def noted(
        self: nn.TransformerEncoder,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if guards is not None and src_key_padding_mask is not None and self.use_nested_tensor and PADDED not in guards:
            guards.append(PADDED)
        return encode(self, src, mask, src_key_padding_mask, is_causal)

    patched: list[tuple[Any, str, Any]] = [
        (nn.TransformerEncoder, "forward", noted),
        (transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: bool(is_causal)),
        (F, "_none_or_dtype", lambda x: None if x is None else x.dtype),  # which wants a tensor, and no proxy
    ]
    originals = [getattr(owner, name) for owner, name, _ in patched]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for owner, name, replacement in patched:
            setattr(owner, name, replacement)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for (owner, name, _), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)

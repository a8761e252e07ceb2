"""What a LoRA adapter does to the weights of its base, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vfsurgery.combining.adapter_files import Stored
from vfsurgery.combining.base import Store
from vfsurgery.errors import CheckpointError, explain


@dataclass(frozen=True)
class Factors:
    """What an adapter does to one weight.

    Attributes:
        down: ``A``, of shape ``(r, inputs, ...)``.
        up: ``B``, of shape ``(outputs, r)``, with ones for a convolution.
        scale: What the product is multiplied by.
        magnitude: Of DoRA: the norm that the weights of each output have in the end.
        turned: Whether the weight has its inputs first, as tables of embeddings have.
    """

    down: Stored
    up: Stored
    scale: float
    magnitude: Stored | None = None
    turned: bool = False

    def onto(self, weight: Tensor) -> Tensor:
        """The weight with the adapter folded in, in its own dtype."""
        down, up = self.down.tensor().to(weight), self.up.tensor().to(weight)
        product = (up.flatten(1) @ down.flatten(1)).mul_(self.scale)
        total = (product.T if self.turned else product).reshape(weight.shape).add_(weight)
        if self.magnitude is None:
            return total
        outputs = 1 if self.turned else 0
        norms = torch.linalg.vector_norm(total, dim=[dim for dim in range(total.ndim) if dim != outputs], keepdim=True)
        return total.mul_(self.magnitude.tensor().to(weight).reshape(norms.shape) / norms)


@dataclass(frozen=True)
class Folded:
    """A base and an adapter as the :class:`~vfsurgery.combining.base.Store` of one model, folded tensor by tensor.

    What the adapter changes is given in float32 at least, so that of a base in half precision nothing is lost. One
    tensor is kept at a time, as long as it is read in parts.

    Attributes:
        shapes: Of all tensors of the model; of a head that the adapter brings, another than the base's.
        notes: Sentences that a report should have.
    """

    base: Store = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    weights: Mapping[str, Factors]
    biases: Mapping[str, Tensor] = field(repr=False)
    saved: Mapping[str, Stored] = field(repr=False)
    notes: tuple[str, ...] = ()
    _last: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False, compare=False)

    @property
    def changed(self) -> frozenset[str]:
        """Names of all tensors that are not the base's."""
        return frozenset([*self.weights, *self.biases, *self.saved])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`~vfsurgery.combining.base.Store`."""
        if not (name in self.weights or name in self.biases or name in self.saved):
            return self.base.read(name, start, stop)
        if (whole := self._last.get(name)) is None:
            self._last.clear()
            whole = self._folded(name)
            if stop - start < len(whole):
                self._last[name] = whole
        return whole[start:stop]

    def _folded(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name in self.saved and name not in self.biases:
            return self.saved[name].tensor().reshape(-1)
        found = (
            self.saved[name].tensor()
            if name in self.saved
            else self.base.read(name, 0, math.prod(shape)).reshape(shape)
        )
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        found = self.weights[name].onto(found) if name in self.weights else found + self.biases[name].to(found)
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(explain(f"folded into {name}, an adapter gives NaN or infinite values"))
        return found.reshape(-1)

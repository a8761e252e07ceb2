"""Dropping of biases that softmax attention makes superfluous: those of keys become zero, those of values move on.

The bias of keys adds the same to all logits of a query, which its softmax does not see. Attention weights sum to one,
so the bias of values is added to every result, and the output projection adds what it makes of it:
``b_o <- b_o + W_o b_v``, ``b_v <- 0``. Nothing is dropped where a norm or a rotary embedding stands between bias and
product, where keys that no projection makes take part (``bias_k``, zero tokens, attention sinks), or where a projection
has no bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.passes.attention_biases import AttentionBiases, Projection
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.bias_numbers import NONE
from vfsurgery.tracing.modes import in_training
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class DropDeadBiases(Pass):
    """Set biases of keys to zero, and move biases of values into the biases of the output projections.

    Of a packed bias (``qkv.bias``, ``in_proj_bias``) it is the part of keys and that of values. The report has the
    names of both.

    >>> DropDeadBiases()
    DropDeadBiases()
    """

    name: ClassVar[str] = "drop-dead-biases"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Drop them, in place."""
        biases = AttentionBiases(graph_module)
        dead, training = biases.dead(), in_training(graph_module)
        if training is not None:
            dead = dead.both(AttentionBiases(training).dead())
        state = canonical_state(graph_module)
        vectors = _Vectors(state, biases.numbers.first)
        for projection in dead.projections:
            _move(state, projection, vectors.at(projection, dead.values))
        context.notes.append(f"{self.name}: of keys {_listed(vectors.clear(dead.keys))}")
        moved = _listed(vectors.clear(dead.values))
        context.notes.append(f"{self.name}: of values, moved into output projections, {moved}")
        return graph_module


@dataclass(frozen=True)
class _Vectors:
    """The vectors of a model by the numbers of their entries."""

    state: Mapping[str, Tensor]
    first: Mapping[str, int]

    def at(self, projection: Projection, allowed: set[int]) -> Tensor:
        """The values that reach the columns of a projection, float64; zero where none does that may move."""
        numbers = torch.tensor(projection.numbers)
        values = torch.zeros(len(numbers), dtype=torch.float64)
        known = torch.tensor([number != NONE and number in allowed for number in projection.numbers])
        for _, start, tensor in self._each():
            here = known & (numbers >= start) & (numbers < start + len(tensor))
            if bool(here.any()):
                values[here] = tensor.to("cpu", torch.float64)[numbers[here] - start]
        return values

    def clear(self, numbers: set[int]) -> list[str]:
        """Set entries to zero; the names of the vectors that have some, with the part where it is not all."""
        found: list[str] = []
        for name, start, tensor in self._each():
            places = [place for place in range(len(tensor)) if start + place in numbers]
            if places:
                tensor[places] = 0
                part = "" if len(places) == len(tensor) else f"[{places[0]}:{places[-1] + 1}]"
                found.append(f"{name}{part}")
        return found

    def _each(self) -> Iterator[tuple[str, int, Tensor]]:
        yield from ((name, start, self.state[name]) for name, start in self.first.items())


def _move(state: Mapping[str, Tensor], projection: Projection, values: Tensor) -> None:
    """Add to the bias of a projection what its weight makes of the biases of values."""
    bias, weight = state[projection.bias], state[projection.weight]
    bias.copy_(bias.to(torch.float64) + weight.to(torch.float64) @ values.to(weight.device))


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"

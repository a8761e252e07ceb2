"""Folding of scales into other weights, in place: what multiplies single units becomes ones.

A norm with scale ``g`` and shift ``e`` in front of readers ``W x + b``: ``b <- b + W e``, ``W <- W diag(g)``, then
``g <- 1`` and ``e <- 0``. Where a reader has no bias that could take it, the shift stays in the norm as ``e / g``. A
factor ``s`` behind a layer ``W x + b`` (LayerScale): ``W <- diag(s) W``, ``b <- s b``, ``s <- 1``. What can be folded
is found by discovery (:mod:`vfsurgery.discovery.foldings`); the network computes the same in eval mode and in training,
where no dropout lies between a shift and its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from vfsurgery.discovery.canonical import fold, refusal, takes_shift
from vfsurgery.groups import Folding
from vfsurgery.passes.base import Context, Pass
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class _FoldScales(Pass):
    """Folding of all scales that go ``into`` readers, or into writers; ``what`` they are, for reports."""

    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False
    into: ClassVar[Literal["readers", "writers"]]
    what: ClassVar[str]

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all of them, in place."""
        foldings = [folding for folding in context.groups.foldings if getattr(folding, self.into)]
        context.notes.extend(self._folded(canonical_state(graph_module), foldings))
        return graph_module

    def _folded(self, state: Mapping[str, Tensor], foldings: Sequence[Folding]) -> Iterator[str]:
        """Fold, and say for the report what was done and what was not.

        Of a norm that is folded in several parts, all are or none.
        """
        refused = {each.scale.parameter: reason for each in foldings if (reason := refusal(state, each))}
        done = [each for each in foldings if each.scale.parameter not in refused]
        for folding in done:
            fold(state, folding)
        kept = {each.shift.parameter for each in done if each.shift is not None and not takes_shift(each)}
        count = len({each.scale.parameter for each in done})
        yield f"{self.name}: {count} {self.what} folded" + (
            f", shifts stay in {len(kept)} of these norms" if kept else ""
        )
        yield from (f"{self.name}: left as it is: {reason}" for reason in refused.values())


@dataclass(frozen=True, kw_only=True)
class FoldNormScales(_FoldScales):
    """Fold the scales of norms into all weights that read what they give out, and shifts into the biases there.

    Norms become ``(x - mean) / std`` with ones and zeros. Where a reader has no bias the shift stays, divided by the
    scale; a norm whose scale is near zero where that is needed is left as it is, and the report says so.

    >>> import torch, vfsurgery as surgery
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)).eval()
    >>> _ = model[1].weight.data.uniform_(1, 2), model[1].bias.data.uniform_(1, 2)
    >>> folded = surgery.run_passes(model, ["fold-norm-scales"], example_inputs=torch.randn(2, 4))
    >>> folded[1].weight.tolist() == [1.0] * 8, folded[1].bias.tolist() == [0.0] * 8
    (True, True)
    """

    name: ClassVar[str] = "fold-norm-scales"
    into: ClassVar[Literal["readers", "writers"]] = "readers"
    what: ClassVar[str] = "norm scales"


@dataclass(frozen=True, kw_only=True)
class FoldLayerScales(_FoldScales):
    """Fold weights that multiply the outputs of a layer (LayerScale) into that layer's rows and bias.

    >>> FoldLayerScales()
    FoldLayerScales()
    """

    name: ClassVar[str] = "fold-layer-scales"
    into: ClassVar[Literal["readers", "writers"]] = "writers"
    what: ClassVar[str] = "layer scales"

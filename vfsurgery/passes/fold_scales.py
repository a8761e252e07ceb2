"""Folding of scales into other weights, in place: what multiplies single units becomes ones.

A norm with scale ``g`` and shift ``e`` in front of readers ``W x + b``: ``b <- b + W e``, ``W <- W diag(g)``, then
``g <- 1`` and ``e <- 0``. Where a reader has no bias that could take it, the shift stays in the norm as ``e / g``. A
factor ``s`` behind a layer ``W x + b`` (LayerScale): ``W <- diag(s) W``, ``b <- s b``, ``s <- 1``. What can be folded
is found by discovery (:mod:`vfsurgery.discovery.foldings`); the network computes the same in eval mode and in training,
where no dropout lies between a shift and its readers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.discovery.canonical import fold, refusal, takes_shift, unmappable
from vfsurgery.groups import Folding, GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class FoldNormScales(Pass):
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
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all of them, in place."""
        foldings = [folding for folding in context.groups.foldings if folding.readers]
        context.notes.extend(_folded(self.name, "norm scales", canonical_state(graph_module), foldings))
        return graph_module


@dataclass(frozen=True, kw_only=True)
class FoldLayerScales(Pass):
    """Fold weights that multiply the outputs of a layer (LayerScale) into that layer's rows and bias.

    >>> FoldLayerScales()
    FoldLayerScales()
    """

    name: ClassVar[str] = "fold-layer-scales"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fold all of them, in place."""
        foldings = [folding for folding in context.groups.foldings if folding.writers]
        context.notes.extend(_folded(self.name, "layer scales", canonical_state(graph_module), foldings))
        return graph_module


@torch.no_grad()
def canonicalize(graph_module: fx.GraphModule, groups: GroupSet, masked: Collection[str] = ()) -> dict[str, str]:
    """Fold all scales of a traced model, in place: what maps of units beyond permutations suppose.

    Tensors keep their storage, dtype and ``requires_grad``; numbers are computed in float64.

    Args:
        graph_module: What :func:`~vfsurgery.trace` returns; its tensors are written into.
        groups: Its groups.
        masked: State-dict keys of weights whose zeros are to stay.

    Returns:
        For each group whose units can only be reordered in these weights, though its symmetry is more than
        permutations, the reason: a scale that could not be folded, whole numbers, zeros that are to stay.

    >>> import torch, vfsurgery as surgery
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2, bias=False))
    >>> _ = model[1].bias.data.fill_(1.0), model[1].weight.data[0].fill_(1e-9)
    >>> graph_module = surgery.trace(model, torch.randn(2, 4))
    >>> canonicalize(graph_module, surgery.find_groups(graph_module))["g0"]
    '1.weight is near zero, and 1.bias over it would be 1e+09: 2.weight has no bias that could take it'
    """
    state, left = canonical_state(graph_module), dict[str, str]()
    refused = _fold_all(state, groups.foldings)
    for group in groups:
        names = dict.fromkeys(member.parameter for member in group.members)
        sparse = next((f"{name} is sparse, and its zeros would be filled" for name in names if name in masked), "")
        held = next((refused[m.parameter] for m in group.members if m.scales and m.parameter in refused), "")
        reason = unmappable(state, group) or sparse or held
        if reason and group.symmetry.is_continuous:
            left[group.name] = reason
    return left


def _fold_all(state: Mapping[str, Tensor], foldings: Sequence[Folding]) -> dict[str, str]:
    """Fold weights, in place; those that are left as they are, by name, each with the reason.

    Of a norm that is folded in several parts, all are or none.
    """
    refused = {each.scale.parameter: reason for each in foldings if (reason := refusal(state, each))}
    for folding in foldings:
        if folding.scale.parameter not in refused:
            fold(state, folding)
    return refused


def _folded(name: str, what: str, state: Mapping[str, Tensor], foldings: Sequence[Folding]) -> Iterator[str]:
    """Fold, and say for the report what was done and what was not."""
    refused = _fold_all(state, foldings)
    done = [each for each in foldings if each.scale.parameter not in refused]
    kept = {each.shift.parameter for each in done if each.shift is not None and not takes_shift(each)}
    count = len({each.scale.parameter for each in done})
    yield f"{name}: {count} {what} folded" + (f", shifts stay in {len(kept)} of these norms" if kept else "")
    yield from (f"{name}: left as it is: {reason}" for reason in refused.values())

"""Centring of what writes into units that only LayerNorms look at: ``W <- C W``, ``b <- C b``, ``C = 1 - 11'/d``.

A LayerNorm subtracts the mean over its units. So whatever weights add to all of them alike can be taken away: then the
units have no mean, and two networks differ in one thing less. Where something else sees the mean (a layer that reads
the units without a norm, an RMSNorm, a norm over the units of several places) nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.groups import Centring, Member
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.mask import SPARSE
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class CentreWriters(Pass):
    """Take the mean over the units out of every weight that writes into units which LayerNorms alone look at.

    Those are layers, embeddings, positions and tokens of groups that are ``orthogonal fixing ones``; the report says
    which groups are left as they are, and why. Layer scales have to be folded before (``fold-layer-scales``).

    >>> CentreWriters()
    CentreWriters()
    """

    name: ClassVar[str] = "centre-writers"
    preserves_function: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ("fold-layer-scales",)

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Centre them, in place."""
        state = canonical_state(graph_module)
        for centring in context.groups.centrings:
            group = context.groups[centring.group]
            reason = centring.reason or _refusal(state, centring)
            if reason:
                context.notes.append(f"{self.name}: {group} is left as it is, {reason}")
                continue
            for member in centring.writers:
                state[member.parameter].copy_(_centred(state[member.parameter], member))
            context.notes.append(f"{self.name}: {len(centring.writers)} weights that write into {group}")
        if not context.groups.centrings:
            context.notes.append(f"{self.name}: no LayerNorm reads units that can be rotated")
        return graph_module


def _refusal(state: Mapping[str, Tensor], centring: Centring) -> str:
    """Why it does not hold for these weights."""
    for member in centring.writers:
        tensor = state[member.parameter]
        if not tensor.is_floating_point():
            return f"{member.parameter} holds no real numbers"
        if float((tensor.eq(0) & _centred(tensor, member).ne(0)).double().mean()) > SPARSE:
            return f"{member.parameter} is sparse, and its zeros would be filled"
    for member in centring.scales:
        if not bool((state[member.parameter] == 1).all()):
            return f"{member.parameter} multiplies single units (run fold-layer-scales before)"
    return ""


def _centred(tensor: Tensor, member: Member) -> Tensor:
    """A weight less its mean over the units at each place, float64."""
    result = tensor.to(torch.float64, copy=True)
    rows = result.movedim(member.dim, 0)
    places = torch.from_numpy(member.positions()).to(tensor.device)  # (units, places per unit)
    units = rows[places]
    rows[places] = units - units.mean(0, keepdim=True)
    return result

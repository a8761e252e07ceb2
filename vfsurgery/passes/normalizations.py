"""What ``renormalize=`` stands for: passes by name, in the order given, or those that suit the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import fx

from vfsurgery.discovery.recording import hidden_norms
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes import NORMALIZATIONS, CalibrateBiases, ClosedFormReset, Pass, Repair, Rescale, Reset
from vfsurgery.passes.contract import check_order
from vfsurgery.passes.producers import is_norm
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.tracing.exported import EXPORTED
from vfsurgery.tracing.ops import OpReader

Renormalization: TypeAlias = str | Pass | Sequence[str | Pass] | None
"""What ``renormalize=`` takes."""


def normalizations(
    choice: Renormalization, graph_module: fx.GraphModule, groups: GroupSet, has_data: bool
) -> tuple[Pass, ...]:
    """The passes that a choice stands for in a network.

    Raises:
        OptionError: a name is unknown, an entry is no pass, passes exclude their order, or the graph hides its norms.
        DataError: a pass needs data and there is none.
    """
    if choice is None:
        return ()
    if choice == "auto":
        step = _default_normalization(graph_module, has_data)
        choice = () if step is None or not step.applies(graph_module, groups) else step
    steps: Iterable[str | Pass] = [choice] if isinstance(choice, str) or not isinstance(choice, Sequence) else choice
    passes = tuple(NORMALIZATIONS[step]() if isinstance(step, str) else step for step in steps)
    hidden = hidden_norms(graph_module)
    if passes and hidden:
        raise OptionError(
            explain(
                "renormalize= cannot find the BatchNorm layers: it needs an fx trace, and fx cannot record this model",
                layers=", ".join(hidden[:4]),
                fx=graph_module.meta[EXPORTED],
                remedy="pass renormalize=None, or keep the module that fx cannot record as one node with leaf=",
            )
        )
    for step in passes:
        if not isinstance(step, Pass):
            accepted = ", ".join(["auto", *NORMALIZATIONS])
            raise OptionError(explain(f"renormalize holds no pass but {step!r}", accepted=f"None, {accepted}"))
        if step.needs_data and not has_data:
            raise DataError(
                explain(
                    f"renormalize={step.name!r} needs data",
                    remedy="pass data=, or data='imagined', or renormalize='auto', or renormalize=None",
                )
            )
    check_order(passes)
    return passes


def _default_normalization(graph_module: fx.GraphModule, has_data: bool) -> Pass | None:
    """What ``"auto"`` stands for where it applies; the table of docs/merge.md.

    Under LayerNorm and GroupNorm the output layer is repaired too: docs/benchmarks/transformers.py gains by it in every
    row, up to ten points.
    """
    if hidden_norms(graph_module):
        return None
    if batch_norm_nodes(graph_module):
        return Reset() if has_data else ClosedFormReset()
    if any(is_norm(op) for op in OpReader(graph_module)):
        return Repair(include_output=True) if has_data else None
    return Rescale() if has_data else CalibrateBiases()

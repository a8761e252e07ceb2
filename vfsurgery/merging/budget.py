"""Which prefix a merge preserves, decided from the graph before any weights are touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.passes import Preserve
from vfsurgery.passes.costs import Ledger
from vfsurgery.passes.cut import Boundaries
from vfsurgery.passes.preserve import chosen_form
from vfsurgery.records.report import Candidate, Preserved


@dataclass(frozen=True)
class Budget:
    """The most that a merged network may cost, as ratios to one source; ``None`` is no limit."""

    flops: float | None = None
    params: float | None = None

    def check(self) -> None:
        """Refuse what is no budget.

        Raises:
            OptionError: a limit is no number or below 1, which even plain merging costs.
        """
        for name, limit in (("max_flops", self.flops), ("max_params", self.params)):
            number = isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit)
            if limit is not None and not (number and limit >= 1):
                raise OptionError(
                    explain(f"{name}={limit!r} is no budget", expected="a ratio to one source, at least 1, as in 1.2")
                )

    def allows(self, row: Candidate) -> bool:
        """Whether a candidate is within both limits."""
        return row.flops <= (self.flops or math.inf) and row.parameters <= (self.params or math.inf)

    def __str__(self) -> str:
        limits = (("flops", self.flops), ("parameters", self.params))
        return ", ".join(f"{name} x{limit:g}" for name, limit in limits if limit is not None)


def plan_prefix(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    sources: int,
    preserve: int | str | Preserve,
    budget: Budget,
) -> tuple[Preserve, Preserved] | None:
    """The pass that keeps what was asked for, and what it costs; ``None`` for plain merging.

    Args:
        graph_module: The trace of a source.
        inputs: What it was traced with.
        sources: How many sources have a share.
        preserve: A boundary, or a pass that has one.
        budget: What may be spent; chooses the boundary.

    Raises:
        OptionError: there is no such boundary or form, both a boundary and a budget are given, or nothing fits.
    """
    budget.check()
    limited = budget != Budget()
    if isinstance(preserve, int) and not isinstance(preserve, bool) and not preserve and not limited:
        return None
    if limited and preserve:
        raise OptionError(
            explain(f"preserve={preserve!r} was given beside a budget", budget=budget, remedy="leave one of both out")
        )
    wanted = preserve if isinstance(preserve, Preserve) else Preserve(boundary=preserve)
    boundaries, ledger = Boundaries(graph_module), Ledger.of(graph_module, inputs)
    found = candidates(boundaries, ledger, sources) if limited else ()
    cut = boundaries.cut(_most(found, budget).boundary if limited else wanted.boundary)
    ratio = ledger.cost(cut, sources) / ledger.cost(boundaries.cut(0), sources)
    form = chosen_form(wanted.form, graph_module, cut)
    kept = cut.preserves and sources > 1
    told = Preserved(
        cut.boundary, cut.layers, cut.depth, form if kept else "merged", ratio.flops, ratio.parameters, found
    )
    return Preserve(boundary=cut.boundary, form=form), told


def candidates(boundaries: Boundaries, ledger: Ledger, sources: int) -> tuple[Candidate, ...]:
    """The cost of preserving 0, 1, ... layers of every source, relative to one source."""
    cuts = list(boundaries.cuts())
    base = ledger.cost(cuts[0], sources)
    ratios = [ledger.cost(cut, sources) / base for cut in cuts]
    return tuple(Candidate(cut.boundary, cost.flops, cost.parameters) for cut, cost in zip(cuts, ratios, strict=True))


def _most(found: Sequence[Candidate], budget: Budget) -> Candidate:
    """The candidate that preserves most within the budget.

    Raises:
        OptionError: only plain merging is.
    """
    costly = [row for row in found if row.flops > 1 or row.parameters > 1]
    fitting = [row for row in costly if budget.allows(row)]
    if not fitting:
        raise OptionError(
            explain(
                "no preserved prefix is within the budget",
                budget=budget,
                cheapest=costly[0] if costly else None,
                remedy="allow more, or leave the budget out for plain merging",
            )
        )
    return fitting[-1]

"""The last of a merge: the result takes the reference's form or place, and what happened is written down."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from vfsurgery.discovery.canonical import needed, unfold
from vfsurgery.errors import OptionError, explain
from vfsurgery.merging.ancestry import Ancestry
from vfsurgery.merging.choosing import Choice
from vfsurgery.merging.combined import Combined
from vfsurgery.merging.prepared import Grouped
from vfsurgery.passes.preserve import standalone
from vfsurgery.records.report import GroupMatch, MergeReport, Preserved, version_of
from vfsurgery.tracing.bound import refuse_bound
from vfsurgery.tracing.computed import settle
from vfsurgery.tracing.copies import forget_kept
from vfsurgery.tracing.modes import limits
from vfsurgery.tracing.sources import canonical_state, write_into


def finish(traced: Grouped, combined: Combined, inplace: bool, preserved: bool) -> nn.Module:
    """Give the result the reference's training modes, or write it into the reference.

    Where sources were brought to a canonical form, a result of their class gets the scales of a's norms back.

    In place, the copy's values go into a's tensors at the very end: whatever fails before leaves a as it was.

    Raises:
        OptionError: the result does not fit into the reference.
    """
    reference, merged, context = traced.reference, combined.model, combined.context
    if inplace and context.restructured:
        raise OptionError(
            explain(
                f"the result does not fit into model a, a {type(reference).__name__}",
                because="a pass in renormalize= changed the graph and not tensors alone",
                remedy="leave inplace out: the result is then a graph module",
            )
        )
    if traced.originals and not (preserved or context.restructured):
        for folding in needed(traced.groups):
            unfold(canonical_state(merged), folding, traced.originals[0].state)
    if inplace:
        write_into(reference, merged, context.created_biases)
        settle(reference, merged)
        return reference
    source = traced.sources[0]
    if preserved or context.restructured:
        refuse_bound(source.graph_module)
        assert isinstance(merged, fx.GraphModule)
        paths = (path for path, _ in reference.named_modules())
        return standalone(merged, dict(zip(paths, traced.modes, strict=True)), source.model(*traced.inputs))
    forget_kept(merged, source.model)
    for module, training in zip(merged.modules(), traced.modes, strict=True):
        module.training = training
    return merged


def report_on(
    choice: Choice, notes: Sequence[str] = (), preserved: Preserved | None = None, ancestry: Ancestry | None = None
) -> MergeReport:
    """Freeze what happened."""
    base = "" if ancestry is None else ancestry.told
    surveyed, certified, context = choice.surveyed, choice.certified, choice.combined.context
    grouped = surveyed.grouped
    matches = tuple(
        GroupMatch(
            number, g.group, grouped.groups[g.group].label, grouped.groups[g.group].units, g.before, g.after, g.moved
        )
        for number, matching in enumerate(certified.each)
        for g in matching.gains
    )
    return MergeReport(
        model=type(grouped.sources[0].model).__name__,
        sources=len(grouped.sources),
        weights=tuple(context.weights) if ancestry is None else ancestry.weights,
        matching=certified.matcher.name,
        renormalize=tuple(step.name for step in choice.way.passes),
        groups=grouped.groups,
        matches=matches,
        certificates=certified.certificates,
        created_biases=tuple(context.created_biases),
        notes=(
            *grouped.notes,
            *notes,
            *grouped.groups.notes,
            *certified.notes,
            *context.notes,
            *choice.notes,
            *(limits(grouped.graph_module) if context.restructured or preserved else ()),
            *([f"statistics of {surveyed.taken.images} images"] if surveyed.taken else []),
        ),
        guards=grouped.graph_module.meta["guards"],
        seed=grouped.seed,
        versions=tuple((name, version_of(name)) for name in ("vfsurgery", "torch", "scipy", "networkx")),
        seconds=tuple(grouped.clock.seconds),
        preserved=preserved,
        trials=choice.trials,
        combine="" if choice.way.combiner is None else str(choice.way.combiner),
        base=base,
    )

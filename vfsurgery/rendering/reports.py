"""What notebooks show of reports and groups: a first line, tables, and the rest to unfold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import singledispatch

from vfsurgery.groups import GroupSet, PermutationGroup
from vfsurgery.groups.groupset import UNKNOWN_OP_REMEDY
from vfsurgery.passes.running import PassReport
from vfsurgery.pruning import PruneReport
from vfsurgery.pruning.renormalizing import RenormalizeReport
from vfsurgery.pruning.units import UnitPruneReport
from vfsurgery.records.report import MergeReport, Report
from vfsurgery.rendering.fragments import (
    LONG,
    Html,
    escaped,
    folded,
    fragment,
    paragraph,
    paragraphs,
    table,
    verbatim,
)
from vfsurgery.scoring.soups import SoupReport
from vfsurgery.shown import html_of
from vfsurgery.stats.imagined import Imagined, ImagineReport


@html_of.register(Report)
def report_html(report: Report) -> str:
    """The first line of the text, tables, and the whole text to unfold."""
    first = str(report).partition("\n")[0]
    return fragment(first, *tables_of(report), folded("the whole report", verbatim(str(report))))


@html_of.register(Imagined)
def imagined_html(images: Imagined) -> str:
    """That of their report: images are no part of it, since what notebooks show fetches nothing."""
    return report_html(images.report)


@html_of.register(GroupSet)
def groups_html(groups: GroupSet) -> str:
    """The first line of the listing, and what is below it to unfold."""
    return fragment(groups.listing().partition("\n")[0], *_groups(groups))


@singledispatch
def tables_of(report: Report) -> tuple[Html, ...]:
    """What is shown of a report without a click, beside its first line; of a kind that is not known here, nothing."""
    return ()


@tables_of.register(ImagineReport)
def _imagined(report: ImagineReport) -> tuple[Html, ...]:
    """How near each BatchNorm layer's statistics came."""
    rows = [(layer.source, layer.layer, layer.units, layer.before, layer.after) for layer in report.layers]
    layers = table(["source", "layer", "units", "distance before", "after"], rows)
    return (folded(f"{len(rows)} layers", layers, unfolded=len(rows) <= LONG),) if rows else ()


@tables_of.register(MergeReport)
def _merge(report: MergeReport) -> tuple[Html, ...]:
    """How it was done, the certificates, what was tried, and to unfold: matches and groups."""
    steps = ", ".join(report.renormalize) or "none"
    combined = f"Combined by {report.combine}, base {report.base}. " if report.combine else ""
    judge = report.trials[0].judge if report.trials else ""
    matches = [
        (source if report.sources > 2 else "", *others)
        for source, *others in (dataclasses.astuple(match) for match in report.matches)
    ]
    headers = ["source", "group", "first written by", "units", "similarity before", "after", "moved"]
    return (
        paragraph(f"{combined}Matching {report.matching}; renormalization {steps}; seed {report.seed}."),
        paragraphs(f"{certificate.mark} {certificate}" for certificate in report.certificates),
        paragraphs(part for part in (report.preserved, report.masks, *report.notes) if part is not None),
        table(
            ["tried", f"agrees with {judge}", "cross-entropy", "seconds", ""],
            [trial.cells for trial in report.trials],
        ),
        _unfoldable("what matching did", headers, matches) if matches else Html(""),
        folded(f"{len(report.groups)} permutation groups", *_groups(report.groups)),
    )


@tables_of.register(PruneReport)
def _prune(report: PruneReport) -> tuple[Html, ...]:
    """How it was done, and the layers."""
    rows = [(layer.name, layer.entries, f"{layer.sparsity:.2%}", layer.dense) for layer in report.layers]
    return (
        paragraph(f"Method {report.method}, compared by {report.scope}; seed {report.seed}."),
        paragraphs(report.notes),
        _unfoldable(f"{len(rows)} layers", ["weight", "entries", "zero", "dense, because"], rows),
    )


@tables_of.register(UnitPruneReport)
def _prune_units(report: UnitPruneReport) -> tuple[Html, ...]:
    """Costs, the certificate, and what each group lost."""
    rows = [(group.group, group.label, group.before, group.after, "") for group in report.groups]
    rows += [(group.group, group.label, group.units, group.units, group.reason) for group in report.left_whole]
    costs = [
        ("parameters", report.before.parameters, report.after.parameters),
        ("flops", report.before.flops, report.after.flops),
    ]
    return (
        table(["", "before", "after"], costs),
        paragraph(f"{'✓' if report.certificate else '✗'} {report.certificate}"),
        paragraphs(report.notes),
        _unfoldable(f"{len(rows)} groups", ["group", "first written by", "units", "left", "whole, because"], rows),
    )


@tables_of.register(RenormalizeReport)
def _renormalize(report: RenormalizeReport) -> tuple[Html, ...]:
    """Layers with what they were scaled by, and those left as they were."""
    rows = [(pair.layer, pair.partner, pair.by, pair.units, pair.scale) for pair in report.paired]
    return (
        paragraph(f"{report.sparsity:.2%} of the weights are zero, before as after."),
        paragraphs(report.notes),
        _unfoldable(f"{len(rows)} layers", ["layer", "of the reference", "found by", "units", "scaled by"], rows),
        paragraphs(f"Left as it is, {layer}" for layer in report.unpaired),
    )


@tables_of.register(PassReport)
def _passes(report: PassReport) -> tuple[Html, ...]:
    """The passes in their order."""
    rows = [(str(step).partition(";")[0], len(step.added), len(step.removed), step.error) for step in report.passes]
    return (table(["pass", "nodes added", "removed", "error, where the function is kept"], rows),)


@tables_of.register(SoupReport)
def _soup(report: SoupReport) -> tuple[Html, ...]:
    """The models in the order in which they were tried."""
    rows = [
        (str(found.model), found.accuracy, found.soup, found.weight if found.kept else "left out")
        for found in report.ingredients
    ]
    return (table(["model", "accuracy", "soup", "weight"], rows),)


def _groups(groups: GroupSet) -> tuple[Html, ...]:
    """Groups, pinned axes and unknown ops, each as a table to unfold."""
    rows = [
        (group.name, group.label, group.units, group.outer or "", folded(str(len(group.members)), _members(group)))
        for group in groups
    ]
    parts = [_unfoldable(f"{len(rows)} groups", ["group", "first written by", "units", "inside", "members"], rows)]
    if groups.pinned:
        pins = [(f"{pin.parameter}[{pin.dim}]", pin.count, pin.reason) for pin in groups.pinned]
        parts.append(folded(f"{len(pins)} pinned axes", table(["axis", "indices", "because"], pins)))
    if groups.unknown_ops:
        ops = table(["ops without a coupling rule: all that they touch is pinned"], zip(groups.unknown_ops))
        parts.append(folded(f"{len(groups.unknown_ops)} ops without a rule", ops, paragraph(UNKNOWN_OP_REMEDY)))
    return (*parts, paragraphs(groups.notes))


def _members(group: PermutationGroup) -> Html:
    """One a line."""
    return Html("<br>".join(escaped(str(member)) for member in group.members))


def _unfoldable(summary: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table, folded away at first where it is long."""
    return folded(summary, table(headers, rows), unfolded=len(rows) <= LONG)

"""The page of all surveys and merges of model libraries, ``docs/coverage.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vfsurgery.testing.zoo.matrix import Cell, matrix_section
from vfsurgery.testing.zoo.survey import SOURCES, Survey, model_names


def page(surveys: Iterable[Survey], cells: Sequence[Cell] = ()) -> str:
    """A Markdown page: totals, symmetries and merges if there are any, what failed and why, then a line per model."""
    rows = list(surveys)
    good = [row for row in rows if row.verified]
    lines = [
        "# Coverage",
        "",
        "Every model below was built with random weights, traced and grouped at its own input size, and verified by",
        "`vfsurgery zoo`: in float64, with random normalization parameters and running statistics, all groups permuted",
        "at random at once, with negative controls. Coverage is the share of parameters that lie in a group. *Verified",
        "on* says what the proof ran on: the model itself (on images of its own size or smaller ones), or a twin that",
        "the same constructor makes with other arguments. *Continuous* is the share of parameters in groups that may",
        "be mapped by [more than orders](symmetries.md); it stands where that was looked at.",
        "",
        "| source | surveyed | verified | wrong | over 95 % of parameters grouped | median s, trace and groups |",
        "|---|---|---|---|---|---|",
        *_totals(rows),
    ]
    if any(row.continuous is not None for row in rows):
        lines += ["", *_symmetries_section(rows)]
    if cells:
        lines += ["", *matrix_section(cells)]
    failed = [row for row in rows if not row.verified]
    if failed:
        lines += ["", "## Not verified", "", "| model | why |", "|---|---|"]
        lines += [f"| {row.model} | {_cell(row.failure)} |" for row in failed]
    short = [row for row in good if row.coverage <= 0.95]
    if short:
        lines += ["", "## Verified, with 95 % of parameters or fewer in groups", ""]
        lines += ["| model | coverage | indices pinned most, and ops without a rule |", "|---|---|---|"]
        lines += [f"| {row.model} | {row.coverage:.1%} | {_cell(row.reasons)} {row.unknown_ops} |" for row in short]
    lines += ["", "## Verified", "", "| model | groups | coverage | continuous | nodes | s | error | verified on |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.model} | {row.groups} | {row.coverage:.2%} | {_share(row)} | {row.nodes} | {row.seconds:.2f} "
        f"| {row.error:.0e} | {row.subject} |"
        for row in good
    ]
    return "\n".join(lines) + "\n"


def _symmetries_section(rows: Sequence[Survey]) -> Iterable[str]:
    """What was found of symmetries beyond orders, in the models where that was looked at."""
    seen = [row for row in rows if row.continuous is not None]
    found = sorted((row for row in seen if row.symmetries), key=lambda row: (-(row.continuous or 0.0), row.model))
    unproven = sum(not row.verified for row in found)
    yield from (
        "## Symmetries beyond orders",
        "",
        f"In {len(found)} of {len(seen)} models that were looked at, units of some groups may be mapped by",
        "[matrices](symmetries.md). Besides all orders, each proof tried random ones, with condition numbers of up to",
        f"1,000: {len(found) - unproven} are proven, {unproven} are not. In the other models there are only orders.",
        "",
        "| model | parameters in such groups | groups | mapped in the proof | proven |",
        "|---|---|---|---|---|",
    )
    for row in found:
        proven = "yes" if row.verified else "**no**"
        yield f"| {row.model} | {_share(row)} | {row.symmetries} | {row.mapped} on {row.subject} | {proven} |"


def _share(row: Survey) -> str:
    return "" if row.continuous is None else f"{row.continuous:.1%}"


def _totals(rows: Sequence[Survey]) -> Iterable[str]:
    for source in sorted({row.model.partition(":")[0] for row in rows}):
        mine = [row for row in rows if row.model.startswith(f"{source}:")]
        proven = [row for row in mine if row.verified]
        wrong = sum(row.failure.startswith("not verified") for row in mine)
        wide = sum(row.coverage > 0.95 for row in proven)
        seconds = sorted(row.seconds for row in proven)
        middle = f"{seconds[len(seconds) // 2]:.2f}" if seconds else ""
        surveyed = f"{len(mine)} of {len(model_names([source]))}" if source in SOURCES else len(mine)
        yield f"| {source} | {surveyed} | {len(proven)} | {wrong} | {wide} | {middle} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

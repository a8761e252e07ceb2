"""One HTML file for a diagnosis and all that is known about the merge: styles and figures inside, nothing to fetch.

The template decides how things look, this module what is shown. Every text is escaped by jinja2; only the figures,
which matplotlib makes of escaped text, go in as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfsurgery.checkpoints import write_text
from vfsurgery.errors import OptionError, explain
from vfsurgery.records.report import MergeReport, Report
from vfsurgery.rendering.figures import Draw, barrier_panels, diagnosis_panels, draw_costs, grid_panel, svg, sweep_panel
from vfsurgery.scoring.barriers import Barrier
from vfsurgery.scoring.diagnosis import CostRow, Diagnosis
from vfsurgery.scoring.evaluation import Score
from vfsurgery.scoring.flip_rates import Flips
from vfsurgery.scoring.layers import LayerDiagnosis
from vfsurgery.scoring.sweeps import Sweep
from vfsurgery.scoring.verdict import VANISHED
from vfsurgery.shown import write_page
from vfsurgery.stats.imagined import Imagined

if TYPE_CHECKING:
    from jinja2 import Environment

TONES = {"broken": "bad", "vanished": "bad", "faded": "fair", "grown": "fair", "kept": "good"}
"""Colour of the verdict."""

SHOWN = 40
"""Imagined images on the page."""

GOLDEN_ANGLE = 137.508
"""Degrees between the hues of consecutive groups: however many there are, neighbours differ."""


@write_page.register(Diagnosis)
def diagnosis_page(
    found: Diagnosis,
    path: str | Path,
    *,
    report: Report | None = None,
    scores: Mapping[str, Score] | None = None,
    own: str | None = None,
    barrier: Barrier | None = None,
    flips: Flips | None = None,
    cost_curve: Sequence[CostRow] | None = None,
    before: Diagnosis | None = None,
    sweep: Sweep | None = None,
    imagined: Imagined | None = None,
) -> Path:
    """What :meth:`vfsurgery.scoring.diagnosis.Diagnosis.page` does.

    Raises:
        OptionError: a row of ``cost_curve`` does not have four numbers, or ``own`` is no name in ``scores``.
        CheckpointError: the file cannot be written; nothing is left of it then.
    """
    costs = _cost_rows(cost_curve or ())
    merge = report if isinstance(report, MergeReport) else None
    figures = {
        "features": _figures(diagnosis_panels(found, before), "vf"),
        "barrier": _figures(barrier_panels(barrier), "barrier") if barrier else [],
        "costs": _figures({"accuracy over cost": lambda axes: draw_costs(axes, costs)}, "cost") if costs else [],
        "sweep": _figures({"accuracy over sparsity": sweep_panel(sweep)}, "sweep") if sweep else [],
        "imagined": _figures({"some of them": grid_panel(imagined, SHOWN)}, "imagined") if imagined else [],
    }
    text = (
        _environment()
        .get_template("page.html.j2")
        .render(
            found=found,
            before=before,
            tone=TONES[found.state],
            vanished=VANISHED,
            layers=_layer_rows(found, before),
            report=report,
            merge=merge,
            wiring=wiring(merge, found) if merge else [],
            matches=_matches(merge),
            sources="reference" if len(found.layers[0].sources) == 1 else "sources",
            scores=_own_first(scores or {}, own),
            own=own,
            barrier=barrier,
            flips=flips,
            imagined=imagined,
            costs=costs,
            figures=figures,
        )
    )
    write_text(path, text)
    return Path(path)


@dataclass(frozen=True)
class Chip:
    """A group as it is shown at a layer: its name, and what to tell about it."""

    name: str
    title: str

    @property
    def style(self) -> str:
        """Its colour; what may not move is grey."""
        number = re.search(r"\d+", self.name)
        if number is None:
            return "background:#eee;border-color:#bbb;color:#555"
        hue = round(int(number[0]) * GOLDEN_ANGLE) % 360
        return f"background:hsl({hue} 70% 90%);border-color:hsl({hue} 45% 55%)"


@dataclass(frozen=True)
class Wires:
    """A layer with the groups whose order it reads and writes."""

    path: str
    kind: str
    reads: dict[str, Chip] = field(default_factory=dict[str, Chip])
    writes: dict[str, Chip] = field(default_factory=dict[str, Chip])


def wiring(report: MergeReport, found: Diagnosis) -> list[Wires]:
    """The groups as a table: layers in order of execution, and which groups each reads and writes.

    A weight is written along its first dim and read along the others, that of a transposed convolution the other way
    round; what has one dim, as a bias has, is written. A norm layer writes what it reads.
    """
    kinds = {layer.name: layer.kind for layer in found.layers}
    rows = {name: Wires(name, kind) for name, kind in kinds.items()}
    chips = [
        (member.parameter, member.dim, Chip(group.name, f"{group.label}: {group.units} units"))
        for group in report.groups
        for member in group.members
    ]
    chips += [(pin.parameter, pin.dim, Chip("fixed", pin.reason)) for pin in report.groups.pinned]
    for parameter, dim, chip in chips:
        path, _, leaf = parameter.rpartition(".")
        kind = kinds.get(path, "")
        row = rows.setdefault(path, Wires(path, kind))
        written = dim == (1 if kind == "transposed conv" and leaf == "weight" else 0)
        for side in (row.reads, row.writes) if "norm" in kind else (row.writes if written else row.reads,):
            side[chip.name] = chip
    return [row for row in rows.values() if row.reads or row.writes]


@dataclass(frozen=True)
class LayerRow:
    """One line of the table of layers."""

    layer: LayerDiagnosis
    before: LayerDiagnosis | None
    bound: float
    smoothed: float


def _layer_rows(found: Diagnosis, before: Diagnosis | None) -> list[LayerRow]:
    earlier = {layer.name: layer for layer in before.layers} if before else {}
    return [
        LayerRow(layer, earlier.get(layer.name), bound, smoothed)
        for layer, bound, smoothed in zip(found.layers, found.bound, found.smoothed(), strict=True)
    ]


def _matches(report: MergeReport | None) -> dict[str, list[Any]]:
    """What matching did, by group; one entry per source after the first."""
    found: dict[str, list[Any]] = {}
    for match in report.matches if report else ():
        found.setdefault(match.group, []).append(match)
    return found


def _cost_rows(rows: Iterable[Sequence[float]]) -> list[CostRow]:
    found: list[CostRow] = []
    for number, row in enumerate(rows):
        if len(row) != 4 or not all(isinstance(value, int | float) for value in row):
            raise OptionError(
                explain(
                    f"row {number} of cost_curve is {row}",
                    expected="(layers preserved, FLOPs ratio, parameter ratio, accuracy from 0 to 1)",
                )
            )
        preserved, flops, parameters, accuracy = row
        found.append((int(preserved), flops, parameters, accuracy))
    return found


def _own_first(scores: Mapping[str, Score], own: str | None) -> dict[str, Score]:
    """The scores, beginning with that of the network which the page is about."""
    if own is None:
        return dict(scores)
    if own not in scores:
        raise OptionError(explain(f"own={own!r} is no name in scores", expected=", ".join(scores) or "some scores"))
    return {own: scores[own], **scores}


def _figures(panels: Mapping[str, Draw], name: str) -> list[tuple[str, str]]:
    """Titles and SVG elements."""
    return [(title, svg(draw, f"{name}{number}")) for number, (title, draw) in enumerate(panels.items())]


def _environment() -> Environment:
    # Imported here because whoever writes no page should not wait for it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("vfsurgery.rendering", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(number=_number, percent=_percent, bar=_bar)
    return made


def _number(value: float) -> str:
    """Three digits, as short as they can be."""
    if math.isnan(value):
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _percent(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}%}"


def _bar(ratio: float) -> str:
    """Style of a cell that is filled up to a ratio, as far as it goes."""
    share = 0 if math.isnan(ratio) else 100 * min(max(ratio, 0), 1)
    return f"background:linear-gradient(90deg, var(--bar) {share:.0f}%, transparent {share:.0f}%)"

"""Every matcher with every normalization on pairs of library models: each merge runs, or is refused for a reason.

A pair are two draws of one architecture with random weights, whose BatchNorm layers have seen some images in training
mode, so that their statistics are those of activations. What is tried on them is whether the parts of a merge go
together, not how good it is: images are small and few, and networks that are large have a twin of fewer layers where
their constructor makes one. One trace of the pair serves all cells, one matching those of a row.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import CertificateError, SurgeryError
from vfsurgery.matching import MATCHERS
from vfsurgery.merging.aligned import certify_sources, match_sources
from vfsurgery.merging.combined import Terms, combine
from vfsurgery.merging.prepared import group_units, trace_sources
from vfsurgery.merging.shares import Shares
from vfsurgery.merging.surveyed import Way, plan_survey
from vfsurgery.passes import NORMALIZATIONS, Pass, Regress
from vfsurgery.passes.normalizations import normalizations
from vfsurgery.stats.batch_norms import is_batch_norm
from vfsurgery.testing.zoo.processes import GIB, MEMORY, in_processes
from vfsurgery.testing.zoo.twins import BYTES, SHRINKS, SIDE_NAMES, TooLargeError, build_quickly, image_inputs, runs
from vfsurgery.tracing.values import tensors_of

IMAGES, BATCH = 16, 8
"""Calibration images of one pair, and how many are in a batch."""
SIDES = (64, 96, 128)
"""Sides of the images tried, the first that the network takes wins."""
SHALLOW_FROM = 4_000_000
"""Parameters from which on a twin of fewer layers is merged instead, if there is one."""
RIDGE = 0.1
"""Of the regression; to choose one takes several times as long."""
MOST_FLOPS = 3e12
"""Floating-point operations above which the regression of a pair is left out; about five minutes on one core."""
HALVES = Terms(Shares((0.5, 0.5), {}))
UNTRIED = "takes too long for this table"
Outcome: TypeAlias = Literal["runs", "refused", "fails"]


@dataclass(frozen=True)
class Cell:
    """One merge of one pair; ``subject`` says what stands for the model, ``reason`` why it did not run."""

    model: str
    subject: str
    matcher: str
    normalization: str
    outcome: Outcome
    reason: str = ""


def ways() -> dict[str, Any]:
    """All that ``merge(renormalize=...)`` takes by name, and ``None``."""
    return {**{name: name for name in NORMALIZATIONS}, "auto": "auto", "none": None}


def merge_pair(spec: str, memory: float = MEMORY) -> list[Cell]:
    """Merge a pair of one architecture in all ways, here and now."""
    subject, (a, b), images = _pair(spec, memory * GIB / BYTES)
    table = _Table(spec, subject, [a, b], images)
    return [cell for name in MATCHERS for cell in table.row(name)]


class _Table:
    """The cells of one pair."""

    def __init__(self, spec: str, subject: str, models: list[nn.Module], images: Tensor) -> None:
        self.spec, self.subject, self.images = spec, subject, images
        data = list(images.split(BATCH))
        self.grouped = group_units(trace_sources(models, data, progress=False))
        self.passes: dict[str, tuple[Pass, ...] | str] = {}
        for name, choice in ways().items():
            self.passes[name] = self._passes(choice)
        with self.grouped.running():
            columns = [passes for passes in self.passes.values() if not isinstance(passes, str)]
            ways_to_merge = [Way(MATCHERS[name](), passes) for name in MATCHERS for passes in columns]
            self.surveyed = plan_survey(self.grouped, ways_to_merge)

    def row(self, matcher: str) -> Iterator[Cell]:
        """The cells of one matcher."""
        with self.grouped.running():
            try:
                certified = certify_sources(self.surveyed, match_sources(self.surveyed, MATCHERS[matcher]()))
            except Exception as error:
                yield from (Cell(self.spec, self.subject, matcher, way, *_told(error)) for way in ways())
                return
            for way, passes in self.passes.items():
                cell = Cell(self.spec, self.subject, matcher, way, "runs")
                if isinstance(passes, str):
                    yield dataclasses.replace(cell, outcome="refused", reason=passes)
                    continue
                try:
                    merged = combine(self.surveyed, certified, passes, HALVES)
                    yield dataclasses.replace(cell, reason=self._checked(merged.model))
                except Exception as error:
                    outcome, reason = _told(error)
                    yield dataclasses.replace(cell, outcome=outcome, reason=reason)

    def _passes(self, choice: Any) -> tuple[Pass, ...] | str:
        """The passes of one column, or why there are none."""
        graph_module, groups = self.grouped.graph_module, self.grouped.groups
        try:
            passes = normalizations(choice, graph_module, groups, has_data=True)
        except SurgeryError as error:
            return _first_line(error)
        cheap = Regress(ridge=RIDGE, images=IMAGES)
        if not any(isinstance(step, Regress) for step in passes):
            return passes
        return (cheap,) if cheap.flops(graph_module, groups) <= MOST_FLOPS else UNTRIED

    def _checked(self, merged: nn.Module) -> str:
        source = self.grouped.sources[0].model
        found, expected = (tensors_of(model(self.images[:2])) for model in (merged, source))
        if [x.shape for x in found] != [x.shape for x in expected]:
            raise AssertionError("outputs of another shape")
        if not all(bool(x.isfinite().all()) for x in found if x.is_floating_point()):
            raise AssertionError("outputs that are not finite")
        return ""


def _told(error: Exception) -> tuple[Outcome, str]:
    known = isinstance(error, SurgeryError) and not isinstance(error, CertificateError)
    return ("refused", _first_line(error)) if known else ("fails", f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _pair(spec: str, most: float) -> tuple[str, tuple[nn.Module, nn.Module], Tensor]:
    """Two draws of a model, or of a twin of it, and images for both."""
    for name, options, side in _subjects(spec, most):
        try:
            a = build_quickly(spec, most=most, **options)
        except TooLargeError:
            continue
        except Exception:  # whatever a constructor says to an argument that it does not know
            continue
        inputs = image_inputs(a, side)
        if len(inputs) == 1 and runs(a, inputs):
            b = build_quickly(spec, seed=1, **options)
            images = torch.randn(IMAGES, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(2))
            for seed, model in enumerate((a, b)):
                _liven(model, images, seed)
            return name, (a, b), images
    raise SurgeryError("no twin of it is small enough, or takes images alone")


def _subjects(spec: str, most: float) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """What may stand for a model, cheapest first: in words, as arguments of its constructor, and the side of images."""
    try:
        own = build_quickly(spec, most=min(most, SHALLOW_FROM))
        shallow = False
        sizes = image_inputs(own)[0].shape[-2:]
    except TooLargeError:
        shallow, sizes = True, (max(SIDES) + 1,) * 2
    for shrink in (*(SHRINKS if shallow else ()), {}):
        layers = ", ".join(f"{key}={value}" for key, value in shrink.items())
        for side in SIDES:
            if side < min(sizes):
                yield " ".join([*[layers] * bool(layers), f"{side}x{side} images"]), shrink, side
            for key in SIDE_NAMES:
                yield ", ".join([*[layers] * bool(layers), f"{key}={side}"]), {**shrink, key: side}, side
        yield layers or "own size", shrink, None


@torch.no_grad()
def _liven(model: nn.Module, images: Tensor, seed: int) -> None:
    """Random scales, shifts and statistics; those of BatchNorm as training leaves them."""
    randomize(model, torch.Generator().manual_seed(seed))
    norms = [module for module in model.modules() if is_batch_norm(module)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    for batch in images.split(BATCH):
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum


def merge_zoo(
    names: Sequence[str],
    table: Path,
    *,
    memory: float = MEMORY,
    limit: float = 3600.0,
    jobs: int = 1,
    done: Callable[[str, Sequence[Cell]], None] = lambda name, cells: None,
) -> list[Cell]:
    """Merge pairs of many models, each in a process of its own; models that the table lists already are left out.

    Args:
        names: Models as :func:`~vfsurgery.testing.zoo.survey.model_names` gives them.
        table: The CSV file, appended to after each model.
        memory: GiB that a model's process may allocate.
        limit: Seconds that it may take.
        jobs: Processes at a time.
        done: Called with every model's new cells.

    Returns:
        The cells of all ``names``, old and new, in their order.
    """
    known = read_cells(table) if table.exists() else []
    listed = {cell.model for cell in known}
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Cell)], lineterminator="\n")
        if not table.stat().st_size:
            writer.writeheader()
        missing = [name for name in names if name not in listed]
        for name, found in in_processes(merge_pair, missing, memory, limit, jobs):
            cells = [Cell(name, "", "", "", "fails", found)] if isinstance(found, str) else found
            writer.writerows(map(dataclasses.asdict, cells))
            file.flush()
            known += cells
            done(name, cells)
    order = {name: place for place, name in enumerate(names)}
    return sorted((cell for cell in known if cell.model in order), key=lambda cell: order[cell.model])


def read_cells(path: Path) -> list[Cell]:
    """The cells in a CSV file."""
    with path.open(newline="") as file:
        return [Cell(**row) for row in csv.DictReader(file)]  # type: ignore[arg-type]


def matrix_section(cells: Iterable[Cell]) -> list[str]:
    """Lines of a Markdown page: a row per model with the cells that were refused, and a list of the reasons."""
    model_of = attrgetter("model")
    rows = [(model, list(found)) for model, found in groupby(sorted(cells, key=model_of), model_of)]
    reasons = sorted({cell.reason for _, row in rows for cell in row if cell.outcome != "runs"})
    marks = dict(zip(reasons, _marks(), strict=False))
    total = sum(len(row) for _, row in rows)
    ran, failed = (sum(cell.outcome == kind for _, row in rows for cell in row) for kind in ("runs", "fails"))
    matchers = sorted({cell.matcher for _, row in rows for cell in row if cell.matcher})
    columns = list(dict.fromkeys(cell.normalization for _, row in rows for cell in row if cell.normalization))
    lines = [
        "## Every matcher with every normalization",
        "",
        "`vfsurgery zoo --matrix` merged two draws of each model below, with random weights, with every matcher",
        f"({', '.join(matchers)}) and every normalization ({', '.join(columns)}).",
        f"Of {total} merges {ran} ran, {total - ran - failed} were refused for the reasons below, and {failed} failed.",
        "Where no matcher is named, all of them are meant.",
        "",
        "| | reason |",
        "|---|---|",
        *(f"| {mark} | {reason.replace('|', '/')} |" for reason, mark in marks.items()),
        "",
        "| model | merged on | ran | refused |",
        "|---|---|---|---|",
    ]
    for model, row in rows:
        good = sum(cell.outcome == "runs" for cell in row)
        lines.append(f"| {model} | {row[0].subject} | {good} of {len(row)} | {_refused(row, marks, matchers)} |")
    return lines


def _refused(row: Sequence[Cell], marks: Mapping[str, str], matchers: Sequence[str]) -> str:
    """Columns by mark, those of some matchers alone with their names."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in row:
        if cell.outcome != "runs":
            found.setdefault((marks[cell.reason], cell.normalization), []).append(cell.matcher)
    texts: dict[str, list[str]] = {}
    for (mark, column), names in found.items():
        some = "" if sorted(names) == list(matchers) else f" after {', '.join(names)}"
        texts.setdefault(mark, []).append(f"{column or 'all'}{some}")
    return "; ".join(f"**{mark}** {', '.join(columns)}" for mark, columns in sorted(texts.items()))


def _marks() -> Iterator[str]:
    yield from ascii_lowercase
    yield from (first + second for first in ascii_lowercase for second in ascii_lowercase)

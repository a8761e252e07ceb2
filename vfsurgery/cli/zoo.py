"""``vfsurgery zoo``: every model of timm and torchvision, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from vfsurgery.checkpoints import write_text
from vfsurgery.cli.options import EPILOG
from vfsurgery.errors import OptionError, explain
from vfsurgery.testing.zoo import Cell, merge_zoo
from vfsurgery.testing.zoo import page as coverage_page
from vfsurgery.testing.zoo import survey as zoo


@click.command("zoo", epilog=EPILOG)
@click.option("--source", "sources", type=click.Choice(zoo.SOURCES), multiple=True, help="Library.  [default: both]")
@click.option("--filter", "pattern", default="*", show_default=True, metavar="GLOB", help="Names to take.")
@click.option("--names", type=click.Path(path_type=Path, exists=True), help="A file with one model name per line.")
@click.option("--memory", default=8.0, show_default=True, help="GiB that one model may allocate.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds that one model may take.")
@click.option("--jobs", default=1, show_default=True, help="Models at a time.")
@click.option(
    "--matrix",
    type=click.Path(path_type=Path),
    help="Instead, merge pairs of the models with every matcher and every normalization, and write this table.",
)
@click.option("--page", type=click.Path(path_type=Path), help="Also write a Markdown page, of both tables.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("zoo.csv"), show_default=True)
def survey_zoo(
    sources: tuple[str, ...],
    pattern: str,
    names: Path | None,
    memory: float,
    limit: float,
    jobs: int,
    matrix: Path | None,
    page: Path | None,
    output: Path,
) -> None:
    """Trace, group and verify every model of timm and torchvision; write a table.

    Weights are random, nothing is downloaded. Each model runs in a process of its own; models that the table holds
    already are left out, so a survey that was cut off goes on where it stopped.

    With --matrix two draws of each model are merged instead, with every matcher and every normalization.

    \b
    Examples:
      vfsurgery zoo --source torchvision --filter "resnet*"
      vfsurgery zoo --source timm --filter "test_*" -o table.csv --page coverage.md
      vfsurgery zoo --source timm --filter "test_*" -o table.csv --matrix merges.csv --page coverage.md
    """
    wanted = zoo.model_names(sources or zoo.SOURCES, pattern) if names is None else names.read_text().split()
    for option, path in (("-o", output), ("--matrix", matrix)):
        if path is not None and path.is_dir():
            raise OptionError(explain(f"{path} is a folder", remedy=f"name a CSV file with {option}"))
    if matrix is None:
        found, cells = _survey(wanted, output, memory, limit, jobs), []
    else:
        found, cells = zoo.read_table(output) if output.exists() else [], _merge(wanted, matrix, memory, limit, jobs)
    if page is not None:
        write_text(page, coverage_page(found, cells))


def _survey(wanted: list[str], output: Path, memory: float, limit: float, jobs: int) -> list[zoo.Survey]:
    surveyed = 0

    def done(survey: zoo.Survey) -> None:
        nonlocal surveyed
        surveyed += 1
        verdict = f"{survey.groups} groups, {survey.coverage:.1%}" if survey.verified else survey.failure
        click.echo(f"[{surveyed}] {survey.model}: {verdict}")

    click.echo(f"{len(wanted)} models; those that {output} lists are not run again")
    found = zoo.survey_zoo(wanted, output, memory=memory, limit=limit, jobs=jobs, done=done)
    click.echo(f"{sum(survey.verified for survey in found)} of {len(found)} verified; written to {output}")
    return found


def _merge(wanted: list[str], matrix: Path, memory: float, limit: float, jobs: int) -> list[Cell]:
    merged = 0

    def done(model: str, cells: Sequence[Cell]) -> None:
        nonlocal merged
        merged += 1
        counts = Counter(cell.outcome for cell in cells)
        click.echo(f"[{merged}] {model}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")

    click.echo(f"{len(wanted)} models; those that {matrix} lists are not merged again")
    cells = merge_zoo(wanted, matrix, memory=memory, limit=limit, jobs=jobs, done=done)
    failed = sum(cell.outcome == "fails" for cell in cells)
    click.echo(f"{len(cells)} merges, {failed} failed; written to {matrix}")
    return cells

"""``vfsurgery zoo``: every model of timm and torchvision, one by one."""

from __future__ import annotations

from pathlib import Path

import click

from vfsurgery.checkpoints import write_text
from vfsurgery.cli.options import EPILOG
from vfsurgery.errors import OptionError, explain
from vfsurgery.zoo import survey as zoo


@click.command("zoo", epilog=EPILOG)
@click.option("--source", "sources", type=click.Choice(zoo.SOURCES), multiple=True, help="Library.  [default: both]")
@click.option("--filter", "pattern", default="*", show_default=True, metavar="GLOB", help="Names to take.")
@click.option("--names", type=click.Path(path_type=Path, exists=True), help="A file with one model name per line.")
@click.option("--memory", default=8.0, show_default=True, help="GiB that one model may allocate.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds that one model may take.")
@click.option("--jobs", default=1, show_default=True, help="Models at a time.")
@click.option("--page", type=click.Path(path_type=Path), help="Also write a Markdown page.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("zoo.csv"), show_default=True)
def survey_zoo(
    sources: tuple[str, ...],
    pattern: str,
    names: Path | None,
    memory: float,
    limit: float,
    jobs: int,
    page: Path | None,
    output: Path,
) -> None:
    """Trace, group and verify every model of timm and torchvision; write a table.

    Weights are random, nothing is downloaded. Each model runs in a process of its own; models that the table holds
    already are left out, so a survey that was cut off goes on where it stopped.

    \b
    Examples:
      vfsurgery zoo --source torchvision --filter "resnet*"
      vfsurgery zoo --source timm --filter "test_*" -o table.csv --page coverage.md
    """
    wanted = zoo.model_names(sources or zoo.SOURCES, pattern) if names is None else names.read_text().split()
    if output.is_dir():
        raise OptionError(explain(f"{output} is a folder", remedy="name a CSV file with -o"))

    surveyed = 0

    def done(survey: zoo.Survey) -> None:
        nonlocal surveyed
        surveyed += 1
        verdict = f"{survey.groups} groups, {survey.coverage:.1%}" if survey.verified else survey.failure
        click.echo(f"[{surveyed}] {survey.model}: {verdict}")

    click.echo(f"{len(wanted)} models; those that {output} lists are not run again")
    found = zoo.survey_zoo(wanted, output, memory=memory, limit=limit, jobs=jobs, done=done)
    click.echo(f"{sum(survey.verified for survey in found)} of {len(found)} verified; written to {output}")
    if page is not None:
        write_text(page, zoo.page(found))

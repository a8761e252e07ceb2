"""``vfsurgery replay``: make a merged file again, and compare."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from vfsurgery.checkpoints import INDEX, FileRecord, file_hash
from vfsurgery.cli.merge import merge_checkpoints, merge_files
from vfsurgery.cli.options import EPILOG, QUIET, say
from vfsurgery.cli.records import Record
from vfsurgery.errors import CheckpointError, explain
from vfsurgery.stats.threads import threads


@click.command(epilog=EPILOG)
@click.argument("report", type=click.Path(path_type=Path))
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to keep the new files in.  [default: none]"
)
@QUIET
def replay(report: Path, sources: tuple[Path, ...], output: Path | None, quiet: bool) -> None:
    """Merge again as REPORT says, which "vfsurgery merge" wrote, and compare the hashes of the files.

    The sources are looked for where they lay, seen from the report, or are given anew as SOURCES; they must have the
    hashes that the report names. Exits with 1 when they do not, or when the new file differs from the old one.

    A report may name code to import, as a recipe does: replay only those that you trust.

    \b
    Examples:
      vfsurgery replay ab.report.json
      vfsurgery replay ab.report.json elsewhere/a.safetensors elsewhere/b.pt
    """
    record = Record.read(report)
    found = _checked(record.sources, sources, report)
    with tempfile.TemporaryDirectory() as scratch, threads(record.threads):
        target = (output or Path(scratch)) / Path(record.output[-1].path).name.removesuffix(INDEX)
        arguments = [*map(str, found), *record.arguments(), f"--output={target}", *(["--quiet"] if quiet else [])]
        with merge_checkpoints.make_context("merge", arguments) as context:
            _, written = merge_files(**context.params)
        _compare(record.output, written[:-1], report)
    say(f"the same: {', '.join(map(str, record.output))}{f', written into {output}' if output else ''}")


def _checked(records: tuple[FileRecord, ...], given: tuple[Path, ...], report: Path) -> tuple[Path, ...]:
    """Where the sources are, once they are known to be the same files."""
    if given and len(given) != len(records):
        raise CheckpointError(
            explain(f"{report} is of {len(records)} sources, not of {len(given)}", remedy="name all of them, or none")
        )
    paths = tuple(path.absolute() for path in given) or tuple(Path(record.path) for record in records)
    for path, record in zip(paths, records, strict=True):
        if not path.is_file():
            remedy = f"name both sources: vfsurgery replay {report.name} A B"
            raise CheckpointError(explain(f"there is no checkpoint {path}", remedy=remedy))
        if (found := FileRecord.of(path).sha256) != record.sha256:
            raise CheckpointError(explain(f"{path} is not the file that was merged", merged=record.sha256, found=found))
    return paths


def _compare(records: tuple[FileRecord, ...], paths: tuple[Path, ...], report: Path) -> None:
    now = {path.name: file_hash(path) for path in paths}
    then = {record.name: record.sha256 for record in records}
    differing = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if differing:
        first = differing[0]
        raise CheckpointError(
            explain(
                f"{first} made again differs from what {report} names",
                then=then.get(first, "no such file"),
                now=now.get(first, "no such file"),
                others=", ".join(differing[1:]) or None,
                because="images, versions of libraries or the processor differ; the report has the versions of then",
            )
        )

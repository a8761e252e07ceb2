"""``vfsurgery compare``: what fine-tuning did to copies of one checkpoint, and whether they can be merged."""

from __future__ import annotations

from pathlib import Path

import click

from vfsurgery.cli.options import EPILOG
from vfsurgery.combining.comparing import compare
from vfsurgery.errors import CheckpointError, explain


@click.command("compare", epilog=EPILOG)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw the figure; the ending is its format.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result and errors.")
def compare_checkpoints(base: Path, sources: tuple[Path, ...], as_json: bool, plot: Path | None, quiet: bool) -> None:
    """Compare the checkpoints SOURCES, or folders of LoRA adapters, with what they were fine-tuned from, BASE.

    Says how far each moved and how much alike, layer by layer; what speaks against merging them; and what merging is
    likely to do. Needs no architecture and no images.

    \b
    Examples:
      vfsurgery compare pretrained.safetensors cars.pt pets.pt
      vfsurgery compare pretrained.safetensors cars.pt pets.pt --plot moved.png
    """
    if plot is not None and plot.resolve() in [path.resolve() for path in (base, *sources)]:
        raise CheckpointError(explain(f"{plot} would be overwritten by the figure", remedy="name another file"))
    found = compare(sources, base=base)
    click.echo(found.to_json() if as_json else str(found))
    if plot is not None:
        found.plot(plot)
        if not quiet:
            click.echo(f"\nwritten to {plot}", err=True)

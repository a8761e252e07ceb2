"""``vfsurgery diagnose``: where the features of a checkpoint vanish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfsurgery.cli.options import (
    EPILOG,
    compute_options,
    data_options,
    example_input,
    import_from_here,
    load_images,
    load_models,
    model_options,
)
from vfsurgery.errors import CheckpointError, OptionError, explain
from vfsurgery.scoring.diagnosis import diagnose
from vfsurgery.stats.imagined import Imagined, stand_in
from vfsurgery.stats.threads import find_device


@click.command("diagnose", epilog=EPILOG)
@click.argument("merged", type=click.Path(path_type=Path))
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
@model_options("The architecture of all")
@data_options
@compute_options("Decides which images are drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result and errors.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write one self-contained HTML page.")
def diagnose_checkpoint(
    merged: Path,
    sources: tuple[Path, ...],
    model: str,
    num_classes: int | None,
    key: tuple[str, ...],
    seed: int,
    device: str,
    as_json: bool,
    quiet: bool,
    output: Path | None,
    **data: Any,
) -> None:
    """Say where the features of the checkpoint MERGED vanish, layer by layer, beside its SOURCES.

    MERGED may as well be a pruned network, and SOURCES the one before pruning. Needs --data.

    \b
    Examples:
      vfsurgery diagnose ab.safetensors a.safetensors b.safetensors \\
          --model timm:resnet18 --data imagefolder:photos/train -o ab.html
    """
    import_from_here()
    if output is not None and output.resolve() in [path.resolve() for path in (merged, *sources)]:
        raise CheckpointError(explain(f"{output} would be overwritten by the page", remedy="name another file with -o"))
    network, *others = load_models((merged, *sources), model, num_classes, key, find_device(device))
    example = example_input(data["input_size"], find_device(device))
    images = stand_in(others, load_images(model, network, seed=seed, **data), example, seed=seed, progress=not quiet)
    if images is None:
        raise OptionError(explain("a diagnosis needs images", remedy="--data imagefolder:PATH, or --data imagined"))
    found = diagnose(network, others, images, progress=not quiet)
    click.echo(found.to_json() if as_json else str(found))
    if output is not None:
        found.page(output, imagined=images if isinstance(images, Imagined) else None)
        if not quiet:
            click.echo(f"\nwritten to {output}", err=as_json)

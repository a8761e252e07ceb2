"""``vfsurgery run``: an experiment from a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from vfsurgery.cli.options import EPILOG, QUIET, import_from_here
from vfsurgery.recipe import Recipe


@click.command(epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results.  [default: out/NAME]")
@click.option("--reduced", is_flag=True, help="Run the recipe's smaller form, for machines without a GPU.")
@QUIET
@click.pass_context
def run(ctx: click.Context, recipe: Path, output: Path | None, reduced: bool, quiet: bool) -> None:
    """Run the experiment that the YAML file RECIPE describes.

    Trains its pairs of networks, merges each pair in several ways, prints one table per pair, and writes the merged
    weights, barrier plots and report.json into the output folder once all of it is done. Exits with 1 when
    something that the recipe expects of its table does not hold.

    \b
    Examples:
      vfsurgery run recipes/digits.yaml
      vfsurgery run recipes/digits.yaml --output results
      vfsurgery run recipes/paper/vgg16_cifar10_matching.yaml --reduced
    """
    import_from_here()
    experiment = Recipe.from_yaml(recipe)
    done = (experiment.in_reduced_form() if reduced else experiment).run(output, progress=not quiet)
    click.echo(str(done))
    if failures := done.failures:
        click.echo("error: not as expected:\n" + "\n".join(f"  {failure}" for failure in failures), err=True)
        ctx.exit(1)

"""``vfsurgery run``, ``plan``, ``check`` and ``schema``: recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from vfsurgery.checkpoints.plain import read_yaml
from vfsurgery.cli.options import EPILOG, QUIET, import_from_here, say
from vfsurgery.errors import RecipeError, explain
from vfsurgery.recipes.planning import check, plan
from vfsurgery.recipes.recipe import Recipe

C = TypeVar("C", bound=Callable[..., object])


def recipe_options(command: C) -> C:
    """The recipe, and what the command line may change in it."""
    options = (
        click.argument("recipe", type=click.Path(path_type=Path)),
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="PATH=VALUE",
            help="Another value in the recipe, as in stages.train.epochs=5; may be given several times.",
        ),
        click.option("--seed", type=int, help="The same as --set seed=N."),
        click.option("--device", help="The same as --set device=NAME."),
        click.option("--dtype", help="The same as --set dtype=NAME."),
        click.option("--reduced", is_flag=True, help="The recipe's smaller form, for machines without a GPU."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_change(text: str) -> tuple[str, object]:
    """Path and value from ``PATH=VALUE``, the value as YAML has it.

    Raises:
        RecipeError: it is nothing of the kind.

    >>> read_change("stages.merge.alpha=[0.2, 0.8]")
    ('stages.merge.alpha', [0.2, 0.8])
    """
    path, equals, written = text.partition("=")
    if not equals or not all(path.split(".")):
        raise RecipeError(explain(f"{text!r} changes nothing", remedy="write PATH=VALUE, as in stages.train.epochs=5"))
    try:
        return path, read_yaml(written)
    except yaml.YAMLError as error:
        cause = getattr(error, "problem", error)
        raise RecipeError(explain(f"the value in {text!r} is no YAML", cause=cause)) from error


def read_recipe(recipe: Path, changes: tuple[str, ...], reduced: bool, **given: Any) -> Recipe:
    """The recipe with all changes."""
    import_from_here()
    wanted = dict(map(read_change, changes)) | {key: value for key, value in given.items() if value is not None}
    return Recipe.from_yaml(recipe, wanted, reduced=reduced)


@click.command(epilog=EPILOG)
@recipe_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results.  [default: out/NAME]")
@click.option("--resume", is_flag=True, help="Take over what an earlier run into the same folder has finished.")
@QUIET
@click.pass_context
def run(ctx: click.Context, output: Path | None, resume: bool, quiet: bool, **options: Any) -> None:
    """Run what the YAML file RECIPE describes.

    Its sources go through its stages one after another: they are trained, merged or pruned, in several ways that
    are compared in a table, or in one. Weights, plots, pages and report.json are written into the output folder
    once all of it is done. Exits with 1 when something that the recipe expects does not hold.

    A run that was cut off goes on with --resume, and ends in the same files.

    \b
    Examples:
      vfsurgery run recipes/digits.yaml
      vfsurgery run recipes/stages.yaml --set stages.train.epochs=5 --seed 1
      vfsurgery run recipes/stages.yaml --output results --resume
      vfsurgery run recipes/paper/vgg16_cifar10_matching.yaml --reduced
    """
    done = read_recipe(**options).run(output, progress=not quiet, resume=resume)
    say(str(done))
    if failures := done.failures:
        click.echo("error: not as expected:\n" + "\n".join(f"  {failure}" for failure in failures), err=True)
        ctx.exit(1)


@click.command("plan", epilog=EPILOG)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_recipe(as_json: bool, **options: Any) -> None:
    """Say what RECIPE would do: networks, groups, costs, steps, memory and files.

    Everything follows from shapes: no weights are made, read or changed, and nothing is written.

    \b
    Examples:
      vfsurgery plan recipes/stages.yaml
      vfsurgery plan recipes/stages.yaml --set stages.preserve.flops=1.5
    """
    found = plan(read_recipe(**options))
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@click.command("check", epilog=EPILOG)
@recipe_options
def check_recipe(recipe: Path, **options: Any) -> None:
    """Check RECIPE: keys and values, that its models can be built and traced, that its checkpoints fit, and that its
    data is there.

    \b
    Example:
      vfsurgery check recipes/stages.yaml
    """
    found = check(read_recipe(recipe, **options))
    click.echo(f"{recipe} can run: {len(found.steps)} steps on {len(found.networks)} architectures")


@click.command("schema", epilog=EPILOG)
def recipe_schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    \b
    Example:
      vfsurgery schema > recipe.schema.json
    and as the first line of a recipe, for editors with the YAML language server:
      # yaml-language-server: $schema=recipe.schema.json
    """
    click.echo(json.dumps(Recipe.json_schema(), indent=2))

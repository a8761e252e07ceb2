"""The command line, one module per command; ``vfsurgery --help`` lists them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click

from vfsurgery.cli.combine import combine_checkpoints
from vfsurgery.cli.compare import compare_checkpoints
from vfsurgery.cli.diagnose import diagnose_checkpoint
from vfsurgery.cli.groups import groups
from vfsurgery.cli.merge import merge_checkpoints
from vfsurgery.cli.multitask import multitask_checkpoints
from vfsurgery.cli.options import EPILOG, is_quiet
from vfsurgery.cli.prune import prune_checkpoint, renormalize_checkpoint
from vfsurgery.cli.push import push
from vfsurgery.cli.replay import replay
from vfsurgery.cli.run import check_recipe, plan_recipe, recipe_schema, run
from vfsurgery.cli.words import in_options
from vfsurgery.cli.zoo import survey_zoo
from vfsurgery.errors import OptionError, SurgeryError, SurgeryWarning


class Commands(click.Group):
    """Prints the library's own errors and warnings as one message without traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; exit with 2 for wrong options or recipes, with 1 for any other of our errors."""
        try:
            with _warnings_in_a_line():
                return super().invoke(ctx)
        except SurgeryError as error:
            if os.environ.get("VFSURGERY_TRACEBACK") == "1":
                raise
            called = self.get_command(ctx, ctx.invoked_subcommand or "")
            click.echo(f"error: {error if called is None else in_options(str(error), called)}", err=True)
            ctx.exit(2 if isinstance(error, OptionError) else 1)


@contextmanager
def _warnings_in_a_line() -> Generator[None]:
    """Print our own warnings as one line on stderr, in words of the command line; not under ``--quiet``."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SurgeryWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, SurgeryWarning):
                return usual(message, category, *place)
            if not is_quiet():
                click.echo(f"warning: {in_options(str(message), click.get_current_context().command)}", err=True)

        warnings.showwarning = show
        yield


@click.group("vfsurgery", cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vfsurgery")
def main() -> None:
    """Merge and prune trained networks, and repair what merging and pruning break.

    \b
    Start here, with data that comes along:
      vfsurgery run recipes/digits.yaml
    See what a recipe would do, without doing it:
      vfsurgery plan recipes/stages.yaml
    Merge two checkpoints of one architecture:
      vfsurgery merge a.safetensors b.pt --model timm:resnet18 \\
          --data imagefolder:photos -o ab.safetensors
    Combine checkpoints that were fine-tuned from one, file to file:
      vfsurgery combine base.pt cars.pt pets.pt --method ties -o both.safetensors
    Make one network of checkpoints of different tasks, with a head for each:
      vfsurgery multitask cars=cars.pt pets=pets.pt --model timm:resnet18 -o both
    Prune a checkpoint and give its units their statistics back:
      vfsurgery prune a.pt --model timm:resnet18 --sparsity 0.8 \\
          --data imagefolder:photos --renormalize auto -o p.safetensors
    See which units of a network may be reordered:
      vfsurgery groups torchvision:resnet18
    """


COMMANDS = (
    *(run, plan_recipe, check_recipe, recipe_schema, merge_checkpoints, combine_checkpoints, multitask_checkpoints),
    *(prune_checkpoint, renormalize_checkpoint, replay, push, diagnose_checkpoint, compare_checkpoints),
    *(groups, survey_zoo),
)
for command in COMMANDS:
    main.add_command(command)

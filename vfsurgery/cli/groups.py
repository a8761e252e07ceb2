"""``vfsurgery groups``: which units of a network move together."""

from __future__ import annotations

import dataclasses
import json

import click

from vfsurgery.cli.options import EPILOG, example_input, image_shape, import_from_here
from vfsurgery.discovery.finding import find_groups
from vfsurgery.networks.architectures import build_model


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option("--num-classes", type=int, help="Passed on to the architecture.")
@click.option(
    "--input-size", type=image_shape, metavar="CxHxW", help="Image shape.  [default: what the model's source says]"
)
@click.option("--strict", is_flag=True, help="Fail on ops without a coupling rule instead of pinning what they touch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def groups(
    model: str, num_classes: int | None, input_size: tuple[int, int, int] | None, strict: bool, as_json: bool
) -> None:
    """Print the permutation groups of MODEL: which units move together, and which axes may not move.

    MODEL is timm:NAME, torchvision:NAME or import.path:factory; no weights are downloaded.

    \b
    Examples:
      vfsurgery groups torchvision:resnet18
      vfsurgery groups timm:test_resnet --json
      vfsurgery groups vfsurgery.networks.demo:TinyConvNet --input-size 1x8x8
    """
    import_from_here()
    found = find_groups(build_model(model, num_classes), example_input(input_size), strict=strict)
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else found.listing())

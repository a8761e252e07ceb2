"""``vfsurgery combine``: checkpoints that were fine-tuned from one, combined file to file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vfsurgery.checkpoints import check_shard_size
from vfsurgery.cli.cards import CARD_OPTION, command_line
from vfsurgery.cli.options import (
    COUNT,
    EPILOG,
    QUIET,
    example_input,
    image_shape,
    import_from_here,
    key_of_each,
    numbers,
    say,
    set_threads,
)
from vfsurgery.combining.files import DTYPES, beside, combine_files
from vfsurgery.combining.named import combiner_of
from vfsurgery.combining.told import FileReport
from vfsurgery.errors import OptionError, explain
from vfsurgery.hub.cards import check_card
from vfsurgery.hub.combined import card_of_files
from vfsurgery.networks.architectures import FORMS

PATH = click.Path(path_type=Path)


@click.command("combine", epilog=EPILOG)
@click.argument("base", type=PATH)
@click.argument("sources", type=PATH, nargs=-1)
@click.option("--method", default="ties", show_default=True, help="How: mean, task-arithmetic, ties, and others.")
@click.option("--weights", type=numbers, metavar="N,N,...", help="A number for each source; -1 takes a task away.")
@click.option("--scale", type=float, help="What the combined task vector is multiplied by.  [default: the method's]")
@click.option("--option", "given", multiple=True, metavar="NAME=VALUE", help="Of the method, as in density=0.2.")
@click.option("--no-base", is_flag=True, help="BASE is a source like the others, for methods that need no base.")
@click.option("--model", help=f"Its graph tells what each tensor is: {FORMS}.  [default: names and shapes tell]")
@click.option("--num-classes", type=int, help="Passed on to the architecture.")
@click.option("--input-size", type=image_shape, metavar="CxHxW", help="Image shape.  [default: what the model says]")
@click.option(
    "--key",
    multiple=True,
    help="Which network of a file: under which key it stands, as in ema or teacher. Said once it goes for all files; "
    "else say it for each in their order, as '' for one that needs none.",
)
@click.option("--ema/--no-ema", default=True, help="Whether to take moving averages of weights.  [default: ema]")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Of the result.  [default: the base's]")
@click.option("--max-shard-size", metavar="SIZE", help="Split weights into files of at most that, as in 5GB.")
@click.option(
    "--adapter-rank",
    type=COUNT,
    help="Write a LoRA adapter of this rank into the folder OUTPUT; all SOURCES have to be adapters.",
)
@CARD_OPTION
@click.option("--seed", default=0, show_default=True, help="Decides which numbers a method drops at random.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), expose_value=False, callback=set_threads, help="Threads on the CPU."
)
@QUIET
@click.option(
    "-o", "--output", required=True, type=PATH, help="File ending in .safetensors, or a folder (--adapter-rank)."
)
def combine_checkpoints(base: Path, sources: Sequence[Path], output: Path, **options: Any) -> None:
    """Combine the checkpoints SOURCES, which were fine-tuned from BASE, without holding any of them in memory.

    State dicts of any architecture will do; folders of LoRA adapters are sources, too. The result goes to the file
    named by -o, a report beside it into NAME.report.json. Run the command again if it was interrupted: it goes on from
    the last whole tensor.

    \b
    Examples:
      vfsurgery combine base.safetensors cars.pt pets.pt \\
          --method ties --option density=0.2 -o both.safetensors
      vfsurgery combine base.safetensors cars.pt --weights -1 \\
          --method task-arithmetic --scale 0.3 -o forgot.safetensors
      vfsurgery combine base.pt cars.pt pets.pt --model timm:resnet18 \\
          --method task-arithmetic -o both.safetensors
      vfsurgery combine run1.pt run2.pt run3.pt --no-base \\
          --method mean -o soup.safetensors
      vfsurgery combine base.safetensors lora-cars lora-pets \\
          --method knots --adapter-rank 16 --card -o lora-both
    """
    folder = output.parent if options["adapter_rank"] is None else output
    if options["card"]:
        check_card(folder)
    report = combine_into(base, sources, output, **options)
    written = [*report.output, str(beside(Path(report.output[0]) if options["adapter_rank"] else output))]
    if options["card"]:
        classes = options["num_classes"]
        built = {} if classes is None else {"num_classes": classes}
        card = card_of_files(report, command_line(click.get_current_context()), options["model"], built)
        written.append(str(card.write(folder)))
    say(f"{report}\n\nwritten to {', '.join(written[:-1])} and {written[-1]}")


def combine_into(base: Path, sources: Sequence[Path], output: Path, **options: Any) -> FileReport:
    """What the command does with its options."""
    import_from_here()
    paths = [base, *sources]
    found, others = (None, paths) if options["no_base"] else (base, [*sources])
    if options["max_shard_size"] is not None:
        check_shard_size(options["max_shard_size"])
    return combine_files(
        found,
        others,
        output,
        combiner_of(options["method"], read_written(options["given"])),
        weights=options["weights"],
        scale=options["scale"],
        model=options["model"],
        num_classes=options["num_classes"],
        example_inputs=example_input(options["input_size"]),
        key=key_of_each(paths, options["key"]),
        ema=options["ema"],
        dtype=options["dtype"],
        max_shard_size=options["max_shard_size"],
        adapter_rank=options["adapter_rank"],
        seed=options["seed"],
        progress=not options["quiet"],
    )


def read_written(given: Sequence[str]) -> dict[str, object]:
    """Options as they are written: ``density=0.2``, ``scope=tensor``.

    >>> read_written(["density=0.2", "scope=tensor"])
    {'density': 0.2, 'scope': 'tensor'}
    """
    read: dict[str, object] = {}
    for text in given:
        option, separator, value = text.partition("=")
        if not separator:
            raise OptionError(explain(f"{text!r} is no option of a method", remedy="write NAME=VALUE: density=0.2"))
        try:
            read[option] = json.loads(value)
        except ValueError:
            read[option] = value
    return read

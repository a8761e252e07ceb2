"""``vfsurgery multitask``: checkpoints of different tasks into one network with a head for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import load_into, read_checkpoint
from vfsurgery.cli.options import (
    COUNT,
    EPILOG,
    QUIET,
    compute_options,
    example_input,
    image_shape,
    import_from_here,
    load_images,
    numbers,
    say,
)
from vfsurgery.data.datasets import CALIBRATION
from vfsurgery.errors import CheckpointError, OptionError, explain
from vfsurgery.merging.multitask import multitask, save_multitask
from vfsurgery.merging.multitask.files import CONTENTS
from vfsurgery.merging.multitask.requests import check_tasks
from vfsurgery.networks.architectures import FORMS, build_model
from vfsurgery.records.results import report_of
from vfsurgery.stats.threads import find_device

PROBED = (2, 3)
"""Numbers of classes with which an architecture is built to see where they stand in its shapes."""


@click.command("multitask", epilog=EPILOG)
@click.argument("experts", nargs=-1, metavar="NAME=FILE NAME=FILE ...")
@click.option("--model", required=True, help=f"The architecture of all: {FORMS}.")
@click.option("--base", type=click.Path(path_type=Path), help="The checkpoint that all were fine-tuned from.")
@click.option("--method", default="mean", show_default=True, help="Of trunks: mean, ties, ..., adamerging, or auto.")
@click.option("--scale", type=numbers, metavar="N,N,...", help="What differences are multiplied by; several are tried.")
@click.option("--data", multiple=True, metavar="[NAME=]DATA", help="Images of a task, as in pets=imagefolder:PATH.")
@click.option("--limit", default=CALIBRATION, show_default=True, type=COUNT, help="Draw at most so many of each task.")
@click.option("--batch-size", default=64, show_default=True, type=COUNT, help="Images per batch.")
@click.option("--input-size", type=image_shape, metavar="CxHxW", help="Image shape.  [default: what the model says]")
@click.option("--labels", multiple=True, metavar="NAME=FILE", help="Names of a task's classes, one a line.")
@click.option("--heads", default="keep", show_default=True, help="keep, same or union.")
@click.option("--head", multiple=True, metavar="PATH", help="The module that is the head, where it is not found.")
@click.option("--batchnorm", default="auto", show_default=True, help="auto, per-task, joint or average.")
@click.option("--matching", default="auto", show_default=True, help="Without --base: weights, activations, ...")
@click.option("--ema/--no-ema", default=True, help="Whether to take moving averages of weights.  [default: ema]")
@compute_options("Decides random orders.")
@QUIET
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
def multitask_checkpoints(experts: Sequence[str], output: Path, **options: Any) -> None:
    """Make one network of checkpoints for different tasks: one trunk, and the head of each.

    Their heads may have different numbers of classes, which the files say. The folder named by -o gets
    trunk.safetensors, heads/NAME.safetensors and multitask.json; a trunk and one head together are the weights of a
    plain model for that task.

    \b
    Examples:
      vfsurgery multitask cars=cars.pt pets=pets.pt --base pretrained.pt \\
          --model timm:resnet18 --method task-arithmetic -o both
      vfsurgery multitask cars=cars.pt pets=pets.pt --model timm:resnet18 \\
          --data cars=imagefolder:cars/train --data pets=imagefolder:pets/train -o both
    """
    import_from_here()
    files = named(experts, "an expert")
    check_tasks([*files])
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / CONTENTS).is_file())):
        raise CheckpointError(explain(f"{output} is there and is no such folder", remedy="name another one with -o"))
    device = find_device(options["device"])
    spec, quiet = options["model"], options["quiet"]
    read = lambda path: load_expert(path, spec, options["ema"], device, quiet)  # noqa: E731
    models = {task: read(path) for task, path in files.items()}
    base = None if options["base"] is None else read(options["base"])
    scale = options["scale"]
    result = multitask(
        models,
        base=base,
        method=options["method"],
        scale=scale[0] if scale is not None and len(scale) == 1 else scale,
        data=_images(options, models),
        heads=options["heads"],
        head=options["head"],
        labels={task: _lines(path) for task, path in named(options["labels"], "labels").items()},
        batchnorm=options["batchnorm"],
        matching=options["matching"],
        example_inputs=example_input(options["input_size"], device),
        seed=options["seed"],
        progress=not quiet,
    )
    save_multitask(result, output, spec)
    say(f"{report_of(result)}\n\nwritten to {output}")


def named(texts: Sequence[str], what: str) -> dict[str, Path]:
    """``NAME=FILE`` as paths by name.

    Raises:
        OptionError: a text has no name, or two have the same.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise OptionError(explain(f"{text!r} names no task", remedy=f"{what} is written NAME=FILE: cars=cars.pt"))
        if name in found:
            raise OptionError(explain(f"two tasks are called {name!r}", remedy="names that differ"))
        found[name] = Path(path)
    return found


def load_expert(path: Path, spec: str, ema: bool, device: torch.device, quiet: bool) -> nn.Module:
    """The network in a file, with as many classes as the file has."""
    found = read_checkpoint(path, ema=ema)
    model = build_model(spec, classes_in(found.state, spec))
    notes = load_into(model, found.state, path)
    for note in filter(None, () if quiet else (found.note, *notes)):
        click.echo(f"{path}: {note}", err=True)
    return model.to(device).eval()


def classes_in(state: Mapping[str, Tensor], spec: str) -> int | None:
    """How many classes a state dict of an architecture has; ``None`` where its names do not say.

    >>> classes_in({"fc.weight": torch.zeros(37, 512), "fc.bias": torch.zeros(37)}, "torchvision:resnet18")
    37
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        two, three = (build_model(spec, count).state_dict() for count in PROBED)
    for name, tensor in two.items():
        for dim, (low, high) in enumerate(zip(tensor.shape, three[name].shape, strict=True)):
            if (low, high) == PROBED:
                its = next((x for key, x in state.items() if key == name or key.endswith(f".{name}")), None)
                if its is not None and its.ndim == tensor.ndim:
                    return its.shape[dim]
    return None


def _images(options: Mapping[str, Any], models: Mapping[str, nn.Module]) -> Any:
    """The images that ``--data`` names: of each task, or of all together."""
    given: dict[str, str] = {}
    for text in options["data"]:
        task, separator, data = text.partition("=")
        given.update({task: data} if separator else {each: text for each in models})
    load = {name: options[name] for name in ("limit", "batch_size", "input_size", "seed")}
    unknown = next((task for task in given if task not in models), None)
    if unknown is not None:
        raise OptionError(explain(f"there are images of {unknown!r}, which is no task", tasks=", ".join(models)))
    spec = options["model"]
    return {
        task: load_images(spec, models[task], data=data, mean=None, std=None, **load) for task, data in given.items()
    } or None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            explain(f"{path} cannot be read", cause=error, remedy="names of classes, one a line")
        ) from error

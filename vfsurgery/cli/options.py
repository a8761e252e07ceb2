"""Options that several commands share, and what they mean: a model, a device, images, steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vfsurgery.checkpoints import (
    ONNX,
    check_onnx,
    check_same_classes,
    check_writable,
    load_into,
    load_state_dict,
    read_checkpoint,
)
from vfsurgery.checkpoints.reading import Checkpoint
from vfsurgery.data import loader
from vfsurgery.data.datasets import CALIBRATION, find_data, load_for, options_of, read_name
from vfsurgery.errors import CheckpointError, OptionError, explain
from vfsurgery.networks.architectures import FORMS, build_model
from vfsurgery.stats.imagined import IMAGINED
from vfsurgery.stats.threads import threads

C = TypeVar("C", bound=Callable[..., object])

EPILOG = "Every option with examples: docs/cli.md. Recipes: docs/recipes.md. Set VFSURGERY_TRACEBACK=1 to debug."


def image_shape(text: str) -> tuple[int, int, int]:
    """Parse one image's shape, written as ``3x224x224``."""
    try:
        channels, height, width = (int(length) for length in text.split("x"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no shape; write channels x height x width, as in 3x224x224") from None
    return channels, height, width


def numbers(text: str) -> tuple[float, ...]:
    """Parse one number per channel, with commas between them."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no list of numbers; write one per channel, as in 0.485,0.456,0.406"
        ) from None


COUNT = click.IntRange(min=1)
QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


def is_quiet() -> bool:
    """Whether the command that runs was given ``--quiet``."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet"))


def say(text: str) -> None:
    """Print what a command has done, unless it was asked to be quiet."""
    if not is_quiet():
        click.echo(text)


def model_options(whose: str) -> Callable[[C], C]:
    """Options that say of which architecture the checkpoints are; ``whose`` begins the help, as in ``"Its"``."""
    return together(
        click.option("--model", required=True, help=f"{whose}: {FORMS}."),
        click.option("--num-classes", type=int, help="Passed on to the architecture."),
        click.option(
            "--key",
            multiple=True,
            help="Which network of a file: under which key it stands, as in ema or teacher. Said once it goes for all "
            "files; else say it for each in their order, as '' for one that needs none.",
        ),
    )


def compute_options(seed: str) -> Callable[[C], C]:
    """Options that say where to compute, and what the seed is for."""
    return together(
        click.option("--seed", default=0, show_default=True, help=seed),
        click.option(
            "--device", default="cpu", show_default=True, help="Where to compute, as in cuda, cuda:1 or auto."
        ),
        click.option(
            "--threads",
            type=click.IntRange(1, 1024),
            expose_value=False,
            callback=set_threads,
            help="Threads on the CPU; with a fixed number, results do not depend on how many cores there are.",
        ),
    )


def set_threads(context: click.Context, parameter: click.Parameter, count: int | None) -> None:
    """For as long as the command runs."""
    context.with_resource(threads(count))


def data_options(command: C) -> C:
    """Options that say what the calibration data is."""
    return together(
        click.option(
            "--data",
            metavar="NAME[:PATH]",
            help="Calibration images, those for training: imagefolder:PATH, cifar10:PATH, cifar100:PATH or digits; "
            "or imagined: made from the network.",
        ),
        click.option(
            "--limit", default=CALIBRATION, show_default=True, type=COUNT, help="Draw at most so many images."
        ),
        click.option("--batch-size", default=64, show_default=True, type=COUNT, help="Images per batch."),
        click.option(
            "--input-size",
            type=image_shape,
            metavar="CxHxW",
            help="Image shape.  [default: what the model's source says]",
        ),
        click.option("--mean", type=numbers, metavar="N,N,...", help="Per channel, subtracted from pixels in [0, 1]."),
        click.option("--std", type=numbers, metavar="N,N,...", help="Per channel, dividing after that."),
    )(command)


def together(*options: Callable[[C], C]) -> Callable[[C], C]:
    """One decorator for several options, which the help lists in their order."""

    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def import_from_here() -> None:
    """Let ``import.path:factory`` name a module in the current folder, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_output(output: Path, report: Path, inputs: tuple[Path, ...], suffixes: tuple[str, ...]) -> None:
    """Refuse an output of another ending than ``suffixes``, the first of which is offered, or in place of an input."""
    suffix = output.suffix if output.suffix in suffixes else suffixes[0]
    check_onnx(output) if suffix == ONNX else check_writable(output, suffix)
    for path in inputs:
        if path.resolve() in (output.resolve(), report.resolve()):
            raise CheckpointError(explain(f"{path} would be overwritten", remedy="name another file with -o"))


def key_of_each(paths: Sequence[Path], keys: Sequence[str]) -> list[str | None]:
    """Under which key each file has its network; ``None`` for the only one."""
    if len(keys) not in (0, 1, len(paths)):
        raise OptionError(
            explain(
                f"--key is given {len(keys)} times for {len(paths)} files",
                remedy="give it once, for all of them, or once for each in their order, as '' for one that needs none",
            )
        )
    return [key or None for key in keys] if len(keys) == len(paths) else [next(iter(keys), None) or None] * len(paths)


def _read(path: Path, key: str | None, ema: bool, *, alone: bool) -> Checkpoint:
    """Read a checkpoint; where it wants another key than the files beside it, say that each may have its own."""
    try:
        return read_checkpoint(path, ema=ema, key=key)
    except (CheckpointError, OptionError) as error:
        if alone or not any(about in str(error) for about in ("under key", "as in key=")):
            raise
        each = "where files differ, once for each in their order, as '' for one that needs none"
        raise type(error)(f"{error}\n  or      {each}") from error


def load_models(
    paths: Sequence[Path],
    model: str,
    num_classes: int | None,
    keys: Sequence[str],
    device: torch.device,
    *,
    ema: bool = True,
) -> list[nn.Module]:
    """The networks in several files; what was chosen or left out of a file is said on stderr."""
    quiet = is_quiet()
    networks: list[nn.Module] = []
    for path, key in zip(paths, key_of_each(paths, keys), strict=True):
        found = _read(path, key, ema, alone=len(paths) == 1 or len(keys) > 1)
        network = build_model(model, num_classes)
        try:
            notes = load_into(network, found.state, path)
        except CheckpointError:
            pairs = zip(paths, key_of_each(paths, keys), strict=True)
            check_same_classes({str(each): load_state_dict(each, ema=ema, key=own) for each, own in pairs})
            raise
        for note in filter(None, () if quiet else (found.note, *notes)):
            click.echo(f"{path}: {note}", err=True)
        networks.append(network.to(device).eval())
    return networks


def example_input(shape: tuple[int, int, int] | None, device: torch.device | None = None) -> Tensor | None:
    """Random pixels, because on equal ones a wrong order of units may go unseen."""
    if shape is None:
        return None
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def steps(renormalize: str) -> str | tuple[str, ...] | None:
    """From ``none``, ``auto`` or ``reset,repair`` to what :func:`vfsurgery.merge` takes."""
    if renormalize == "none":
        return None
    return tuple(renormalize.split(",")) if "," in renormalize else renormalize


def load_images(
    spec: str,
    model: nn.Module,
    *,
    data: str | None,
    limit: int,
    batch_size: int,
    input_size: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    seed: int,
) -> DataLoader[Any] | str | None:
    """The images for calibration that ``--data`` names, as the model expects them: those that a recipe would read.

    Those that are to be imagined are left to the function that takes them, which knows of which networks.
    """
    if data is not None and data != IMAGINED and get_close_matches(data, [IMAGINED], cutoff=0.85):
        raise OptionError(explain(f"unknown data {data!r}", remedy=f"did you mean {IMAGINED!r}?"))
    if data == IMAGINED and (mean is not None or std is not None):
        raise OptionError(explain("imagined images are made as the network expects them", remedy="no --mean, no --std"))
    if data is None or data == IMAGINED:
        return data
    name, path = read_name(data)
    known = options_of(find_data(name))
    given: dict[str, Any] = {"path": path, "mean": mean, "std": std}
    if refused := next((f"--{key}" for key in ("mean", "std") if given[key] is not None and key not in known), None):
        raise OptionError(explain(f"{name} has no {refused}", remedy="its images are standardised: leave it out"))
    if input_size is not None and "size" in known:
        if input_size[1] != input_size[2]:
            raise OptionError(explain("images from a folder are square", found="x".join(map(str, input_size))))
        given["size"] = input_size[1]
    if "calibration" in known:
        given["calibration"] = limit
    options = {key: value for key, value in given.items() if value is not None}
    found = load_for(name, options, spec, lambda: model, seed).calibration
    return loader(found, batch_size=batch_size, limit=limit, seed=seed)

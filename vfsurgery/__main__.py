"""The command line: ``vfsurgery run``, ``merge``, ``diagnose``, ``groups`` and ``zoo``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vfsurgery import zoo
from vfsurgery.api import find_groups, merge
from vfsurgery.architectures import FORMS, build_model
from vfsurgery.checkpoints import (
    PROGRAM,
    WEIGHTS,
    check_writable,
    load_into,
    load_state_dict,
    save_program,
    save_state_dict,
    write_text,
)
from vfsurgery.data import digits, image_folder, loader, preprocessing
from vfsurgery.diagnosis import diagnose
from vfsurgery.errors import CheckpointError, ExampleInputError, OptionError, SurgeryError, explain
from vfsurgery.evaluation import first_images
from vfsurgery.recipe import Recipe
from vfsurgery.results import merge_report_of
from vfsurgery.tracing.examples import example_inputs_of

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


class Commands(click.Group):
    """Prints the library's own errors as one message without traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; exit with 2 for wrong options or recipes, with 1 for any other of our errors."""
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            if os.environ.get("VFSURGERY_TRACEBACK") == "1":
                raise
            hint = "\n  option  --input-size, as in 3x224x224" if isinstance(error, ExampleInputError) else ""
            click.echo(f"error: {error}{hint}", err=True)
            ctx.exit(2 if isinstance(error, OptionError) else 1)


@click.group("vfsurgery", cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vfsurgery")
def main() -> None:
    """Merge trained networks in weight space, and repair what merging breaks.

    \b
    Start here, with data that comes along:
      vfsurgery run recipes/digits.yaml
    Merge two checkpoints of one architecture:
      vfsurgery merge a.safetensors b.pt --model timm:resnet18 -o ab.safetensors
    See which units of a network may be reordered:
      vfsurgery groups torchvision:resnet18
    """


@main.command(epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results.  [default: out/NAME]")
@click.option("--reduced", is_flag=True, help="Run the recipe's smaller form, for machines without a GPU.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
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
    _import_from_here()
    experiment = Recipe.from_yaml(recipe)
    done = (experiment.in_reduced_form() if reduced else experiment).run(output, progress=not quiet)
    click.echo(str(done))
    if failures := done.failures:
        click.echo("error: not as expected:\n" + "\n".join(f"  {failure}" for failure in failures), err=True)
        ctx.exit(1)


@main.command(epilog=EPILOG)
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
      vfsurgery groups vfsurgery.demo:TinyConvNet --input-size 1x8x8
    """
    _import_from_here()
    found = find_groups(build_model(model, num_classes), _example(input_size), strict=strict)
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else str(found))


def _data_options(command: C) -> C:
    """Options of ``merge`` that say what the calibration data is."""
    options = [
        click.option("--data", help="Calibration images: imagefolder:PATH or digits. Without, weights alone are used."),
        click.option("--limit", default=5000, show_default=True, help="Draw at most so many images."),
        click.option("--batch-size", default=64, show_default=True, help="Images per batch."),
        click.option(
            "--input-size",
            type=image_shape,
            metavar="CxHxW",
            help="Image shape.  [default: what the model's source says]",
        ),
        click.option("--mean", type=numbers, metavar="N,N,...", help="Per channel, subtracted from pixels in [0, 1]."),
        click.option("--std", type=numbers, metavar="N,N,...", help="Per channel, dividing after that."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command("merge", epilog=EPILOG)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--model", required=True, help=f"The architecture of both: {FORMS}.")
@click.option("--num-classes", type=int, help="Passed on to the architecture.")
@_data_options
@click.option("--alpha", default=0.5, show_default=True, help="Weight of B, 0 to 1; A has the rest.")
@click.option(
    "--matching", default="auto", show_default=True, help="auto, weights, activations, zipit, cca or identity."
)
@click.option(
    "--renormalize",
    default="auto",
    show_default=True,
    help="auto, none, or steps in order with commas between: reset, repair, regress, closed-form-repair, rescale, "
    "reshift, bias-calibration, bias-removal.",
)
@click.option("--preserve", metavar="N|NAME", help="Keep the first N layers, or all up to a module, of each source.")
@click.option("--max-flops", type=float, metavar="X", help="Keep as many as cost X times the FLOPs of one source.")
@click.option("--max-params", type=float, metavar="X", help="The same for parameters.")
@click.option("--masks", help="What the result of pruned sources keeps: keep, intersect, union or reprune.")
@click.option("--seed", default=0, show_default=True, help="Decides random orders.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, as in cuda or cuda:1.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File ending in .safetensors.")
def merge_checkpoints(
    a: Path,
    b: Path,
    model: str,
    num_classes: int | None,
    alpha: float,
    matching: str,
    renormalize: str,
    preserve: str | None,
    max_flops: float | None,
    max_params: float | None,
    masks: str | None,
    seed: int,
    device: str,
    quiet: bool,
    output: Path,
    **data_options: Any,
) -> None:
    """Merge the checkpoints A and B into one network of the same architecture and size.

    Units of B are first reordered to match those of A. The weights go to the file named by -o, the report beside it
    into NAME.report.json. With --preserve, --max-flops or --max-params the result
    is a larger network; it goes as a whole, a program of torch.export, into a
    file ending in .pt2.

    \b
    Examples:
      vfsurgery merge a.safetensors b.pt --model timm:resnet18 -o ab.safetensors
      vfsurgery merge a.pt b.pt --model torchvision:vgg11_bn --num-classes 10 \\
          --data imagefolder:photos/train --limit 5000 -o ab.safetensors
      vfsurgery merge a.pt b.pt --model mynets:small --input-size 3x32x32 \\
          -o ab.safetensors
      vfsurgery merge a.pt b.pt --model timm:resnet18 --preserve layer2 -o ab.pt2
    """
    _import_from_here()
    report_path = output.with_suffix(".report.json")
    whole = not (preserve in (None, "0") and max_flops is None and max_params is None)
    _check_output(output, report_path, (a, b), PROGRAM if whole else WEIGHTS)
    target = _device(device)
    source_a, source_b = (_source(path, model, num_classes, target) for path in (a, b))
    calibration = _calibration(model, source_a, seed=seed, **data_options)
    example = _example(data_options["input_size"], target)
    merged = merge(
        source_a,
        source_b,
        data=calibration,
        alpha=alpha,
        matching=matching,
        renormalize=_steps(renormalize),
        preserve=_boundary(preserve),
        max_flops=max_flops,
        max_params=max_params,
        masks=masks,
        example_inputs=example,
        seed=seed,
        progress=not quiet,
    )
    report = merge_report_of(merged)
    if whole:
        images = first_images(source_a, calibration) if example is None and calibration is not None else example
        save_program(merged, example_inputs_of(source_a, images), output)
    else:
        save_state_dict(merged.state_dict(), output, {"model": model, "sources": f"{a.name}, {b.name}"})
    write_text(report_path, report.to_json() + "\n")
    click.echo(f"{report}\n\nwritten to {output} and {report_path}")


@main.command("diagnose", epilog=EPILOG)
@click.argument("merged", type=click.Path(path_type=Path))
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--model", required=True, help=f"The architecture of all: {FORMS}.")
@click.option("--num-classes", type=int, help="Passed on to the architecture.")
@_data_options
@click.option("--seed", default=0, show_default=True, help="Decides which images are drawn.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, as in cuda or cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write one self-contained HTML page.")
def diagnose_checkpoint(
    merged: Path,
    sources: tuple[Path, ...],
    model: str,
    num_classes: int | None,
    seed: int,
    device: str,
    as_json: bool,
    quiet: bool,
    output: Path | None,
    **data_options: Any,
) -> None:
    """Say where the features of the checkpoint MERGED vanish, layer by layer, beside its SOURCES.

    MERGED may as well be a pruned network, and SOURCES the one before pruning. Needs --data.

    \b
    Examples:
      vfsurgery diagnose ab.safetensors a.safetensors b.safetensors \\
          --model timm:resnet18 --data imagefolder:photos/train -o ab.html
    """
    _import_from_here()
    if output is not None and output.resolve() in [path.resolve() for path in (merged, *sources)]:
        raise CheckpointError(explain(f"{output} would be overwritten by the page", remedy="name another file with -o"))
    network, *others = (_source(path, model, num_classes, _device(device)) for path in (merged, *sources))
    data = _calibration(model, network, seed=seed, **data_options)
    if data is None:
        raise OptionError(explain("a diagnosis needs images", remedy="--data imagefolder:PATH, or --data digits"))
    found = diagnose(network, others, data, progress=not quiet)
    click.echo(found.to_json() if as_json else str(found))
    if output is not None:
        found.page(output)
        click.echo(f"\nwritten to {output}", err=as_json)


@main.command("zoo", epilog=EPILOG)
@click.option("--source", "sources", type=click.Choice(zoo.SOURCES), multiple=True, help="Library.  [default: both]")
@click.option("--filter", "pattern", default="*", show_default=True, metavar="GLOB", help="Names to take.")
@click.option("--names", type=click.Path(path_type=Path, exists=True), help="A file with one model name per line.")
@click.option("--memory", default=8.0, show_default=True, help="GiB that one model may allocate.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds that one model may take.")
@click.option("--jobs", default=1, show_default=True, help="Models at a time.")
@click.option("--page", type=click.Path(path_type=Path), help="Also write a Markdown page.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("zoo.csv"), show_default=True)
def survey_zoo(
    sources: tuple[str, ...],
    pattern: str,
    names: Path | None,
    memory: float,
    limit: float,
    jobs: int,
    page: Path | None,
    output: Path,
) -> None:
    """Trace, group and verify every model of timm and torchvision; write a table.

    Weights are random, nothing is downloaded. Each model runs in a process of its own; models that the table holds
    already are left out, so a survey that was cut off goes on where it stopped.

    \b
    Examples:
      vfsurgery zoo --source torchvision --filter "resnet*"
      vfsurgery zoo --source timm --filter "test_*" -o table.csv --page coverage.md
    """
    wanted = zoo.model_names(sources or zoo.SOURCES, pattern) if names is None else names.read_text().split()
    if output.is_dir():
        raise OptionError(explain(f"{output} is a folder", remedy="name a CSV file with -o"))

    surveyed = 0

    def done(survey: zoo.Survey) -> None:
        nonlocal surveyed
        surveyed += 1
        verdict = f"{survey.groups} groups, {survey.coverage:.1%}" if survey.verified else survey.failure
        click.echo(f"[{surveyed}] {survey.model}: {verdict}")

    click.echo(f"{len(wanted)} models; those that {output} lists are not run again")
    found = zoo.survey_zoo(wanted, output, memory=memory, limit=limit, jobs=jobs, done=done)
    click.echo(f"{sum(survey.verified for survey in found)} of {len(found)} verified; written to {output}")
    if page is not None:
        write_text(page, zoo.page(found))


def _import_from_here() -> None:
    """Let ``import.path:factory`` name a module in the current folder, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _check_output(output: Path, report: Path, inputs: tuple[Path, ...], suffix: str) -> None:
    check_writable(output, suffix)
    for path in inputs:
        if path.resolve() in (output.resolve(), report.resolve()):
            raise CheckpointError(
                explain(f"{path} would be overwritten by the merge", remedy="name another file with -o")
            )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        cause = str(error).partition("\n")[0]
        raise OptionError(explain(f"cannot compute on device {name!r}", cause=cause)) from error


def _source(path: Path, model: str, num_classes: int | None, device: torch.device) -> nn.Module:
    state = load_state_dict(path)
    source = build_model(model, num_classes)
    load_into(source, state, path)
    return source.to(device).eval()


def _example(shape: tuple[int, int, int] | None, device: torch.device | None = None) -> Tensor | None:
    """Random pixels, because on equal ones a wrong order of units may go unseen."""
    if shape is None:
        return None
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def _boundary(preserve: str | None) -> int | str:
    """A number of layers, or a name."""
    try:
        return int(preserve or 0)
    except ValueError:
        return str(preserve)


def _steps(renormalize: str) -> str | tuple[str, ...] | None:
    """From ``none``, ``auto`` or ``reset,repair`` to what :func:`vfsurgery.merge` takes."""
    if renormalize == "none":
        return None
    return tuple(renormalize.split(",")) if "," in renormalize else renormalize


def _calibration(
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
) -> DataLoader[Any] | None:
    """The images that ``--data`` names, as the model expects them."""
    if data is None:
        return None
    kind, _, folder = data.partition(":")
    if data == "digits":
        return loader(digits(seed=seed).calibration, batch_size=batch_size, limit=limit, seed=seed)
    if kind != "imagefolder" or not folder:
        raise OptionError(explain(f"unknown data {data!r}", accepted="imagefolder:PATH, digits"))
    if input_size is not None and input_size[1] != input_size[2]:
        raise OptionError(explain("images from a folder are square", found="x".join(map(str, input_size))))
    size = None if input_size is None else input_size[1]
    transform = preprocessing(spec, model, size=size, mean=mean, std=std)
    return image_folder(folder, transform, batch_size=batch_size, limit=limit, seed=seed)


if __name__ == "__main__":
    main()

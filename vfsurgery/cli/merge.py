"""``vfsurgery merge``: two checkpoints into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import Tensor, nn

from vfsurgery.checkpoints import ONNX, PROGRAM, WEIGHTS, check_shard_size
from vfsurgery.cli.cards import CARD_OPTION, CardRequest
from vfsurgery.cli.options import (
    EPILOG,
    QUIET,
    check_output,
    compute_options,
    data_options,
    example_input,
    find_device,
    import_from_here,
    load_images,
    load_models,
    model_options,
    say,
    steps,
)
from vfsurgery.cli.records import Record
from vfsurgery.hub.cards import CARD
from vfsurgery.merging.merge import merge
from vfsurgery.records.report import MergeReport
from vfsurgery.records.results import merge_report_of
from vfsurgery.scoring.evaluation import first_images
from vfsurgery.tracing.examples import example_inputs_of


@click.command("merge", epilog=EPILOG)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@model_options("The architecture of both")
@data_options
@click.option("--alpha", default=0.5, show_default=True, help="Weight of B, 0 to 1; A has the rest.")
@click.option(
    "--matching", default="auto", show_default=True, help="auto, weights, activations, zipit, cca or identity."
)
@click.option(
    "--renormalize",
    default="auto",
    show_default=True,
    help="auto, none, or steps in order with commas between: reset, repair, regress, closed-form-repair, rescale, "
    "reshift, bias-calibration, bias-removal, closed-form-reset.",
)
@click.option("--preserve", metavar="N|NAME", help="Keep the first N layers, or all up to a module, of each source.")
@click.option("--max-flops", type=float, metavar="X", help="Keep as many as cost X times the FLOPs of one source.")
@click.option("--max-params", type=float, metavar="X", help="The same for parameters.")
@click.option("--masks", help="What the result of pruned sources keeps: keep, intersect, union or reprune.")
@compute_options("Decides random orders.")
@click.option("--ema/--no-ema", default=True, help="Whether to take moving averages of weights.  [default: ema]")
@click.option("--max-shard-size", metavar="SIZE", help="Split weights into files of at most that, as in 5GB.")
@CARD_OPTION
@QUIET
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File ending in .safetensors, .pt2 or .onnx."
)
def merge_checkpoints(**options: Any) -> None:
    """Merge the checkpoints A and B into one network of the same architecture and size.

    Units of B are first reordered to match those of A. The result goes to the file named by -o, the report beside it
    into NAME.report.json, with which "vfsurgery replay" makes the same file again. A file ending in .safetensors holds
    the weights; one in .pt2 (torch.export) or .onnx the network as a whole. With --preserve, --max-flops or
    --max-params the result is a larger network, which can only be written whole.

    \b
    Examples:
      vfsurgery merge a.safetensors b.pt --model timm:resnet18 \\
          --data imagefolder:photos/train -o ab.safetensors
      vfsurgery merge a.pt b.pt --model torchvision:vgg11_bn --num-classes 10 \\
          --data imagefolder:photos/train --limit 5000 -o ab.safetensors
      vfsurgery merge a.pt b.pt --model mynets:small --input-size 3x32x32 \\
          --data imagefolder:photos/train -o ab.safetensors
      vfsurgery merge a.pt b.pt --model timm:resnet18 --preserve layer2 \\
          --data imagefolder:photos/train -o ab.pt2
      vfsurgery merge a.pt b.pt --model timm:resnet18 \\
          --data imagefolder:photos/train -o ab.onnx
      vfsurgery merge a.pt b.pt --model timm:resnet18 \\
          --data imagefolder:photos/train --card -o ab/model.safetensors
    """
    report, written = merge_files(**options)
    say(f"{report}\n\nwritten to {', '.join(map(str, written[:-1]))} and {written[-1]}")
    if options["card"]:
        say(f"card in {written[-1].with_name(CARD)}")


def merge_files(
    a: Path, b: Path, output: Path, *, quiet: bool, card: bool, **options: Any
) -> tuple[MergeReport, tuple[Path, ...]]:
    """What the command does with its options: returns the report, and the files written, the report's last."""
    record = Record.of((a, b), options)
    request = CardRequest.of((a, b), output) if card else None
    if len({source.sha256 for source in record.sources}) < len(record.sources) and not quiet:
        click.echo(f"warning: {a} and {b} are the same file, and their merge is what they hold", err=True)
    merged, inputs = _merged(a, b, output, quiet=quiet, **options)
    report = merge_report_of(merged)
    written = record.write(merged, inputs, output, _beside(output))
    if request is not None:
        request.write(merged, output, written[:-1], options)
    return report, written


def _merged(
    a: Path,
    b: Path,
    output: Path,
    *,
    model: str,
    num_classes: int | None,
    key: tuple[str, ...],
    alpha: float,
    matching: str,
    renormalize: str,
    preserve: str | None,
    max_flops: float | None,
    max_params: float | None,
    masks: str | None,
    seed: int,
    device: str,
    ema: bool,
    max_shard_size: str | None,
    quiet: bool,
    **data: Any,
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network, and inputs by which it can be written as a program."""
    import_from_here()
    whole = not (preserve in (None, "0") and max_flops is None and max_params is None)
    check_output(output, _beside(output), (a, b), (PROGRAM, ONNX) if whole else (WEIGHTS, PROGRAM, ONNX))
    if max_shard_size is not None:
        check_shard_size(max_shard_size)
    target = find_device(device)
    source_a, source_b = load_models((a, b), model, num_classes, key, target, ema=ema)
    calibration = load_images(model, source_a, seed=seed, **data)
    example = example_input(data["input_size"], target)
    merged = merge(
        source_a,
        source_b,
        data=calibration,
        alpha=alpha,
        matching=matching,
        renormalize=steps(renormalize),
        preserve=_boundary(preserve),
        max_flops=max_flops,
        max_params=max_params,
        masks=masks,
        example_inputs=example,
        seed=seed,
        progress=not quiet,
    )
    images = first_images(source_a, calibration) if example is None and calibration is not None else example
    return merged, () if output.suffix == WEIGHTS else example_inputs_of(source_a, images)


def _beside(output: Path) -> Path:
    """Where the report of a result lies."""
    return output.with_suffix(".report.json")


def _boundary(preserve: str | None) -> int | str:
    """A number of layers, or a name."""
    try:
        return int(preserve or 0)
    except ValueError:
        return str(preserve)

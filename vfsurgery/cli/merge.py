"""``vfsurgery merge``: two checkpoints into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import Tensor

from vfsurgery.checkpoints import ONNX, PROGRAM, WEIGHTS, check_shard_size
from vfsurgery.cli.jobs import Job, beside, output_options
from vfsurgery.cli.options import EPILOG, data_options, model_options, say, steps
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
@click.option(
    "--symmetries",
    default="auto",
    show_default=True,
    help="How B's units are aligned: permutations (orders alone), all (matrices too, in transformers), or auto.",
)
@click.option(
    "--imagine/--no-imagine",
    default=True,
    help="Without --data: imagine images, or use weights alone.  [default: imagine]",
)
@output_options(
    "Decides random orders and imagined images.",
    ".safetensors, .pt2 or .onnx",
    click.option("--ema/--no-ema", default=True, help="Whether to take moving averages of weights.  [default: ema]"),
    click.option("--max-shard-size", metavar="SIZE", help="Split weights into files of at most that, as in 5GB."),
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


def merge_files(a: Path, b: Path, output: Path, **options: Any) -> tuple[MergeReport, tuple[Path, ...]]:
    """What the command does with its options: returns the report, and the files written, the report's last."""
    kept = {name: value for name, value in options.items() if name not in ("quiet", "card")}
    record = Record.of((a, b), kept)
    if len({source.sha256 for source in record.sources}) < len(record.sources) and not options["quiet"]:
        click.echo(f"warning: {a} and {b} are the same file, and their merge is what they hold", err=True)
    preserve, max_flops, max_params = (options[name] for name in ("preserve", "max_flops", "max_params"))
    whole = not (preserve in (None, "0") and max_flops is None and max_params is None)
    if options["max_shard_size"] is not None:
        check_shard_size(options["max_shard_size"])
    job = Job.begin((a, b), output, (PROGRAM, ONNX) if whole else (WEIGHTS, PROGRAM, ONNX), options)
    merged = merge(
        *job.networks,
        data=job.images,
        alpha=options["alpha"],
        matching=options["matching"],
        renormalize=steps(options["renormalize"]),
        preserve=_boundary(preserve),
        max_flops=max_flops,
        max_params=max_params,
        masks=options["masks"],
        symmetries=options["symmetries"],
        imagine=options["imagine"],
        example_inputs=job.example,
        seed=options["seed"],
        progress=not options["quiet"],
    )
    report = merge_report_of(merged)
    written = record.write(merged, _inputs(job), output, beside(output))
    if job.card is not None:
        job.card.write(merged, output, written[:-1], options)
    return report, written


def _inputs(job: Job) -> tuple[Tensor, ...]:
    """Inputs by which a network is written as a program; weights need none."""
    if job.output.suffix == WEIGHTS:
        return ()
    first = job.networks[0]
    if job.example is not None or job.images is None or isinstance(job.images, str):
        return example_inputs_of(first, job.example)
    return example_inputs_of(first, first_images(first, job.images))


def _boundary(preserve: str | None) -> int | str:
    """A number of layers, or a name."""
    try:
        return int(preserve or 0)
    except ValueError:
        return str(preserve)

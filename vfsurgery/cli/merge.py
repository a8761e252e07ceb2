"""``vfsurgery merge``: two checkpoints into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfsurgery.api import merge
from vfsurgery.architectures import FORMS
from vfsurgery.checkpoints import PROGRAM, WEIGHTS, save_program, save_state_dict, write_text
from vfsurgery.cli.options import (
    EPILOG,
    check_output,
    data_options,
    example_input,
    find_device,
    import_from_here,
    load_images,
    load_model,
    steps,
)
from vfsurgery.evaluation import first_images
from vfsurgery.results import merge_report_of
from vfsurgery.tracing.examples import example_inputs_of


@click.command("merge", epilog=EPILOG)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--model", required=True, help=f"The architecture of both: {FORMS}.")
@click.option("--num-classes", type=int, help="Passed on to the architecture.")
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
    **data: Any,
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
    import_from_here()
    report_path = output.with_suffix(".report.json")
    whole = not (preserve in (None, "0") and max_flops is None and max_params is None)
    check_output(output, report_path, (a, b), PROGRAM if whole else WEIGHTS)
    target = find_device(device)
    source_a, source_b = (load_model(path, model, num_classes, target) for path in (a, b))
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
    report = merge_report_of(merged)
    if whole:
        images = first_images(source_a, calibration) if example is None and calibration is not None else example
        save_program(merged, example_inputs_of(source_a, images), output)
    else:
        save_state_dict(merged.state_dict(), output, {"model": model, "sources": f"{a.name}, {b.name}"})
    write_text(report_path, report.to_json() + "\n")
    click.echo(f"{report}\n\nwritten to {output} and {report_path}")


def _boundary(preserve: str | None) -> int | str:
    """A number of layers, or a name."""
    try:
        return int(preserve or 0)
    except ValueError:
        return str(preserve)

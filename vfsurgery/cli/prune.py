"""``vfsurgery prune``: weights of a checkpoint to zero; ``vfsurgery renormalize``: repair what that has broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

from vfsurgery.checkpoints import WEIGHTS, save_state_dict, write_text
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
from vfsurgery.data.batches import Data
from vfsurgery.errors import OptionError, explain
from vfsurgery.pruning import PRUNERS, prune
from vfsurgery.pruning.renormalizing import passes_named, renormalize
from vfsurgery.records.results import report_of


@click.command("prune", epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@model_options("Its architecture")
@click.option("--sparsity", type=float, metavar="S", help="Share of the weights to set to zero, 0 to 1.")
@click.option("--pattern", metavar="N:M", help="Keep N of every M weights instead, as in 2:4.")
@click.option(
    "--method",
    default="magnitude",
    show_default=True,
    help="magnitude, random, wanda, sparsegpt, diagonal-fisher, woodfisher.",
)
@click.option("--scope", help="What weights compete with: global, layer or row.  [default: the method's]")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Layers to leave dense; may be repeated.")
@data_options
@click.option(
    "--renormalize",
    "restore",
    default="none",
    show_default=True,
    help="Then restore the statistics of the dense network: auto, reset, repair, rescale.",
)
@compute_options("Decides whatever is drawn at random.")
@CARD_OPTION
@QUIET
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File ending in .safetensors.")
def prune_checkpoint(
    checkpoint: Path,
    model: str,
    num_classes: int | None,
    key: tuple[str, ...],
    sparsity: float | None,
    pattern: str | None,
    method: str,
    scope: Any,
    exclude: tuple[str, ...],
    restore: str,
    seed: int,
    device: str,
    card: bool,
    quiet: bool,
    output: Path,
    **data: Any,
) -> None:
    """Set the least important weights of CHECKPOINT to zero, without training.

    The weights go to the file named by -o, the report beside it into NAME.report.json.

    \b
    Examples:
      vfsurgery prune a.pt --model timm:resnet18 --sparsity 0.8 -o p.safetensors
      vfsurgery prune a.pt --model torchvision:resnet50 --pattern 2:4 \\
          --method sparsegpt --data imagefolder:photos/train \\
          --renormalize auto -o p.safetensors
    """
    import_from_here()
    report_path = output.with_suffix(".report.json")
    check_output(output, report_path, (checkpoint,), (WEIGHTS,))
    request = CardRequest.of((checkpoint,), output) if card else None
    target = find_device(device)
    (dense,) = load_models((checkpoint,), model, num_classes, key, target)
    images = load_images(model, dense, seed=seed, **data)
    choice = steps(restore)
    if choice is not None:
        passes_named(choice)  # a typo is better told before a long pruning than after it
        _need_images(images, f"--renormalize {restore}")
    if PRUNERS[method]().needs_data:
        _need_images(images, f"--method {method}")
    pruned = prune(
        dense,
        sparsity,
        method=method,
        scope=scope,
        pattern=pattern,
        exclude=exclude,
        data=images,
        seed=seed,
        progress=not quiet,
    )
    say(str(report_of(pruned)))
    if choice is not None:
        example = example_input(data["input_size"], target)
        pruned = renormalize(
            pruned, reference=dense, data=images, renormalize=choice, example_inputs=example, progress=not quiet
        )
        say(str(report_of(pruned)))
    _write(pruned, output, report_path, {"model": model, "dense": checkpoint.name})
    if request is not None:
        request.write(pruned, output, (output,), {"model": model, "num_classes": num_classes, **data})


@click.command("renormalize", epilog=EPILOG)
@click.argument("compressed", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@model_options("The architecture of both")
@data_options
@click.option(
    "--renormalize", "choice", default="auto", show_default=True, help="auto, reset, repair, rescale or reshift."
)
@compute_options("Decides which images are drawn.")
@CARD_OPTION
@QUIET
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File ending in .safetensors.")
def renormalize_checkpoint(
    compressed: Path,
    reference: Path,
    model: str,
    num_classes: int | None,
    key: tuple[str, ...],
    choice: str,
    seed: int,
    device: str,
    card: bool,
    quiet: bool,
    output: Path,
    **data: Any,
) -> None:
    """Give the units of the checkpoint COMPRESSED the statistics that they have in REFERENCE, the one it was made from.

    Zeros stay zeros, and size and speed stay as they are. Needs --data; 64 images help already.

    \b
    Examples:
      vfsurgery renormalize pruned.pt dense.pt --model timm:resnet18 \\
          --data imagefolder:photos/train -o repaired.safetensors
    """
    import_from_here()
    report_path = output.with_suffix(".report.json")
    check_output(output, report_path, (compressed, reference), (WEIGHTS,))
    request = CardRequest.of((compressed, reference), output) if card else None
    target = find_device(device)
    passes = passes_named(steps(choice))
    network, dense = load_models((compressed, reference), model, num_classes, key, target)
    images = load_images(model, dense, seed=seed, **data)
    _need_images(images, "renormalize")
    repaired = renormalize(
        network,
        reference=dense,
        data=images,
        renormalize=passes or "auto",
        example_inputs=example_input(data["input_size"], target),
        progress=not quiet,
    )
    say(str(report_of(repaired)))
    _write(repaired, output, report_path, {"model": model, "reference": reference.name})
    if request is not None:
        request.write(repaired, output, (output,), {"model": model, "num_classes": num_classes, **data})


def _need_images(images: Data | None, what: str) -> None:
    if images is None:
        raise OptionError(
            explain(f"{what} needs images", remedy="--data imagefolder:PATH, or --data digits; some hundred do")
        )


def _write(model: nn.Module, output: Path, report: Path, metadata: dict[str, str]) -> None:
    save_state_dict(model.state_dict(), output, metadata)
    write_text(report, report_of(model).to_json() + "\n")
    say(f"\nwritten to {output} and {report}")

"""``vfsurgery prune``: weights of a checkpoint to zero; ``vfsurgery renormalize``: repair what that has broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.cli.jobs import Job, output_options
from vfsurgery.cli.options import EPILOG, data_options, model_options, say, steps
from vfsurgery.pruning import PRUNERS, prune
from vfsurgery.pruning.renormalizing import passes_named, renormalize
from vfsurgery.records.results import report_of
from vfsurgery.stats.imagined import stand_in


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
@output_options("Decides whatever is drawn at random.", ".safetensors")
def prune_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    sparsity: float | None,
    pattern: str | None,
    method: str,
    scope: Any,
    exclude: tuple[str, ...],
    restore: str,
    **options: Any,
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
    job = Job.begin((checkpoint,), output, (WEIGHTS,), options)
    (dense,) = job.networks
    choice, progress = steps(restore), not options["quiet"]
    if choice is not None:
        passes_named(choice)  # a typo is better told before a long pruning than after it
        job.need_images(f"--renormalize {restore}")
    if PRUNERS[method]().needs_data:
        job.need_images(f"--method {method}")
    images = stand_in([dense], job.images, job.example, seed=options["seed"], progress=progress)
    pruned = prune(
        dense,
        sparsity,
        method=method,
        scope=scope,
        pattern=pattern,
        exclude=exclude,
        data=images,
        seed=options["seed"],
        progress=progress,
    )
    say(str(report_of(pruned)))
    if choice is not None:
        pruned = renormalize(
            pruned,
            reference=dense,
            data=images,
            renormalize=choice,
            example_inputs=job.example,
            progress=progress,
        )
        say(str(report_of(pruned)))
    job.finish(pruned, dense=checkpoint.name)


@click.command("renormalize", epilog=EPILOG)
@click.argument("compressed", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@model_options("The architecture of both")
@data_options
@click.option(
    "--renormalize", "choice", default="auto", show_default=True, help="auto, reset, repair, rescale or reshift."
)
@output_options("Decides which images are drawn.", ".safetensors")
def renormalize_checkpoint(compressed: Path, reference: Path, output: Path, *, choice: str, **options: Any) -> None:
    """Give the units of the checkpoint COMPRESSED the statistics that they have in REFERENCE, the one it was made from.

    Zeros stay zeros, and size and speed stay as they are. 64 images help already; without --data they are imagined.

    \b
    Examples:
      vfsurgery renormalize pruned.pt dense.pt --model timm:resnet18 \\
          --data imagefolder:photos/train -o repaired.safetensors
    """
    passes = passes_named(steps(choice))
    job = Job.begin((compressed, reference), output, (WEIGHTS,), options)
    network, dense = job.networks
    repaired = renormalize(
        network,
        reference=dense,
        data=job.images,
        renormalize=passes or "auto",
        example_inputs=job.example,
        progress=not options["quiet"],
    )
    say(str(report_of(repaired)))
    job.finish(repaired, reference=reference.name)

"""How many images a model computes together: one, or the batch that the user has chosen.

Most networks compute each image by itself, so batches may be cut anywhere. Some do not: video networks fold the frames
of a clip into the batch, norms without running statistics look at all of it. Those are only run on whole batches of the
size of the example. So are networks whose trace holds for that size alone (:mod:`vfsurgery.tracing.bound`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, are_tokens
from vfsurgery.errors import DataError, explain
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.bound import bound_to
from vfsurgery.tracing.examples import BATCH, example_inputs_of
from vfsurgery.tracing.values import tensors_of

B = TypeVar("B", bound=Batches)

DIFFERENT = 1e-3
"""Relative difference from which on an image's output depends on those beside it; rounding differs with the batch."""


def examples_of(
    model: nn.Module, batches: B | None, given: Tensor | Sequence[Tensor] | None
) -> tuple[tuple[Tensor, ...], B | None]:
    """Example inputs, and the data in the runs of images that the model computes together.

    The example is what is given, else two images of the data, or its first batch where the model does not take two;
    else what the model says.

    Raises:
        ExampleInputError: as :func:`~vfsurgery.tracing.examples.example_inputs_of`.
        DataError: the data cannot be read, or holds tokens that the model does not run on.
    """
    if given is None and batches is not None:
        images = next(iter(batches))[0]
        inputs = (images[:BATCH],)
        if are_tokens(images):
            _refuse_tokens(model, images)
        if len(images) > BATCH and outputs_of(model, inputs) is None and outputs_of(model, (images,)) is not None:
            inputs = (images,)
    else:
        inputs = example_inputs_of(model, given)
    together = 1 if batches is None else images_together(model, inputs)
    return inputs, batches if batches is None or together == 1 else batches.in_runs(together)


def in_bound_runs(batches: B | None, graph_module: fx.GraphModule) -> B | None:
    """The data in runs of as many images as a trace holds for, if it holds for one number alone."""
    bound = bound_to(graph_module)
    return batches if batches is None or not bound else batches.in_runs(bound, alone=True)


def note_on(batches: Batches | None) -> list[str]:
    """For the report: that images are used together, and how many."""
    if batches is None or batches.together == 1:
        return []
    reason = "the model computes none by itself, or makes a number of Python's of the batch size"
    return [f"images are used in runs of {batches.together}, as in the example: {reason}"]


def images_together(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Whether all but the first image of an example come out the same without it; 1 if so, else their number.

    Two runs in eval mode, after which the model is what it was. A model that does not run on the example is not judged.

    >>> images_together(nn.Linear(2, 2), (torch.randn(4, 2),))
    1
    >>> images_together(nn.BatchNorm1d(2, track_running_stats=False), (torch.randn(4, 2),))
    4
    """
    count = len(inputs[0]) if inputs and inputs[0].ndim else 1
    if count == 1:
        return 1
    whole = outputs_of(model, inputs)
    if whole is None:
        return 1
    rest = outputs_of(model, tuple(x[1:] if x.ndim and len(x) == count else x for x in inputs))
    if rest is None:
        return count
    pairs = [
        (x, y[1:]) for x, y in zip(rest, whole, strict=False) if y.ndim and len(y) == count and len(x) == count - 1
    ]
    return count if any(_differ(x, y) for x, y in pairs) else 1


def _differ(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return True
    if not y.numel() or not (y.is_floating_point() or y.is_complex()):
        return False
    scale = y.abs().nan_to_num(posinf=0.0).max()
    return not bool(((x - y).abs().masked_fill(x == y, 0.0) <= DIFFERENT * scale).all())


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """What a model returns in eval mode; nothing where it cannot run."""
    try:
        return run_kept(model, inputs)
    except Exception:
        return None


def run_kept(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a model returns in eval mode, after which it is what it was; raises whatever its forward does."""
    devices = {x.device for x in inputs if x.device.type == "cuda"}
    with borrowed(model, {}), torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
        model.eval()
        return tensors_of(model(*(x.clone() for x in inputs)))


def _refuse_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Say that a model takes no integers, or not these; a trace, which computes no values, would not."""
    try:
        run_kept(model, (tokens,))
    except Exception as error:
        raise DataError(
            explain(
                f"the model does not run on the integers in the data, {tokens.dtype} of shape (N, {tokens.shape[1]})",
                cause=str(error).partition("\n")[0],
                remedy="pass floating-point numbers, scaled as in training, to a model that begins with no embedding, "
                "and to one that does numbers below its size",
            )
        ) from error

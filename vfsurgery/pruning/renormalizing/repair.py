"""Repair a compressed network: give its units the statistics that they have in the network it was made from.

Pruning, factors of low rank, coarse weights: whatever takes something away from a layer weakens what its units say, the
more the deeper (Qu & Horvath, CPAL 2025, section 5.5). The dense network is the one reference,

``f_p <- (f_p - E f_p) / Std f_p * Std f + E f``

per unit, folded into weights and biases: a scale per unit leaves every zero of a weight where it is.

Both networks run on the same images, the dense one first on each batch, so what these images have by chance cancels.
That is why REPAIR is the default under BatchNorm too, where it goes into the norm's own scale and shift: RESET measures
the compressed network alone and needs thousands of images for what REPAIR does with 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.errors import DataError, OptionError, did_you_mean, explain
from vfsurgery.passes import Pass, Repair, Rescale, Reset, Reshift
from vfsurgery.passes.renormalize import Measured
from vfsurgery.pruning.renormalizing.pairing import Keep
from vfsurgery.pruning.renormalizing.references import check_reference
from vfsurgery.pruning.renormalizing.work import Work
from vfsurgery.records.results import remember
from vfsurgery.stats.imagined import Imagined, stand_in
from vfsurgery.stats.threads import device_of
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.wrappers import as_given, network

Choice: TypeAlias = str | Pass | Sequence[str | Pass]

PASSES: dict[str, type[Pass]] = {step.name: step for step in (Reset, Repair, Rescale, Reshift)}
"""The normalizations that need no second source, by name."""


def renormalize(
    compressed: nn.Module,
    *,
    reference: nn.Module,
    data: Data | str | None = None,
    renormalize: Choice = "auto",
    keep: Keep | None = None,
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Give every unit of a compressed network the mean and deviation that it has in the network it was made from.

    It does not matter how it was compressed: by ``torch.nn.utils.prune`` (hooks still on, or removed), any other
    pruner, N:M patterns, low-rank factors in the place of a layer, rounded weights, half precision, or an edit
    of your own. Layers are paired by module path, then by their place in the graph; what has no partner is left as it
    is, and :func:`~vfsurgery.records.results.report_of` the result names it with the reason. Weights that a
    parametrization computes cannot be scaled and are left alone, too; a BatchNorm behind them is corrected.

    ``f_p <- (f_p - E f_p) / Std f_p * Std f + E f`` per unit (Qu & Horvath, CPAL 2025, section 5.5), with the moments
    of both networks on ``data``, folded: size and speed stay, and so does every zero of a weight, bit for bit.

    Args:
        compressed: The network to repair.
        reference: The network that it was made from, in any precision.
        data: Calibration images as for :func:`~vfsurgery.merging.merge.merge`, labels ignored. One batch of 64 is
            enough. ``"imagined"``, and without any, images are made from the reference: docs/without_data.md.
        renormalize: ``"auto"``, ``"repair"``, ``"rescale"``, ``"reshift"``, ``"reset"``, a pass such as
            ``Repair(sequential=True)``, or a list of those run in order. ``"auto"`` is REPAIR of all layers, the output
            layer included, after RESET where a BatchNorm has no scale and shift of its own. It runs each of the two
            networks once over the data (with RESET the compressed one twice); ``sequential`` takes a pass per layer.
        keep: For layers that have lost units, by module path: which of the reference's units are left, in their order.
        example_inputs: As for :func:`~vfsurgery.discovery.finding.trace`; by default the shape of ``data``'s images.
        inplace: Write the result into ``compressed``, whose tensors keep their storage, once all has succeeded.
            Otherwise a copy is returned. The peak is both networks, one more ``compressed`` (two where hooks or
            parametrizations compute weights), and what a batch needs.
        progress: Show bars for work that takes over a second.

    Returns:
        A network of the class, the ``state_dict`` keys and the hooks of ``compressed``, with a bias more where the
        report says so; ``compressed`` itself if ``inplace``.

    Raises:
        OptionError: an argument is not acceptable.
        DataError: the data is missing, empty, cannot be read twice, or does not fit the network.
        IncompatibleModelsError: the reference is of another architecture; names the first difference.
        InvalidWeightsError: a network holds NaN or infinite values, or ``inplace`` would change the reference.
        SurgeryError: a weight would underflow to zero or overflow in the network's precision; names it.

    >>> from copy import deepcopy
    >>> from torch.nn.utils import prune
    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sparse = deepcopy(dense)
    >>> for layer in (sparse[0], sparse[2]):
    ...     _ = prune.l1_unstructured(layer, "weight", amount=0.5)
    >>> data = [torch.randn(64, 4)]
    >>> repaired = renormalize(sparse, reference=dense, data=data)
    >>> bool((repaired(data[0]).mean(0) - dense(data[0]).mean(0)).abs().max() < 1e-5)
    True
    """
    passes = passes_named(renormalize)
    given = compressed
    compressed, reference = network(compressed, "the compressed model"), network(reference, "the reference")
    check_reference(compressed, reference, inplace)
    data = stand_in([reference], data, example_inputs, unasked=True, progress=progress)
    if data is None:
        raise DataError(
            explain(
                "renormalize needs data, and the reference does not take images that could be imagined",
                remedy="pass data=; one batch of 64 images does",
            )
        )
    device = device_of(compressed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        work = Work.prepare(compressed, reference, data, example_inputs, keep, progress)
        work.notes += str(data.report).splitlines() if isinstance(data, Imagined) else []
        context, names = work.run(passes or work.sensible())
    result = work.deliver(compressed, context, inplace)
    remember(result, work.report(compressed, reference, names, context))
    return as_given(result, given)


def passes_named(choice: Choice | None) -> tuple[Pass, ...]:
    """The passes asked for; none for ``"auto"``, which depends on the network.

    Raises:
        OptionError: nothing is asked for, or something else than a normalization by a reference.

    >>> [step.name for step in passes_named("rescale")], passes_named("auto")
    (['rescale'], ())
    """
    if isinstance(choice, str) and choice == "auto":
        return ()
    steps = [choice] if isinstance(choice, str | Pass) else list(choice or ())
    passes: list[Pass] = []
    for step in steps:
        if isinstance(step, str) and step in PASSES:
            passes.append(PASSES[step]())
        elif isinstance(step, Reset | Measured):
            passes.append(step)
        else:
            remedy = did_you_mean(step, ["auto", *PASSES]) if isinstance(step, str) else f"one of {', '.join(PASSES)}"
            raise OptionError(
                explain(f"renormalize holds {step!r}, which compares no network with a reference", remedy=remedy)
            )
    if not passes:
        raise OptionError(explain(f"renormalize={choice!r} leaves nothing to do", remedy="leave it out for 'auto'"))
    return tuple(passes)

"""Imagined images in the place of data that is not there: what ``data="imagined"`` and no data at all come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.errors import DataError, ExampleInputError, explain
from vfsurgery.stats.imagined.imagining import imagine
from vfsurgery.stats.imagined.planning import flops_of_an_image, networks_of
from vfsurgery.stats.imagined.sizes import fitting_leaves
from vfsurgery.stats.threads import affordable_flops, device_of
from vfsurgery.tracing.examples import ExampleInputs

IMAGINED = "imagined"
"""What users say instead of data."""
READ = 4
"""How often all images are run through each network, about, in what they are imagined for."""
MOST, LEAST = 1000, 32
"""Images that are imagined unasked: as many as are affordable, and none if fewer are."""


@overload
def stand_in(
    models: Sequence[nn.Module],
    data: Data | str,
    given: ExampleInputs | None = None,
    *,
    unasked: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Data: ...


@overload
def stand_in(
    models: Sequence[nn.Module],
    data: Data | str | None,
    given: ExampleInputs | None = None,
    *,
    unasked: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Data | None: ...


def stand_in(
    models: Sequence[nn.Module],
    data: Data | str | None,
    given: ExampleInputs | None = None,
    *,
    unasked: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Data | None:
    """The data as it was given, or images imagined in its place.

    Args:
        models: The networks to imagine them for.
        data: ``"imagined"`` asks for them.
        given: An example of the images, as for :func:`~vfsurgery.stats.imagined.imagining.imagine`.
        unasked: Whether no data asks for them too, where the networks take images and running some is affordable.
        seed: Of the images.
        progress: Show how far it is, once it lasts over a second.

    Returns:
        Data; ``None`` if there was none and none is imagined.

    Raises:
        DataError: the data is another word.
        SurgeryError: as for ``imagine``, if images were asked for.
    """
    if isinstance(data, str) and data != IMAGINED:
        raise DataError(
            explain(
                f"data={data!r} is no data",
                remedy="pass images: a loader, a dataset or a tensor; or the word 'imagined'",
            )
        )
    if data is None and unasked:
        count, example, reason = _affordable(models, given)
        if not count:
            return None
        images = imagine(models, count, example_inputs=example, seed=seed, progress=progress)
        images.report = replace(images.report, notes=(reason, *images.report.notes)) if reason else images.report
        return images
    if isinstance(data, str):
        return imagine(models, example_inputs=given, seed=seed, progress=progress)
    return data


def _affordable(models: Sequence[nn.Module], given: ExampleInputs | None) -> tuple[int, ExampleInputs | None, str]:
    """How many images can be run through all networks several times, and an example of them; why it is of its size.

    None where the networks take no images.
    """
    try:
        (model,) = networks_of(models[:1])
        example, reason = fitting_leaves(model, given)
        flops = flops_of_an_image(model, example)
    except (DataError, ExampleInputError):
        return 0, given, ""
    count = int(affordable_flops(device_of(model)) / max(READ * len(models) * flops, 1))
    return (min(count, MOST) if count >= LEAST else 0), example if given is None else given, reason

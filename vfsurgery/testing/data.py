"""The conformance suite of data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vfsurgery.data import Splits, Transform
from vfsurgery.data.datasets import DATA, load_data
from vfsurgery.testing.watching import expect, untouched

PARTS = ("train", "calibration", "test")
LOOKED_AT = 8
"""Images of each part."""


def check_data(name: str, options: Mapping[str, Any] | None = None, *, transform: Transform | None = None) -> None:
    """Check all that the library expects of a data set that is registered under a name.

    No part is empty; each yields images, float tensors of one shape, with the index of a class; the same seed gives the
    same images; and the global random states are left alone.

    Args:
        name: Under which :data:`~vfsurgery.data.datasets.DATA` has it.
        options: Its keywords.
        transform: From a PIL image to a tensor, where the data holds pictures.

    Raises:
        AssertionError: something does not hold; the message says what.
        SurgeryError: it cannot be loaded so.

    >>> check_data("digits", {"seed": 3})
    """
    expect(name in DATA, f"data {name!r} is not registered", remedy='put @DATA.register("...") over its function')
    where = f"data {name!r}"
    with untouched(where, []):
        first, second = (_items(load_data(name, {"seed": 0, **(options or {})}, transform)) for _ in range(2))
    for part in PARTS:
        _check_part(f"the part {part} of {where}", first[part], second[part])


def _items(splits: Splits) -> dict[str, list[Any]]:
    """The first images of every part, with their labels."""
    parts = {part: cast("Dataset[Any]", getattr(splits, part)) for part in PARTS}
    counts = {part: min(LOOKED_AT, len(cast("Sized", dataset))) for part, dataset in parts.items()}
    return {part: [dataset[place] for place in range(counts[part])] for part, dataset in parts.items()}


def _check_part(where: str, items: list[Any], again: list[Any]) -> None:
    expect(len(items) > 0, f"{where} is empty")
    pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in items)
    expect(pairs, f"{where} yields no pairs of image and label", found=type(items[0]).__name__)
    images, labels = zip(*items, strict=True)
    found = {f"{each.dtype} {tuple(each.shape)}" if isinstance(each, Tensor) else str(type(each)) for each in images}
    expect(
        len(found) == 1 and isinstance(images[0], Tensor) and images[0].is_floating_point(),
        f"{where} has images that are no float tensors of one shape",
        found=", ".join(sorted(found)),
    )
    classes = all(float(label) == int(label) >= 0 for label in labels)
    expect(classes, f"{where} has labels that are no class", found=labels)
    same = all(torch.equal(image, other[0]) for image, other in zip(images, again, strict=True))
    expect(same, f"{where} has other images the second time", remedy="draw from a generator that seed= seeds")

"""Whether a base is what sources were fine-tuned from, told by a few numbers of every weight, before they are combined.

The figures and their bounds are those of :func:`~vfsurgery.combining.compare`, which looks at all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from vfsurgery.combining.base import Kind, Store, Trait
from vfsurgery.combining.cautions import cautions_of
from vfsurgery.combining.comparison import Comparison
from vfsurgery.combining.moved import Moved, mean
from vfsurgery.combining.running import FEWEST, FOREIGN, SAMPLE, TRUSTED

OF_ANCESTORS = ("wrong base", "other ancestor")
"""Faults after which a method gives nothing of use, and nothing else says so."""


def doubts(
    base: Store,
    sources: Mapping[str, Store],
    shapes: Mapping[str, tuple[int, ...]],
    traits: Mapping[str, Trait],
    told: str = "the base",
) -> list[str]:
    """What speaks against this base, a sentence each; nothing where all is well.

    Args:
        base: Its tensors.
        sources: Theirs, by what they are called.
        shapes: Of all tensors.
        traits: What they are.
        told: What the base is called.

    >>> import torch
    >>> from vfsurgery.combining.base import InMemory
    >>> ancestor, stranger, a, b = (torch.randn(64, generator=torch.Generator().manual_seed(n)) for n in range(4))
    >>> tuned = {name: InMemory({"w": ancestor + 0.1 * own}) for name, own in (("a", a), ("b", b))}
    >>> shapes, traits = {"w": (8, 8)}, {"w": Trait(Kind.MATRIX)}
    >>> doubts(InMemory({"w": ancestor}), tuned, shapes, traits)
    []
    >>> doubts(InMemory({"w": stranger}), tuned, shapes, traits)[0].partition(":")[0]
    'the base is not what the sources were fine-tuned from'
    """
    moved: dict[str, Moved] = {}
    for name, trait in traits.items() if sources else ():
        count = math.prod(shapes[name])
        if trait.kind is Kind.MATRIX and count >= FEWEST:
            stop = min(count, SAMPLE)
            moved[name] = Moved.of(base.read(name, 0, stop), [each.read(name, 0, stop) for each in sources.values()])
    kept = {name: mean([each.kept(source) for source in range(each.sources)]) for name, each in moved.items()}
    if not moved:
        return []
    if median(kept.values()) > TRUSTED:  # layers that began anew have nothing to do with the base, and are told apart
        moved = {name: each for name, each in moved.items() if not kept[name] < FOREIGN}
    found = Comparison(told, tuple(sources), moved, dict.fromkeys(moved, Kind.MATRIX.value))
    return [str(caution) for caution in cautions_of(found, {}) if caution.fault in OF_ANCESTORS]

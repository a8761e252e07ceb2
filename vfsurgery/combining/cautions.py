"""What is wrong with sources and their base, told by the figure that shows it; and what merging is likely to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from vfsurgery.checkpoints.refusals import listing
from vfsurgery.combining.comparison import Caution, Comparison
from vfsurgery.combining.running import FOREIGN, TRUSTED

ALIKE, FAR = 0.8, 0.5
"""Where the mean cosine of task vectors and their mean norm, relative to the base's, are above, the base is wrong."""


def cautions_of(found: Comparison, averaged: Mapping[str, bool | None]) -> Iterator[Caution]:
    """All that the figures of a comparison, and the names of positions' tables, warn of.

    Args:
        found: The comparison.
        averaged: For each source, whether its file says that its weights are a moving average.
    """
    names, total = found.sources, found.total
    similar = {
        name: [kept for moved in found.weights.values() if not math.isnan(kept := moved.kept(source))]
        for source, name in enumerate(names)
    }
    middles = {name: median(values) if values else math.nan for name, values in similar.items()}
    wrong = total.mean_cosine > ALIKE and total.mean_ratio > FAR
    if wrong:
        yield Caution(
            "wrong base",
            f"{found.base} is not what the sources were fine-tuned from: their task vectors all point one way (mean "
            f"cosine {total.mean_cosine:.2f}) and are long ({total.mean_ratio:.2f} of the base's norm), since each "
            "holds the way from it to their ancestor; base= that ancestor",
            names,
            total.mean_cosine,
        )
    for name, middle in middles.items():
        if middle < FOREIGN and not wrong:
            others = [value for other, value in middles.items() if other != name]
            beside = f", the others {max(others):.2f}" if others and max(others) > FOREIGN else ""
            yield Caution(
                "other ancestor",
                f"{name} was not fine-tuned from {found.base}: the median cosine between their weights is {middle:.2f}"
                f"{beside}; another pretrained tag of the architecture, or another seed: leave it out, or align it",
                (name,),
                middle,
            )
    yield from _new_layers(found, middles)
    yield from _averages(names, averaged)
    for table in found.tables:
        sizes = ", ".join(f"{name} {shape}" for name, shape in zip((found.base, *names), table.shapes, strict=True))
        yield Caution(
            "image size",
            f"{table.name} differs in shape ({sizes}), as where images have another size: resample the base's as "
            "it was before training (timm.create_model(..., img_size=...) does), or positions do not correspond",
            names,
        )
    yield from _equals(found)


def outlook(found: Comparison) -> str:
    """What merging these is likely to do, in a sentence."""
    total, faults = found.total, {caution.fault for caution in found.cautions}
    if broken := faults & {"wrong base", "other ancestor"}:
        return f"Merging these on this base is likely to give nothing of use ({', '.join(sorted(broken))})."
    if not any(map(any, total.products)):
        return "No source differs from the base where they could be merged: there is nothing to combine."
    again = " Re-estimate the running statistics afterwards." if "statistics" in found.kinds.values() else ""
    far = total.mean_ratio
    if total.sources == 1:
        return (
            f"One source, {far:.1%} of the base's norm away: between the two (combine='wise-ft') accuracy on new data "
            f"is likely kept, and some of what the base knew comes back.{again}"
        )
    cosine = total.mean_cosine
    if math.isnan(cosine):
        return f"A single source moved: the result is likely to be it, or something on the way to it.{again}"
    if cosine > 0.5:
        return (
            f"The sources went much the same way (mean cosine {cosine:.2f}), as runs of one task do: their mean is "
            f"likely as good as the best of them or better; there is little interference to resolve.{again}"
        )
    if cosine < -0.1:
        return (
            f"The sources pull against each other (mean cosine {cosine:.2f}): most of what one learned is likely lost "
            f"to another; a network with all heads and one trunk for each may be what is wanted.{again}"
        )
    loss = "little" if far < 0.05 else "some" if far < 0.3 else "much"
    return (
        f"The sources went different ways (mean cosine {cosine:.2f}), as different tasks do, {far:.1%} of the base's "
        f"norm far: each is likely to lose {loss} of its accuracy, the more the more there are; choose method and "
        f"scale on held-out images.{again}"
    )


def _new_layers(found: Comparison, middles: Mapping[str, float]) -> Iterator[Caution]:
    for source, name in enumerate(found.sources):
        if not middles[name] > TRUSTED:
            continue
        new = {weight: kept for weight, moved in found.weights.items() if (kept := moved.kept(source)) < FOREIGN}
        if new:
            least = min(new.values())
            yield Caution(
                "new layers",
                f"{name} has {len(new)} layers that began anew (cosine to the base {least:.2f} and more, the median of "
                f"all is {middles[name]:.2f}): {listing([*new])}; they cannot be combined with the base's: a head of "
                "its own, or another way of loading",
                (name,),
                least,
            )


def _averages(names: Sequence[str], averaged: Mapping[str, bool | None]) -> Iterator[Caution]:
    those = {kind: [name for name, own in averaged.items() if own is kind] for kind in (True, False)}
    if those[True] and those[False]:
        yield Caution(
            "moving average",
            f"{listing(those[True])}: the moving average of the weights, {listing(those[False])}: the weights "
            "themselves; their difference counts as something learned: take the same of all (ema=False, or key=)",
            tuple(name for name in (*those[True], *those[False]) if name in names),
        )


def _equals(found: Comparison) -> Iterator[Caution]:
    same, names = found.total.same, found.sources
    for source, name in enumerate(names):
        if same[source][-1]:
            yield Caution(
                "equal to base",
                f"{name} equals the base in all {len(found.tensors)} tensors that could be merged: it adds nothing",
                (name,),
                0.0,
            )
    for a, b in found.total.pairs:
        if same[a][b] and not same[a][-1]:
            yield Caution(
                "equal sources",
                f"{names[a]} and {names[b]} are equal in all {len(found.tensors)} tensors that could be merged: they "
                "count twice",
                (names[a], names[b]),
                1.0,
            )

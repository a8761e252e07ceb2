"""What notebooks show of measurements."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import islice

from vfsurgery.rendering.figures import Draw, barrier_panels, diagnosis_panels, svg
from vfsurgery.rendering.fragments import LONG, Html, bar, figure, folded, fragment, paragraph, paragraphs, table
from vfsurgery.scoring.barriers import Barrier
from vfsurgery.scoring.diagnosis import Diagnosis
from vfsurgery.scoring.flip_rates import Flips
from vfsurgery.shown import html_of


@html_of.register(Barrier)
def barrier_html(found: Barrier) -> str:
    """Scores of the ends, the barriers, and the curves."""
    scores = {"source a": found.a, "source b": found.b, "ensemble": found.ensemble}
    ends = [(name, f"{score.accuracy:.2%}", score.loss) for name, score in scores.items()]
    for name, curve in found.curves.items():
        ends.append((f"{name}, halfway", f"{curve.accuracy[curve.midpoint]:.2%}", curve.loss[curve.midpoint]))
    barriers = [(name, f"{curve.accuracy_barrier:.2%}", curve.loss_barrier) for name, curve in found.curves.items()]
    return fragment(
        f"from source a to source b, {len(found.naive.alphas)} points",
        table(["", "accuracy", "loss"], ends),
        table(["barrier", "of accuracy", "of loss"], barriers),
        figures(barrier_panels(found), str(found)),
    )


@html_of.register(Diagnosis)
def diagnosis_html(found: Diagnosis) -> str:
    """The verdict, a row per layer, and the figure that shows vanishing; the page has the others."""
    rows = [
        (
            layer.name,
            layer.kind,
            f"{layer.depth:.0%}",
            bar(layer.ratio),
            bound,
            layer.model.feature,
            layer.source("feature"),
            layer.variance_ratio,
        )
        for layer, bound in zip(found.layers, found.bound, strict=True)
    ]
    headers = ["layer", "kind", "depth", "ratio", "bound", "feature", "of the sources", "variance ratio"]
    sources = len(found.layers[0].sources)
    return fragment(
        f"{found.model} beside {sources} source{'s' * (sources > 1)}, {found.images} images",
        paragraph(found.verdict),
        folded(f"{len(rows)} layers", table(headers, rows), unfolded=len(rows) <= LONG),
        paragraphs(f"not compared: {layer}" for layer in found.unpaired),
        figures(dict(islice(diagnosis_panels(found).items(), 1)), str(found)),
    )


@html_of.register(Flips)
def flips_html(found: Flips) -> str:
    """A row per old model."""
    rows = [
        (
            rates.old,
            rates.count,
            *(f"{share:.2%}" for share in (rates.negative_rate, rates.positive_rate)),
            rates.relative_negative_rate,
            f"{rates.negative_impact:.2%}",
        )
        for rates in found.rows
    ]
    headers = ["old model", "images", "negative", "positive", "relative negative", "share of new errors"]
    return fragment("flips", table(headers, rows))


def figures(panels: Mapping[str, Draw], content: str) -> Html:
    """Panels as figures; ids begin with a number made of the content, since many figures share one page."""
    name = f"vf{zlib.crc32(content.encode()):08x}"
    drawn = (figure(title, svg(draw, f"{name}{number}")) for number, (title, draw) in enumerate(panels.items()))
    return Html("".join(drawn))

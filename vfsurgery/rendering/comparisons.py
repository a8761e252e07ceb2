"""How comparisons of fine-tuned models with their base look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfsurgery.combining.comparison import Comparison
from vfsurgery.rendering.figures import GREY, PALETTE, POINTS, Draw, _finish, draw_panels
from vfsurgery.rendering.fragments import LONG, folded, fragment, paragraph, paragraphs, table
from vfsurgery.rendering.notebook import figures
from vfsurgery.shown import draw, html_of

LONGEST = 24
"""Letters of a name that a legend has room for."""


@draw.register(Comparison)
def draw_comparison(found: Comparison, path: str | Path) -> Path:
    """Draw the panels of :func:`comparison_panels` side by side into ``path``; its ending is the format, else PNG.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    panels = comparison_panels(found)
    return draw_panels(panels, path, 5.5 * len(panels), 4.6)


def comparison_panels(found: Comparison) -> Mapping[str, Draw]:
    """By their titles, each over the layers in the order of the base: how far, and how much alike."""

    names = [name if len(name) <= LONGEST else f"…{name[-LONGEST:]}" for name in found.sources]

    def far(axes: Any) -> None:
        for source, name in enumerate(names):
            heights = [moved.ratio(source) for moved in found.layers.values()]
            axes.plot(heights, color=PALETTE[source % len(PALETTE)], marker="o", label=name, **POINTS)
        axes.set_ylim(bottom=0)
        over_layers(axes)

    def alike(axes: Any) -> None:
        layers = found.layers.values()
        for number, (a, b) in enumerate(found.total.pairs):
            label, colour = f"{names[a]}, {names[b]}", PALETTE[number % len(PALETTE)]
            axes.plot([moved.cosine(a, b) for moved in layers], color=colour, marker="o", label=label, **POINTS)
        conflicts = [moved.conflict for moved in layers]
        axes.plot(conflicts, color=GREY, linestyle="--", linewidth=1.5, label="share of signs in conflict")
        axes.axhline(0, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(-1.05, 1.05)
        over_layers(axes)

    def over_layers(axes: Any) -> None:
        axes.set_xlabel(f"{len(found.layers)} layers, from the first of the base to its last", fontsize=11)
        _finish(axes)

    panels: dict[str, Draw] = {"norm of task vectors, relative to the base": far}
    return {**panels, "cosine of task vectors": alike} if len(found.sources) > 1 else panels


@html_of.register(Comparison)
def comparison_html(found: Comparison) -> str:
    """Sources, cautions, layers, and the figure."""
    total = found.total
    sources = [(name, total.ratio(own), total.kept(own)) for own, name in enumerate(found.sources)]
    pairs = [(found.sources[a], found.sources[b], total.cosine(a, b)) for a, b in total.pairs]
    layers = [(name, moved.mean_ratio, moved.mean_cosine, moved.conflict) for name, moved in found.layers.items()]
    return fragment(
        f"{len(found.sources)} sources beside {found.base}",
        paragraph(found.outlook),
        paragraphs(f"caution: {caution}" for caution in found.cautions),
        table(["source", "norm relative to the base", "cosine to the base"], sources),
        table(["source", "and", "cosine of task vectors"], pairs),
        folded(
            f"{len(layers)} layers",
            table(["layer", "norm relative to the base", "cosine", "signs in conflict"], layers),
            unfolded=len(layers) <= LONG,
        ),
        figures(comparison_panels(found), str(found)),
    )

"""How the coefficients of AdaMerging look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfsurgery.merging.multitask.adapted import Adapted
from vfsurgery.rendering.figures import GREY, PALETTE, POINTS, Draw, _finish, draw_panels
from vfsurgery.rendering.fragments import LONG, folded, fragment, paragraph, paragraphs, table
from vfsurgery.rendering.notebook import figures
from vfsurgery.shown import draw, html_of


@draw.register(Adapted)
def draw_adapted(found: Adapted, path: str | Path) -> Path:
    """Draw the panels of :func:`adapted_panels` side by side into ``path``; its ending is the format, else PNG.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it then.
    """
    panels = adapted_panels(found)
    return draw_panels(panels, path, 5.5 * len(panels), 4.6)


def adapted_panels(found: Adapted) -> Mapping[str, Draw]:
    """By their titles: coefficients over the rows, in the order of the network, and agreement over steps."""

    def coefficients(axes: Any) -> None:
        for place, task in enumerate(found.tasks):
            values = [row[place] for row in found.coefficients]
            axes.plot(values, color=PALETTE[place % len(PALETTE)], marker="o", label=task, **POINTS)
        axes.axhline(0, color="black", linestyle=":", linewidth=1)
        rows = (
            "one row" if len(found.rows) == 1 else f"{len(found.rows)} rows, from the first of the network to its last"
        )
        axes.set_xlabel(rows, fontsize=11)
        _finish(axes)

    def agreement(axes: Any) -> None:
        steps = [look.step for look in found.looks]
        for place, task in enumerate(found.tasks):
            values = [100 * look.agreement[place] for look in found.looks]
            axes.plot(steps, values, color=PALETTE[place % len(PALETTE)], marker="o", label=task, **POINTS)
        axes.plot(steps, [100 * look.mean for look in found.looks], color="black", linewidth=1.5, label="mean")
        axes.axvline(found.step, color=GREY, linestyle="--", linewidth=1.2, label="taken")
        axes.set_xlabel("step", fontsize=11)
        axes.set_ylabel("agreement with the expert (%)", fontsize=11)
        _finish(axes)

    return {"coefficients": coefficients, "agreement on held-out images": agreement}


@html_of.register(Adapted)
def adapted_html(found: Adapted) -> str:
    """Tasks, coefficients, and the figure."""
    tasks = [
        (task, found.chosen.agreement[place], found.looks[0].agreement[place], found.held_out[place])
        for place, task in enumerate(found.tasks)
    ]
    rows = [(row, *values) for row, values in zip(found.rows, found.coefficients, strict=True)]
    return fragment(
        f"AdaMerging of {len(found.tasks)} tasks",
        paragraph(found.why),
        paragraphs(found.notes),
        table(["task", "agreement", "at the start", "held-out images"], tasks),
        folded(
            f"{len(rows)} rows of coefficients",
            table(["row", *found.tasks], rows),
            unfolded=len(rows) <= LONG,
        ),
        figures(adapted_panels(found), str(found)),
    )

"""A diagnosis in words: where features vanish, which renormalization is recommended for such a network, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfsurgery.diagnosis import Diagnosis, LayerDiagnosis

VANISHED = 0.1
"""Below this share of the sources' feature norm, features count as vanished."""

FADED = 0.5
"""Below this share at the end, features count as faded."""

ADVICE = {
    "reset": (
        "RESET (renormalize='reset'): the statistics in its BatchNorm layers do not fit the changed weights; measured "
        "anew they restore mean and deviation of every unit, which works best in BatchNorm networks."
    ),
    "repair": (
        "REPAIR (renormalize='repair'): its norm layers keep no statistics that could be measured anew, so every unit "
        "is given back the sources' mean and deviation before the norm."
    ),
    "rescale": (
        "RESCALE (renormalize='rescale'): in networks without norm layers, giving every unit back its deviation works "
        "best, and better than REPAIR; without data, bias calibration comes near."
    ),
}
"""What to do and why, by the name of the pass (Qu & Horvath, CPAL 2025, section 5.3)."""


def in_words(found: Diagnosis) -> str:
    """What :attr:`vfsurgery.diagnosis.Diagnosis.verdict` says."""
    broken = next((layer for layer in found.layers if not math.isfinite(layer.model.feature)), None)
    if broken is not None:
        return f"The model's values are not finite from {_place(broken)} on: it holds or makes NaN or infinity."
    last, start = found.layers[-1], found.vanishes_at()
    kept = f"at the last one, {last.name}, the model has {last.ratio:.2g} times the feature norm of its sources"
    if start is None and not found.bound[-1] < FADED:
        lowest = min(found.layers, key=lambda layer: math.inf if math.isnan(layer.ratio) else layer.ratio)
        return f"Nothing vanishes: of all layers, {_place(lowest)} has the lowest ratio, {lowest.ratio:.2g}; {kept}."
    if start is None:
        words = f"Features fade but do not vanish along the layers: {kept}."
    else:
        words = (
            f"Features vanish: from {_place(start)} on, no layer has {VANISHED:.0%} of the feature norm of its "
            f"sources; {kept}."
        )
    offset = (
        f"There the input moves the values by {last.model.feature:.2g} around an offset of {last.model.offset:.2g}, "
        f"in the sources by {last.source('feature'):.2g} around {last.source('offset'):.2g}."
    )
    return f"{words} {offset} Recommended for this kind of network: {ADVICE[found.recommended]}"


def _place(layer: LayerDiagnosis) -> str:
    return f"{layer.name} ({layer.depth:.0%} of the depth)"

"""A diagnosis in words: where features vanish, which renormalization is recommended for such a network, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from vfsurgery.scoring.layers import LayerDiagnosis

VANISHED = 0.1
"""Below this share of the sources' feature norm, features count as vanished."""

FADED = 0.5
"""Below this share at the end, features count as faded."""

GROWN = 10
"""Above this multiple of the sources' feature norm, features count as grown."""

State: TypeAlias = Literal["broken", "vanished", "faded", "grown", "kept"]
"""What became of the features; broken where values are not finite."""

Remedy: TypeAlias = Literal["reset", "repair", "rescale"]
"""Name of a renormalization."""

ADVICE: dict[Remedy, str] = {
    "reset": (
        "RESET ({call}): the statistics in its BatchNorm layers do not fit the changed weights; measured "
        "anew they restore mean and deviation of every unit, which works best in BatchNorm networks."
    ),
    "repair": (
        "REPAIR ({call}): its norm layers keep no statistics that could be measured anew, so every unit "
        "is given back the mean and deviation that {owner} has before the norm."
    ),
    "rescale": (
        "RESCALE ({call}): in networks without norm layers, giving every unit back its deviation works "
        "best, and better than REPAIR{also}."
    ),
}
"""What to do and why, by the name of the pass (Qu & Horvath, CPAL 2025, section 5.3)."""


def first_below(layers: Sequence[LayerDiagnosis], bound: Sequence[float], threshold: float) -> LayerDiagnosis | None:
    """The first layer from which on no ratio reaches ``threshold``, or ``None``; ``bound`` is tight, one a layer."""
    return next((layer for layer, height in zip(layers, bound, strict=True) if height < threshold), None)


def state_of(layers: Sequence[LayerDiagnosis], bound: Sequence[float]) -> State:
    """What :attr:`vfsurgery.scoring.diagnosis.Diagnosis.state` is."""
    if _first_broken(layers) is not None:
        return "broken"
    if first_below(layers, bound, VANISHED) is not None:
        return "vanished"
    if bound[-1] < FADED:
        return "faded"
    return "grown" if bound[0] > GROWN else "kept"


def in_words(layers: Sequence[LayerDiagnosis], bound: Sequence[float], step: Remedy) -> str:
    """What :attr:`vfsurgery.scoring.diagnosis.Diagnosis.verdict` says; ``step`` is what is recommended."""
    state, broken, last = state_of(layers, bound), _first_broken(layers), layers[-1]
    start = first_below(layers, bound, VANISHED)
    alone = len(last.sources) == 1
    sources = "the reference" if alone else "the sources"
    if broken is not None:
        return f"The model's values are not finite from {_place(broken)} on: it holds or makes NaN or infinity."
    at_last = f"{last.ratio:.3g} times at the last layer, {last.name}"
    if state in ("kept", "grown"):
        known = [layer for layer in layers if not math.isnan(layer.ratio)] or [last]
        lowest, highest = (choose(known, key=lambda layer: layer.ratio) for choose in (min, max))
        if state == "kept":
            return (
                f"Nothing vanishes: in every layer the feature norm is at least {lowest.ratio:.3g} times that of "
                f"{sources}, as at {_place(lowest)}; it is {at_last}."
            )
        return (
            f"Nothing vanishes, but features have grown: at {_place(highest)} their norm is {highest.ratio:.3g} times "
            f"that of {sources}, {at_last}. Statistics of too few images, or of units that hardly vary, can do this."
        )
    words = f"Features fade but do not vanish: beside those of {sources}, their norm is {at_last}."
    if start is not None:
        words = (
            f"Features vanish: from {_place(start)} on, no layer has {VANISHED:.0%} of the feature norm of "
            f"{sources}; it is {at_last}."
        )
    offset = (
        f"There the input moves the values by {last.model.feature:.2g} around an offset of {last.model.offset:.2g}, "
        f"in {sources} by {last.source('feature'):.2g} around {last.source('offset'):.2g}."
    )
    call = f"renormalize(model, reference=..., data=..., renormalize='{step}')" if alone else f"renormalize='{step}'"
    also = "" if alone else "; without data, bias calibration comes near"
    advice = ADVICE[step].format(call=call, owner="the reference" if alone else "a mean of the sources", also=also)
    return f"{words} {offset} Recommended for this kind of network: {advice}"


def _first_broken(layers: Sequence[LayerDiagnosis]) -> LayerDiagnosis | None:
    return next((layer for layer in layers if not math.isfinite(layer.model.feature)), None)


def _place(layer: LayerDiagnosis) -> str:
    return f"{layer.name} ({layer.depth:.0%} of the depth)"

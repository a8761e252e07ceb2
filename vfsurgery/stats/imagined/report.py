"""What is known of imagined images: how they were made, how near they come to what the networks remember, the cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfsurgery.records.report import Report

NO_REAL_IMAGE = "no real image was used"
"""What reports and cards say."""


@dataclass(frozen=True, slots=True)
class NormReport:
    """How far the statistics of the steered images are from those that one BatchNorm layer keeps.

    Distances are the mean over its units of ``(mean - running mean)^2 / running variance + (deviation / running
    deviation - 1)^2``: 0 is met, 2 is what images give that leave the layer dead and centred elsewhere by a deviation.

    >>> print(NormReport(0, "layer1.bn", 64, before=0.5, after=0.0125))
    source 0, layer1.bn (64 units): 0.500 -> 0.013
    """

    source: int
    layer: str
    units: int
    before: float
    after: float

    def __str__(self) -> str:
        return f"source {self.source}, {self.layer} ({self.units} units): {self.before:.3f} -> {self.after:.3f}"


@dataclass(frozen=True, slots=True)
class Looks:
    """What the networks find on the images, and how the images differ from each other.

    ``images`` were looked at. ``agreement`` is the share of them on which all sources find the same class, ``classes``
    how many classes their mean logits find, and ``within`` the share of the variance of those logits that lies within
    classes, which is 0 where each class has a single image over and over; all are ``None`` where there are no logits.
    ``duplicates`` counts images that hardly differ from an earlier one.
    """

    images: int
    agreement: float | None
    classes: int | None
    within: float | None
    duplicates: int


@dataclass(frozen=True)
class ImagineReport(Report):
    """How images were imagined; no real image was used.

    Attributes:
        images: How many there are.
        size: Of each: ``(channels, height, width)``.
        how: ``"leaves"`` or ``"statistics"``.
        steered: How many were moved towards the statistics that BatchNorm layers keep; the others are leaves.
        steps: How often each of those was moved.
        layers: How near the statistics came, per layer and source; empty where there are none or nobody looked.
        looks: What the sources find on the images.
        seconds: Wall-clock time.
        flops: Floating-point operations of the steps, estimated before them.
        seed: Of all that was drawn.
        notes: What else is to be known.
    """

    images: int
    size: tuple[int, int, int]
    how: str
    steered: int
    steps: int
    layers: tuple[NormReport, ...]
    looks: Looks
    seconds: float
    flops: float
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> float | None:
        """The mean distance of all layers before the steps, ``None`` without any."""
        return _mean([layer.before for layer in self.layers])

    @property
    def after(self) -> float | None:
        """The mean distance of all layers after the steps, ``None`` without any."""
        return _mean([layer.after for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return {**super().to_dict(), "before": self.before, "after": self.after, "real_images": 0}

    def __str__(self) -> str:
        shape = "x".join(map(str, self.size))
        lines = [f"{self.images} imagined images of {shape}, seed {self.seed}; {NO_REAL_IMAGE}"]
        if self.steered:
            lines.append(f"{self.steered} of them moved towards BatchNorm statistics in {self.steps} steps")
        if self.before is not None and self.after is not None:
            lines.append(f"distance of {len(self.layers)} layers' statistics {self.before:.3f} -> {self.after:.3f}")
        looks = self.looks
        if looks.agreement is not None:
            lines.append(f"of {looks.images}, the sources agree on {looks.agreement:.1%}")
            lines.append(f"{looks.classes} classes found; within them lies {looks.within or 0:.0%} of what logits vary")
        lines.append(f"{looks.duplicates} near-duplicates among {looks.images}")
        lines.append(f"{self.seconds:.1f} s" + (f", about {self.flops:.1e} FLOPs in steps" if self.flops else ""))
        return "\n  ".join([*lines, *self.notes])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

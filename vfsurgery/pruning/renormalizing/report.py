"""The record of one repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfsurgery.pruning.renormalizing.pairing import Unpaired
from vfsurgery.records.report import Report


@dataclass(frozen=True)
class LayerPair:
    """A layer of the compressed network and what was done to it.

    ``partner`` is the reference's layer, found ``by`` name or position; ``scale`` the geometric mean over its units of
    what its weight was multiplied by.
    """

    layer: str
    partner: str
    by: str
    units: int
    scale: float

    def __str__(self) -> str:
        found = "" if self.layer == self.partner else f" from {self.partner}, found by {self.by}"
        return f"{self.layer}: {self.units} units, scaled by {self.scale:.3g}{found}"


@dataclass(frozen=True)
class RenormalizeReport(Report):
    """All that happened in one repair.

    ``paired`` layers were compared with the reference, ``unpaired`` ones left as they were. ``sparsity`` is the share
    of zeros in the weights of convolutions and linear layers, before as after. ``seconds`` are wall time by step.
    """

    model: str
    reference: str
    passes: tuple[str, ...]
    paired: tuple[LayerPair, ...]
    unpaired: tuple[Unpaired, ...]
    images: int
    sparsity: float
    created_biases: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...]
    versions: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return {**super().to_dict(), "seconds": dict(self.seconds), "versions": dict(self.versions)}

    def __str__(self) -> str:
        lines = [
            f"{self.model} renormalized after {self.reference}: {', '.join(self.passes)} on {self.images} images",
            f"  {self.sparsity:.2%} of the weights are zero, before as after",
            *(f"  {note}" for note in self.notes),
            *(f"  {pair}" for pair in self.paired),
            *(f"  left as it is, {layer}" for layer in self.unpaired),
            *(
                f"  created {bias}: load the state with strict=False, or set bias=True on that layer"
                for bias in self.created_biases
            ),
        ]
        lines.append("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds))
        lines.append("  " + ", ".join(f"{name} {version}" for name, version in self.versions))
        return "\n".join(lines)

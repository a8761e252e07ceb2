"""The record of one pruning: what became sparse, how much, and what stayed dense and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfsurgery.records.report import Report


@dataclass(frozen=True)
class PrunedLayer:
    """One weight: how many of its entries are zero now; ``dense`` is the reason why it was not pruned."""

    name: str
    entries: int
    zeros: int
    dense: str = ""

    @property
    def sparsity(self) -> float:
        """Share of entries that are zero, 0 to 1."""
        return self.zeros / self.entries if self.entries else 0.0

    def __str__(self) -> str:
        reason = f"  dense: {self.dense}" if self.dense else ""
        return f"{self.name:<40}{self.entries:>12,}{self.sparsity:>9.2%}{reason}"


@dataclass(frozen=True)
class PruneReport(Report):
    """What was done to prune a model.

    Attributes:
        requested: The sparsity, the sparsities by pattern of layers, or the N:M pattern that was asked for.
        layers: All weights of convolutions and linear layers but the excluded ones.
        parameters: How many parameters the model has in all: biases, norms and excluded layers too.
        notes: Sentences by the pruner.
    """

    model: str
    method: str
    scope: str
    requested: float | str | Mapping[str, float]
    layers: tuple[PrunedLayer, ...]
    parameters: int
    seed: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of the entries of all ``layers`` that are zero."""
        return self._zeros / max(sum(layer.entries for layer in self.layers), 1)

    @property
    def of_parameters(self) -> float:
        """Share of all parameters that are zero in ``layers``."""
        return self._zeros / max(self.parameters, 1)

    @property
    def _zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers; the sparsities among them."""
        plain = super().to_dict()
        for layer, entry in zip(self.layers, plain["layers"], strict=True):
            entry["sparsity"] = layer.sparsity
        return {**plain, "sparsity": self.sparsity, "of_parameters": self.of_parameters}

    def __str__(self) -> str:
        asked = self.requested
        goal = ", ".join(f"{key} {value:g}" for key, value in asked.items()) if isinstance(asked, Mapping) else asked
        lines = [
            f"{self.model} pruned: {self.sparsity:.2%} of {sum(layer.entries for layer in self.layers):,} weights are "
            f"zero, {self.of_parameters:.2%} of all {self.parameters:,} parameters",
            f"  method {self.method}, compared by {self.scope}; asked for {goal}; seed {self.seed}; "
            f"{self.seconds:.2f} s",
            *(f"  {note}" for note in self.notes),
            f"  {'weight':<40}{'entries':>12}{'zero':>9}",
            *(f"  {layer}" for layer in self.layers),
        ]
        return "\n".join(lines)

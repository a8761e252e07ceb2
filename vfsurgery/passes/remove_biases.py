"""Bias removal: zero the biases of the last layers, where they outweigh what is left of the features.

Averaging shrinks what the input induces at every layer, but a bias only in the layers after its own; so behind the last
layers of a merged network the biases have the word. Without the last ``k`` of them the features have it again, however
small they are (Qu & Horvath, CPAL 2025, section 5.3; Fig. 12 has the norms). Removing the first ones does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.agreement import class_logits, ensemble_classes, first_output
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import find_producers
from vfsurgery.tracing.sources import canonical_state


@dataclass(frozen=True, kw_only=True)
class RemoveBiases(Pass):
    """Zero the biases of the last ``layers`` layers that have one, in graph order, the output layer included.

    Norm layers count; convolutions and linear layers that only feed a BatchNorm do not: it subtracts their bias.

    Without ``layers`` every number from 0 to all is tried on held-out images, one in five of the calibration data, that
    neither matching nor statistics see. The one whose outputs most often have their largest class where the ensemble
    of the sources (their mean logits, weighted as the merge is) has it is kept, the smallest one of equals. Labels are
    not looked at. It takes one forward pass of the held-out images through every source, and one through the merged
    model for each number; the report has the figures.

    Raises:
        OptionError: ``layers`` is negative.

    >>> RemoveBiases(layers=2)
    RemoveBiases(layers=2)
    """

    name: ClassVar[str] = "bias-removal"
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 0:
            raise OptionError(explain(f"layers must be at least 0 but is {self.layers}", remedy="0 removes nothing"))

    def holds_out(self) -> bool:
        """Whether the number of layers is to be chosen."""
        return self.layers is None

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Zero the biases.

        Raises:
            OptionError: there are no biases, or fewer than ``layers``; or the number is to be chosen and the model does
                not return one logit for each of several classes.
            DataError: the number is to be chosen and no images are held out.
        """
        state = canonical_state(graph_module)
        producers = find_producers(graph_module, context.groups)
        biases = [state[p.bias] for p in producers if p.bias is not None and not p.feeds_norm]
        if not biases or (self.layers or 0) > len(biases):
            raise OptionError(
                explain(f"{self.name} found {len(biases)} layers with a bias", wanted=self.layers or "at least 1")
            )
        if self.layers is None and not context.sources:
            raise OptionError(
                explain(
                    f"{self.name} goes by its sources' ensemble, and there are no sources",
                    remedy="pass sources=, or say how many: RemoveBiases(layers=...)",
                )
            )
        if self.layers is None:
            curve = agreement_curve(graph_module, biases, context)
            layers = curve.index(max(curve))
            found = " ".join(f"{share:.3f}" for share in curve)
            reason = f", chosen on held-out images by agreement with the ensemble (from none to all: {found})"
        else:
            layers, reason = self.layers, ""
        for bias in biases[len(biases) - layers :]:
            bias.zero_()
        context.notes.append(f"{self.name}: the last {layers} of {len(biases)} biases{reason}")
        return graph_module


def agreement_curve(graph_module: fx.GraphModule, biases: Sequence[Tensor], context: Context) -> list[float]:
    """For 0, 1, ... removed biases, the share of held-out images that the sources' ensemble classifies likewise.

    The biases are as before when it returns.
    """
    kept = [bias.clone() for bias in biases]
    agreed = torch.zeros(len(biases) + 1, dtype=torch.float64, device=biases[0].device)
    count = 0
    for images in context.held_out_images("bias removal: how many biases"):
        found = _logits(graph_module, images).argmax(1)
        classes = ensemble_classes([source.graph_module for source in context.sources], context.weights, images)
        assert classes is not None  # all sources return what the merged model does
        agreed[0] += (found == classes).sum()
        for removed, bias in enumerate(reversed(biases), start=1):
            bias.zero_()
            agreed[removed] += (_logits(graph_module, images).argmax(1) == classes).sum()
        for bias, values in zip(biases, kept, strict=True):
            bias.copy_(values)
        count += classes.numel()
    return (agreed / count).tolist()


def _logits(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    logits = class_logits(graph_module, images)
    if logits is None:
        other = first_output(graph_module, images)
        raise OptionError(
            explain(
                "how many biases to remove is chosen by the classes that a model finds, and this one returns no logits",
                found="no tensor" if other is None else f"shape {tuple(other.shape)}",
                expected="(N, classes, ...)",
                remedy="say how many: RemoveBiases(layers=...)",
            )
        )
    return logits

"""Where in a merged or pruned network the influence of the input vanishes, layer by layer.

Averaging or pruning weights shrinks what a layer makes of its input more than it shrinks what the biases add, and the
loss compounds with depth (Qu & Horvath, "Vanishing Feature: Diagnosing Model Merging and Beyond", CPAL 2025). At layer
``l`` split ``f_l(x) = g_l(x) + h_l`` into the offset ``h_l = f_l(0)`` and the feature ``g_l(x) = f_l(x) - f_l(0)``, and
compare the mean norm of the feature with that of the sources at the same layer.

Layers are paired by their paths, found with hooks while the networks run: a merged network, a pruned one and a graph
module keep them, and nothing needs to be traced. What has no partner of the same path is listed and not guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import IncompatibleModelsError, OptionError, explain
from vfsurgery.records.report import Report, Unpaired
from vfsurgery.scoring.barriers import Barrier
from vfsurgery.scoring.evaluation import Score
from vfsurgery.scoring.flip_rates import Flips
from vfsurgery.scoring.layers import LayerDiagnosis
from vfsurgery.scoring.sweeps import Sweep
from vfsurgery.scoring.verdict import VANISHED, Remedy, State, first_below, in_words, state_of
from vfsurgery.shown import Drawn, write_page
from vfsurgery.stats.imagined import Imagined, stand_in
from vfsurgery.stats.layers import BATCH_NORM, Reading
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.wrappers import network

Distance: TypeAlias = Literal["paper", "code"]
"""How the smoothed bound counts layers: to the last one, or to one beyond it."""

CostRow: TypeAlias = tuple[int, float, float, float]
"""Layers preserved, FLOPs and parameters relative to one source, accuracy from 0 to 1."""

DEPTHS = tuple(step / 20 for step in range(1, 21))
"""Relative depths at which the paper shows its curves: 5 %, 10 %, ..., 100 %."""


@dataclass(frozen=True)
class Diagnosis(Drawn):
    """What :func:`diagnose` found; print it for a table, or make a page of it.

    ``layers`` are in the sources' order of execution, and ``entries`` is how many layers the sources have: those of
    them that have no partner in the model are in ``unpaired`` and leave a gap.
    """

    model: str
    images: int
    entries: int
    layers: tuple[LayerDiagnosis, ...]
    unpaired: tuple[Unpaired, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """``r_l`` of every layer."""
        return tuple(layer.ratio for layer in self.layers)

    @property
    def bound(self) -> tuple[float, ...]:
        """The tight bound of every layer: the largest ratio from it on, ``e_l = max(e_{l+1}, r_l)``, ``e_L = r_L``."""
        return self._backwards(lambda beyond, position: beyond)

    def smoothed(self, gamma: float = 1.4, distance: Distance = "paper") -> tuple[float, ...]:
        """The paper's smoothed bound, ``e_l = max(s_l, r_l)``, of every layer.

        ``s_l = gamma e_{l+1} + (1 - gamma) e_{l+1} (1 - 1 / d) = e_{l+1} (1 + (gamma - 1) / d)``, with ``l = 1..L``.

        Args:
            gamma: How fast the bound may rise from the last layer to the first; 1 gives the tight bound.
            distance: ``d = L + 1 - l`` as in the paper, or ``L + 2 - l`` as in its authors' code.
        """
        extra = {"paper": 0, "code": 1}[distance]
        return self._backwards(
            lambda beyond, position: beyond * (1 + (gamma - 1) / (self.entries - position + extra)),
        )

    def at_depths(self, values: Sequence[float]) -> tuple[float, ...]:
        """Values of all layers, interpolated linearly at the relative depths :data:`DEPTHS`; NaN are left out."""
        points = [
            (layer.depth, value) for layer, value in zip(self.layers, values, strict=True) if not math.isnan(value)
        ]
        depths, heights = zip(*points, strict=True) if points else ((0.0,), (math.nan,))
        return tuple(map(float, np.interp(DEPTHS, depths, heights)))

    def bound_at(self, depth: float) -> float:
        """The tight bound at a relative depth from 0 to 1, between layers interpolated; NaN where no layer has a ratio.

        Layers before the first one compared are preserved: each computes what its source does, with a ratio of 1.
        """
        pairs = zip(self.layers, self.bound, strict=True)
        points = [(layer.depth, bound) for layer, bound in pairs if not math.isnan(bound)]
        if not points:
            return math.nan
        kept, last = max(1.0, points[0][1]), max(self.entries - 1, 1)
        points = [*((position / last, kept) for position in range(self.layers[0].position)), *points]
        depths, bounds = zip(*points, strict=True)
        return float(np.interp(depth, depths, bounds))

    def vanishes_at(self, threshold: float = VANISHED) -> LayerDiagnosis | None:
        """The first layer from which on no ratio reaches ``threshold``, or ``None``."""
        return first_below(self.layers, self.bound, threshold)

    @property
    def recommended(self) -> Remedy:
        """The renormalization for a network of this kind; whether it is needed is for :attr:`verdict` to say."""
        kinds = {layer.kind for layer in self.layers}
        return "reset" if BATCH_NORM in kinds else "repair" if "norm" in kinds else "rescale"

    @property
    def state(self) -> State:
        """What became of the features, in one word."""
        return state_of(self.layers, self.bound)

    @property
    def verdict(self) -> str:
        """In words: where features vanish, and what to do about it and why; or that nothing vanishes."""
        return in_words(self.layers, self.bound, self.recommended)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; what is not a finite number is ``None``."""
        bounds = {"bound": self.bound, "smoothed_bound": self.smoothed()}
        layers = [
            {**layer.to_dict(), **{name: values[index] for name, values in bounds.items()}}
            for index, layer in enumerate(self.layers)
        ]
        curves = {"ratio": self.ratios, **bounds}
        return _plain(
            {
                "model": self.model,
                "images": self.images,
                "state": self.state,
                "verdict": self.verdict,
                "recommended": self.recommended,
                "entries": self.entries,
                "layers": layers,
                "unpaired": [{"name": each.layer, "reason": each.reason} for each in self.unpaired],
                "depths": DEPTHS,
                "curves": {name: self.at_depths(values) for name, values in curves.items()},
            }
        )

    def to_json(self) -> str:
        """The values of :meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def page(
        self,
        path: str | Path,
        *,
        report: Report | None = None,
        scores: Mapping[str, Score] | None = None,
        own: str | None = None,
        barrier: Barrier | None = None,
        flips: Flips | None = None,
        cost_curve: Sequence[CostRow] | None = None,
        before: Diagnosis | None = None,
        sweep: Sweep | None = None,
        imagined: Imagined | None = None,
    ) -> Path:
        """Write one HTML file that needs nothing beside it, neither files nor a network.

        Args:
            path: The file.
            report: Of what made the model; that of a merge has certificates and groups.
            scores: Accuracy and loss by name, as from :func:`vfsurgery.scoring.evaluation.compare`.
            own: The name in ``scores`` that is this network's: its row comes first and is highlighted.
            barrier: The line between the sources.
            flips: What the model gets wrong that its sources got right.
            cost_curve: Rows ``(layers preserved, FLOPs ratio, parameter ratio, accuracy from 0 to 1)``.
            before: The diagnosis of the same network before it was renormalized, to show beside this one.
            sweep: Accuracy over sparsity, of a pruned network.
            imagined: The images, where no real ones were used.

        Raises:
            OptionError: ``own`` is no name in ``scores``, or a row of ``cost_curve`` does not have four numbers.
            CheckpointError: the file cannot be written; nothing is left of it then.
        """
        return write_page(
            self,
            path,
            report=report,
            scores=scores,
            own=own,
            barrier=barrier,
            flips=flips,
            cost_curve=cost_curve,
            before=before,
            sweep=sweep,
            imagined=imagined,
        )

    def __str__(self) -> str:
        sources = len(self.layers[0].sources)
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{self.model} beside {sources} source{'s' * (sources > 1)}, {self.images} images",
            f"  {self.verdict}",
            f"  {'layer':<{width}}  {'kind':<15}{'depth':>6}{'ratio':>10}{'bound':>10}{'smoothed':>10}"
            f"{'feature':>11}{'sources':>11}{'offset':>11}{'sources':>11}{'variance ratio':>16}",
        ]
        for layer, bound, smoothed in zip(self.layers, self.bound, self.smoothed(), strict=True):
            lines.append(
                f"  {layer.name:<{width}}  {layer.kind:<15}{layer.depth:>6.0%}{layer.ratio:>10.3g}{bound:>10.3g}"
                f"{smoothed:>10.3g}{layer.model.feature:>11.3g}{layer.source('feature'):>11.3g}"
                f"{layer.model.offset:>11.3g}{layer.source('offset'):>11.3g}{layer.variance_ratio:>16.3g}"
            )
        return "\n".join([*lines, *(f"  not compared: {layer}" for layer in self.unpaired)])

    def _backwards(self, smooth: Callable[[float, int], float]) -> tuple[float, ...]:
        """``e_l = max(s_l, r_l)`` from the last layer back; layers that are missing, or NaN, do not raise it."""
        ratios = {layer.position: layer.ratio for layer in self.layers}
        bounds: dict[int, float] = {}
        beyond = -math.inf
        for position in reversed(range(self.entries)):
            ratio = ratios.get(position, math.nan)
            raised = smooth(beyond, position) if math.isfinite(beyond) else beyond
            beyond = raised if math.isnan(ratio) else max(raised, ratio)
            bounds[position] = beyond if beyond > -math.inf else math.nan
        return tuple(bounds[layer.position] for layer in self.layers)


def diagnose(
    model: nn.Module, sources: nn.Module | Sequence[nn.Module], data: Data | str, *, progress: bool = True
) -> Diagnosis:
    """Measure, layer by layer, how much of the sources' features a merged or pruned network keeps.

    For every layer ``l`` the ratio ``r_l = E||f_l(x) - f_l(0)|| / mean_i E||f_l^i(x) - f_l^i(0)||`` over the sources
    ``i`` (Qu & Horvath, CPAL 2025, Def. 5.1; ``0`` is an image of zeros as the network sees it, that is after
    normalization), its bounds, offset and feature, and REPAIR's variance ratio. All networks are read in eval mode
    in one pass over the data; every image counts the same, whatever the batches.

    Args:
        model: The merged, partly merged or pruned network, of any class.
        sources: The networks that it was made from; of a pruned network, the one before pruning.
        data: Images, labels ignored; see :mod:`vfsurgery.data.batches`. The paper takes the training images.
            ``"imagined"`` for images that :func:`~vfsurgery.imagine` makes of the sources.
        progress: Show a bar when it takes over a second.

    Raises:
        OptionError: there is no source.
        IncompatibleModelsError: no layer of the model has the path of a layer of the sources.
        DataError: the data is empty or does not fit a network.

    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = diagnose(dense, dense, torch.randn(32, 4))
    >>> [(layer.name, layer.ratio, layer.variance_ratio) for layer in found.layers]
    [('0', 1.0, 1.0), ('2', 1.0, 1.0)]
    >>> print(found.verdict)
    Nothing vanishes: in every layer the feature norm is at least 1 times that of the reference, as at 0 (0% of ...
    """
    model = network(model)
    others = [sources] if isinstance(sources, nn.Module) else sources
    networks = [model, *(network(each, f"source {number}") for number, each in enumerate(others))]
    if len(networks) < 2:
        raise OptionError(
            explain("there is no source to compare with", remedy="sources=[a, b], or the network before pruning")
        )
    batches = Batches(stand_in(networks[1:], data, progress=progress))
    readings = [Reading(each) for each in networks]
    seen = 0
    with torch.random.fork_rng(_cuda(networks)), eval_mode(*networks):
        for images, _ in progress_bar(batches, "diagnosis", batches.length(), progress):
            for reading in readings:
                reading.update(images)
            seen += len(images)
    return _compare(type(model).__name__, seen, readings)


def _compare(model: str, images: int, readings: Sequence[Reading]) -> Diagnosis:
    """Pair the layers of the model, which comes first, with those of its sources."""
    own, *others = [reading.finalize() for reading in readings]
    order = list(others[0])
    common = [name for name in order if name in own and all(name in other for other in others)]
    if not common:
        raise IncompatibleModelsError(
            explain(
                "the model and its sources have no layer in common",
                model=_first(own),
                sources=_first(others[0]),
                remedy="layers are paired by their paths: pass the networks that the model was made from",
            )
        )
    layers = tuple(
        LayerDiagnosis(
            name,
            own[name].kind,
            order.index(name),
            order.index(name) / (len(order) - 1) if len(order) > 1 else 1.0,
            own[name],
            tuple(other[name] for other in others),
        )
        for name in common
    )
    misfits = dict.fromkeys(name for reading in readings for name in reading.misfits)
    alone = {name: "its outputs are not one block per image" for name in misfits}
    for number, other in enumerate(others):
        alone |= {name: f"source {number} has it, the model has not" for name in other if name not in own} | alone
        alone |= {name: f"the model has it, source {number} has not" for name in own if name not in other} | alone
        alone |= {name: f"source 0 has it, source {number} has not" for name in order if name not in other} | alone
    return Diagnosis(model, images, len(order), layers, tuple(Unpaired(*pair) for pair in alone.items()))


def _first(names: Mapping[str, object]) -> str:
    return ", ".join([*list(names)[:4], *["..."] * (len(names) > 4)]) or "no layer that is known"


def _cuda(networks: Sequence[nn.Module]) -> list[torch.device]:
    devices = {parameter.device for network in networks for parameter in network.parameters()}
    return [device for device in devices if device.type == "cuda"]


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree

"""What preserving more layers buys: cost and quality of preserve-first merging at several boundaries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import OptionError, explain
from vfsurgery.matching import Given
from vfsurgery.merging.arguments import Matchings, asks_for_images
from vfsurgery.merging.merge import match, merge
from vfsurgery.passes.cut import Boundaries
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.records.results import merge_report_of
from vfsurgery.scoring.evaluation import first_images, logits_of
from vfsurgery.stats.imagined import stand_in
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of
from vfsurgery.tracing.sources import eval_mode


@dataclass(frozen=True, slots=True)
class PreservePoint:
    """A merge with one boundary: costs as ratios to one source, quality from 0 to 1.

    ``agreement`` is the share of images that get the class which the sources' mean logits give them; ``accuracy`` is
    ``None`` where the data has no labels.
    """

    boundary: int | str
    layers: int
    flops: float
    parameters: float
    agreement: float
    accuracy: float | None


@dataclass(frozen=True)
class PreserveCurve:
    """What :func:`preserve_curve` found, boundary by boundary. Print it for a table."""

    points: tuple[PreservePoint, ...]
    depth: int
    accuracy: tuple[float, float, float] | None
    """Accuracy of source a, source b and their mean logits, where the data has labels."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """The curve as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max(len(str(point.boundary)) for point in self.points) + 2
        width = max(width, len("preserved  "))
        known = self.accuracy is not None
        lines = [f"{'preserved':<{width}}{'layers':>9}{'flops':>9}{'params':>9}{'agreement':>12}"]
        lines[0] += f"{'accuracy':>11}" * known
        for point in self.points:
            layers = f"{point.layers}/{self.depth}"
            lines.append(
                f"{point.boundary!s:<{width}}{layers:>9}{point.flops:>9.3f}{point.parameters:>9.3f}"
                f"{point.agreement:>12.2%}" + (f"{point.accuracy:>11.2%}" if point.accuracy is not None else "")
            )
        if self.accuracy is not None:
            a, b, ensemble = self.accuracy
            lines.append(f"sources {a:.2%} and {b:.2%}, ensemble {ensemble:.2%}")
        return "\n".join(lines)


def preserve_curve(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    calibration: Data | str | None = None,
    boundaries: Sequence[int | str] | None = None,
    alpha: float = 0.5,
    matching: Matchings = "auto",
    renormalize: Renormalization = "auto",
    masks: str | None = None,
    symmetries: str = "auto",
    imagine: bool = True,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PreserveCurve:
    """Merge ``a`` and ``b`` at several boundaries, matched once, and measure what each costs and gives.

    Args:
        a: The reference.
        b: The source that is aligned to it.
        data: Images to compare predictions on; with labels, accuracy is measured too.
        calibration: Images for matching and renormalization; their labels are not looked at. As ``data`` of
            :func:`vfsurgery.merge`.
        boundaries: As ``preserve`` of :func:`vfsurgery.merge`; by default 0 and every number of layers from 2 (1 is the
            same as 0).
        alpha: As for :func:`vfsurgery.merge`.
        matching: As for :func:`vfsurgery.merge`.
        renormalize: As for :func:`vfsurgery.merge`.
        masks: As for :func:`vfsurgery.merge`.
        symmetries: As for :func:`vfsurgery.merge`.
        imagine: As for :func:`vfsurgery.merge`.
        example_inputs: As for :func:`vfsurgery.merge`; ``None`` takes the first images of the data.
        seed: Of the matching.
        progress: Show a bar when it takes over a second.

    Raises:
        OptionError: there is no boundary, or one that the network does not have.
        SurgeryError: as for :func:`vfsurgery.merge`.

    >>> from vfsurgery.networks.demo import TinyConvNet
    >>> curve = preserve_curve(TinyConvNet(), TinyConvNet(), torch.randn(8, 1, 8, 8), boundaries=[0, 2])
    >>> [point.layers for point in curve.points]
    [0, 2]
    """
    inputs = example_inputs_of(a, first_images(a, data) if example_inputs is None else example_inputs)
    cuts = list(Boundaries(record_or_export(a, inputs)).cuts())
    wanted = [cut.boundary for cut in cuts if cut.boundary != 1] if boundaries is None else list(boundaries)
    if not wanted:
        raise OptionError(explain("boundaries= is empty", remedy="leave it out for all of them"))
    asks = imagine and asks_for_images(matching, renormalize)
    calibration = stand_in([a, b], calibration, inputs, unasked=asks, seed=seed, progress=progress)
    options: dict[str, Any] = {"example_inputs": inputs, "imagine": False, "seed": seed, "progress": False}
    found = Given(match(a, b, data=calibration, matching=matching, symmetries=symmetries, **options))
    options["masks"] = masks
    expected = _Expected.of(a, b, alpha, data)
    points: list[PreservePoint] = []
    for boundary in progress_bar(wanted, "boundaries", len(wanted), progress):
        merged = merge(
            a, b, data=calibration, alpha=alpha, matching=found, renormalize=renormalize, preserve=boundary, **options
        )
        kept = merge_report_of(merged).preserved
        layers, flops, parameters = (0, 1.0, 1.0) if kept is None else (kept.layers, kept.flops, kept.parameters)
        points.append(PreservePoint(boundary, layers, flops, parameters, *expected.compare(merged, data)))
    return PreserveCurve(tuple(points), cuts[0].depth, expected.accuracy)


@dataclass(frozen=True)
class _Expected:
    """Classes that the sources' mean logits give, batch by batch, and the true ones where the data says them."""

    classes: list[Tensor]
    accuracy: tuple[float, float, float] | None

    @staticmethod
    def of(a: nn.Module, b: nn.Module, alpha: float, data: Data) -> _Expected:
        """One pass over the data."""
        classes: list[Tensor] = []
        right: list[Tensor] = []
        with eval_mode(a, b):
            for images, labels in _batches(a, data):
                own = [logits_of(model, images) for model in (a, b)]
                answers = [logits.argmax(1) for logits in (*own, (1 - alpha) * own[0] + alpha * own[1])]
                classes.append(answers[-1])
                if labels is not None:
                    right.append(torch.stack([(answer == labels).float() for answer in answers]))
        if not right:
            return _Expected(classes, None)
        first, second, ensemble = torch.cat(right, 1).mean(1).tolist()
        return _Expected(classes, (first, second, ensemble))

    def compare(self, model: nn.Module, data: Data) -> tuple[float, float | None]:
        """A model's agreement with these classes, and its accuracy."""
        same: list[Tensor] = []
        right: list[Tensor] = []
        with eval_mode(model):
            for (images, labels), classes in zip(_batches(model, data), self.classes, strict=True):
                answer = logits_of(model, images).argmax(1)
                same.append(answer == classes)
                if labels is not None:
                    right.append(answer == labels)
        accuracy = float(torch.cat(right).float().mean()) if right else None
        return float(torch.cat(same).float().mean()), accuracy


def _batches(model: nn.Module, data: Data) -> Iterator[tuple[Tensor, Tensor | None]]:
    device = next(parameter.device for parameter in model.parameters())
    return iter(Batches(data, device=device))

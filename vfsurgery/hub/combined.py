"""The card of checkpoints that were combined on disk, of what their report says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vfsurgery.combining.told import FileReport
from vfsurgery.hub.cards import Card, Network, Summary, described
from vfsurgery.hub.loading import Written

UNKNOWN = "network"
"""What stands for an architecture that nobody has named."""


def card_of_files(report: FileReport, recipe: str, model: str | None, options: Mapping[str, Any]) -> Card:
    """Say what was combined by which method, with base, hashes and coefficients.

    Args:
        report: What :func:`~vfsurgery.combine_files` returned.
        recipe: The command.
        model: The architecture, as in ``"timm:resnet18"``, if it was named.
        options: Its arguments.
    """
    files = [Path(path) for path in report.output]
    name = files[-1].absolute().parent.name if report.is_adapter else files[0].name.partition(".")[0]
    told = str(report)
    sources = zip(report.weights, described(report.sources), strict=True)
    weights = [f"weight {weight:g}: {source}" for weight, source in sources]
    network = Network(
        name=name,
        written=Written(
            tuple(path.name for path in files), model or UNKNOWN, options, of_timm=False, adapter=report.is_adapter
        ),
        summary=Summary("merge", told.partition("\n")[0], tuple(_facts(report)), text=told),
        sources=[*(f"base: {each}" for each in described([] if report.base is None else [report.base])), *weights],
    )
    summary = "A LoRA adapter and how it was made." if report.is_adapter else "A network and how it was made."
    return Card(title=name, summary=summary, networks=[network], recipe=recipe, language="bash")


def _facts(report: FileReport) -> Iterator[tuple[str, str]]:
    yield "method", report.method
    yield "base", "none" if report.base is None else report.base.name
    yield from ((option, str(value)) for option, value in report.options.items())
    yield "weights", ", ".join(f"{weight:g}" for weight in report.weights)
    yield "kinds of tensors told by", report.told_by
    yield "seed", str(report.seed)

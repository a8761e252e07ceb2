"""What commands share that make one network of networks in files: what comes before the work, and what after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click
from torch import Tensor, nn

from vfsurgery.checkpoints import save_state_dict, write_text
from vfsurgery.cli.cards import CARD_OPTION, CardRequest
from vfsurgery.cli.options import (
    QUIET,
    C,
    check_output,
    compute_options,
    example_input,
    import_from_here,
    load_images,
    load_models,
    say,
    together,
)
from vfsurgery.data.batches import Data
from vfsurgery.errors import OptionError, explain
from vfsurgery.records.results import report_of
from vfsurgery.stats.threads import find_device

CALIBRATION = ("data", "limit", "batch_size", "input_size", "mean", "std")
"""Names of the options that say what the calibration data is."""


def output_options(seed: str, endings: str, *others: Callable[[Any], Any]) -> Callable[[C], C]:
    """Options that say where and how to compute, and where the result goes; ``others`` stand in between."""
    path = click.Path(path_type=Path)
    output = click.option("-o", "--output", required=True, type=path, help=f"File ending in {endings}.")
    return together(compute_options(seed), *others, CARD_OPTION, QUIET, output)


def beside(output: Path) -> Path:
    """Where the report of a result lies."""
    return output.with_suffix(".report.json")


@dataclass(frozen=True)
class Job:
    """The networks and images of a command, in its order and on its device, and where the result goes.

    ``example`` are inputs of the shape that was asked for.
    """

    output: Path
    networks: Sequence[nn.Module]
    images: Data | str | None
    example: Tensor | None
    card: CardRequest | None
    options: Mapping[str, Any]

    @classmethod
    def begin(
        cls,
        sources: tuple[Path, ...],
        output: Path,
        endings: tuple[str, ...],
        options: Mapping[str, Any],
    ) -> Self:
        """Check where the result goes, before anything takes time, and read networks and images.

        Args:
            sources: Files of the networks.
            output: Where the result goes.
            endings: What it may end in; the first one is offered.
            options: Those of the command.
        """
        import_from_here()
        check_output(output, beside(output), sources, endings)
        card = CardRequest.of(sources, output) if options["card"] else None
        target, model = find_device(options["device"]), options["model"]
        networks = load_models(
            sources, model, options["num_classes"], options["key"], target, ema=options.get("ema", True)
        )
        given = {name: options[name] for name in CALIBRATION}
        images = load_images(model, networks[0], seed=options["seed"], **given)
        return cls(output, networks, images, example_input(options["input_size"], target), card, options)

    def need_images(self, what: str) -> None:
        """Refuse to do ``what`` without images."""
        if self.images is None:
            raise OptionError(
                explain(f"{what} needs images", remedy="--data imagefolder:PATH, some hundred do; or --data imagined")
            )

    def finish(self, result: nn.Module, **metadata: str) -> None:
        """Write the weights of a result, its report and its card, and say so."""
        report = beside(self.output)
        save_state_dict(result.state_dict(), self.output, {"model": self.options["model"], **metadata})
        write_text(report, report_of(result).to_json() + "\n")
        say(f"\nwritten to {self.output} and {report}")
        if self.card is not None:
            self.card.write(result, self.output, (self.output,), self.options)

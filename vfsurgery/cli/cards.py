"""What the option ``--card`` adds to a command: a README.md in the folder of what it writes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click
from click.core import ParameterSource
from torch import nn

from vfsurgery.checkpoints import FileRecord
from vfsurgery.cli.records import as_text
from vfsurgery.hub.cards import CLASSIFICATION, Card, Network, Summary, check_card, described
from vfsurgery.hub.loading import TIMM_WEIGHTS, Written, is_of_timm
from vfsurgery.records.results import Report, report_of
from vfsurgery.stats.imagined import IMAGINED, NO_REAL_IMAGE

CARD_OPTION = click.option("--card", is_flag=True, help="Write a model card, README.md, beside the result.")


@dataclass(frozen=True)
class CardRequest:
    """A card to be written: its sources, hashed before the work, and the folder, which must not have another README."""

    command: str
    sources: tuple[FileRecord, ...]

    @classmethod
    def of(cls, sources: Sequence[Path], output: Path) -> Self:
        """Before the work.

        Raises:
            CheckpointError: A README.md is there that is no card.
        """
        check_card(output.parent)
        records = tuple(FileRecord.of(path) for path in sources if path.is_file())  # others are refused when read
        return cls(command_line(click.get_current_context()), records)

    def write(self, result: nn.Module, output: Path, files: Sequence[Path], options: Mapping[str, Any]) -> Path:
        """Write the card of ``result``, which lies in ``files``, the last of which loads it."""
        of_timm, classes = is_of_timm(result), options["num_classes"]
        whole = output.name == TIMM_WEIGHTS  # then the folder is the network
        written = Written(
            tuple(path.name for path in files),
            options["model"],
            {} if classes is None else {"num_classes": classes},
            of_timm=of_timm,
        )
        name = output.absolute().parent.name if whole else output.stem
        network = Network(
            name=name,
            written=written,
            summary=Summary.of(report_of(result)),
            sources=described(self.sources),
            statistics=_statistics(options, report_of(result)),
            model=result if whole and len(files) == 1 else None,
        )
        return Card(
            title=name,
            summary="A network and how it was made.",
            networks=[network],
            recipe=self.command,
            language="bash",
            task=CLASSIFICATION if of_timm else None,
        ).write(output.parent)


def command_line(context: click.Context) -> str:
    """A command as it was typed: options that were given, files without their folders."""
    words = ["vfsurgery", str(context.command.name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words += [_word(name, value)]
        elif isinstance(value, bool):
            words += [parameter.opts[0] if value or not parameter.secondary_opts else parameter.secondary_opts[0]]
        else:
            several = isinstance(parameter, click.Option) and parameter.multiple
            for each in value if several else [value]:
                words += [parameter.opts[0], _word(name, each)]
    return shlex.join(words)


def _word(name: str, value: Any) -> str:
    return value.name if isinstance(value, Path) else str(as_text(name, value))


def _statistics(options: Mapping[str, Any], report: Report) -> str:
    """Which images were used, if any."""
    notes: Iterable[str] = getattr(report, "notes", ())
    if options["data"] == IMAGINED or any(NO_REAL_IMAGE in note for note in notes):
        return f"of images imagined from the networks; {NO_REAL_IMAGE}"
    if options["data"] is None:
        return "none: the weights alone"
    return f"of at most {options['limit']} images of {options['data']}, labels not looked at"

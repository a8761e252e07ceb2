"""Model cards: the README.md of a folder of weights, with the front matter that the Hugging Face Hub reads.

The template decides how a card looks, this module what it says. What is not known (a licence, base models) is left out
and never guessed.
"""

from __future__ import annotations

import html
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vfsurgery.checkpoints import FileRecord, file_hash, write_text
from vfsurgery.errors import CheckpointError, explain
from vfsurgery.hub.loading import Written, write_config
from vfsurgery.pruning import PruneReport
from vfsurgery.pruning.renormalizing import RenormalizeReport
from vfsurgery.pruning.units import UnitPruneReport
from vfsurgery.records.report import MergeReport, Report, version_of
from vfsurgery.scoring.soups import SoupReport

if TYPE_CHECKING:
    from jinja2 import Template

CARD = "README.md"

TAG = "vfsurgery"
"""Stands among the tags of every card, and tells a card from any other README.md."""

PACKAGES = ("vfsurgery", "torch", "torchvision", "timm", "safetensors")

CLASSIFICATION = "image-classification"

ON_THE_HUB = "timm:hf-hub:"
"""How names of models begin that come from the Hub."""

KINDS: Mapping[type[Report], str] = {
    MergeReport: "merge",
    SoupReport: "model-soup",
    PruneReport: "pruned",
    UnitPruneReport: "pruned",
    RenormalizeReport: "renormalized",
}
"""Tags, by what was done; ``merge`` is the one that the Hub knows."""

FACTS = (
    *(
        "combine",
        "base",
        "weights",
        "matching",
        "renormalize",
        "passes",
        "greedy",
        "method",
        "scope",
        "requested",
        "saliency",
        "fraction",
    ),
    *("removed", "preserved", "masks", "recalibrated", "images", "seed"),
)
"""What of a report is shown as a table, where it has it."""


@dataclass(frozen=True)
class Summary:
    """What a card says of a report, as plain values, so that it can be kept without the report.

    Attributes:
        kind: A tag, or none.
        headline: A sentence.
        facts: Rows of a table.
        certificates: In words.
        biases: Names of biases that the architecture lacks.
        text: The whole report.
        tried: Rows of a table of ways to merge, :attr:`~vfsurgery.records.report.Trial.cells`.
    """

    kind: str | None = None
    headline: str = "As it was given, or trained"
    facts: Sequence[tuple[str, str]] = ()
    certificates: Sequence[str] = ()
    biases: Sequence[str] = ()
    text: str = ""
    tried: Sequence[tuple[str, ...]] = ()

    @staticmethod
    def of(report: Report) -> Summary:
        """The summary of a report."""
        certificates = getattr(report, "certificates", None) or [getattr(report, "certificate", None)]
        return Summary(
            KINDS.get(type(report)),
            str(report).partition("\n")[0],
            tuple(_facts(report)),
            tuple(str(certificate) for certificate in certificates if certificate is not None),
            tuple(getattr(report, "created_biases", ())),
            str(report),
            tuple(trial.cells for trial in getattr(report, "trials", ())),
        )

    def before_training(self, epochs: int) -> Summary:
        """Of a network that was trained since: all but the headline is of before."""
        since = f"then trained for {epochs} epochs, all that follows is of before"
        return replace(self, headline=f"{self.headline}; {since}")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a card.

    Attributes:
        name: Its heading.
        written: The file of its weights, and how they are loaded.
        summary: Of what made it.
        sources: What it was made from, in words, files with their hashes.
        statistics: Which data its statistics are of, in words.
        results: Rows of a table, NaN where nothing was measured.
        published: Figures from elsewhere, by row.
        measured: What the results are, in words.
        accuracy: Of this very network, 0 to 1, for the front matter.
        pictures: File names by caption.
        model: The network itself. If it is timm's and the only one of a card, the file with which timm builds it is
            written beside the card.
    """

    name: str
    written: Written
    summary: Summary
    sources: Sequence[str] = ()
    statistics: str = ""
    results: Mapping[str, float] = field(default_factory=dict[str, float])
    published: Mapping[str, float] = field(default_factory=dict[str, float])
    measured: str = ""
    accuracy: float | None = None
    pictures: Mapping[str, str] = field(default_factory=dict[str, str])
    model: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the README.md of a folder says.

    Attributes:
        title: The first heading.
        summary: One sentence.
        networks: At least one.
        recipe: How to make them again: a recipe, a command or a call.
        language: Of ``recipe``: ``yaml``, ``bash`` or ``python``.
        data: Name of the data that accuracies are of.
        license: As the Hub names licences, as in ``"apache-2.0"``; left out where it is not known.
        base_models: Hub names of the models it was made from, as in ``"timm/resnet18.a1_in1k"``.
        task: As the Hub names tasks.
    """

    title: str
    summary: str
    networks: Sequence[Network]
    recipe: str = ""
    language: str = "yaml"
    data: str = ""
    license: str | None = None
    base_models: Sequence[str] = ()
    task: str | None = None

    def write(self, folder: str | Path) -> Path:
        """Write the card into the folder that holds the files which it names, and return its path.

        Raises:
            CheckpointError: A file is missing, the card cannot be written, or another README.md is there.
        """
        folder = Path(folder)
        check_card(folder)
        write_text(folder / CARD, self._configured(folder).text(folder))
        return folder / CARD

    def _configured(self, folder: Path) -> Card:
        """The same, once timm's file for a single network is written, if timm would find that network by it."""
        one, *others = self.networks
        if others or one.model is None or not write_config(one.model, folder, one.written.name):
            return self
        return replace(self, networks=[replace(one, written=replace(one.written, configured=True))])

    def text(self, folder: Path) -> str:
        """The card; files are hashed where they lie in ``folder``.

        Raises:
            CheckpointError: A file is missing.
        """
        files = dict.fromkeys(name for network in self.networks for name in network.written.files)
        versions = [f"{name} {version_of(name)}" for name in PACKAGES]
        return _template().render(
            card=self,
            front=self.front_matter(),
            entries=[_entry(network) for network in self.networks],
            files=[FileRecord(name, file_hash(folder / name)) for name in files],
            versions=", ".join([*versions, f"Python {platform.python_version()}"]),
        )

    def front_matter(self) -> str:
        """YAML that the Hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        of_timm = all(network.written.of_timm for network in self.networks)
        kinds = {network.summary.kind for network in self.networks if network.summary.kind is not None}
        scores = [
            EvalResult(
                task_type=self.task or CLASSIFICATION,
                dataset_type=self.data,
                dataset_name=self.data,
                metric_type="accuracy",
                metric_name=f"accuracy of {network.name}",
                metric_value=network.accuracy,
            )
            for network in self.networks
            if network.accuracy is not None and self.data
        ]
        found: dict[str, Any] = {
            "library_name": "timm" if of_timm else None,
            "license": self.license,
            "base_model": list(self.base_models) or None,
            "base_model_relation": "merge" if self.base_models and kinds == {"merge"} else None,
            "pipeline_tag": self.task,
            "tags": [TAG, *sorted(kinds)],
        }
        if scores:
            found |= {"model_name": self.title, "eval_results": scores}
        return ModelCardData(**found).to_yaml()


def described(sources: Sequence[FileRecord | str]) -> list[str]:
    """Sources in words, files with their whole hashes.

    >>> described([FileRecord("models/a.pt", 64 * "0"), "seed 1"])
    ['a.pt, SHA-256 0000000000000000000000000000000000000000000000000000000000000000', 'seed 1']
    """
    return [each if isinstance(each, str) else f"{each.name}, SHA-256 {each.sha256}" for each in sources]


def base_models(models: Iterable[str]) -> list[str]:
    """Hub names of those models that come from there.

    >>> base_models(["timm:resnet18", "timm:hf-hub:timm/resnet18.a1_in1k"])
    ['timm/resnet18.a1_in1k']
    """
    names = {name.removeprefix(ON_THE_HUB).partition("@")[0] for name in models if name.startswith(ON_THE_HUB)}
    return sorted(names)


def check_card(folder: Path) -> None:
    """Refuse a folder that has a README.md which is no card of ours.

    Raises:
        CheckpointError: See above.
    """
    path = folder / CARD
    if path.is_symlink() or path.exists():
        if path.is_file() and is_card(path):
            return
        raise CheckpointError(
            explain(f"{path} is there and no card of vfsurgery", remedy="name a folder of its own, or move that file")
        )


def is_card(path: Path) -> bool:
    """Whether a file is a card of this library, edited or not.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64 * 1024).decode("utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(explain(f"cannot read {path}", cause=error)) from error
    head = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", start, re.DOTALL)
    return head is not None and re.search(rf"^\s*- {TAG}\s*$", head[1], re.MULTILINE) is not None


@dataclass(frozen=True)
class _Entry:
    """What the template shows of one network."""

    network: Network
    loading: str
    facts: Sequence[tuple[str, str]]
    results: Sequence[tuple[str, str, str]]


def _entry(network: Network) -> _Entry:
    results = [
        (label, _number(value), _number(network.published.get(label, math.nan)))
        for label, value in network.results.items()
    ]
    statistics = [("statistics", network.statistics)] if network.statistics else []
    return _Entry(network, network.written.code(), [*network.summary.facts, *statistics], results)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    for name in FACTS:
        value: Any = getattr(report, name, None)
        if value is None or value == "":
            continue
        if isinstance(value, tuple):
            value = "; ".join(str(part).partition("\n")[0] for part in value) or "none"
        yield {"renormalize": "renormalization"}.get(name, name), str(value)


def _number(value: float) -> str:
    """Four digits, as short as they can be.

    >>> _number(97.22222), _number(10.0), _number(float("nan"))
    ('97.22', '10', '–')
    """
    return "–" if math.isnan(value) else f"{value:.4g}"


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("vfsurgery.hub", ""),
        autoescape=False,  # of HTML; Markdown is escaped by a filter
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"escape_markdown": escape_markdown, "fenced": _fenced}
    made.filters.update(filters)
    return made.get_template("card.md.j2")


def escape_markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line, in a table too.

    >>> print(escape_markdown("a_b | <i>*c*"))
    a\\_b \\| &lt;i&gt;\\*c\\*
    """
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _fenced(text: str, language: str) -> str:
    """A block of code, behind more backticks than the text has in a row."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"

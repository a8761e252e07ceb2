"""What lies on the bench while a recipe runs, as frozen values: networks, what is known of them, what is to be written.

A stage makes a new bench of the one before. So several ways can begin at one bench, and none disturbs another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vfsurgery.checkpoints import FileRecord, load_into, provenance
from vfsurgery.data import Splits
from vfsurgery.hub.cards import Summary
from vfsurgery.recipes.sections import Images, Source, fitting
from vfsurgery.records.report import Report
from vfsurgery.records.results import report_of
from vfsurgery.scoring.barriers import Barrier
from vfsurgery.scoring.evaluation import Score, compare, evaluate, first_images
from vfsurgery.scoring.flip_rates import Flips
from vfsurgery.scoring.measured import Measured
from vfsurgery.stats.imagined import Imagined
from vfsurgery.tracing.examples import BATCH, random_images
from vfsurgery.training import from_seed


class Told(BaseModel):
    """What a stage says: lines for the terminal, plain values for the report, figures by row, all fit to be kept.

    ``rows`` are what expectations look at, accuracies in percent; ``goes_on`` is the way that a comparison chose, and
    ``chain`` what was made on it. What is to be written, what was made and ``images`` that were imagined are not kept.
    Of the networks that a stage made, ``metadata`` and ``summaries`` are what their files and cards say; they are
    filled in by the one who runs it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")

    lines: list[str] = []
    values: dict[str, Any] = {}
    rows: dict[str, float] = {}
    scores: dict[str, Score] = {}
    flips: Flips | None = None
    barrier: Barrier | None = None
    goes_on: str | None = None
    metadata: dict[str, dict[str, str]] = {}
    summaries: dict[str, Summary | None] = {}
    images: Annotated[Any, Field(exclude=True)] = None
    writes: Annotated[list[Any], Field(exclude=True)] = []
    chain: Annotated[list[Any], Field(exclude=True)] = []


@dataclass(frozen=True)
class Lab:
    """What all stages of one run share; ``trainings`` is a folder that keeps those of sources for other recipes."""

    run: str
    sections: Mapping[str, Source]
    splits: Splits | None
    data: Images | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    recipe: str
    progress: bool
    trainings: Path | None = None
    imagined: Imagined | None = None

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """The checkpoints of sources by their names, hashed once: they may be large."""
        named = {name: each.checkpoint for name, each in self.sections.items()}
        return {name: FileRecord.of(Path(file)) for name, file in named.items() if file is not None}

    @property
    def origins(self) -> list[FileRecord | str]:
        """Where the weights of sources come from."""
        made = [each for each in self.sections.values() if each.checkpoint is None]
        words = [
            f"{each.model}, {'its published weights' if each.pretrained else f'from seed {each.seed}'}" for each in made
        ]
        return [*self.files.values(), *words]

    @property
    def calibration(self) -> Any:
        """The images that statistics are taken of: imagined ones if there are any, else those of the data."""
        return self.imagined or (None if self.splits is None else self.splits.calibration)

    def part(self, name: str) -> Any:
        """The images for training, calibration or the test."""
        return self.calibration if name == "calibration" else getattr(self.splits, name)

    @property
    def common(self) -> dict[str, Any]:
        """What merging, pruning and passes are given alike."""
        return {"data": self.calibration, "seed": self.seed, "progress": self.progress}

    def given(self, model: nn.Module) -> dict[str, Any]:
        """The same for what has to run such a ``model`` even without images."""
        return self.common | ({"example_inputs": self.example(model)} if self.calibration is None else {})

    def example(self, model: nn.Module) -> Tensor | None:
        """Two images: of the data, or of the size that the sources are said to take."""
        if self.splits is not None:
            return first_images(model, self.splits.calibration)
        size = next(iter(self.sections.values())).input_size
        return None if size is None else random_images((BATCH, *size), model)

    def load(self) -> tuple[dict[str, Net], list[str]]:
        """Every source with its weights, and notes on what was left out of a file.

        Raises:
            SurgeryError: a model cannot be built, or a checkpoint does not fit.
        """
        networks: dict[str, Net] = {}
        notes: list[str] = []
        with fitting(self.sections.values()):
            for name, section in self.sections.items():
                model = from_seed(section.build, section.seed)
                if (file := section.checkpoint) is not None:
                    notes += [f"{file}: {note}" for note in load_into(model, section.weights(), file)]
                networks[name] = Net(model.to(self.device, self.dtype).eval(), section)
        return networks, notes

    def untrained(self, name: str) -> nn.Module:
        """A network of the class that a name has, with random weights."""
        section = self.sections.get(name) or next(iter(self.sections.values()))
        return from_seed(section.untrained, 0).to(self.device, self.dtype)


@dataclass(frozen=True)
class Net:
    """A network, and what is known of it.

    ``source`` says where it comes from as long as nothing was done to it; ``origins`` are those that it was made from,
    and ``before`` what it was before it was renormalized; training keeps its zeros where it is ``sparse``.
    """

    model: nn.Module
    source: Source | None = None
    origins: tuple[nn.Module, ...] = ()
    before: nn.Module | None = None
    sparse: bool = False
    report: Report | None = None
    summary: Summary | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def become(self, model: nn.Module, **known: Any) -> Net:
        """The same network with other weights, and with what else is known now."""
        return replace(self, **{"model": model, "source": None, "before": None, "report": None, **known})

    def reported(self, lab: Lab) -> Net:
        """With the report of what made it just now, and what a file and a card say of that."""
        report = report_of(self.model)
        metadata = provenance(report, lab.recipe, [*lab.files.values()])
        return replace(self, report=report, summary=Summary.of(report), metadata=metadata)


@dataclass(frozen=True)
class Bench:
    """The networks by name as they are, the sources as they went into a merge, figures, and what is to be written.

    ``keep`` gives the file that keeps a network's training; ``shared`` is what several ways have in common.
    """

    lab: Lab
    networks: Mapping[str, Net]
    ends: Mapping[str, Net] = field(default_factory=dict[str, Net])
    shown: Measured = field(default_factory=Measured)
    writes: tuple[Write, ...] = ()
    keep: Callable[[str], Path] | None = None
    shared: Any = None

    @property
    def models(self) -> dict[str, nn.Module]:
        """The networks without what is known of them."""
        return {name: net.model for name, net in self.networks.items()}

    @property
    def first(self) -> dict[str, nn.Module]:
        """Those that all began with: the sources of the merge, where there was one."""
        return {name: net.model for name, net in (self.ends or self.networks).items()}

    def wrote(self, *writes: Write) -> Bench:
        """With more to be written."""
        return replace(self, writes=(*self.writes, *writes))

    def score(self, part: str) -> dict[str, Score]:
        """Of the networks that all began with, their ensemble if they are several, and what was made of them."""
        data, progress = self.lab.part(part), self.lab.progress
        scores = compare(self.first, data, progress=progress) if len(self.first) > 1 else {}
        others = {name: model for name, model in {**self.first, **self.models}.items() if name not in scores}
        return scores | {name: evaluate(model, data, progress=progress) for name, model in others.items()}


@dataclass(frozen=True)
class Write:
    """A file to be written when all has succeeded; ``caption`` says what a picture shows.

    Of a file of a network, ``name`` and ``net`` say which one it is, and ``shown`` is what was measured by then.
    """

    file: str
    to: Callable[[Path], object]
    caption: str = ""
    name: str = ""
    net: Net | None = None
    shown: Measured = field(default_factory=Measured)

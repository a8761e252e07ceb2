"""Running the experiments of a recipe: each gives a table, files, and figures to hold expectations to."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from vfsurgery.checkpoints import FileRecord, load_into, load_state_dict, provenance, save_state_dict
from vfsurgery.data import Splits
from vfsurgery.hub.cards import Network, Summary, described
from vfsurgery.hub.loading import Written, is_of_timm
from vfsurgery.recipes.comparison import Comparison, compare_merges, table
from vfsurgery.recipes.expectations import Outcome
from vfsurgery.recipes.pruning_sections import PruningSweep, Soup
from vfsurgery.recipes.sections import Experiment, Images, Pair
from vfsurgery.records.report import Report
from vfsurgery.records.results import report_of
from vfsurgery.scoring.sweeps import DENSE, Sweep, row, sweep, sweep_table
from vfsurgery.soups.phases import Retraining, SparseSoup, sparse_soup
from vfsurgery.training import from_seed, train

E = TypeVar("E", bound=Experiment)


@dataclass(frozen=True)
class Lab:
    """What all experiments of one recipe share."""

    data: Images
    splits: Splits
    device: torch.device
    seed: int
    alpha: float
    threads: int | None
    resume: str | None
    progress: bool

    def network(self, experiment: Experiment, seed: int, checkpoint: str | None) -> nn.Module:
        """A network from its seed: loaded where a checkpoint is given, else trained, or trained on."""
        model = from_seed(experiment.build, seed).to(self.device)
        if checkpoint is not None:
            load_into(model, load_state_dict(checkpoint), checkpoint)
            return model.eval()
        return train(
            model,
            self.splits.train,
            seed=seed,
            checkpoint=self._kept_training(experiment, seed),
            label=f"training {experiment.name}, seed {seed}",
            progress=self.progress,
            **experiment.training.model_dump(),
        )

    def _kept_training(self, experiment: Experiment, seed: int) -> Path | None:
        """Named after all that decides the weights, so recipes that train the same network share the file."""
        if self.resume is None:
            return None
        decides = {
            "data": self.data.model_dump(exclude={"calibration", "test"}),
            "model": experiment.model_dump(include={"model", "options", "training"}),
            "threads": self.threads,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.resume) / f"{experiment.model.rpartition(':')[2]}_seed{seed}_{digest}.pt"


class Finding(Protocol):
    """What one experiment gave."""

    @property
    def name(self) -> str:
        """Heads the table, and begins the names of files."""
        ...

    def outcomes(self) -> tuple[Outcome, ...]:
        """Which expectations hold."""
        ...

    def lines(self) -> list[str]:
        """The table."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything but weights, as plain JSON values."""
        ...

    def write(self, base: Path, recipe: str) -> None:
        """Write files whose names begin with ``base``; ``recipe`` is the recipe's text, for their headers."""
        ...

    def described(self, data: str) -> Sequence[tuple[Network, nn.Module]]:
        """The networks that are written, with what a card says about them; ``data`` is the name of the images."""
        ...


class OfExperiment(ABC, Generic[E]):
    """What one pair, sweep or soup gave."""

    experiment: E

    @property
    def name(self) -> str:
        """That of the experiment."""
        return self.experiment.name

    def outcomes(self) -> tuple[Outcome, ...]:
        """Which expectations hold."""
        measured, published = self.measured(), self.published()
        return tuple(expected.check(measured, published) for expected in self.experiment.expectations)

    @abstractmethod
    def measured(self) -> Mapping[str, float]:
        """What stands in the rows that expectations name, accuracies in percent."""

    @abstractmethod
    def published(self) -> Mapping[str, float]:
        """Figures from elsewhere, by row."""


@dataclass(frozen=True)
class PairFinding(OfExperiment[Pair]):
    """Two sources and their merges."""

    experiment: Pair
    comparison: Comparison

    @property
    def model(self) -> nn.Module:
        """The last merge."""
        return self.comparison.merged

    def described(self, data: str) -> Sequence[tuple[Network, nn.Module]]:
        """With the sources' seeds or files, the line between them, and all rows."""
        found = self.comparison
        return _described(
            self,
            found.report,
            self.experiment.seeds,
            statistics=f"of {found.diagnosis.images} calibration images of {data}, labels not looked at",
            accuracy=list(found.scores.values())[-1].accuracy,
            pictures={"accuracy and loss on the way between the sources": f"{self.experiment.name}_barrier.png"},
        )

    @property
    def ratios(self) -> dict[str, float]:
        """Of the rows that ask for a ratio, by label."""
        return {row.label: row.of(self.comparison.diagnoses[row.merge]) for row in self.experiment.ratios}

    def measured(self) -> Mapping[str, float]:
        """Accuracies and barriers in percent, and ratios."""
        accuracies = {label: 100 * score.accuracy for label, score in self.comparison.scores.items()}
        curves = self.comparison.barrier.curves.items()
        barriers = {f"barrier {name}": 100 * curve.accuracy_barrier for name, curve in curves}
        return accuracies | barriers | self.ratios

    def published(self) -> Mapping[str, float]:
        """As the pair has them."""
        return self.experiment.published

    def lines(self) -> list[str]:
        """A row per network."""
        return list(table(self.comparison, self.experiment.published, self.ratios))

    def to_dict(self) -> dict[str, Any]:
        """The comparison and the ratios."""
        return {**self.comparison.to_dict(), "ratios": self.ratios}

    def write(self, base: Path, recipe: str) -> None:
        """The last merge's weights, barrier plot and page."""
        found = self.comparison
        save_state_dict(
            found.merged.state_dict(), f"{base}.safetensors", _header(self.experiment, found.report, recipe)
        )
        found.barrier.plot(f"{base}_barrier.png")
        found.diagnosis.page(
            f"{base}.html",
            report=found.report,
            scores=found.scores,
            own=list(found.scores)[-1],
            barrier=found.barrier,
            flips=found.flips,
        )


@dataclass(frozen=True)
class SweepFinding(OfExperiment[PruningSweep]):
    """One network, pruned in several ways."""

    experiment: PruningSweep
    sweep: Sweep

    @property
    def model(self) -> nn.Module:
        """That in which renormalization brings most."""
        return self.sweep.example.model

    def described(self, data: str) -> Sequence[tuple[Network, nn.Module]]:
        """With the network before pruning, the curves, and all rows."""
        example = self.sweep.example
        return _described(
            self,
            report_of(self.model),
            (self.experiment.seed,),
            statistics=f"of {example.after.images} calibration images of {data}",
            accuracy=self.sweep.scores[row(example.method, example.sparsity, renormalized=True)].accuracy,
            pictures={"accuracy over sparsity": f"{self.experiment.name}_sweep.png"},
        )

    def measured(self) -> Mapping[str, float]:
        """Accuracies in percent."""
        return {label: 100 * score.accuracy for label, score in self.sweep.scores.items()}

    def published(self) -> Mapping[str, float]:
        """By network."""
        return self.experiment.published_rows

    def lines(self) -> list[str]:
        """Two rows per method."""
        return list(sweep_table(self.sweep, self.experiment.published_rows))

    def to_dict(self) -> dict[str, Any]:
        """The curves, and the diagnoses of one cell."""
        return self.sweep.to_dict()

    def write(self, base: Path, recipe: str) -> None:
        """Of the cell in which renormalization brings most, weights and page; and the plot of all."""
        example = self.sweep.example
        report = report_of(example.model)
        save_state_dict(example.model.state_dict(), f"{base}.safetensors", _header(self.experiment, report, recipe))
        self.sweep.plot(f"{base}_sweep.png", self.experiment.published)
        example.after.page(
            f"{base}.html",
            report=report,
            scores=example.scores,
            own=row(example.method, example.sparsity, renormalized=True),
            before=example.before,
            sweep=self.sweep,
        )


@dataclass(frozen=True)
class SoupFinding(OfExperiment[Soup]):
    """One network, made sparse in phases."""

    experiment: Soup
    soup: SparseSoup

    @property
    def model(self) -> nn.Module:
        """The last soup."""
        return self.soup.model

    def described(self, data: str) -> Sequence[tuple[Network, nn.Module]]:
        """With the network that it began with, and all phases."""
        return _described(
            self,
            report_of(self.model),
            (self.experiment.seed,),
            statistics=f"of calibration images of {data}",
            accuracy=self.soup.phases[-1].soup,
        )

    def measured(self) -> Mapping[str, float]:
        """Accuracies in percent."""
        rows = {DENSE: self.soup.dense}
        for number, phase in enumerate(self.soup.phases, start=1):
            rows[f"phase {number} pruned"], rows[f"phase {number} soup"] = phase.pruned, phase.soup
            rows |= {f"phase {number} copy {copy}": accuracy for copy, accuracy in enumerate(phase.copies)}
            rows[f"phase {number} one copy"] = float("nan") if phase.plain is None else phase.plain
        return {label: 100 * accuracy for label, accuracy in rows.items()}

    def published(self) -> Mapping[str, float]:
        """Nothing is."""
        return {}

    def lines(self) -> list[str]:
        """A row per phase."""
        return [f"  {line}" for line in str(self.soup).splitlines()]

    def to_dict(self) -> dict[str, Any]:
        """The phases."""
        return {"name": self.experiment.name, **self.soup.to_dict()}

    def write(self, base: Path, recipe: str) -> None:
        """The last soup's weights and mask."""
        report = report_of(self.soup.model)
        save_state_dict(self.soup.model.state_dict(), f"{base}.safetensors", _header(self.experiment, report, recipe))
        self.soup.masks.save(f"{base}_masks.safetensors")


def _described(
    finding: PairFinding | SweepFinding | SoupFinding, report: Report, seeds: Sequence[int], **others: Any
) -> list[tuple[Network, nn.Module]]:
    """What all cards of experiments say; networks that were not loaded from files were trained from ``seeds``."""
    experiment = finding.experiment
    files = [FileRecord.of(Path(file)) for file in experiment.files]
    network = Network(
        name=experiment.name,
        written=Written(
            (f"{experiment.name}.safetensors",), experiment.model, experiment.options, of_timm=is_of_timm(finding.model)
        ),
        summary=Summary.of(report),
        sources=described(files or [f"{experiment.model}, trained from seed {seed}" for seed in seeds]),
        results=finding.measured(),
        published=finding.published(),
        measured="Accuracies and barriers in percent, on test images.",
        **others,
    )
    return [(network, finding.model)]


def _header(experiment: Experiment, report: Report, recipe: str) -> dict[str, str]:
    """What stands in the header of a file of weights."""
    sources = [FileRecord.of(Path(path)) for path in experiment.files]
    return {"experiment": experiment.name, **provenance(report, recipe, sources)}


def run_pair(pair: Pair, lab: Lab) -> PairFinding:
    """Train or load two sources and merge them in every way."""
    files = pair.checkpoints or (None, None)
    a, b = (lab.network(pair, seed, file) for seed, file in zip(pair.seeds, files, strict=True))
    comparison = compare_merges(
        pair.name,
        a,
        b,
        {merge.row: merge.arguments() for merge in pair.merges},
        calibration=lab.splits.calibration,
        test=lab.splits.test,
        alpha=lab.alpha,
        alphas=pair.alphas,
        seed=lab.seed,
        diagnosed={ratio.merge for ratio in pair.ratios},
        progress=lab.progress,
    )
    return PairFinding(pair, comparison)


def run_sweep(section: PruningSweep, lab: Lab) -> SweepFinding:
    """Train or load a network and prune it in every way."""
    found = sweep(
        section.name,
        lab.network(section, section.seed, section.checkpoint),
        {method.name: method.arguments() for method in section.methods},
        section.sparsities,
        calibration=lab.splits.calibration,
        test=lab.splits.test,
        renormalize=section.renormalize,
        seed=lab.seed,
        progress=lab.progress,
    )
    return SweepFinding(section, found)


def run_soup(section: Soup, lab: Lab) -> SoupFinding:
    """Train or load a network and make it sparse in phases."""
    options = section.model_dump(include={"sparsity", "phases", "copies", "method", "scope", "exclude", "greedy"})
    found = sparse_soup(
        lab.network(section, section.seed, section.checkpoint),
        lab.splits.train,
        lab.splits.test,
        retraining=Retraining(**section.retraining.model_dump()),
        calibration=lab.splits.calibration,
        seed=lab.seed,
        progress=lab.progress,
        **options,
    )
    return SoupFinding(section, found)

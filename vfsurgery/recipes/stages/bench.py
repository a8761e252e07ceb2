"""The networks of a run of stages, and what each kind of step does with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import (
    ONNX,
    PROGRAM,
    FileRecord,
    check_same_classes,
    load_into,
    provenance,
    save_onnx,
    save_program,
    save_state_dict,
    timm_config,
)
from vfsurgery.data import Splits
from vfsurgery.errors import CheckpointError, RecipeError, explain
from vfsurgery.hub.cards import Summary
from vfsurgery.merging.merge import merge
from vfsurgery.passes.running import run_passes
from vfsurgery.pruning import Masks, prune
from vfsurgery.pruning.renormalizing import renormalize
from vfsurgery.recipes.expectations import Outcome
from vfsurgery.recipes.stages.entries import build_normalizations, build_passes
from vfsurgery.recipes.stages.sections import Source
from vfsurgery.recipes.stages.steps import MERGED, Step, file_of
from vfsurgery.recipes.stages.store import Record
from vfsurgery.records.report import Report
from vfsurgery.records.results import report_of
from vfsurgery.scoring.diagnosis import Diagnosis, diagnose
from vfsurgery.scoring.evaluation import Score, compare, evaluate, first_images
from vfsurgery.scoring.flip_rates import flips
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.examples import BATCH, example_inputs_of, random_images
from vfsurgery.training import from_seed, train

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


@dataclass
class Told:
    """What a step says of itself: lines for the terminal, plain values for the report."""

    lines: list[str] = field(default_factory=list[str])
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    outcomes: list[Outcome] = field(default_factory=list[Outcome])


@dataclass(frozen=True)
class Export:
    """A network to be written when all steps have succeeded, and what its card is to say."""

    file: str
    name: str
    model: nn.Module
    summary: Summary
    inputs: tuple[Tensor, ...]
    metadata: Mapping[str, str]

    def write(self, folder: Path) -> Path:
        """Write it by the ending of its name."""
        path = folder / self.file
        if path.suffix == PROGRAM:
            save_program(self.model, self.inputs, path, self.metadata)
        elif path.suffix == ONNX:
            save_onnx(self.model, self.inputs, path, self.metadata)
        else:
            save_state_dict(self.model.state_dict(), path, self.metadata)
        return path


@dataclass(frozen=True)
class Page:
    """A diagnosis to be written as a page; ``name`` is the network's, and that of its row where it was measured."""

    file: str
    name: str
    found: Diagnosis
    report: Report | None
    scores: Mapping[str, Score]

    def write(self, folder: Path) -> Path:
        """Write it."""
        own = self.name if self.name in self.scores else None
        return self.found.page(folder / self.file, report=self.report, scores=self.scores or None, own=own)


@dataclass
class Bench:
    """The networks by name as they are, what they come from, and what is to be written.

    ``origins`` has for each network those that it was made from, ``ends`` the sources as they went into the merge;
    ``sparse`` names those whose zeros training keeps.
    ``training`` gives the file that keeps a network's training. ``measured`` has for each row of scores the networks
    that it was measured on: they may have changed since.
    """

    sections: Mapping[str, Source]
    splits: Splits | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    recipe: str
    progress: bool
    data_key: Any = None
    networks: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    origins: dict[str, list[nn.Module]] = field(default_factory=dict[str, list[nn.Module]])
    ends: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    sparse: set[str] = field(default_factory=set[str])
    reports: dict[str, Report] = field(default_factory=dict[str, Report])
    summaries: dict[str, Summary] = field(default_factory=dict[str, Summary])
    metadata: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    scores: dict[str, Score] = field(default_factory=dict[str, Score])
    measured: dict[str, list[nn.Module]] = field(default_factory=dict[str, list[nn.Module]])
    writes: list[Export | Page] = field(default_factory=list[Export | Page])
    training: Callable[[str], Path] | None = None
    notes: list[str] = field(default_factory=list[str])

    def load_sources(self) -> None:
        """Build every source and bring its weights into it.

        Raises:
            SurgeryError: a model cannot be built, or a checkpoint does not fit.
        """
        for name, section in self.sections.items():
            model = from_seed(section.build, section.seed)
            if section.checkpoint is not None:
                self._load(model, section, section.checkpoint)
            self.networks[name] = model.to(self.device, self.dtype).eval()

    def _load(self, model: nn.Module, section: Source, path: str) -> None:
        """Bring the weights of one source into its network; what was left out of the file is said of the first step."""
        try:
            self.notes += [f"{path}: {note}" for note in load_into(model, section.weights(), path)]
        except CheckpointError:
            check_same_classes({s.checkpoint: s.weights() for s in self.sections.values() if s.checkpoint is not None})
            raise

    def run(self, step: Step) -> Told:
        """Do what a step says."""
        runner: Callable[[Step], Told] = getattr(self, f"_{step.kind}")
        told = runner(step)
        told.lines, self.notes = [*self.notes, *told.lines], []
        if step.changes_networks:
            self._remember(step)
        return told

    def restore(self, step: Step, networks: Mapping[str, nn.Module], record: Record) -> None:
        """Take over what an earlier run of a step gave."""
        self.notes = []  # they are among the lines of the first step
        if step.kind == "merge":
            self._merged(networks[MERGED])
        elif step.changes_networks:
            for name, model in networks.items():
                self._replace(name, model, step.kind)
        if step.kind == "evaluate":
            self._scored(record.scores)
        self.metadata |= record.metadata
        self.summaries |= record.summaries

    def untrained(self, name: str) -> nn.Module:
        """A network of the class that a name has, with random weights."""
        section = self.sections.get(name) or next(iter(self.sections.values()))
        return section.untrained().to(self.device, self.dtype)

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """The checkpoints of sources by their names, hashed once: they may be large."""
        return {
            name: FileRecord.of(Path(each.checkpoint))
            for name, each in self.sections.items()
            if each.checkpoint is not None
        }

    @property
    def origins_in_words(self) -> list[str]:
        """Where the weights of sources come from that were in no file."""
        return [
            f"{each.model}, {'its published weights' if each.pretrained else f'from seed {each.seed}'}"
            for each in self.sections.values()
            if each.checkpoint is None
        ]

    def _remember(self, step: Step) -> None:
        """Keep the report of each network, and what its files are to say."""
        for name in step.made:
            model = self.networks[name]
            if step.kind == "train":  # what a report has measured was measured before
                self.reports.pop(name, None)
                if name in self.summaries:
                    self.summaries[name] = self.summaries[name].before_training(step.value.epochs)
            else:
                self.reports[name] = report_of(model)
                self.summaries[name] = Summary.of(self.reports[name])
                self.metadata[name] = provenance(self.reports[name], self.recipe, [*self.files.values()])

    def _replace(self, name: str, model: nn.Module, kind: str) -> None:
        if kind == "prune":
            if len(self.origins.get(name, ())) != 1:  # pruned before, it still comes from what it was at first
                self.origins[name] = [self.networks[name]]
            self.sparse.add(name)
        self.networks[name] = model

    def _merged(self, model: nn.Module) -> None:
        self.ends = dict(self.networks)
        self.networks = {MERGED: model}
        self.origins = {MERGED: list(self.ends.values())}
        self.sparse = {MERGED} if self.sparse else set()

    def _scored(self, scores: Mapping[str, Score]) -> None:
        """Keep the scores of the networks as they are now; a row of no network is that of the ensemble of the first."""
        now = {**self.ends, **self.networks}
        self.scores = dict(scores)
        self.measured = {
            label: [now[label]] if label in now else [*(self.ends or self.networks).values()] for label in scores
        }

    def scores_beside(self, name: str, model: nn.Module) -> dict[str, Score]:
        """The scores to show with a network: its own, if it is the very one that was measured, and those of others."""
        now = [*self.ends.values(), *self.networks.values()]
        allowed = {label: [model] if label == name else now for label in self.scores}
        return {
            label: score
            for label, score in self.scores.items()
            if all(each in allowed[label] for each in self.measured[label])
        }

    @property
    def _calibration(self) -> Any:
        return None if self.splits is None else self.splits.calibration

    @property
    def _common(self) -> dict[str, Any]:
        """What merging, pruning and passes are given alike."""
        return {"data": self._calibration, "seed": self.seed, "progress": self.progress}

    def _part(self, name: str) -> Any:
        assert self.splits is not None  # the recipe is checked for that
        return getattr(self.splits, name)

    def _train(self, step: Step) -> Told:
        for name in step.networks:
            model = self.networks[name]
            section = self.sections.get(name)
            trained = train(
                copied(model),
                self._part("train"),
                seed=self.seed if section is None else section.seed,
                masks=Masks.of(model) if name in self.sparse else None,
                checkpoint=None if self.training is None else self.training(name),
                label=f"training {name}",
                progress=self.progress,
                **step.value.model_dump(),
            )
            self._replace(name, trained, "train")
        return Told([f"{step.value.epochs} epochs of {', '.join(step.networks)}"])

    def _prune(self, step: Step) -> Told:
        told = Told()
        for name in step.networks:
            pruned = prune(self.networks[name], **step.value.arguments(), **self._common)
            self._replace(name, pruned, "prune")
            told.lines.append(f"{name}: {Masks.of(pruned).sparsity:.2%} of its prunable weights are zero")
            told.values[name] = report_of(pruned).to_dict()
        return told

    def _merge(self, step: Step) -> Told:
        options = step.merge_arguments()
        if self._calibration is None:
            options["example_inputs"] = self._example(next(iter(self.networks.values())))
        merged = merge([*self.networks.values()], **self._common, **options)
        self._merged(merged)
        report = report_of(merged)
        return Told(str(report).splitlines(), report.to_dict())

    def _renormalize(self, step: Step) -> Told:
        told = Told()
        chosen = build_normalizations(step.value)
        for name in step.networks:
            (dense,) = self.origins[name]
            repaired = renormalize(
                self.networks[name],
                reference=dense,
                data=self._calibration,
                renormalize=chosen,
                progress=self.progress,
            )
            self._replace(name, repaired, "renormalize")
            told.lines += [f"{name}: {line}" for line in str(report_of(repaired)).splitlines()[:1]]
            told.values[name] = report_of(repaired).to_dict()
        return told

    def _apply(self, step: Step) -> Told:
        told = Told()
        for name in step.networks:
            changed = run_passes(self.networks[name], build_passes(step.value), **self._common)
            self._replace(name, changed, "apply")
            told.lines += [f"{name}: {line.strip()}" for line in str(report_of(changed)).splitlines()[1:]]
            told.values[name] = report_of(changed).to_dict()
        return told

    def _evaluate(self, step: Step) -> Told:
        data = self._part(step.value.data)
        first = self.ends or self.networks
        if len(first) > 1:
            scores = compare(first, data, progress=self.progress)
        else:
            scores = {name: evaluate(model, data, progress=self.progress) for name, model in first.items()}
        for name, model in self.networks.items() if self.ends else ():
            scores[name] = evaluate(model, data, progress=self.progress)
        self._scored(scores)
        told = Told(values={"scores": {label: asdict(score) for label, score in self.scores.items()}})
        width = max(map(len, self.scores))
        told.lines = [f"{label:<{width}}  {score}" for label, score in self.scores.items()]
        if step.value.flips and self.ends:
            found = flips(self.ends, self.networks[MERGED], data, progress=self.progress)
            told.values["flips"] = found.to_dict()
            told.lines += str(found).splitlines()
        told.outcomes = outcomes_of(step, self.scores)
        return told

    def _diagnose(self, step: Step) -> Told:
        told = Told()
        for name, model in self.networks.items():
            found = diagnose(model, self.origins[name], self._calibration, progress=self.progress)
            file = file_of(step.value.page, name, self.networks)
            self.writes.append(Page(file, name, found, self.reports.get(name), self.scores_beside(name, model)))
            told.lines += [f"{name}: {found.verdict}"]
            told.values[name] = found.to_dict()
        return told

    def _export(self, step: Step) -> Told:
        return self.export(step.value)

    def export(self, files: Sequence[str]) -> Told:
        """Have the networks written, as they are now, into files of these names."""
        told = Told()
        for file in files:
            for name, model in self.networks.items():
                target = file_of(file, name, self.networks)
                self.writes.append(self._exported(target, name, model))
                told.lines.append(target)
        return told

    def _exported(self, file: str, name: str, model: nn.Module) -> Export:
        metadata = {"model": next(iter(self.sections.values())).model, **self.metadata.get(name, {})}
        metadata.setdefault("recipe", self.recipe)
        summary = self.summaries.get(name, Summary())
        restructured = isinstance(model, torch.fx.GraphModule)
        if not file.endswith((PROGRAM, ONNX)):
            if restructured:
                raise RecipeError(
                    explain(
                        f"{file} cannot hold {name}: its graph is not that of its class any more",
                        remedy=f"export it whole, as {Path(file).stem}.pt2 or .onnx; --resume then goes on from here",
                    )
                )
            config = timm_config(model)
            return Export(
                file, name, model, summary, (), metadata if config is None else {**metadata, "timm_config": config}
            )
        shaped = next(iter((self.ends or self.networks).values()))
        inputs = example_inputs_of(shaped, self._example(shaped))
        return Export(file, name, model, summary, inputs, metadata)

    def _example(self, model: nn.Module) -> Tensor | None:
        """Two images: of the data, or of the size that the sources are said to take."""
        if self._calibration is not None:
            return first_images(model, self._calibration)
        size = next(iter(self.sections.values())).input_size
        return None if size is None else random_images((BATCH, *size), model)


def outcomes_of(step: Step, scores: Mapping[str, Score]) -> list[Outcome]:
    """Which expectations of an evaluation hold, on accuracies in percent."""
    measured = {label: 100 * score.accuracy for label, score in scores.items()}
    return [expected.check(measured) for expected in step.value.expectations]

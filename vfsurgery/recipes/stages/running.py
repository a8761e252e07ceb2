"""Running the stages of a recipe, each step once: what an earlier run kept is taken over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfsurgery.checkpoints import FileRecord, file_hash
from vfsurgery.data.datasets import find_data
from vfsurgery.errors import SurgeryError
from vfsurgery.hub.cards import Network, described
from vfsurgery.hub.loading import Written, is_of_timm
from vfsurgery.matching import MATCHERS
from vfsurgery.passes import PASSES
from vfsurgery.pruning import PRUNERS
from vfsurgery.recipes.expectations import Outcome
from vfsurgery.recipes.stages.bench import Bench, Export, Told, outcomes_of
from vfsurgery.recipes.stages.entries import build_passes, name_of
from vfsurgery.recipes.stages.sections import Source
from vfsurgery.recipes.stages.steps import Step, rows_of
from vfsurgery.recipes.stages.store import Kept, Record, Store, digest, loads


@dataclass(frozen=True)
class StagesFinding:
    """What the steps of a recipe gave: printed step by step; ``write`` puts the networks and pages into a folder."""

    name: str
    steps: tuple[Step, ...]
    told: tuple[Told, ...]
    taken_over: tuple[bool, ...]
    bench: Bench

    def outcomes(self) -> tuple[Outcome, ...]:
        """Which expectations hold."""
        return tuple(outcome for told in self.told for outcome in told.outcomes)

    def lines(self) -> list[str]:
        """A heading and what it says of itself, for every step."""
        found: list[str] = []
        for step, told, kept in zip(self.steps, self.told, self.taken_over, strict=True):
            found.append(f"  {step.place + 1} {step}{' (taken over)' if kept else ''}")
            found += [f"    {line}" for line in told.lines]
        return found

    def to_dict(self) -> dict[str, Any]:
        """What every step says, as plain values."""
        return {
            "steps": [
                {"stages": [stage.model_dump(mode="json") for stage in step.stages], "result": told.values}
                for step, told in zip(self.steps, self.told, strict=True)
            ]
        }

    def described(self, data: str) -> Sequence[tuple[Network, nn.Module]]:
        """Every network that is written, with the scores of the last evaluation, its own if it is what was measured."""
        bench = self.bench
        exports = [each for each in bench.writes if isinstance(each, Export)]
        first = next(iter(bench.sections.values()))
        statistics = "" if bench.splits is None else f"of calibration images of {data}"
        beside = [bench.scores_beside(export.name, export.model) for export in exports]
        return [
            (
                Network(
                    name=export.file,
                    written=Written((export.file,), first.model, first.options, of_timm=is_of_timm(export.model)),
                    summary=export.summary,
                    sources=described([*bench.files.values(), *bench.origins_in_words]),
                    results={label: 100 * score.accuracy for label, score in scores.items()},
                    measured="Accuracies in percent." if scores else "",
                    accuracy=scores[export.name].accuracy if export.name in scores else None,
                    statistics=statistics,
                ),
                export.model,
            )
            for export, scores in zip(exports, beside, strict=True)
        ]

    def write(self, base: Path, recipe: str) -> None:
        """Write what is to be written into the folder of ``base``."""
        for write in self.bench.writes:
            write.write(base.parent)


def run_steps(name: str, steps: Sequence[Step], bench: Bench, store: Store, outputs: Sequence[str]) -> StagesFinding:
    """Run every step that is not kept already, in order, and keep what it gives.

    Args:
        name: Of the recipe.
        steps: In their order.
        bench: With nothing on it yet.
        store: Where steps are kept.
        outputs: Files for the networks of the end.

    Raises:
        SurgeryError: a step fails; those before it are kept.
    """
    keys = step_keys(steps, bench)
    bench.load_sources()
    store.prepare()  # a recipe that cannot begin has emptied nothing
    found = [store.find(key) for key in keys]
    told: list[Told] = []
    taken: list[bool] = []
    for place, (step, key, kept) in enumerate(zip(steps, keys, found, strict=True)):
        bench.training = lambda network, key=key: store.training(key, network)
        reports_needed = any(later.kind == "diagnose" for later in steps[place:])
        result = None if kept is None or (step.kind == "merge" and reports_needed) else _taken_over(step, kept, bench)
        taken.append(result is not None)
        told.append(result or _run(step, key, bench, store))
    if outputs:
        bench.export(outputs)
    return StagesFinding(name, tuple(steps), tuple(told), tuple(taken), bench)


def _run(step: Step, key: str, bench: Bench, store: Store) -> Told:
    told = bench.run(step)
    networks: dict[str, nn.Module] = {}
    if step.changes_networks:
        networks = {name: bench.networks[name] for name in step.made}
    elif step.kind != "evaluate":
        return told
    if all(loads(model, bench.untrained(name)) for name, model in networks.items()):
        record = Record(
            lines=told.lines,
            values=told.values,
            metadata={name: bench.metadata[name] for name in networks if name in bench.metadata},
            summaries={name: bench.summaries[name] for name in networks if name in bench.summaries},
            scores=bench.scores if step.kind == "evaluate" else {},
        )
        store.keep(key, record, networks)
    store.forget_trainings(key)
    return told


def _taken_over(step: Step, kept: Kept, bench: Bench) -> Told | None:
    """What a step gave in an earlier run; ``None`` where it cannot be read any more."""
    record = kept.record
    if step.kind == "evaluate" and {*record.scores} != {*rows_of(step, [*bench.sections])}:
        return None
    try:
        networks = {name: kept.load(name, bench.untrained(name)) for name in step.made if step.changes_networks}
    except SurgeryError:
        return None
    bench.restore(step, networks, record)
    return Told(record.lines, record.values, outcomes_of(step, record.scores) if step.kind == "evaluate" else [])


def step_keys(steps: Sequence[Step], bench: Bench) -> list[str]:
    """For every step the hash of all that decides what it gives: sources, data, earlier steps, options, versions."""
    origin = {
        "sources": [_origin(section, bench.files.get(name)) for name, section in bench.sections.items()],
        "data": bench.data_key,
        "code of data": [] if bench.data_key is None else _code([find_data(bench.data_key["name"])]),
        "seed": bench.seed,
        "threads": torch.get_num_threads(),
        "device": bench.device.type,
        "dtype": str(bench.dtype),
        "versions": {package: version(package) for package in ("vfsurgery", "torch", "torchvision", "timm", "scipy")},
    }
    keys: list[str] = []
    key = digest(origin)
    for step in steps:
        own = digest(key, [stage.model_dump(mode="json") for stage in step.stages], _code_of(step))
        keys.append(own)
        key = own if step.changes_networks else key
    return keys


def _origin(section: Source, file: FileRecord | None) -> dict[str, Any]:
    plain: dict[str, Any] = section.model_dump(mode="json")
    return plain if file is None else {**plain, "checkpoint": file.sha256}


def _code_of(step: Step) -> list[str]:
    """Hashes of the code of passes, matchers and pruners that others wrote: it may change under the same name."""
    steps: list[Any] = [
        entry for kind in ("renormalize", "apply") for entry in (step.find(kind) or ()) if step.find(kind) != "auto"
    ]
    used: list[Any] = [PASSES[each.name] for each in build_passes(steps)]
    if (entry := step.find("match")) not in (None, "auto"):
        used.append(MATCHERS[name_of(entry)])
    if step.kind == "prune":
        used.append(PRUNERS[step.value.method])
    return _code(used)


def _code(used: Iterable[Any]) -> list[str]:
    files = {_file_of(each) for each in used if not each.__module__.startswith("vfsurgery.")}
    return sorted(file_hash(file) for file in files if file is not None)


def _file_of(written: Any) -> str | None:
    """The file of a class or function; what was typed into an interpreter has none."""
    try:
        return inspect.getsourcefile(written)
    except (TypeError, OSError):
        return None

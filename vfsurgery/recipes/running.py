"""Running the stages of a recipe, each once: what an earlier run kept is taken over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import nn

from vfsurgery.checkpoints import file_hash
from vfsurgery.checkpoints.kept import Store, digest, loads
from vfsurgery.data.datasets import find_data
from vfsurgery.errors import SurgeryError
from vfsurgery.hub.cards import Network, Summary, described
from vfsurgery.hub.loading import Written, is_of_timm
from vfsurgery.recipes.bench import Bench, Lab, Told
from vfsurgery.recipes.stage import Stage
from vfsurgery.scoring.expectations import Outcome
from vfsurgery.stats.imagined import NO_REAL_IMAGE


@dataclass(frozen=True)
class Step:
    """A stage that was run, what it said, and whether an earlier run did it.

    ``number`` is its place in the list, from 1; none, where it stands in the way of a comparison.
    """

    stage: Stage
    told: Told
    taken_over: bool
    number: int | None


@dataclass(frozen=True)
class Finding:
    """What one list of stages gave, step by step, and the bench at its end."""

    name: str
    all_steps: tuple[Step, ...]
    bench: Bench

    @property
    def steps(self) -> tuple[Step, ...]:
        """Those of the list, without those in the ways of comparisons."""
        return tuple(step for step in self.all_steps if step.number is not None)

    def said(self, name: str) -> Told:
        """What the last stage of a name said, as in ``finding.said("compare").scores``."""
        return next(step.told for step in reversed(self.all_steps) if step.stage.name == name)

    def outcomes(self) -> tuple[Outcome, ...]:
        """Which expectations hold."""
        return tuple(outcome for step in self.all_steps for outcome in step.stage.outcomes(step.told))

    def lines(self) -> list[str]:
        """A heading and what it says of itself, for every stage of the list."""
        found: list[str] = []
        for step in self.steps:
            found.append(f"  {step.number} {step.stage}{' (taken over)' if step.taken_over else ''}")
            found += [f"    {line}" for line in step.told.lines]
        return found

    def to_dict(self) -> dict[str, Any]:
        """What every stage says, as plain values."""
        steps = [
            {"stage": {step.stage.name: step.stage.dump()}, "number": step.number, "result": step.told.values}
            for step in self.all_steps
        ]
        return {"name": self.name, "steps": steps, "expectations": [outcome.to_dict() for outcome in self.outcomes()]}

    def networks(self, data: str) -> Iterator[Network]:
        """Every network that is written, with what a card says of it: figures, as far as they are of this network."""
        bench, lab = self.bench, self.bench.lab
        first = next(iter(lab.sections.values()))
        images = lab.calibration
        count = f"{len(images)} " if isinstance(images, Sized) else ""
        kind = f"imagined images; {NO_REAL_IMAGE}" if lab.imagined is not None else f"calibration images of {data}"
        now = [*bench.networks.values(), *bench.ends.values()]  # the figures are theirs
        for one in bench.writes:
            if one.net is None:
                continue
            model, shown = one.net.model, bench.shown
            if not any(model is each.model for each in now):
                shown = one.shown.beside(shown.once_changed(bench.ends))
            own = shown.rows.get(shown.own.get(one.name, ""))
            yield Network(
                name=one.file,
                written=Written((one.file,), first.model, first.options, of_timm=is_of_timm(model)),
                summary=one.net.summary or Summary(),
                sources=described(lab.origins),
                results=shown.rows,
                published={row: figure for row, figure in shown.published.items() if row in shown.rows},
                measured="Accuracies and barriers in percent." if shown.rows else "",
                accuracy=None if own is None else own / 100,
                statistics="" if images is None else f"of {count}{kind}",
                pictures={each.caption: each.file for each in bench.writes if each.caption},
                model=model,
            )


@dataclass(frozen=True)
class Done:
    """A stage that was run: what it made and said, and the bench behind it."""

    stage: Stage
    models: dict[str, nn.Module]
    told: Told
    bench: Bench

    @classmethod
    def of(cls, stage: Stage, bench: Bench) -> Self:
        """Run it; the networks that it makes have reports of it."""
        models, told = stage.work(bench)
        after = stage.after(bench, models, told)
        if stage.changes and stage.reports:
            after = replace(after, networks={name: net.reported(bench.lab) for name, net in after.networks.items()})
        told.metadata = {name: dict(after.networks[name].metadata) for name in models}
        told.summaries = {name: after.networks[name].summary for name in models}
        return cls(stage, models, told, after)


@dataclass(frozen=True)
class Runner:
    """Runs stages one after another, and keeps what each gives."""

    lab: Lab
    store: Store

    def run(self, stages: Sequence[Stage], bench: Bench, notes: Sequence[str]) -> Finding:
        """Run a whole list; ``notes`` are said by its first stage.

        Raises:
            SurgeryError: a stage fails; those before it are kept.
        """
        key, steps = digest(_origin(self.lab)), list[Step]()
        for number, stage in enumerate(stages, start=1):
            own, later = self._key(key, stage), stages[number:]
            step, bench = self._step(stage, number, own, bench, later)
            steps.append(step)
            way = stage.way(step.told)
            for place, one in enumerate(way):
                key = self._key(key, one)
                done = step.told.chain[place] if step.told.chain else None
                more, bench = self._step(one, None, key, bench, [*way[place + 1 :], *later], done)
                steps.append(more)
            bench, key = stage.behind(bench, step.told), own if stage.changes or stage.decides else key
        steps[0].told.lines[:0] = notes
        return Finding(self.lab.run, tuple(steps), bench)

    def _key(self, before: str, stage: Stage) -> str:
        """The hash of all that decides what a stage gives: what was before, its options, the code of others in it."""
        return digest(before, {stage.name: stage.dump()}, _code(map(type, stage.parts())))

    def _step(
        self, stage: Stage, number: int | None, key: str, bench: Bench, later: Sequence[Stage], done: Done | None = None
    ) -> tuple[Step, Bench]:
        """One stage: taken over from an earlier run, as it was done on the way of a comparison, or run now."""
        if done is None and not self._is_asked_for(stage, key, later):
            taken = self._taken_over(stage, key, bench)
            if taken is not None:
                return Step(stage, taken[0], True, number), taken[1]
        done = done or Done.of(stage, replace(bench, keep=lambda name: self.store.training(key, name)))
        if stage.kept:
            if all(loads(model, self.lab.untrained(name)) for name, model in done.models.items()):
                self.store.keep(key, done.told.model_dump_json(), done.models)
            self.store.forget_trainings(key)
        return Step(stage, done.told, False, number), replace(done.bench, keep=None, shared=None)

    def _is_asked_for(self, stage: Stage, key: str, later: Iterable[Stage]) -> bool:
        """Whether what follows looks at how a network was made, which is not kept: then it is made again."""
        for one in later if stage.changes and stage.reports else ():
            if one.needs_report and self._said(one, self._key(key, one)) is None:
                return True
            if one.changes or one.branches:
                return False
        return False

    def _said(self, stage: Stage, key: str) -> Told | None:
        """What a stage said in an earlier run, if that can be read."""
        text = self.store.find(key) if stage.kept else None
        with suppress(ValueError):
            return None if text is None else Told.model_validate_json(text)

    def _taken_over(self, stage: Stage, key: str, bench: Bench) -> tuple[Told, Bench] | None:
        """What a stage gave in an earlier run; ``None`` where it cannot be read any more."""
        told = self._said(stage, key)
        if told is None:
            return None
        try:
            models = {name: self.store.load(key, name, self.lab.untrained(name)) for name in told.metadata}
        except SurgeryError:
            return None
        after = stage.after(bench, models, told)
        made = {
            name: replace(after.networks[name], metadata=told.metadata[name], summary=told.summaries[name])
            for name in models
        }
        return told, replace(after, networks={**after.networks, **made})


def _origin(lab: Lab) -> dict[str, Any]:
    """What decides the networks that a list of stages begins with, and what its stages give besides their options."""
    files = {name: {"checkpoint": file.sha256} for name, file in lab.files.items()}
    return {
        "sources": [each.model_dump(mode="json") | files.get(name, {}) for name, each in lab.sections.items()],
        "data": None if lab.data is None else lab.data.model_dump(mode="json"),
        "code of data": [] if lab.data is None else _code([find_data(lab.data.name)]),
        "seed": lab.seed,
        "threads": torch.get_num_threads(),
        "device": lab.device.type,
        "dtype": str(lab.dtype),
        "versions": {package: version(package) for package in ("vfsurgery", "torch", "torchvision", "timm", "scipy")},
    }


def _code(used: Iterable[Any]) -> list[str]:
    """Hashes of the code of what others wrote: it may change under the same name."""
    files: set[str | None] = set()
    for each in used:
        with suppress(TypeError, OSError):  # what was typed into an interpreter has no file
            files |= set() if each.__module__.startswith("vfsurgery.") else {inspect.getsourcefile(each)}
    return sorted(file_hash(file) for file in files if file is not None)

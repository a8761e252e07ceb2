"""Surgery written down in YAML: the networks to begin with, and what is done to them, stage by stage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from vfsurgery.checkpoints import WEIGHTS, check_writable, write_text
from vfsurgery.checkpoints.kept import Store
from vfsurgery.checkpoints.plain import changed, line_of
from vfsurgery.errors import RecipeError, explain, refuse_repeated
from vfsurgery.hub.cards import CLASSIFICATION, Card, base_models, check_card
from vfsurgery.recipes.bench import Bench, Lab
from vfsurgery.recipes.running import Finding, Runner
from vfsurgery.recipes.sections import AsTuple, Images, Name, Section, Seed, Source, complete_sources
from vfsurgery.recipes.stage import RESERVED, SCHEMA, Place, Stage, Stages, followed, read, schemas
from vfsurgery.recipes.text import describe, parse, read_recipe
from vfsurgery.scoring.expectations import Outcome
from vfsurgery.stats.threads import find_device, known_device, threads
from vfsurgery.training import from_seed

STEPS = ".stages"
"""Folder below that of the results, for what a run that is cut off has finished."""

Sources = Annotated[tuple[Source, ...], BeforeValidator(complete_sources)]


class Run(Section):
    """Sources, and the stages that they go through; the names of all files begin with its name."""

    name: Name
    sources: Annotated[Sources, Field(min_length=1)]
    stages: Annotated[Stages, Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        refuse_repeated("source", names)
        if taken := next((name for name in names if name in RESERVED), None):
            raise ValueError(f"no source may be called {taken!r}: a row of its own has that name")
        return self

    @property
    def steps(self) -> tuple[Stage, ...]:
        """The stages, and where none of them exports, an export of the networks of the end."""
        exports = any(stage.name == "export" for stage in self.stages)
        return self.stages if exports else (*self.stages, read("export"))


class Recipe(Section):
    """Networks, and what is done to them, one stage after another; or several such ``runs``, one after another.

    A ``model`` may name any importable factory, which is then called: run only recipes that you trust.

    >>> recipe = Recipe.from_yaml('''
    ... name: tiny
    ... sources: ["vfsurgery.networks.demo:TinyConvNet", {seed: 7}]
    ... stages: [merge: {matching: weights}]
    ... ''')
    >>> [str(stage) for stage in recipe.steps]
    ['merge', 'export']
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    name: Name
    source: str | None = None
    data: Images | None = None
    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Annotated[str, AfterValidator(known_device)] = "cpu"
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    resume: str | None = None
    sources: Sources = ()
    stages: Stages = ()
    runs: Annotated[tuple[Run, ...], AsTuple] = ()
    reduced: dict[str, Any] = {}

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        if self.runs and (self.sources or self.stages):
            raise ValueError("sources and stages stand in the runs, where a recipe has several")
        if not self.runs and not (self.sources or self.stages):
            raise ValueError("there is nothing to do: a recipe has sources and stages, or several runs of them")
        if not self.runs and not (self.sources and self.stages):
            raise ValueError("sources and stages come together: networks, and what is done to them")
        refuse_repeated("run", [run.name for run in self.runs])
        list(self.follow())
        return self

    @cached_property
    def parts(self) -> tuple[Run, ...]:
        """The runs, or the only one."""
        return self.runs or (Run(name=self.name, sources=self.sources, stages=self.stages),)

    def follow(self) -> Iterator[tuple[Run, Stage, Place, Place]]:
        """Every stage of every run, with what there is before and behind it.

        Raises:
            Misplaced: a stage cannot stand where it stands.
        """
        files: tuple[str, ...] = ()
        for number, run in enumerate(self.parts):
            names = tuple(source.name for source in run.sources)
            at = Place(run.name, names, names, self.data is not None, files=files)
            above = ("runs", number) if self.runs else ()
            for stage, before, behind in followed(run.steps, at, *above, "stages"):
                yield run, stage, before, behind
                files = behind.files

    @property
    def steps(self) -> tuple[Stage, ...]:
        """All stages in the order in which they run, with the exports that are implied where none is written."""
        return tuple(stage for run in self.parts for stage in run.steps)

    @classmethod
    def from_yaml(
        cls, source: str | Path, changes: Mapping[str, object] | None = None, *, reduced: bool = False
    ) -> Self:
        """Read a recipe from a file, or from text: a string with a line break is text, all else is a path.

        Args:
            source: See above.
            changes: Values to put in the place of what is written, by their path: keys with dots between them, entries
                of lists by their place, their ``name``, or for stages by their key, as in ``stages.train.epochs``.
            reduced: Whether to put in those of ``reduced`` first; the name then ends in ``-reduced``.

        Raises:
            RecipeError: No such file, no YAML, an unknown key (the nearest spelling is offered) or a wrong value; names
                the file and the line. Or there is no ``reduced``.
        """
        if isinstance(source, str) and "\n" in source:
            place, text = "the recipe", source
        else:
            place, text = str(source), read_recipe(Path(source))
        written = parse(text, place, cls.model_fields)
        whole = cls._read(written if reduced else changed(written, changes or {}), place, text)
        if not whole.reduced:
            if reduced:
                remedy = "leave --reduced out, or describe one"
                raise RecipeError(explain(f"{whole.name} has no reduced form", remedy=remedy))
            return whole
        small: Any = {**written, "name": f"{written['name']}-reduced", "reduced": {}}
        for path, value in whole.reduced.items():
            try:
                small = changed(small, {path: value})
            except RecipeError as error:
                raise RecipeError(f"{place}:{line_of(text, ('reduced', path))}: {error}") from None
        found = cls._read(changed(small, changes or {}) if reduced else small, place, text, whole.reduced)
        return found if reduced else whole

    @classmethod
    def _read(cls, content: Any, place: str, text: str, reduced: Mapping[str, Any] | None = None) -> Self:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(describe(error, cls, place, text, reduced)) from None

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of recipes, by which editors complete and check them; ``vfsurgery schema`` prints it."""
        schema = cls.model_json_schema()
        text = json.dumps({**schema, "$defs": {**schema["$defs"], **schemas()}})
        found = json.loads(text.replace(json.dumps(SCHEMA), json.dumps({"$ref": "#/$defs/Stage"})))
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}

    def to_yaml(self) -> str:
        """Write every option down, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def run(self, output: str | Path | None = None, progress: bool = True, *, resume: bool = False) -> RecipeRun:
        """Do what the stages say, and write the results once all of them are there.

        Args:
            output: Folder for the results, made when missing; ``out/<name>`` by default.
            progress: Whether to show bars for what takes more than a second.
            resume: Whether to take over what an earlier run into the same folder has finished: every stage whose
                sources, options and code are the same, and every epoch of a training.

        Raises:
            SurgeryError: A model cannot be built, ``output`` is a file, or a stage fails; nothing is written then.
        """
        start = time.perf_counter()
        output = Path(output) if output is not None else Path("out") / self.name
        check_writable(output / f"{self.name}{WEIGHTS}")
        check_card(output)
        device, first = find_device(self.device), self.parts[0].sources[0]
        splits = self.data and self.data.load(first.model, partial(from_seed, first.untrained, 0))
        labs = [
            Lab(
                run=run.name,
                sections={source.name: source for source in run.sources},
                splits=splits,
                data=self.data,
                device=device,
                dtype=getattr(torch, self.dtype),
                seed=self.seed,
                recipe=self.to_yaml(),
                progress=progress,
                trainings=None if self.resume is None else Path(self.resume),
            )
            for run in self.parts
        ]
        store = Store(output / STEPS, resume)
        findings: list[Finding] = []
        with threads(self.threads):
            loaded = [lab.load() for lab in labs]  # what cannot be built or read is met before the first training
            store.prepare()  # a recipe that cannot begin has emptied nothing
            for lab, part in zip(labs, self.parts, strict=True):
                networks, notes = loaded.pop(0)
                findings.append(Runner(lab, store).run(part.steps, Bench(lab, networks), notes))
        run = RecipeRun(self, tuple(findings), output, time.perf_counter() - start)
        run.write()
        return run


@dataclass(frozen=True)
class RecipeRun:
    """What running a recipe gave: one finding per run, printed as tables; the files lie in ``output``."""

    recipe: Recipe
    findings: tuple[Finding, ...]
    output: Path
    seconds: float

    def outcomes(self) -> tuple[tuple[Outcome, ...], ...]:
        """Run by run, which expectations hold."""
        return tuple(finding.outcomes() for finding in self.findings)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The expectations that do not hold, of all runs."""
        return tuple(outcome for held in self.outcomes() for outcome in held if not outcome.holds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        runs = [finding.to_dict() for finding in self.findings]
        return {"recipe": self.recipe.model_dump(mode="json"), "seconds": self.seconds, "runs": runs}

    def write(self) -> None:
        """Write the files of each run, and for all ``report.json`` and a card."""
        for write in (write for finding in self.findings for write in finding.bench.writes):
            write.to(self.output / write.file)
        write_text(self.output / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        self._card().write(self.output)

    def _card(self) -> Card:
        """What the folder says about itself."""
        data = "" if self.recipe.data is None else self.recipe.data.name
        return Card(
            title=self.recipe.name,
            summary="Networks from a recipe, and what was measured of them.",
            networks=[each for found in self.findings for each in found.networks(data)],
            recipe=self.recipe.to_yaml(),
            data=data,
            base_models=base_models(source.model for run in self.recipe.parts for source in run.sources),
            task=CLASSIFICATION,
        )

    def __str__(self) -> str:
        tables = [
            "\n".join([found.name, *found.lines(), *(f"  {outcome}" for outcome in found.outcomes())])
            for found in self.findings
        ]
        return "\n\n".join([*tables, f"written to {self.output} after {self.seconds:.0f} s"])

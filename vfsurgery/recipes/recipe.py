"""Experiments written down in YAML: which networks to train, how to merge or prune them, what to compare and write."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic.json_schema import PydanticJsonSchemaWarning

from vfsurgery.checkpoints import PROGRAM, WEIGHTS, load_into, load_state_dict, write_text
from vfsurgery.errors import RecipeError, explain
from vfsurgery.hub.cards import CLASSIFICATION, Card, check_card
from vfsurgery.hub.loading import write_config
from vfsurgery.recipes.comparison import Comparison
from vfsurgery.recipes.expectations import Outcome
from vfsurgery.recipes.experiments import (
    Finding,
    Lab,
    PairFinding,
    SoupFinding,
    SweepFinding,
    run_pair,
    run_soup,
    run_sweep,
)
from vfsurgery.recipes.pruning_sections import PruningSweep, ReducedSweep, Soup
from vfsurgery.recipes.sections import (
    AsTuple,
    Experiment,
    Images,
    Name,
    Pair,
    ReducedPair,
    Section,
    Seed,
    Threads,
    given,
    refuse_repeated,
    refuse_unknown,
)
from vfsurgery.recipes.stages.bench import DTYPES, Bench
from vfsurgery.recipes.stages.running import StagesFinding, run_steps
from vfsurgery.recipes.stages.sections import FileNames, Source, Stage, check_weights, complete_sources
from vfsurgery.recipes.stages.steps import RESERVED, Step, check_files, files_of, steps_of
from vfsurgery.recipes.stages.store import Store
from vfsurgery.recipes.text import changed, parse, read_text
from vfsurgery.recipes.wording import describe, written_path
from vfsurgery.stats.threads import threads
from vfsurgery.training import from_seed

STEPS = ".stages"
"""Folder below that of the results, for what a run that is cut off has finished."""

KINDS: Mapping[str, type] = {
    "pairs": PairFinding,
    "sweeps": SweepFinding,
    "soups": SoupFinding,
    "runs": StagesFinding,
}
"""Under which key of the report each kind of finding stands."""


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N")
    return name


class Reduced(Section):
    """What a smaller form of the recipe changes, for machines without a GPU."""

    data: Images | None = None
    threads: Threads | None = None
    pairs: Annotated[tuple[ReducedPair, ...], AsTuple] = ()
    sweeps: Annotated[tuple[ReducedSweep, ...], AsTuple] = ()


class Recipe(Section):
    """Data, and experiments on it: pairs of models to merge, networks to prune.

    Or ``sources`` and ``stages``: networks, and what is done to them, one after another.

    An experiment's ``model`` may name any importable factory, which is then called: run only recipes that you trust.

    >>> recipe = Recipe.from_yaml('''
    ... name: tiny
    ... pairs:
    ...   - {name: conv, model: "vfsurgery.networks.demo:TinyConvNet", training: {epochs: 1}}
    ... ''')
    >>> recipe.pairs[0].training.epochs
    1
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    name: Name
    source: str | None = None
    data: Images | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: Seed = 0
    threads: Threads | None = None
    device: Annotated[str, AfterValidator(_known_device)] = "cpu"
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    resume: str | None = None
    pairs: Annotated[tuple[Pair, ...], AsTuple] = ()
    sweeps: Annotated[tuple[PruningSweep, ...], AsTuple] = ()
    soups: Annotated[tuple[Soup, ...], AsTuple] = ()
    sources: Annotated[tuple[Source, ...], BeforeValidator(complete_sources)] = ()
    stages: Annotated[tuple[Stage, ...], AsTuple] = ()
    outputs: FileNames = ()
    reduced: Reduced | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_repeated("experiment", [experiment.name for experiment in self.experiments])
        names = [source.name for source in self.sources]
        refuse_repeated("source", names)
        if taken := next((name for name in names if name in RESERVED), None):
            raise ValueError(f"no source may be called {taken!r}: a row of its own has that name")
        if not self.experiments and not self.stages:
            raise ValueError("there is nothing to do: a recipe has sources and stages, or pairs, sweeps or soups")
        return self

    @model_validator(mode="after")
    def _stages_can_run(self) -> Self:
        if bool(self.stages) != bool(self.sources):
            raise ValueError("sources and stages come together: networks, and what is done to them")
        if self.stages and self.experiments:
            raise ValueError("a recipe has stages, or else pairs, sweeps and soups: make two of this one")
        if self.dtype != "float32" and not self.stages:
            raise ValueError("dtype is for recipes with stages: pairs, sweeps and soups are computed in float32")
        if self.stages and self.alpha != 0.5:
            raise ValueError("alpha stands in the stage: write merge: {alpha: ...}")
        if self.stages and self.resume is not None:
            raise ValueError("resume is for pairs, sweeps and soups: stages go on with --resume")
        if self.outputs and not self.stages:
            raise ValueError("outputs are for recipes with stages: pairs, sweeps and soups name their files themselves")
        for step in self.steps:
            if self.data is None and step.needs_data:
                raise ValueError(f"stages[{step.place}]: {step.kind} needs data")
            if step.kind == "merge" and step.value.weights is not None:
                check_weights(step.value.weights, len(self.sources), f"stages[{step.place}]")
        check_files(self.steps, self.files)
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the stages become: those of one merge run at once."""
        return tuple(steps_of(self.stages, [source.name for source in self.sources]))

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """Pairs, sweeps and soups, in the order in which they run."""
        return (*self.pairs, *self.sweeps, *self.soups)

    @model_validator(mode="after")
    def _reduced_form_is_a_recipe(self) -> Self:
        if self.reduced is not None:
            for kind, changes, known in (
                ("pair", self.reduced.pairs, self.pairs),
                ("sweep", self.reduced.sweeps, self.sweeps),
            ):
                names = [experiment.name for experiment in known]
                refuse_unknown(f"reduced {kind}", [change.name for change in changes], names)
            try:
                self.in_reduced_form()
            except ValidationError as error:
                problem = error.errors()[0]
                where = written_path(problem["loc"]) or "the recipe"
                raise ValueError(f"in the reduced form, at {where}: {problem['msg']}") from None
        return self

    def in_reduced_form(self) -> Self:
        """Return the smaller recipe that ``reduced`` describes; its name ends in ``-reduced``.

        Raises:
            RecipeError: There is no ``reduced``.
        """
        if self.reduced is None:
            raise RecipeError(
                explain(f"{self.name} has no reduced form", remedy="leave --reduced out, or describe one")
            )
        pairs = {change.name: change for change in self.reduced.pairs}
        sweeps = {change.name: change for change in self.reduced.sweeps}
        content = self.model_dump(mode="json", exclude={"reduced"})
        content |= given(self.reduced)
        content["name"] = f"{self.name}-reduced"
        content["pairs"] = [pairs.get(pair.name, ReducedPair(name=pair.name)).changed(pair) for pair in self.pairs]
        content["sweeps"] = [sweeps.get(one.name, ReducedSweep(name=one.name)).changed(one) for one in self.sweeps]
        return type(self).model_validate(content)

    @classmethod
    def from_yaml(cls, source: str | Path, changes: Mapping[str, object] | None = None) -> Self:
        """Read a recipe from a file, or from text: a string with a line break is text, all else is a path.

        Args:
            source: See above.
            changes: Values to put in the place of what is written, by their path: keys with dots between them, entries
                of lists by their place, their ``name``, or for stages by their key, as in ``stages.train.epochs``.

        Raises:
            RecipeError: No such file, no YAML, an unknown key (the nearest spelling is offered) or a wrong value; names
                the file and the line.
        """
        if isinstance(source, str) and "\n" in source:
            place, text = "the recipe", source
        else:
            place, text = str(source), read_text(Path(source))
        content = parse(text, place, cls.model_fields)
        for path, value in (changes or {}).items():
            content = changed(content, path, value)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(describe(error, cls, place, text)) from None

    def _run_stages(self, output: Path, device: torch.device, progress: bool, resume: bool) -> RecipeRun:
        start = time.perf_counter()
        first = self.sources[0]
        bench = Bench(
            {source.name: source for source in self.sources},
            None if self.data is None else self.data.load(first.model, first.untrained),
            device,
            DTYPES[self.dtype],
            self.seed,
            self.to_yaml(),
            progress,
            None if self.data is None else self.data.model_dump(mode="json"),
        )
        with threads(self.threads):
            finding = run_steps(self.name, self.steps, bench, Store(output / STEPS, resume), self.files)
        run = RecipeRun(self, (finding,), output, time.perf_counter() - start)
        run.write()
        return run

    @property
    def files(self) -> tuple[str, ...]:
        """What the networks of the end are written into; where nothing is said or exported, one file of our name."""
        exports = any(stage.kind == "export" for stage in self.stages)
        return self.outputs or (() if exports else (f"{self.name}{PROGRAM if self._preserves else WEIGHTS}",))

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of all networks and pages that stages have written."""
        return (*(file for step in self.steps for file in step.writes), *files_of(self.files, self.steps[-1].made))

    @property
    def _preserves(self) -> bool:
        return any(stage.kind == "preserve" and stage.value for stage in self.stages)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of recipes, by which editors complete and check them; ``vfsurgery schema`` prints it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # of defaults that are empty mappings
            schema = cls.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def to_yaml(self) -> str:
        """Write every option down, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def run(self, output: str | Path | None = None, progress: bool = True, *, resume: bool = False) -> RecipeRun:
        """Train, merge, compare, and write the results once all of them are there.

        Args:
            output: Folder for the results, made when missing; ``out/<name>`` by default.
            progress: Whether to show bars for what takes more than a second.
            resume: Whether to take over what an earlier run into the same folder has finished: every step whose
                sources, options and code are the same, and every epoch of a training.

        Raises:
            SurgeryError: A model cannot be built, ``output`` is a file, or a merge fails; nothing is written then.
        """
        output = Path(output) if output is not None else Path("out") / self.name
        _check_folder(output)
        check_card(output)
        device = _device(self.device)
        if self.stages:
            return self._run_stages(output, device, progress, resume)
        for experiment in self.experiments:
            model = from_seed(experiment.build, 0)  # every misspelt model is met before the first minute of training
            for path in experiment.files:
                load_into(model, load_state_dict(path), path)
        start = time.perf_counter()
        first = self.experiments[0]
        data = self.data or Images()
        kept = self.resume or (str(output / STEPS) if resume else None)
        splits = data.load(first.model, first.build)
        lab = Lab(data, splits, device, self.seed, self.alpha, self.threads, kept, progress=progress)
        with threads(self.threads):
            findings = (
                *(run_pair(pair, lab) for pair in self.pairs),
                *(run_sweep(one, lab) for one in self.sweeps),
                *(run_soup(one, lab) for one in self.soups),
            )
        run = RecipeRun(self, findings, output, time.perf_counter() - start)
        run.write()
        return run


@dataclass(frozen=True)
class RecipeRun:
    """What running a recipe gave: one finding per experiment, printed as tables; the files lie in ``output``."""

    recipe: Recipe
    findings: tuple[Finding, ...]
    output: Path
    seconds: float

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What merging the pairs gave."""
        return tuple(found.comparison for found in self.findings if isinstance(found, PairFinding))

    def outcomes(self) -> tuple[tuple[Outcome, ...], ...]:
        """Experiment by experiment, which expectations hold."""
        return tuple(finding.outcomes() for finding in self.findings)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The expectations that do not hold, of all experiments."""
        return tuple(outcome for held in self.outcomes() for outcome in held if not outcome.holds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        plain: dict[str, Any] = {"recipe": self.recipe.model_dump(mode="json"), "seconds": self.seconds}
        for kind, made in KINDS.items():
            plain[kind] = [
                {**finding.to_dict(), "expectations": [outcome.to_dict() for outcome in finding.outcomes()]}
                for finding in self.findings
                if isinstance(finding, made)
            ]
        return plain

    def write(self) -> None:
        """Write the files of each experiment, and for all ``report.json`` and a card."""
        text = self.recipe.to_yaml()
        for finding in self.findings:
            finding.write(self.output / finding.name, text)
        write_text(self.output / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        self._card().write(self.output)

    def _card(self) -> Card:
        """What the folder says about itself; a single network of timm also gets the file with which timm loads it."""
        data = (self.recipe.data or Images()).name
        networks = [each for found in self.findings for each in found.described(data)]
        cards = [network for network, _ in networks]
        if len(networks) == 1:
            written = cards[0].written
            if write_config(networks[0][1], self.output, written.name):
                cards = [replace(cards[0], written=replace(written, configured=True))]
        return Card(
            title=self.recipe.name,
            summary="Networks from a recipe, and what was measured of them.",
            networks=cards,
            recipe=self.recipe.to_yaml(),
            data=data,
            base_models=base_models(self.recipe),
            task=CLASSIFICATION,
        )

    def __str__(self) -> str:
        tables = [
            "\n".join([found.name, *found.lines(), *(f"  {outcome}" for outcome in found.outcomes())])
            for found in self.findings
        ]
        return "\n\n".join([*tables, f"written to {self.output} after {self.seconds:.0f} s"])


def base_models(recipe: Recipe) -> list[str]:
    """Hub names of the models that a recipe starts from.

    >>> base_models(Recipe.from_yaml("name: a\\npairs: [{name: b, model: 'timm:hf-hub:timm/resnet18.a1_in1k'}]"))
    ['timm/resnet18.a1_in1k']
    """
    models = [each.model for each in (*recipe.experiments, *recipe.sources)]
    names = [model for model in models if model.startswith(_ON_THE_HUB)]
    return sorted({name.removeprefix(_ON_THE_HUB).partition("@")[0] for name in names})


_ON_THE_HUB = "timm:hf-hub:"


def _device(name: str) -> torch.device:
    """``auto`` is CUDA where there is some, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(explain(f"there is no device {name}", remedy="write device: auto, or device: cpu"))
    return torch.device(name)


def _check_folder(output: Path) -> None:
    """Refuse a folder for results that could not be written, before the work."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        cause = "not writable" if existing.is_dir() else "a file"
        raise RecipeError(
            explain(f"cannot write results into {output}", cause=f"{existing} is {cause}", remedy="name another folder")
        )

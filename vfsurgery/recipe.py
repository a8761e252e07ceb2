"""Experiments written down in YAML: which networks to train, how to merge or prune them, what to compare and write."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from vfsurgery.checkpoints import load_into, load_state_dict, write_text
from vfsurgery.checkpoints.refusals import printable
from vfsurgery.comparison import Comparison
from vfsurgery.data import Splits
from vfsurgery.errors import RecipeError, did_you_mean, explain
from vfsurgery.expectations import Outcome
from vfsurgery.experiments import Finding, Lab, PairFinding, outcomes, run_pair, run_soup, run_sweep
from vfsurgery.pruning_sections import PruningSweep, ReducedSweep, Soup
from vfsurgery.recipe_text import parse, read_text
from vfsurgery.sections import (
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
from vfsurgery.threads import threads
from vfsurgery.training import from_seed


class Reduced(Section):
    """What a smaller form of the recipe changes, for machines without a GPU."""

    data: Images | None = None
    threads: Threads | None = None
    pairs: Annotated[tuple[ReducedPair, ...], AsTuple] = ()
    sweeps: Annotated[tuple[ReducedSweep, ...], AsTuple] = ()


class Recipe(Section):
    """Data, and experiments on it: pairs of models to merge, networks to prune.

    An experiment's ``model`` may name any importable factory, which is then called: run only recipes that you trust.

    >>> recipe = Recipe.from_yaml('''
    ... name: tiny
    ... pairs:
    ...   - {name: conv, model: "vfsurgery.demo:TinyConvNet", training: {epochs: 1}}
    ... ''')
    >>> recipe.pairs[0].training.epochs
    1
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    name: Name
    source: str | None = None
    data: Images = Images()
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: Seed = 0
    threads: Threads | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "cpu"
    resume: str | None = None
    pairs: Annotated[tuple[Pair, ...], AsTuple] = ()
    sweeps: Annotated[tuple[PruningSweep, ...], AsTuple] = ()
    soups: Annotated[tuple[Soup, ...], AsTuple] = ()
    reduced: Reduced | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_repeated("experiment", [experiment.name for experiment in self.experiments])
        if not self.experiments:
            raise ValueError("there is nothing to do: a recipe has pairs, sweeps or soups")
        return self

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
                where = _path(problem["loc"]) or "the recipe"
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
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a recipe from a file, or from text: a string with a line break is text, all else is a path.

        Raises:
            RecipeError: No such file, no YAML, an unknown key (the nearest spelling is offered) or a wrong value.
        """
        if isinstance(source, str) and "\n" in source:
            place, text = "the recipe", source
        else:
            place, text = str(source), read_text(Path(source))
        content = parse(text, place, cls.model_fields)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(_describe(error, cls, place)) from None

    def _images(self) -> Splits:
        """The data, as the first experiment's network expects it."""
        first = self.experiments[0]
        return self.data.load(first.model, first.build)

    def to_yaml(self) -> str:
        """Write every option down, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def run(self, output: str | Path | None = None, progress: bool = True) -> RecipeRun:
        """Train, merge, compare, and write the results once all of them are there.

        Args:
            output: Folder for the results, made when missing; ``out/<name>`` by default.
            progress: Whether to show bars for what takes more than a second.

        Raises:
            SurgeryError: A model cannot be built, ``output`` is a file, or a merge fails; nothing is written then.
        """
        output = Path(output) if output is not None else Path("out") / self.name
        _check_folder(output)
        device = _device(self.device)
        for experiment in self.experiments:
            model = from_seed(experiment.build, 0)  # every misspelt model is met before the first minute of training
            for path in experiment.files:
                load_into(model, load_state_dict(path), path)
        start = time.perf_counter()
        lab = Lab(
            self.data, self._images(), device, self.seed, self.alpha, self.threads, self.resume, progress=progress
        )
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
        return tuple(map(outcomes, self.findings))

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The expectations that do not hold, of all experiments."""
        return tuple(outcome for held in self.outcomes() for outcome in held if not outcome.holds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        plain: dict[str, Any] = {"recipe": self.recipe.model_dump(mode="json"), "seconds": self.seconds}
        for kind in ("pairs", "sweeps", "soups"):
            plain[kind] = [
                {**finding.to_dict(), "expectations": [outcome.to_dict() for outcome in outcomes(finding)]}
                for finding in self.findings
                if finding.experiment in getattr(self.recipe, kind)
            ]
        return plain

    def write(self) -> None:
        """Write the files of each experiment, and ``report.json`` for all."""
        text = self.recipe.to_yaml()
        for finding in self.findings:
            finding.write(self.output / finding.experiment.name, text)
        write_text(self.output / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        tables = [
            "\n".join([found.experiment.name, *found.lines(), *(f"  {outcome}" for outcome in outcomes(found))])
            for found in self.findings
        ]
        return "\n\n".join([*tables, f"written to {self.output} after {self.seconds:.0f} s"])


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


def _describe(error: ValidationError, schema: type[BaseModel], place: str) -> str:
    """The message for the first thing wrong, with its key path; the paths of all others follow."""
    # a misspelt key first: it is often why another one is missing
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first, path = problems[0], _path(problems[0]["loc"])
    others = dict.fromkeys(other for problem in problems[1:] if (other := _path(problem["loc"])) and other != path)
    fact = f"{first['msg'].removeprefix('Value error, ')}, found {printable(repr(first['input']))}"
    remedy = None
    if first["type"] == "extra_forbidden":
        fact = f"unknown key {printable(repr(first['loc'][-1]))}"
        remedy = did_you_mean(str(first["loc"][-1]), _section(schema, first["loc"][:-1]).model_fields)
    elif first["type"] == "missing":
        fact = "a required key is missing"
    elif first["type"] == "value_error":
        fact = first["msg"].removeprefix("Value error, ")
    elif first["type"].startswith("float") and _is_number(first["input"]):
        remedy = "YAML reads 1e-3 as text: write 1.0e-3, without quotes"
    return explain(f"{place}: {fact}", at=path, remedy=remedy, also=", ".join(others) or None)


def _path(location: tuple[int | str, ...]) -> str | None:
    """As in ``pairs[0].training.epochs``; the names that pydantic adds for members of a union are left out."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location if step not in ("str", _TUPLE)]
    return printable("".join(steps).removeprefix(".")) or None


_TUPLE = "tuple[str, ...]"


def _section(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The class of the mapping at ``location``."""
    for step in location:
        if isinstance(step, str):
            annotation = schema.model_fields[step].annotation
            members = getattr(annotation, "__args__", (annotation,))
            schema = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return schema


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True

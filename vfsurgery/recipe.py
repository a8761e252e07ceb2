"""A whole experiment written down in YAML: which pairs to train, how to merge them, what to compare and to write."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from torch import nn

from vfsurgery.checkpoints import FileRecord, load_into, load_state_dict, provenance, save_state_dict, write_text
from vfsurgery.checkpoints.refusals import printable
from vfsurgery.comparison import Comparison, compare_merges, table
from vfsurgery.data import Splits
from vfsurgery.errors import RecipeError, did_you_mean, explain
from vfsurgery.expectations import Outcome
from vfsurgery.recipe_text import parse, read_text
from vfsurgery.sections import (
    AsTuple,
    Images,
    Name,
    Pair,
    Reduced,
    ReducedPair,
    Section,
    Seed,
    Threads,
    given,
    refuse_repeated,
)
from vfsurgery.training import from_seed, train


class Recipe(Section):
    """An experiment: data, pairs of models, and the merges to compare.

    A pair's ``model`` may name any importable factory, which is then called: run only recipes that you trust.

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
    pairs: Annotated[tuple[Pair, ...], AsTuple, Field(min_length=1)]
    reduced: Reduced | None = None

    @field_validator("pairs")
    @classmethod
    def _names_differ(cls, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        refuse_repeated("pair", [pair.name for pair in pairs])
        return pairs

    @model_validator(mode="after")
    def _reduced_form_is_a_recipe(self) -> Self:
        if self.reduced is not None:
            known = [pair.name for pair in self.pairs]
            for change in self.reduced.pairs:
                if change.name not in known:
                    raise ValueError(f"reduced: unknown pair {change.name!r}; {did_you_mean(change.name, known)}")
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
        changes = {change.name: change for change in self.reduced.pairs}
        content = self.model_dump(mode="json", exclude={"reduced"})
        content |= given(self.reduced)
        content["name"] = f"{self.name}-reduced"
        content["pairs"] = [changes.get(pair.name, ReducedPair(name=pair.name)).changed(pair) for pair in self.pairs]
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
        for pair in self.pairs:
            model = from_seed(pair.build, 0)  # every misspelt model is met before the first minute of training
            for path in pair.checkpoints or ():
                load_into(model, load_state_dict(path), path)
        start = time.perf_counter()
        splits = self.data.load()
        with _threads(self.threads):
            comparisons = tuple(self._compare(pair, splits, device, progress) for pair in self.pairs)
        run = RecipeRun(self, comparisons, output, time.perf_counter() - start)
        run.write()
        return run

    def _compare(self, pair: Pair, splits: Splits, device: torch.device, progress: bool) -> Comparison:
        a, b = (self._source(pair, index, splits, device, progress) for index in range(2))
        return compare_merges(
            pair.name,
            a,
            b,
            {merge.row: merge.arguments() for merge in pair.merges},
            calibration=splits.calibration,
            test=splits.test,
            alpha=self.alpha,
            alphas=pair.alphas,
            seed=self.seed,
            progress=progress,
        )

    def _source(self, pair: Pair, index: int, splits: Splits, device: torch.device, progress: bool) -> nn.Module:
        """Source a or b: loaded where a checkpoint is given, else trained, or trained on, from its seed."""
        seed = pair.seeds[index]
        model = from_seed(pair.build, seed).to(device)
        if pair.checkpoints is not None:
            load_into(model, load_state_dict(pair.checkpoints[index]), pair.checkpoints[index])
            return model.eval()
        return train(
            model,
            splits.train,
            seed=seed,
            checkpoint=self._kept_training(pair, seed),
            label=f"training {pair.name}, seed {seed}",
            progress=progress,
            **pair.training.model_dump(),
        )

    def _kept_training(self, pair: Pair, seed: int) -> Path | None:
        """Named after all that decides the weights, so recipes that train the same network share the file."""
        if self.resume is None:
            return None
        decides = {
            "data": self.data.model_dump(exclude={"calibration", "test"}),
            "model": pair.model_dump(include={"model", "options", "training"}),
            "threads": self.threads,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.resume) / f"{pair.model.rpartition(':')[2]}_seed{seed}_{digest}.pt"


@dataclass(frozen=True)
class RecipeRun:
    """What running a recipe gave: one comparison per pair, printed as tables; the files lie in ``output``."""

    recipe: Recipe
    comparisons: tuple[Comparison, ...]
    output: Path
    seconds: float

    def outcomes(self) -> tuple[tuple[Outcome, ...], ...]:
        """Pair by pair, which expectations hold."""
        return tuple(
            tuple(expected.check(_percent(comparison), pair.published) for expected in pair.expectations)
            for pair, comparison in zip(self.recipe.pairs, self.comparisons, strict=True)
        )

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The expectations that do not hold, of all pairs."""
        return tuple(outcome for outcomes in self.outcomes() for outcome in outcomes if not outcome.holds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seconds": self.seconds,
            "pairs": [
                {**comparison.to_dict(), "expectations": [outcome.to_dict() for outcome in outcomes]}
                for comparison, outcomes in zip(self.comparisons, self.outcomes(), strict=True)
            ],
        }

    def write(self) -> None:
        """Write per pair the last merge's weights, barrier plot and page, and ``report.json`` for all."""
        for pair, comparison in zip(self.recipe.pairs, self.comparisons, strict=True):
            base = self.output / comparison.name
            sources = [FileRecord.of(Path(path)) for path in pair.checkpoints or ()]
            metadata = {"pair": pair.name, **provenance(comparison.report, self.recipe.to_yaml(), sources)}
            save_state_dict(comparison.merged.state_dict(), f"{base}.safetensors", metadata)
            comparison.barrier.plot(f"{base}_barrier.png")
            comparison.diagnosis.page(
                f"{base}.html",
                report=comparison.report,
                scores=comparison.scores,
                barrier=comparison.barrier,
                flips=comparison.flips,
            )
        write_text(self.output / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        found = zip(self.recipe.pairs, self.comparisons, self.outcomes(), strict=True)
        tables = [
            "\n".join([pair.name, *table(comparison, pair.published), *(f"  {outcome}" for outcome in outcomes)])
            for pair, comparison, outcomes in found
        ]
        return "\n\n".join([*tables, f"written to {self.output} after {self.seconds:.0f} s"])


def _percent(comparison: Comparison) -> dict[str, float]:
    """Accuracies and barriers of all rows, in percent."""
    accuracies = {label: 100 * score.accuracy for label, score in comparison.scores.items()}
    curves = comparison.barrier.curves.items()
    return accuracies | {f"barrier {name}": 100 * curve.accuracy_barrier for name, curve in curves}


def _device(name: str) -> torch.device:
    """``auto`` is CUDA where there is some, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(explain(f"there is no device {name}", remedy="write device: auto, or device: cpu"))
    return torch.device(name)


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    """Let torch use ``count`` threads: their number decides the order of sums, and with it the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

"""A whole experiment written down in YAML: which pairs to train, how to merge them, what to compare and to write."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from vfsurgery.architectures import build_model
from vfsurgery.checkpoints import save_state_dict, write_text
from vfsurgery.comparison import Comparison, compare_merges
from vfsurgery.data import Splits, digits
from vfsurgery.errors import RecipeError, did_you_mean, explain
from vfsurgery.matching import MATCHERS
from vfsurgery.passes import NORMALIZATIONS
from vfsurgery.training import from_seed, train

# YAML has lists only; a frozen value needs tuples
_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Names become file names, so they hold letters, digits, ``_``, ``.`` and ``-`` only."""


class Section(BaseModel):
    """A mapping of a recipe: frozen, with no keys but its fields, and no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DigitsData(Section):
    """scikit-learn's digits, split by ``seed``; see :func:`vfsurgery.data.digits`."""

    name: Literal["digits"] = "digits"
    seed: int = 0

    def load(self) -> Splits:
        """Return the splits."""
        return digits(seed=self.seed)


class Training(Section):
    """Options of :func:`vfsurgery.training.train`."""

    epochs: Annotated[int, Field(ge=1)] = 20
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Annotated[int, Field(ge=1)] = 64
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


class Merge(Section):
    """One row of the table: options of :func:`vfsurgery.merge`, under ``label`` or a name made from them."""

    matching: str = "auto"
    renormalize: Annotated[str | tuple[str, ...] | None, _AsTuple] = "auto"
    preserve: Annotated[int, Field(ge=0)] | str = 0
    label: str | None = None

    @field_validator("matching")
    @classmethod
    def _matching_exists(cls, matching: str) -> str:
        _refuse_unknown("matching", (matching,), ["auto", *MATCHERS])
        return matching

    @field_validator("renormalize")
    @classmethod
    def _renormalizations_exist(cls, steps: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(steps, str):
            _refuse_unknown("renormalization", (steps,), ["auto", *NORMALIZATIONS])
        else:
            _refuse_unknown("renormalization", steps or (), NORMALIZATIONS)
        return steps

    @property
    def row(self) -> str:
        """The label, or as in ``activations + rescale``."""
        steps = (self.renormalize,) if isinstance(self.renormalize, str) else self.renormalize or ()
        kept = (f"preserve {self.preserve}",) if self.preserve else ()
        return self.label or " + ".join([self.matching, *steps, *kept])


class Pair(Section):
    """Two models of one architecture from two seeds, and the merges to compare; the last one is written out."""

    name: Name
    model: str
    seeds: Annotated[tuple[int, int], _AsTuple] = (0, 1)
    training: Training = Training()
    merges: Annotated[tuple[Merge, ...], _AsTuple, Field(min_length=1)] = (Merge(),)

    @model_validator(mode="after")
    def _rows_differ(self) -> Self:
        _refuse_repeated("merge", [merge.row for merge in self.merges])
        if self.merges[-1].preserve:
            raise ValueError("the last merge has preserve, but its weights are written: put one without it last")
        return self

    def build(self) -> nn.Module:
        """Return one untrained model."""
        return build_model(self.model)

    def train(self, splits: Splits, progress: bool = True) -> tuple[nn.Module, nn.Module]:
        """Train both sources from their seeds."""
        a, b = (self._train_source(seed, splits, progress) for seed in self.seeds)
        return a, b

    def _train_source(self, seed: int, splits: Splits, progress: bool) -> nn.Module:
        model = from_seed(self.build, seed)
        label = f"training {self.name}, seed {seed}"
        return train(model, splits.train, seed=seed, label=label, progress=progress, **self.training.model_dump())


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
    data: DigitsData = DigitsData()
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] | None = None
    pairs: Annotated[tuple[Pair, ...], _AsTuple, Field(min_length=1)]

    @field_validator("pairs")
    @classmethod
    def _names_differ(cls, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        _refuse_repeated("pair", [pair.name for pair in pairs])
        return pairs

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a recipe from a file, or from text: a string with a line break is text, all else is a path.

        Raises:
            RecipeError: No such file, no YAML, an unknown key (the nearest spelling is offered) or a wrong value.
        """
        if isinstance(source, str) and "\n" in source:
            place, text = "the recipe", source
        else:
            place, text = str(source), _read(Path(source))
        content = _parse(text, place)
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
        for pair in self.pairs:
            from_seed(pair.build, 0)  # every misspelt model is met before the first minute of training
        start = time.perf_counter()
        splits = self.data.load()
        with _threads(self.threads):
            comparisons = tuple(self._compare(pair, splits, progress) for pair in self.pairs)
        run = RecipeRun(self, comparisons, output, time.perf_counter() - start)
        run.write()
        return run

    def _compare(self, pair: Pair, splits: Splits, progress: bool) -> Comparison:
        a, b = pair.train(splits, progress)
        merges = {merge.row: merge.model_dump(include={"matching", "renormalize", "preserve"}) for merge in pair.merges}
        return compare_merges(
            pair.name,
            a,
            b,
            merges,
            calibration=splits.calibration,
            test=splits.test,
            alpha=self.alpha,
            seed=self.seed,
            progress=progress,
        )


@dataclass(frozen=True)
class RecipeRun:
    """What running a recipe gave: one comparison per pair, printed as tables; the files lie in ``output``."""

    recipe: Recipe
    comparisons: tuple[Comparison, ...]
    output: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seconds": self.seconds,
            "pairs": [comparison.to_dict() for comparison in self.comparisons],
        }

    def write(self) -> None:
        """Write per pair the last merge's weights, barrier plot and page, and ``report.json`` for all."""
        for comparison in self.comparisons:
            base = self.output / comparison.name
            save_state_dict(comparison.merged.state_dict(), f"{base}.safetensors", {"recipe": self.recipe.name})
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
        tables = "\n\n".join(map(str, self.comparisons))
        return f"{tables}\n\nwritten to {self.output} after {self.seconds:.0f} s"


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


def _refuse_unknown(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; {did_you_mean(name, known)}")


def _refuse_repeated(kind: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two entries have the {kind} name {repeated[0]!r}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(explain(f"cannot read the recipe {path}", cause=error)) from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes plain values only, and here refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, place: str) -> Mapping[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
        raise RecipeError(
            explain(f"{place} is not valid YAML", cause=getattr(error, "problem", None) or error, at=where)
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(
            explain(
                f"{place} is no mapping of keys to values",
                found=f"a {type(content).__name__}",
                accepted=", ".join(Recipe.model_fields),
            )
        )
    return content


def _describe(error: ValidationError, schema: type[BaseModel], place: str) -> str:
    """The message for the first thing wrong, with its key path; the paths of all others follow."""
    # a misspelt key first: it is often why another one is missing
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first, path = problems[0], _path(problems[0]["loc"])
    others = dict.fromkeys(other for problem in problems[1:] if (other := _path(problem["loc"])) and other != path)
    fact = f"{first['msg'].removeprefix('Value error, ')}, found {first['input']!r}"
    remedy = None
    if first["type"] == "extra_forbidden":
        fact = f"unknown key {first['loc'][-1]!r}"
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
    return "".join(steps).removeprefix(".") or None


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

"""The text of recipes: read as a mapping in YAML, and what is wrong with it in words: the key, the line, the remedy.

There are no includes and no environment variables: all that a recipe says stands in its one file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vfsurgery.checkpoints.plain import line_of, read_text, read_yaml
from vfsurgery.checkpoints.refusals import printable
from vfsurgery.errors import RecipeError, did_you_mean, explain
from vfsurgery.recipes.stage import STAGES

EXPERIMENT = "write sources, and stages: [train: ..., {new}]; several experiments are a list of runs"
MOVED = {
    "pairs": EXPERIMENT.format(new="compare: {ways: [LABEL: [merge: ...]]}, barrier, diagnose"),
    "sweeps": EXPERIMENT.format(new="compare: {ways: [LABEL: [prune: ...]], grid: {prune.sparsity: [...]}}, diagnose"),
    "soups": EXPERIMENT.format(new="soup: ..."),
    "alpha": "it stands in the stage: write merge: {alpha: ...}",
    "outputs": "write a last stage: export: [...]",
}
"""Keys of whole recipes that there were, and what took their place."""


_EXPONENT = re.compile(r"[+-]?[\d.]+[eE][+-]?\d+")
_PLAIN, _MEMBERS = ("str", "float", "int"), ("tuple[", "dict[", "function-", "constrained-")


def read_recipe(path: Path) -> str:
    """Return the text of a recipe's file.

    Raises:
        RecipeError: It cannot be read, is no text in UTF-8, or is too large for a recipe.
    """
    try:
        return read_text(path)
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, or a path with a zero in it
        raise RecipeError(explain(f"cannot read the recipe {path}", cause=error)) from error


def parse(text: str, place: str, accepted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read the YAML of a recipe.

    Args:
        text: The YAML.
        place: Where it comes from, for the message.
        accepted: Has the keys that a recipe may have.

    Raises:
        RecipeError: It is no YAML, asks for other than plain values, holds a key twice, is too large or nested too
            deep, or is no mapping.

    >>> parse("name: tiny", "the recipe", {})
    {'name': 'tiny'}
    """
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        mark, cause = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
        remedy = "indent with spaces, YAML takes no tabs" if "'\\t'" in str(error) else None
        raise RecipeError(explain(f"{place} is not valid YAML", cause=cause, at=where, remedy=remedy)) from error
    if not isinstance(content, dict):
        found, known = f"a {type(content).__name__}", ", ".join(accepted)
        raise RecipeError(explain(f"{place} is no mapping of keys to values", found=found, accepted=known))
    return content


def describe(
    error: ValidationError, schema: type[BaseModel], place: str, text: str, reduced: Collection[str] | None = None
) -> str:
    """The message for the first thing wrong, with its line and key path; the paths of all others follow.

    Args:
        error: What the schema says.
        schema: The class that the recipe is read into.
        place: The recipe's file, or words for it.
        text: The recipe.
        reduced: Of an error in the reduced form, the paths whose values it has.
    """
    # a misspelt key first: it is often why another one is missing
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    fact = f"{first['msg'].removeprefix('Value error, ')}, found {printable(repr(first['input']))}"
    remedy, location = None, _location(first)
    if first["type"] == "extra_forbidden":
        key = str(location[-1])
        fact, remedy = f"unknown key {printable(repr(location[-1]))}", did_you_mean(key, _keys(schema, location[:-1]))
        if len(location) == 1 and key in MOVED:
            fact, remedy = f"there is no key {key!r} any more", MOVED[key]
    elif first["type"] == "missing":
        fact = "a required key is missing"
    elif first["type"] == "value_error":
        fact = first["msg"].removeprefix("Value error, ")
    elif first["type"].startswith("float") and _EXPONENT.fullmatch(str(first["input"])):
        remedy = "YAML reads 1e-3 as text: write 1.0e-3, without quotes"
    path = written_path(location)
    others = dict.fromkeys(
        other for problem in problems[1:] if (other := written_path(_location(problem))) and other != path
    )
    if reduced is not None:
        steps = {*map(str, location)}
        own = [key for key in reduced if {step for step in key.split(".") if not step.isdecimal()} <= steps]
        fact, location = f"in the reduced form, {fact}", ("reduced", *own[-1:])
    return explain(f"{place}:{line_of(text, location)}: {fact}", at=path, remedy=remedy, also=", ".join(others) or None)


def written_path(location: tuple[int | str, ...]) -> str | None:
    """As in ``stages[0].train.epochs``; the names that pydantic adds for members of a union are left out.

    >>> written_path(("stages", 0, "soup", "weight_decay", "tuple[float, ...]"))
    'stages[0].soup.weight_decay'
    """
    kept = [step for step in location if isinstance(step, int) or not (step in _PLAIN or step.startswith(_MEMBERS))]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in kept]
    return printable("".join(steps).removeprefix(".")) or None


def _location(problem: Any) -> tuple[int | str, ...]:
    """Where it is: what checks a whole list says by itself which entry it means."""
    return (*problem["loc"], *getattr(problem.get("ctx", {}).get("error"), "location", ()))


def _keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the mapping at ``location``."""
    for step in location:
        if isinstance(step, str) and step in STAGES:
            schema = STAGES[step]
        elif isinstance(step, str) and step in schema.model_fields:
            schema = next(_models(schema.model_fields[step].annotation), schema)
    return [*schema.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from _models(member)

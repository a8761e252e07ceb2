"""What is wrong with a recipe, in words: the key, the line, and what would be right."""

from __future__ import annotations

import re

from pydantic import BaseModel, ValidationError

from vfsurgery.checkpoints.refusals import printable
from vfsurgery.errors import did_you_mean, explain
from vfsurgery.recipes.text import line_of

_TUPLE = "tuple[str, ...]"
_STAGE = re.compile(r"stages\[(\d+)\]: ")


def describe(error: ValidationError, schema: type[BaseModel], place: str, text: str) -> str:
    """The message for the first thing wrong, with its line and key path; the paths of all others follow.

    Args:
        error: What the schema says.
        schema: The class that the recipe is read into.
        place: The recipe's file, or words for it.
        text: The recipe.
    """
    # a misspelt key first: it is often why another one is missing
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    fact = f"{first['msg'].removeprefix('Value error, ')}, found {printable(repr(first['input']))}"
    remedy, location = None, first["loc"]
    if first["type"] == "extra_forbidden":
        fact = f"unknown key {printable(repr(first['loc'][-1]))}"
        remedy = did_you_mean(str(first["loc"][-1]), _section(schema, first["loc"][:-1]).model_fields)
    elif first["type"] == "missing":
        fact = "a required key is missing"
    elif first["type"] == "value_error":
        fact, location = _own(first["msg"].removeprefix("Value error, "), location)
    elif first["type"].startswith("float") and _is_number(first["input"]):
        remedy = "YAML reads 1e-3 as text: write 1.0e-3, without quotes"
    path = written_path(location)
    others = dict.fromkeys(
        other for problem in problems[1:] if (other := written_path(problem["loc"])) and other != path
    )
    where = f"{place}:{line_of(text, location)}"
    return explain(f"{where}: {fact}", at=path, remedy=remedy, also=", ".join(others) or None)


def written_path(location: tuple[int | str, ...]) -> str | None:
    """As in ``pairs[0].training.epochs``; the names that pydantic adds for members of a union are left out.

    >>> written_path(("pairs", 0, "merges", "str"))
    'pairs[0].merges'
    """
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location if step not in ("str", _TUPLE)]
    return printable("".join(steps).removeprefix(".")) or None


def _own(message: str, location: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """A message of ours, and where it belongs: what checks all stages at once begins with the place of one."""
    found = _STAGE.match(message)
    return (message, location) if found is None else (message[found.end() :], ("stages", int(found[1])))


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

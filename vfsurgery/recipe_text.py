"""The text of recipes: YAML that makes plain values only, and no more of them than were written.

There are no includes and no environment variables: all that a recipe says stands in its one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vfsurgery.checkpoints.refusals import printable
from vfsurgery.errors import RecipeError, explain

LARGEST, DEEPEST, MOST_VALUES = 2**18, 20, 100_000
"""Bounds on a recipe: bytes of its file, nested mappings and lists, and values once all aliases are replaced."""


def read_text(path: Path) -> str:
    """Return the text of a recipe's file.

    Raises:
        RecipeError: It cannot be read, is no text in UTF-8, or is too large for a recipe.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise RecipeError(explain(f"cannot read the recipe {path}", cause="it is no regular file"))
        if path.stat().st_size > LARGEST:
            raise RecipeError(explain(f"cannot read the recipe {path}", cause=f"it has more than {LARGEST:,} bytes"))
        return path.read_text(encoding="utf-8-sig")
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
        content = _load(text)
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
                accepted=", ".join(accepted),
            )
        )
    return content


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes plain values only, and here refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # halves of characters, written as escapes, could not be written to a file again
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            # a date that is none, a number too long to read: YAML's own constructors do not say it as YAML errors
            raise yaml.constructor.ConstructorError(None, None, printable(str(error)), node.start_mark) from error
        return value


def _load(text: str) -> object:
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"more than {LARGEST:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, ())
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(f"nested deeper than {DEEPEST}") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node becomes when every alias is replaced by what it stands for.

    An alias is the node that it stands for, so ten lines can become as many values as memory holds: what is counted
    once is remembered, or counting would take as long as replacing.
    """
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an alias stands inside of what it stands for", node.start_mark
        )
    if len(above) > DEEPEST:
        raise yaml.constructor.ConstructorError(None, None, f"nested deeper than {DEEPEST}", node.start_mark)
    if id(node) not in counted:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count(part, counted, (*above, id(node))) for part in parts)
    if counted[id(node)] > MOST_VALUES:
        raise yaml.constructor.ConstructorError(
            None, None, f"becomes more than {MOST_VALUES:,} values", node.start_mark
        )
    return counted[id(node)]

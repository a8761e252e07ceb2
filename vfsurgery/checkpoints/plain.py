"""Plain values in text that others wrote: read from YAML that makes nothing else, found by line, changed by path.

Reading it runs nothing that it says, follows no pipe, and takes no more memory than its bounds allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from vfsurgery.checkpoints.refusals import printable
from vfsurgery.errors import RecipeError, did_you_mean, explain

LARGEST, DEEPEST, MOST_VALUES = 2**18, 20, 100_000
"""Bounds on a text: its characters, nested mappings and lists, and values once all aliases are replaced."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a file, whatever it is that lies there.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, has more than ``largest`` bytes, or is no text in UTF-8.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise ValueError("it is no regular file")
    if path.stat().st_size > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return path.read_text(encoding="utf-8-sig")


def read_yaml(text: str) -> object:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: it is no YAML, asks for other than plain values, holds a key twice, is too large or too deep.

    >>> read_yaml("a: [1, x]")
    {'a': [1, 'x']}
    """
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


def line_of(text: str, location: Sequence[int | str]) -> int:
    """The line, from 1, on which something stands in such a text: its key, or the nearest one around it.

    Args:
        text: YAML that :func:`read_yaml` reads.
        location: Keys and places in lists; what is not there is left out.

    >>> line_of("name: tiny\\npairs:\\n- {name: conv,\\n   model: m}", ("pairs", 0, "model"))
    4
    """
    node = yaml.compose(text, _Loader)
    line = 0
    for step in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            entry = next((pair for pair in node.value if getattr(pair[0], "value", None) == str(step)), None)
            if entry is not None:
                line, node = entry[0].start_mark.line, entry[1]
    return line + 1


def changed(content: Any, changes: Mapping[str, object]) -> Any:
    """Plain values, as of a recipe or a part of it, with others in the place of some.

    Args:
        content: As :func:`read_yaml` returns it; stays as it is.
        changes: Plain values by their paths: keys with dots between them. An entry of a list is named by its place from
            0, by its ``name``, or by its only key; text is such a key without a value.

    Raises:
        RecipeError: a path leads nowhere.

    >>> recipe = {"sources": [{"name": "a"}], "stages": ["merge", {"train": {"epochs": 3}}]}
    >>> changed(recipe, {"stages.train.epochs": 5})["stages"]
    ['merge', {'train': {'epochs': 5}}]
    >>> changed(recipe, {"stages.merge.alpha": 0.2})["stages"][0]
    {'merge': {'alpha': 0.2}}
    """
    for path, value in changes.items():
        steps = path.split(".")
        if len(steps) > DEEPEST:
            fact, remedy = f"a path of {len(steps)} keys leads nowhere", f"recipes nest {DEEPEST} deep"
            raise RecipeError(explain(fact, remedy=remedy))
        content = _changed(content, steps, value, path)
    return content


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes plain values only, and here refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refusal(f"the key {key.value!r} stands twice", key)
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
            raise _refusal(printable(str(error)), node) from error
        return value


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _count(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node becomes when every alias is replaced by what it stands for.

    An alias is the node that it stands for, so ten lines can become as many values as memory holds: what is counted
    once is remembered, or counting would take as long as replacing.
    """
    if id(node) in above:
        raise _refusal("an alias stands inside of what it stands for", node)
    if len(above) > DEEPEST:
        raise _refusal(f"nested deeper than {DEEPEST}", node)
    if id(node) not in counted:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        counted[id(node)] = 1 + sum(_count(part, counted, (*above, id(node))) for part in parts)
    if counted[id(node)] > MOST_VALUES:
        raise _refusal(f"becomes more than {MOST_VALUES:,} values", node)
    return counted[id(node)]


def _changed(node: Any, steps: list[str], value: object, path: str) -> Any:
    if not steps:
        return value
    step, *rest = steps
    if isinstance(node, list):
        entries = [*cast("list[Any]", node)]
        place = _place(entries, step, path)
        entry = {step: None} if entries[place] == step else entries[place]  # a stage that is written as its name
        inside = isinstance(entry, dict) and set(cast("dict[str, Any]", entry)) == {step}
        entries[place] = _changed(entry, steps if inside else rest, value, path)
        return entries
    if node is not None and not isinstance(node, Mapping):
        above = path.removesuffix(".".join(steps)).removesuffix(".")
        because, remedy = f"{above} is {printable(repr(node))}", f"write {above}=VALUE"
        raise RecipeError(explain(f"{path} leads nowhere", because=because, remedy=remedy))
    mapping = dict(cast("Mapping[str, Any]", node or {}))
    return {**mapping, step: _changed(mapping.get(step), rest, value, path)}


def _place(entries: list[Any], step: str, path: str) -> int:
    """The place in a list that a number or a name means."""
    if step.isdecimal() and int(step) < len(entries):
        return int(step)
    names: list[str] = []
    for entry in entries:
        keys = [*cast("dict[str, Any]", entry)] if isinstance(entry, dict) else [str(entry)]
        names.append(str(entry["name"]) if "name" in keys else keys[0] if len(keys) == 1 else "")
    if names.count(step) == 1:
        return names.index(step)
    twice = f"{step!r} stands there {names.count(step)} times" if step in names else None
    known = [name for name in names if name] + [f"0 to {len(entries) - 1}"]
    remedy = "name it by its place" if twice else did_you_mean(step, known)
    raise RecipeError(explain(f"{path} leads nowhere: there is no single {step!r}", because=twice, remedy=remedy))

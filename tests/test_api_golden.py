"""The public names and their signatures: a change shows up as a diff of goldens/api.txt."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cached_property

import vfsurgery


def public(names: Iterator[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("_"))


def describe(name: str, value: object) -> Iterator[str]:
    """One line for a function; for a class its bases, its fields, and its own public methods."""
    if not inspect.isclass(value):
        yield f"{name}{signature(value)}"
        return
    yield f"class {name}({', '.join(base.__name__ for base in value.__bases__ if base is not object)})"
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        yield f"    {field.name}: {field.type}{default}"
    for field in getattr(value, "model_fields", {}):
        yield f"    {field}: {value.__annotations__[field]}"
    for member in public(iter(vars(value))):
        found = inspect.getattr_static(value, member)
        if isinstance(found, property | cached_property):
            getter = found.fget if isinstance(found, property) else found.func
            yield f"    {member}: property{signature(getter)}"
        elif isinstance(found, classmethod | staticmethod):
            yield f"    {type(found).__name__} {member}{signature(found.__func__)}"
        elif inspect.isfunction(found):
            yield f"    {member}{signature(found)}"


def signature(function: object) -> str:
    """As in the source: modules that postpone their annotations have them as text, which would come in quotes."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def test_api_is_as_reviewed(golden):
    names = public(name for name, value in vars(vfsurgery).items() if not inspect.ismodule(value))
    lines = [line for name in names for line in describe(name, getattr(vfsurgery, name))]
    golden("api.txt", "\n".join(lines) + "\n")


def test_every_public_name_is_documented():
    names = public(name for name, value in vars(vfsurgery).items() if not inspect.ismodule(value))
    assert [name for name in names if not (getattr(vfsurgery, name).__doc__ or "").strip()] == []

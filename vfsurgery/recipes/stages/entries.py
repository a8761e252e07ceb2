"""Values in a recipe that are more than a number or text: passes and matchers with options, shares, boundaries.

They are checked when a recipe is read, and kept as plain values, so that a recipe can be written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, WithJsonSchema

from vfsurgery.matching import MATCHERS, Matcher
from vfsurgery.merging.budget import Budget
from vfsurgery.merging.shares import plan_shares
from vfsurgery.passes import NORMALIZATIONS, PASSES, Pass, build_pass
from vfsurgery.passes.options import build
from vfsurgery.recipes.sections import FrozenDict, refuse_unknown

NONE = "none"
"""Stands for no normalization."""


def frozen(value: Any) -> Any:
    """The same value, lists as tuples and mappings as frozen ones, at any depth: sections are values."""
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(item) for key, item in cast("Mapping[Any, Any]", value).items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in cast("list[Any]", value))
    return value


def plain(value: Any) -> Any:
    """What :func:`frozen` was given."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return [plain(item) for item in cast("tuple[Any]", value)] if isinstance(value, tuple) else value


def _one_entry(value: Any, kind: str) -> tuple[str, dict[str, Any]]:
    """Name and options from ``name``, or ``{name: {option: value}}``."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(cast("Mapping[Any, Any]", value)) == 1:
        ((name, options),) = cast("Mapping[Any, Any]", value).items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, plain(options or {})
    raise ValueError(f"a {kind} is written as its name, or as {{name: {{option: value}}}}")


def name_of(entry: Any) -> str:
    """The name in ``name`` or ``{name: {option: value}}``."""
    return entry if isinstance(entry, str) else next(iter(entry))


def build_matcher(entry: Any) -> str | Matcher:
    """What ``match`` says, as :func:`~vfsurgery.merge` takes it.

    >>> build_matcher({"cca": {"gamma": 0.5}}).gamma
    0.5
    """
    name, options = _one_entry(entry, "matcher")
    refuse_unknown("matcher", (name,), ["auto", *MATCHERS])
    return build(cast("type[Matcher]", MATCHERS[name]), options, "matcher") if options else name


def build_passes(entries: Any) -> list[Pass]:
    """What ``apply`` says.

    >>> build_passes(("reset", {"repair": {"factor": 0.9}}))[1].factor
    0.9
    """
    built: list[Pass] = []
    for entry in entries:
        name, options = _one_entry(entry, "pass")
        refuse_unknown("pass", (name,), PASSES)
        built.append(build_pass(name, options))
    return built


def build_normalizations(entries: Any) -> str | list[Pass]:
    """What ``renormalize`` says, as :func:`~vfsurgery.merge` takes it."""
    return entries if entries == "auto" else build_passes(entries)


def _entries(value: Any) -> Any:
    """A tuple of entries, from one or a list of them."""
    return frozen(value if isinstance(value, list | tuple) else [value])


def _normalizations(value: Any) -> Any:
    if value in ("auto", NONE):
        return () if value == NONE else value
    entries = _entries(value)
    for entry in entries:
        refuse_unknown("renormalization", (_one_entry(entry, "renormalization")[0],), NORMALIZATIONS)
    build_passes(entries)
    return entries


def _applied(value: Any) -> Any:
    entries = _entries(value)
    build_passes(entries)
    return entries


def _matched(value: Any) -> Any:
    build_matcher(value)
    return frozen(value)


def _preserved(value: Any) -> Any:
    if isinstance(value, Mapping):
        budget = cast("Mapping[Any, Any]", value)
        refuse_unknown("budget", [str(name) for name in budget], ("flops", "params"))
        if all(limit is None for limit in budget.values()):
            raise ValueError("a budget says flops, params or both, as in {flops: 1.2}")
        Budget(**budget).check()
    elif not _is_boundary(value):
        raise ValueError("write a number of layers, a module path, or a budget as in {flops: 1.2}")
    return frozen(value)


def _is_boundary(value: Any) -> bool:
    if isinstance(value, str):
        return value != ""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(value: Any, nested: bool = True) -> None:
    if isinstance(value, Mapping) and nested:
        for item in cast("Mapping[Any, Any]", value).values():
            _numbers(item, nested=False)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            _numbers(item, nested=False)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("shares are numbers, lists of numbers along the depth, or mappings from layers to either")


def _alpha(value: Any) -> Any:
    _numbers(value)
    plan_shares(2, value, None)
    return frozen(value)


def _weights(value: Any) -> Any:
    _numbers(value)
    return frozen(value)


def _given(check: Callable[[Any], Any]) -> BeforeValidator:
    """Checks what is there; keys that are left out are ``None``."""
    return BeforeValidator(lambda value: None if value is None else check(value))


_NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
_SHARES = {
    "anyOf": [
        _NUMBER,
        {"type": "array"},
        {"type": "object", "additionalProperties": {"anyOf": [_NUMBER, {"type": "array"}]}},
    ]
}
_PASS = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
_PASSES = {"anyOf": [*_PASS["anyOf"], {"type": "array", "items": _PASS}, {"type": "null"}]}
_BUDGET = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"type": "number", "minimum": 1} for name in ("flops", "params")},
}
_BOUNDARY = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}, _BUDGET]}

Alpha = Annotated[Any, _given(_alpha), WithJsonSchema(_SHARES)]
Weights = Annotated[Any, _given(_weights), WithJsonSchema({"anyOf": [*_SHARES["anyOf"], {"type": "null"}]})]
MatcherEntry = Annotated[Any, _given(_matched), WithJsonSchema(_PASS)]
Boundary = Annotated[Any, _given(_preserved), WithJsonSchema(_BOUNDARY)]
Normalizations = Annotated[Any, _given(_normalizations), WithJsonSchema(_PASSES)]
Passes = Annotated[Any, _given(_applied), WithJsonSchema(_PASSES)]

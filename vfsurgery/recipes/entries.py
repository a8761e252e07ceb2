"""Values in a recipe that are more than a number or text: passes and matchers with options, shares, boundaries, files.

They are checked when a recipe is read, and kept as plain values, so that a recipe can be written again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from vfsurgery.checkpoints import ONNX, PROGRAM, WEIGHTS
from vfsurgery.combining import Combiner
from vfsurgery.combining.named import KIND, combiner_of
from vfsurgery.matching import MATCHERS, Matcher
from vfsurgery.matching.base import SYMMETRIES
from vfsurgery.merging.budget import Budget
from vfsurgery.merging.shares import plan_shares
from vfsurgery.passes import NORMALIZATIONS, PASSES, Pass, build_pass
from vfsurgery.passes.mask import CHOICES
from vfsurgery.pruning import PRUNERS, Pruner
from vfsurgery.recipes.sections import AsTuple, refuse_unknown
from vfsurgery.records.options import build

FORMATS = (WEIGHTS, PROGRAM, ONNX)
NONE = "none"
"""Stands for no normalization."""


def _one_entry(value: Any, kind: str) -> tuple[str, dict[str, Any]]:
    """Name and options from ``name``, or ``{name: {option: value}}``."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(cast("Mapping[Any, Any]", value)) == 1:
        ((name, options),) = cast("Mapping[Any, Any]", value).items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, dict(options or {})
    raise ValueError(f"a {kind} is written as its name, or as {{name: {{option: value}}}}")


def build_matcher(entry: Any) -> Literal["auto"] | Matcher:
    """What ``matching`` says, as :func:`~vfsurgery.merge` takes it.

    >>> build_matcher({"cca": {"gamma": 0.5}}).gamma
    0.5
    """
    if entry == "auto":
        return "auto"
    name, options = _one_entry(entry, "matcher")
    refuse_unknown("matcher", (name,), ["auto", *MATCHERS])
    return build(cast("type[Matcher]", MATCHERS[name]), options, "matcher")


def build_combiner(entry: Any) -> Literal["auto"] | Combiner:
    """What ``method`` says, as ``combine`` of :func:`~vfsurgery.merge`.

    >>> str(build_combiner({"ties": {"scale": 0.5}}))
    'ties x0.5'
    """
    if entry == "auto":
        return "auto"
    return combiner_of(*_one_entry(entry, KIND), also=("auto",))


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


def build_normalizations(entries: Any) -> str | list[Pass] | None:
    """What ``renormalize`` says, as :func:`~vfsurgery.merge` takes it."""
    return entries if entries == "auto" else build_passes(entries) or None


def build_pruner(method: str, options: Mapping[str, Any]) -> Pruner:
    """A pruner by its name.

    >>> build_pruner("magnitude", {}).name
    'magnitude'
    """
    return build(cast("type[Pruner]", PRUNERS[method]), options, "pruner")


def _several(value: Any) -> Any:
    return [*value] if isinstance(value, list | tuple) else [value]


def _normalizations(value: Any) -> Any:
    if value in ("auto", NONE, None):
        return value if value == "auto" else []
    entries = _several(value)
    for entry in entries:
        refuse_unknown("renormalization", (_one_entry(entry, "renormalization")[0],), NORMALIZATIONS)
    build_passes(entries)
    return entries


def _applied(value: Any) -> Any:
    entries = _several(value)
    for one in build_passes(entries):
        if one.needs_sources:
            raise ValueError(f"{one.name} compares with the sources of a merge: write it into renormalize of the merge")
    return entries


def _preserved(value: Any) -> None:
    if isinstance(value, Mapping):
        budget = cast("Mapping[Any, Any]", value)
        refuse_unknown("budget", [str(name) for name in budget], ("flops", "params"))
        if all(limit is None for limit in budget.values()):
            raise ValueError("a budget says flops, params or both, as in {flops: 1.2}")
        Budget(**budget).check()
    elif value == "" or isinstance(value, bool) or not isinstance(value, str | int) or str(value)[0] == "-":
        raise ValueError("write a number of layers, a module path, or a budget as in {flops: 1.2}")


def _checked(check: Callable[[Any], object]) -> BeforeValidator:
    """Keeps a value as it is written, once ``check`` has made of it what it stands for."""

    def kept(value: Any) -> Any:
        check(value)
        return value

    return BeforeValidator(kept)


def _one_of(kind: str, known: Iterable[str]) -> AfterValidator:
    def kept(name: str) -> str:
        refuse_unknown(kind, (name,), known)
        return name

    return AfterValidator(kept)


def _file_name(name: str) -> str:
    """Refuse names of files that would lie elsewhere, or are of no format that networks are written in."""
    if not name.endswith(FORMATS):
        raise ValueError(f"networks are written into files that end in {', '.join(FORMATS)}; found {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{,99}", name):
        raise ValueError(f"{name!r} is no plain file name: letters, digits, _ . and -; folders are given by --output")
    return name


_NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
_NUMBERS = [_NUMBER, {"type": "array"}]
_SHARES = [*_NUMBERS, {"type": "object", "additionalProperties": {"anyOf": _NUMBERS}}]
_NULL = {"type": "null"}
_PASS = [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]
_PASSES = [*_PASS, {"type": "array", "items": {"anyOf": _PASS}}]
_LIMITS = {name: {"type": "number", "minimum": 1} for name in ("flops", "params")}
_BUDGET = {"type": "object", "additionalProperties": False, "properties": _LIMITS}


def _any_of(*members: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*members]})


Alpha = Annotated[Any, _checked(lambda value: plan_shares(2, value, None)), _any_of(*_SHARES)]
Weights = Annotated[Any, _any_of(*_SHARES, _NULL)]
CombinerEntry = Annotated[Any, _checked(build_combiner), _any_of(*_PASS)]
MatcherEntry = Annotated[Any, _checked(build_matcher), _any_of(*_PASS)]
Boundary = Annotated[Any, _checked(_preserved), _any_of({"type": "integer", "minimum": 0}, _PASS[0], _BUDGET)]
Normalizations = Annotated[
    Any, BeforeValidator(_normalizations), PlainSerializer(lambda entries: entries or NONE), _any_of(*_PASSES, _NULL)
]
Passes = Annotated[Any, BeforeValidator(_applied), _any_of(*_PASSES)]
Symmetries = Annotated[str, _one_of("choice of symmetries", SYMMETRIES)]
Masks = Annotated[str, _one_of("choice of masks", CHOICES)]
PrunerName = Annotated[str, _one_of("pruner", PRUNERS)]
FileNames = Annotated[tuple[Annotated[str, AfterValidator(_file_name)], ...], AsTuple, BeforeValidator(_several)]

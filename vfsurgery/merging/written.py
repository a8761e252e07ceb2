"""The arguments of a merge as plain values, as recipes have them: matchers and passes by name, budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from vfsurgery.combining import Combiner
from vfsurgery.combining.named import KIND, combiner_of
from vfsurgery.errors import OptionError, refuse_unknown
from vfsurgery.matching import MATCHERS, Matcher
from vfsurgery.merging.budget import Budget
from vfsurgery.passes import NORMALIZATIONS, Pass
from vfsurgery.passes.registry import build_passes
from vfsurgery.records.options import build_entry, read_entry


def build_matcher(entry: Any) -> Literal["auto"] | Matcher:
    """A matcher, as ``matching`` of :func:`~vfsurgery.merge`.

    >>> build_matcher({"cca": {"gamma": 0.5}}).gamma
    0.5
    """
    return entry if entry == "auto" else build_entry(entry, MATCHERS, "matcher", "auto")


def build_combiner(entry: Any) -> Literal["auto"] | Combiner:
    """A combining method, as ``combine`` of :func:`~vfsurgery.merge`.

    >>> str(build_combiner({"ties": {"scale": 0.5}}))
    'ties x0.5'
    """
    return entry if entry == "auto" else combiner_of(*read_entry(entry, KIND), also=("auto",))


def build_normalizations(entries: Any) -> str | list[Pass] | None:
    """What :func:`~vfsurgery.merge` takes as ``renormalize``, of ``"auto"`` or a list.

    >>> build_normalizations(["reset"])
    [Reset()]
    """
    return entries if entries == "auto" else build_passes(entries) or None


def check_normalizations(entries: Sequence[Any]) -> None:
    """Refuse passes that a merge consists of itself, and options that they do not have.

    Raises:
        OptionError: see above.
    """
    for entry in entries:
        refuse_unknown("renormalization", (read_entry(entry, "renormalization")[0],), NORMALIZATIONS)
    build_passes(entries)


def check_boundary(value: Any) -> None:
    """Refuse what says neither what to preserve nor for what budget.

    Raises:
        OptionError: see above.

    >>> check_boundary({"flops": 1.2})
    """
    if isinstance(value, Mapping):
        budget = cast("Mapping[Any, Any]", value)
        refuse_unknown("budget", [str(name) for name in budget], ("flops", "params"))
        if all(limit is None for limit in budget.values()):
            raise OptionError("a budget says flops, params or both, as in {flops: 1.2}")
        Budget(**budget).check()
    elif value == "" or isinstance(value, bool) or not isinstance(value, str | int) or str(value)[0] == "-":
        raise OptionError("write a number of layers, a module path, or a budget as in {flops: 1.2}")


def several(value: Any) -> list[Any]:
    """A list, of a list or of its only entry.

    >>> several("repair"), several(("repair", "rescale"))
    (['repair'], ['repair', 'rescale'])
    """
    return [*value] if isinstance(value, list | tuple) else [value]

"""What the user asks for, layer by layer: sparsities by pattern of names, or N of every M inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

from torch import Tensor

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.pruning.base import Pattern, Scope
from vfsurgery.pruning.layers import matches
from vfsurgery.pruning.selection import Goal
from vfsurgery.stats.inputs import Layout


@dataclass(frozen=True)
class Schedule:
    """The goal of every weight that is to be pruned, and why the others are not."""

    goals: dict[str, Goal]
    dense: dict[str, str]


def read_pattern(pattern: str | None) -> Pattern | None:
    """N and M of ``"N:M"``.

    Raises:
        OptionError: it does not read so, or N is not between 1 and M - 1.

    >>> read_pattern("2:4")
    (2, 4)
    """
    if pattern is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise OptionError(
            explain(
                f"pattern={pattern!r} is not N:M with N from 1 to M - 1",
                remedy='"2:4" keeps 2 of every 4 inputs, which NVIDIA\'s sparse tensor cores take',
            )
        )
    return int(found[1]), int(found[2])


def check_scope(scope: str | None, pattern: str | None) -> None:
    """Refuse a scope that is none, or that stands beside a pattern.

    Raises:
        OptionError: see above.
    """
    if scope is not None and scope not in get_args(Scope):
        raise OptionError(explain(f"unknown scope {scope!r}", remedy=did_you_mean(str(scope), get_args(Scope))))
    if scope is not None and pattern is not None:
        raise OptionError(
            explain(
                f"scope={scope!r} and pattern={pattern!r} exclude each other",
                because="a pattern says by itself which weights compete",
                remedy="leave one of them out",
            )
        )


def by_pattern(weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], pattern: Pattern) -> Schedule:
    """N:M for all weights whose units read a multiple of M inputs; the others stay dense.

    Raises:
        OptionError: there is no such weight.
    """
    kept, width = pattern
    inputs = {name: layouts[name].inputs(weight) for name, weight in weights.items()}
    goals = {name: Goal(1 - kept / width) for name, count in inputs.items() if count % width == 0}
    dense = {
        name: f"a unit reads {count} inputs, no multiple of {width}"
        for name, count in inputs.items()
        if name not in goals
    }
    if not goals:
        raise OptionError(
            explain(
                f"no layer can be pruned {kept}:{width}",
                layers=", ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3]),
                remedy="give a sparsity instead of a pattern",
            )
        )
    return Schedule(goals, dense)


def read_sparsity(sparsity: object) -> dict[str, float]:
    """Sparsities by pattern of layers; one for all of them stands under ``"*"``.

    Raises:
        OptionError: a sparsity is no number in [0, 1), or there is no pattern.

    >>> read_sparsity(0.9), read_sparsity({"conv*": 0.5})
    ({'*': 0.9}, {'conv*': 0.5})
    """
    if not isinstance(sparsity, Mapping):
        return {"*": _checked(sparsity, "")}
    entries = cast("Mapping[object, object]", sparsity)
    if not entries:
        raise OptionError(explain("sparsity has no pattern", remedy='one number, or as in {"conv*": 0.5, "*": 0.9}'))
    return {str(pattern): _checked(value, f" for {pattern!r}") for pattern, value in entries.items()}


def by_sparsity(weights: Mapping[str, Tensor], sparsity: object) -> Schedule:
    """One sparsity for all weights, or the one of the first pattern that matches a weight's name.

    Raises:
        OptionError: a sparsity is no number in [0, 1), or a pattern decides about no weight.
    """
    patterns = read_sparsity(sparsity)
    schedule = _schedule(weights, patterns)
    if not isinstance(sparsity, Mapping):
        return schedule
    for pattern in patterns:
        matching = [name for name in weights if matches(name, pattern)]
        if not matching:
            paths = [name.rpartition(".")[0] for name in weights]
            raise OptionError(
                explain(
                    f"sparsity[{pattern!r}] matches no convolution or linear layer",
                    remedy=did_you_mean(pattern, paths),
                )
            )
        first = next(other for other in patterns if matches(matching[0], other))
        if all(any(matches(name, other) for other in _before(patterns, pattern)) for name in matching):
            raise OptionError(
                explain(
                    f"sparsity[{pattern!r}] decides about no layer",
                    because=f"the first pattern that matches decides, and {first!r} stands before it",
                    remedy="put special cases first and '*' last",
                )
            )
    return schedule


def _schedule(weights: Mapping[str, Tensor], patterns: Mapping[str, float]) -> Schedule:
    goals: dict[str, Goal] = {}
    dense: dict[str, str] = {}
    for name in weights:
        pattern = next((pattern for pattern in patterns if matches(name, pattern)), None)
        if pattern is None:
            dense[name] = "no pattern of sparsity= matches it"
        elif patterns[pattern] == 0:
            dense[name] = "its sparsity is 0"
        else:
            goals[name] = Goal(patterns[pattern], pattern)
    return Schedule(goals, dense)


def _before(patterns: Mapping[str, float], pattern: str) -> list[str]:
    names = list(patterns)
    return names[: names.index(pattern)]


def _checked(sparsity: object, where: str) -> float:
    share = float(sparsity) if isinstance(sparsity, int | float) and not isinstance(sparsity, bool) else math.nan
    if not 0 <= share < 1:
        remedy = "0.9 sets nine of ten weights to zero; a mapping has one number per pattern of layers"
        if 1 < share < 100:
            remedy = f"it is a share and not a percentage: {share:g} % is {share / 100:g}"
        raise OptionError(explain(f"sparsity{where} must be a number in [0, 1) but is {sparsity!r}", remedy=remedy))
    return share

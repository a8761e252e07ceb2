"""Shares of the sources in a merge: the same everywhere, by pattern of layers, or rising and falling along depth.

``alpha`` is the share of the second of two sources, ``weights`` are those of all. Instead of one value either may be a
list of values, which are spread over the layers from first to last and interpolated between, or a mapping from patterns
of layers to values or such lists; the first pattern that fits a parameter decides, and a list is spread over the layers
that its pattern decides.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torch import fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.selection import chosen_tensors
from vfsurgery.tracing.sources import canonical_state

Vector: TypeAlias = tuple[float, ...]
"""One share per source, summing to one."""
Alpha: TypeAlias = float | Sequence[float] | Mapping[str, float | Sequence[float]]
Weights: TypeAlias = (
    Sequence[float] | Sequence[Sequence[float]] | Mapping[str, Sequence[float] | Sequence[Sequence[float]]]
)

EVERYWHERE = ""
"""Stands for the pattern where none was given."""


@dataclass(frozen=True)
class Shares:
    """What every source contributes: ``overall``, and in ``by_name`` to each parameter and buffer that differs."""

    overall: Vector
    by_name: Mapping[str, Vector]


@dataclass(frozen=True)
class SharePlan:
    """Shares as they were asked for, checked but not yet laid over the layers of a model.

    ``stops`` has by pattern one vector, or several to interpolate between.

    >>> plan_shares(2, 0.25, None).stops
    {'': ((0.75, 0.25),)}
    >>> plan_shares(2, {"stem": 0.0, "layer*": [0.2, 0.8]}, None).stops["layer*"]
    ((0.8, 0.2), (0.19999999999999996, 0.8))
    """

    count: int
    stops: Mapping[str, tuple[Vector, ...]]
    argument: str = "alpha"

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same shares."""
        return all(len(stops) == 1 for stops in self.stops.values()) and list(self.stops) == [EVERYWHERE]

    @property
    def used(self) -> tuple[bool, ...]:
        """Source by source, whether it contributes anything anywhere."""
        rest = () if EVERYWHERE in self.stops else (self._equal,)
        every = [*rest, *(vector for stops in self.stops.values() for vector in stops)]
        return tuple(any(vector[number] > 0 for vector in every) for number in range(self.count))

    @property
    def _equal(self) -> Vector:
        return (1 / self.count,) * self.count

    def over(self, graph_module: fx.GraphModule) -> Shares:
        """Lay them over a traced model's layers, in the order in which they run.

        ``overall`` is the mean over all parameters, each counted by its size.

        Raises:
            OptionError: a pattern fits nothing in the model.
        """
        if self.is_uniform:
            return Shares(self.stops[EVERYWHERE][0], {})
        state, layers = canonical_state(graph_module), _layers(graph_module)
        by_name: dict[str, Vector] = {}
        for pattern, stops in self.stops.items():
            chosen = set(chosen_tensors(graph_module, pattern, self.argument)) if pattern else set(state)
            chosen -= by_name.keys()
            decided = [names for layer in layers.values() if (names := [name for name in layer if name in chosen])]
            for place, names in enumerate(decided):
                by_name |= dict.fromkeys(names, _between(stops, place / max(len(decided) - 1, 1)))
        by_name = {name: by_name.get(name, self._equal) for name in state}
        sizes = {name: state[name].numel() for name, _ in graph_module.named_parameters() if name in state}
        total = sum(sizes.values())
        overall = [sum(by_name[name][i] * size for name, size in sizes.items()) / total for i in range(self.count)]
        return Shares(tuple(overall), by_name)

    def __str__(self) -> str:
        parts = [f"{pattern or 'all layers'} {_written(stops)}" for pattern, stops in self.stops.items()]
        return "; ".join(parts)


def plan_shares(count: int, alpha: Alpha, weights: Weights | None) -> SharePlan:
    """Check ``alpha`` or ``weights`` for ``count`` sources.

    Raises:
        OptionError: both are given, the numbers of shares and sources differ, or shares do not lie in [0, 1] and sum to
            one.
    """
    if weights is None:
        if not isinstance(alpha, int | float):
            if count != 2:
                raise OptionError(explain(f"alpha is for two models, not {count}", remedy="pass weights="))
            return SharePlan(2, {pattern: _stops(value, _pair) for pattern, value in _entries(alpha, "alpha")})
        return SharePlan(count, {EVERYWHERE: (shares_of(count, _number(alpha), None),)})
    if alpha != 0.5:
        raise OptionError(explain("alpha and weights were both given", remedy="weights alone says all shares"))

    def vector(value: Any) -> Vector:
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise OptionError(explain(f"weights are one number for each of {count} sources, not {reprlib.repr(value)}"))
        return shares_of(count, 0.5, cast("Sequence[float]", value))

    return SharePlan(
        count,
        {
            pattern: _stops(value, vector) if _is_nested(value) else (vector(value),)
            for pattern, value in _entries(weights, "weights")
        },
        "weights",
    )


def equal_shares(count: int) -> SharePlan:
    """One share for each of any number of sources, a single one among them."""
    return SharePlan(count, {EVERYWHERE: ((1 / count,) * count,)})


def shares_of(count: int, alpha: float, weights: Sequence[float] | None) -> Vector:
    """The sources' shares, which must be at least 0 and sum to 1: statistics of sources are averaged with them.

    Raises:
        OptionError: as for :func:`plan_shares`.
    """
    if weights is not None and alpha != 0.5:
        raise OptionError(explain("alpha and weights were both given", remedy="weights alone says all shares"))
    if weights is None:
        if count > 2 and alpha != 0.5:
            raise OptionError(explain(f"alpha is for two models, not {count}", remedy=f"pass {count} weights="))
        if not 0 <= alpha <= 1:
            raise OptionError(
                explain(f"alpha must lie in [0, 1] but is {alpha}", remedy="0 gives model a, 1 gives model b")
            )
        return (1 - alpha, alpha) if count == 2 else (1 / count,) * count
    shares = tuple(map(_number, weights))
    if len(shares) != count:
        raise OptionError(f"{len(shares)} weights were given for {count} models")
    if any(not 0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise OptionError(
            explain(
                f"weights must lie in [0, 1] and sum to 1 but are {shares}, sum {sum(shares):.6g}",
                remedy="divide each by their sum",
            )
        )
    return shares


def _pair(alpha: Any) -> Vector:
    return shares_of(2, _number(alpha), None)


def _number(share: Any) -> float:
    try:
        if isinstance(share, bool):
            raise TypeError
        return float(share)
    except (TypeError, ValueError) as error:
        raise OptionError(explain(f"{reprlib.repr(share)} is no share", accepted="numbers from 0 to 1")) from error


def _entries(given: Any, argument: str) -> Iterable[tuple[str, Any]]:
    """Pattern and value, one pair for what is no mapping."""
    if not isinstance(given, Mapping):
        return [(EVERYWHERE, given)]
    entries = cast("Mapping[Any, Any]", given)
    bad = next((pattern for pattern in entries if not isinstance(pattern, str) or not pattern), None)
    if bad is not None or not entries:
        raise OptionError(explain(f"{argument} has no pattern {bad!r}", accepted="module paths, names, patterns"))
    return list(entries.items())


def _stops(value: Any, vector: Any) -> tuple[Vector, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, int | float | Iterable):
        accepted = "numbers, lists of numbers along the depth, or mappings from layers to either"
        raise OptionError(explain(f"{reprlib.repr(value)} is no share", accepted=accepted))
    values: list[Any] = [value] if isinstance(value, int | float) else list(value)
    if not values:
        raise OptionError(explain("shares along depth are an empty list", remedy="one value, or several"))
    return tuple(vector(each) for each in values)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Iterable) and any(
        not isinstance(each, int | float) for each in cast("Iterable[object]", value)
    )


def _between(stops: Sequence[Vector], depth: float) -> Vector:
    """Interpolate at a relative depth from 0 to 1."""
    place = depth * (len(stops) - 1)
    low = min(int(place), len(stops) - 2) if len(stops) > 1 else 0
    share = place - low
    high = min(low + 1, len(stops) - 1)
    return tuple((1 - share) * a + share * b for a, b in zip(stops[low], stops[high], strict=True))


def _layers(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """Names of parameters and buffers by the module that has them, modules in the order in which they run."""
    owners: dict[str, list[str]] = {}
    for name in canonical_state(graph_module):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    ordered: dict[str, list[str]] = {}
    for node in graph_module.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            target = target.rpartition(".")[0]
        elif node.op != "call_module":
            continue
        inside = [owner for owner in owners if owner == target or owner.startswith(f"{target}.")]
        for owner in inside if node.op == "call_module" else inside[:1]:
            ordered.setdefault(owner, owners[owner])
    return {**ordered, **owners}


def _written(stops: Sequence[Vector]) -> str:
    return " to ".join(", ".join(f"{share:.3g}" for share in vector) for vector in stops)

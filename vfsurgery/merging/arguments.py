"""What the arguments of a merge say: sources, matchers, and whether images are of any use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import fx, nn

from vfsurgery.errors import DataError, OptionError, did_you_mean, explain, warn
from vfsurgery.matching import MATCHERS, Identity, Matcher
from vfsurgery.matching.base import SYMMETRIES, check_symmetries
from vfsurgery.merging.sparse import MaskPlan
from vfsurgery.passes import NORMALIZATIONS, Pass
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.tracing.wrappers import network

Matchings: TypeAlias = str | Matcher
Given: TypeAlias = nn.Module | str | Path
"""A source: a network, or the folder of an adapter."""


def sources_of(a: Given | Sequence[Given], b: nn.Module | None) -> list[Given]:
    """All that were given, as they were given."""
    if isinstance(a, nn.Module | str | Path | Mapping) or not isinstance(a, Iterable):
        return [a] if b is None else [a, b]
    if b is not None:
        raise OptionError(explain("b was given beside a list of models", remedy="put all models into the list"))
    return [*a]


def networks_of(given: Sequence[object], fewest: int = 2) -> list[nn.Module]:
    models = [network(model, f"source {number}") for number, model in enumerate(given)]
    for number, model in enumerate(models):
        if not any(True for _ in model.parameters()):
            raise OptionError(f"source {number}, a {type(model).__name__}, has no parameters")
    if len(models) < fewest:
        remedy = "merge(a, b) or merge([a, b, c]); of one, merge(tuned, base=pretrained)"
        raise OptionError(explain("a merge needs at least two models", remedy=remedy))
    return models


def asks_for_images(matching: Matchings, renormalize: Renormalization = None) -> bool:
    """Whether images are of any use: not where everything that is asked for works on weights.

    Raises:
        OptionError: there is no such renormalization.
    """
    steps = renormalize if isinstance(renormalize, Sequence) and not isinstance(renormalize, str) else [renormalize]
    passes = [NORMALIZATIONS[step]() if isinstance(step, str) and step != "auto" else step for step in steps]
    matcher = _named(matching)
    return (
        "auto" in (matching, renormalize)
        or getattr(matcher, "needs_data", False)
        or any(isinstance(step, Pass) and (step.needs_data or step.holds_out()) for step in passes)
    )


def allows_maps(matching: Matchings, symmetries: str) -> bool:
    """Whether units are to be mapped by more than orders where that is exact: where the matcher can do so.

    Raises:
        OptionError: there is no such choice of symmetries.
    """
    if check_symmetries(symmetries, SYMMETRIES) == "permutations":
        return False
    return matching == "auto" or getattr(_named(matching), "symmetries", "permutations") == "all"


def _named(matching: Matchings) -> object:
    """The matcher of a name, whose attributes say what it needs; anything else as it is."""
    return MATCHERS[matching]() if isinstance(matching, str) and matching in MATCHERS else matching


def matcher_of(matching: Matchings, has_data: bool) -> Matcher:
    if matching == "auto":
        matching = "activations" if has_data else "weights"
    if isinstance(matching, str) and matching not in MATCHERS:
        raise OptionError(explain(f"unknown matching {matching!r}", remedy=did_you_mean(matching, ["auto", *MATCHERS])))
    matcher = MATCHERS[matching]() if isinstance(matching, str) else matching
    if not isinstance(matcher, Matcher) or isinstance(matcher, type):
        raise OptionError(explain(f"matching is no matcher but {matching!r}", accepted=", ".join(["auto", *MATCHERS])))
    if matcher.needs_data and not has_data:
        remedy = "pass data=, or data='imagined', or matching='weights'"
        raise DataError(explain(f"matching={matcher.name!r} needs data", remedy=remedy))
    return matcher


def suiting(zeros: MaskPlan | None, matching: Matchings, matcher: Matcher) -> Matcher:
    """No matching where nobody asked for one and the sources' masks are equal: their units correspond already."""
    return Identity() if matching == "auto" and zeros is not None and zeros.equal else matcher


def warn_of_norms(graph_module: fx.GraphModule) -> None:
    """Say what a merge without data makes of BatchNorm."""
    norms = len({*batch_norm_nodes(graph_module).values()})
    if norms:
        warn(
            f"a merge of networks with BatchNorm ({norms} layers) loses most of its accuracy without data: statistics "
            "can only be guessed from the weights; pass data=, some hundred training images, labels are not "
            "looked at; or data='imagined'"
        )

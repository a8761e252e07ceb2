"""A method from its name and options, wherever these were written: in a call, a recipe, or on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from vfsurgery.combining.base import COMBINERS, Combiner
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.records.options import build, read_options

KIND = "combining method"


def combiner_of(
    combine: str | Combiner,
    options: Mapping[str, object] | None = None,
    scale: float | None = None,
    *,
    also: Sequence[str] = (),
) -> Combiner:
    """A method with options.

    Args:
        combine: Its name, or the method, which is then changed in what is given.
        options: Its options by name.
        scale: Its scale, if that was given apart.
        also: Other names that are accepted where this is called; errors list them.

    Raises:
        OptionError: there is no such method, or it has no such option, or an option is of another type.

    >>> combiner_of("ties", {"density": 0.1}, 0.5)
    Ties(density=0.1, aggregate='mean', scope='model', scale=0.5)
    """
    given = {**(options or {}), **({} if scale is None else {"scale": float(scale)})}
    if isinstance(combine, Combiner):
        return dataclasses.replace(cast("Any", combine), **read_options(type(combine), given, KIND))
    if not isinstance(combine, str):
        accepted = ", ".join([*also, *COMBINERS])
        raise OptionError(explain(f"combine is no method but {combine!r}", accepted=accepted))
    if combine not in COMBINERS:
        remedy = did_you_mean(combine, [*also, *COMBINERS])
        raise OptionError(explain(f"unknown {KIND} {combine!r}", remedy=remedy))
    return build(COMBINERS[combine], given, KIND)

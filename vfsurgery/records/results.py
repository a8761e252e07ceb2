"""Models that this library made, each with its report, for as long as the model lives."""

from __future__ import annotations

import weakref

from torch import nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.records.report import MergeReport, Report
from vfsurgery.tracing.wrappers import network

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Report, object]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: Report, way: object = None) -> None:
    """Have :func:`report_of` give ``report`` for this very model, and :func:`way_of` how to do it again.

    Both take the place of any earlier ones.
    """
    _KNOWN[model] = report, way


def report_of(model: nn.Module) -> Report:
    """The report of what made a model (a merge, say), as long as that very model lives.

    Raises:
        OptionError: the model does not come from this library.
    """
    found = _KNOWN.get(network(model))
    if found is None:
        raise OptionError(
            explain(
                f"this {type(model).__name__} has no report",
                remedy="ask for the report of the model that merge returned, not of a copy of it",
            )
        )
    return found[0]


def way_of(model: nn.Module) -> object:
    """What was remembered of how this very model was made; ``None`` where nothing was."""
    return _KNOWN.get(network(model), (None, None))[1]


def merge_report_of(model: nn.Module) -> MergeReport:
    """As :func:`report_of`, of a model that comes from a merge."""
    report = report_of(model)
    assert isinstance(report, MergeReport)
    return report

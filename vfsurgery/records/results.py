"""Models that this library made, each with its report, for as long as the model lives."""

from __future__ import annotations

import weakref

from torch import nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.records.report import MergeReport, Report
from vfsurgery.tracing.wrappers import network

_REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: Report) -> None:
    """Have :func:`report_of` give ``report`` for this very model, instead of any earlier one."""
    _REPORTS[model] = report


def report_of(model: nn.Module) -> Report:
    """The report of what made a model (a merge, say), as long as that very model lives.

    Raises:
        OptionError: the model does not come from this library.
    """
    report = _REPORTS.get(network(model))
    if report is None:
        raise OptionError(
            explain(
                f"this {type(model).__name__} has no report",
                remedy="ask for the report of the model that merge returned, not of a copy of it",
            )
        )
    return report


def merge_report_of(model: nn.Module) -> MergeReport:
    """As :func:`report_of`, of a model that comes from a merge."""
    report = report_of(model)
    assert isinstance(report, MergeReport)
    return report

"""What is expected of a table of figures, as text: orders of rows and numbers, bands around published ones, ratios."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from vfsurgery.errors import OptionError, refuse_unknown

_BAND = re.compile(r"(?P<row>.+) within (?P<points>\d+(\.\d+)?) of published")
_NUMBER = re.compile(r"\d+(\.\d+)?")
RATIO = "ratio "
_AT = re.compile(r"(?P<merge>.+) at (?P<percent>\d{1,2}|100)%")


@dataclass(frozen=True)
class Expectation:
    """A chain of rows and numbers that rise strictly, or one row in a band around its published figure.

    ``text`` is as written, ``rows`` are the labels and numbers in it, and ``points`` is half the band's width in what
    the row counts (percentage points, of a ratio none), ``None`` for a chain.

    >>> expected = Expectation.parse("direct < matched < matched + repair")
    >>> expected.rows
    ('direct', 'matched', 'matched + repair')
    >>> print(expected.check({"direct": 10.0, "matched": 42.0, "matched + repair": 41.0}))
    FAILS  direct < matched < matched + repair  (10.00, 42.00, 41.00)
    >>> print(Expectation.parse("ratio direct < 0.2").check({"ratio direct": 0.03125}))
    holds  ratio direct < 0.2  (0.0312, 0.2)
    >>> print(Expectation.parse("matched within 2 of published").check({"matched": 42.0}, {"matched": 43.5}))
    holds  matched within 2 of published  (42.00, published 43.50)
    """

    text: str
    rows: tuple[str, ...]
    points: float | None = None

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Read ``LABEL < LABEL < ...`` or ``LABEL within POINTS of published``.

        Raises:
            ValueError: It is neither.
        """
        if band := _BAND.fullmatch(text.strip()):
            return cls(text, (band["row"].strip(),), float(band["points"]))
        rows = tuple(row.strip() for row in text.split(" < "))
        if len(rows) < 2 or not all(rows) or all(map(is_number, rows)):
            raise ValueError(f"{text!r} expects nothing: write LABEL < LABEL, or LABEL within POINTS of published")
        return cls(text, rows)

    def check(self, measured: Mapping[str, float], published: Mapping[str, float] | None = None) -> Outcome:
        """Compare with what was measured, by row, accuracies in percent; NaN meets no expectation."""
        found = tuple(measured[row] if row in measured else float(row) for row in self.rows)
        if self.points is None:
            holds = all(low < high for low, high in pairwise(found))
            return Outcome(self.text, holds, found)
        goal = (published or {})[self.rows[0]]
        return Outcome(self.text, abs(found[0] - goal) <= self.points, found, goal)


@dataclass(frozen=True)
class Outcome:
    """Whether an expectation holds, with the figures that say so, and the published one of a band."""

    text: str
    holds: bool
    found: tuple[float, ...]
    published: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        figures = [_figure(value) for value in self.found]
        figures += [] if self.published is None else [f"published {_figure(self.published)}"]
        return f"{'holds' if self.holds else 'FAILS'}  {self.text}  ({', '.join(figures)})"


@dataclass(frozen=True)
class RatioRow:
    """``ratio LABEL`` or ``ratio LABEL at PERCENT%``: the bound of a merge's vanishing-feature ratio at that depth.

    It is the tight bound ``e_l = max(e_{l+1}, r_l)`` (Qu & Horvath, CPAL 2025, section 5.1), the largest ratio from
    there on, so that "below 0.1 at 50%" says that no later layer has a tenth of its sources' feature norm. At full
    depth, where no other is given, it is the ratio of the last layer, as in the paper's figure 17. The smoothed bound
    of its other figures would not do for "falls with depth": it falls by itself.

    ``label`` is the row as written, ``merge`` the label of the merge, and ``depth`` a share, 0 to 1.

    >>> RatioRow.parse("ratio direct at 50%", ["direct"])
    RatioRow(label='ratio direct at 50%', merge='direct', depth=0.5)
    >>> RatioRow.parse("ratio WM at 0.1", ["WM at 0.1"]).depth
    1.0
    >>> RatioRow.parse("direct", ["direct"]) is None
    True
    """

    label: str
    merge: str
    depth: float = 1.0

    @classmethod
    def parse(cls, label: str, merges: Collection[str]) -> RatioRow | None:
        """Read the row of one of ``merges``; ``None`` where it is none."""
        merge = label.removeprefix(RATIO)
        found = _AT.fullmatch(merge)
        if merge != label and merge in merges:
            return cls(label, merge)
        if merge != label and found is not None and found["merge"] in merges:
            return cls(label, found["merge"], int(found["percent"]) / 100)
        return None


def ratio_rows(expected: Iterable[Expectation], merges: Collection[str]) -> list[RatioRow]:
    """The rows of ratios that expectations name, each once.

    >>> [row.merge for row in ratio_rows([Expectation.parse("ratio b < 0.2"), Expectation.parse("a < b")], ["a", "b"])]
    ['b']
    """
    named = dict.fromkeys(row for each in expected for row in each.rows if row not in merges)
    return [found for row in named if (found := RatioRow.parse(row, merges)) is not None]


def check_rows(
    expected: Sequence[Expectation], published: Collection[str], rows: Sequence[str], merges: Sequence[str] = ()
) -> None:
    """Refuse what is said of rows that a table will not have: expectations, and published figures.

    Args:
        expected: What is expected of the table.
        published: The rows that have a published figure.
        rows: Those that it will have.
        merges: Those of them that may also stand in a :class:`RatioRow`.

    Raises:
        OptionError: a row is none of them, or a band is around no published figure.

    >>> check_rows([Expectation.parse("a < ratio b")], ["b"], ["a", "b"], ["b"])
    """
    for row in (*published, *(row for each in expected for row in each.rows if not is_number(row))):
        if row not in rows and RatioRow.parse(row, merges) is None:
            if merges and row.startswith(RATIO):
                refuse_unknown("way", (row.removeprefix(RATIO),), merges)
            refuse_unknown("row", (row,), rows)
    for each in expected:
        if each.points is not None and each.rows[0] not in published:
            raise OptionError(f"nothing is published for {each.rows[0]!r}, so it can be in no band around it")


def is_number(row: str) -> bool:
    """Whether what stands in the place of a row is a number, which then stands for itself.

    >>> is_number("0.2"), is_number("k=0")
    (True, False)
    """
    return _NUMBER.fullmatch(row) is not None


def _figure(value: float) -> str:
    """Two decimals for percent, three digits for what is below 1, as ratios are."""
    return f"{value:.3g}" if 0 < value < 1 else f"{value:.2f}"

"""Values that are seen: each asks here, by its type, and whatever draws that type has registered itself.

So reports, groups and measurements know nothing of HTML, figures or pages, and nothing of what draws them;
``rendering/`` does, and the package imports it.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any, NoReturn


class Shown:
    """A value that notebooks show as HTML."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return html_of(self)


class Drawn(Shown):
    """A value that has a figure, too."""

    __slots__ = ()

    def plot(self, path: str | Path) -> Path:
        """Draw the figure into ``path``, whose ending is the format, PNG without one; returns the path.

        Raises:
            CheckpointError: the file cannot be written; nothing is left of it then.
        """
        return draw(self, path)


@singledispatch
def html_of(value: object) -> str:
    """A value as an HTML fragment that needs nothing beside it.

    >>> @html_of.register(complex)
    ... def as_sum(value):
    ...     return f"{value.real} + {value.imag}<i>i</i>"
    >>> html_of(1 + 2j)
    '1.0 + 2.0<i>i</i>'
    >>> html_of("text")
    Traceback (most recent call last):
    TypeError: nothing shows a str as HTML: register what does at vfsurgery.shown.html_of
    """
    _refuse(value, "shows", "as HTML", "html_of")


@singledispatch
def draw(value: object, path: str | Path, **options: Any) -> Path:
    """Draw a value into ``path``, whose ending is the format, PNG without one; returns the path."""
    _refuse(value, "draws", "as a figure", "draw")


@singledispatch
def write_page(value: object, path: str | Path, **beside: Any) -> Path:
    """Write one HTML file about a value and all that is known ``beside`` it; returns the path."""
    _refuse(value, "writes", "as a page", "write_page")


def _refuse(value: object, verb: str, form: str, function: str) -> NoReturn:
    raise TypeError(f"nothing {verb} a {type(value).__name__} {form}: register what does at {__name__}.{function}")

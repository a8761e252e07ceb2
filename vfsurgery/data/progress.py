"""Bars for work that takes over a second, which say what they are part of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # in notebooks without ipywidgets it warns of that, and falls back to bars of text, which do as well
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], label: str, total: int | None = None, enabled: bool = True) -> Iterable[T]:
    """Wrap ``iterable`` so that work lasting over a second shows a bar on stderr, gone when done.

    >>> list(progress([1, 2, 3], "counting", enabled=False))
    [1, 2, 3]
    """
    return tqdm(iterable, desc=_full(label), total=total, disable=not enabled, delay=1, leave=False, file=sys.stderr)


_DOING: ContextVar[str] = ContextVar("doing", default="")


@contextmanager
def named(doing: str) -> Generator[None]:
    """Have all bars say first what they are part of; an empty text changes nothing.

    >>> with named("trying 3 of 6: cca + regress"):
    ...     _full("regression of the layers")
    'trying 3 of 6: cca + regress: regression of the layers'
    """
    token = _DOING.set(_full(doing) if doing else _DOING.get())
    try:
        yield
    finally:
        _DOING.reset(token)


def _full(label: str) -> str:
    return ": ".join(part for part in (_DOING.get(), label) if part)


@contextmanager
def progress_line(label: str, enabled: bool = True) -> Generator[Callable[[str], None]]:
    """Show what a step of unknown length is at, once it lasts over a second; the value says what to show.

    >>> with progress_line("matching", enabled=False) as advance:
    ...     advance("group g0")
    """
    label = _full(label)
    with tqdm(desc=label, disable=not enabled, delay=1, leave=False, file=sys.stderr, bar_format="{desc}") as line:

        def advance(message: str) -> None:
            line.set_description_str(f"{label}: {message}", refresh=False)
            line.update()

        yield advance

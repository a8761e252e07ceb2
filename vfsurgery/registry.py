"""One registry for everything that users may add by name: matchers, normalizations, recipe tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vfsurgery.errors import OptionError, did_you_mean, explain

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind; a clash and a miss are errors that say what is there.

    >>> colours: Registry[str] = Registry("colour")
    >>> colours.register("red")("#f00")
    '#f00'
    >>> colours["red"], list(colours)
    ('#f00', ['red'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters what it decorates under ``name`` and hands it back.

        Raises:
            OptionError: ``name`` is taken already; both places are named.
        """

        def enter(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and taken is not entry:
                raise OptionError(
                    explain(
                        f"two entries claim the {self.kind} name {name!r}",
                        first=_where(taken),
                        second=_where(entry),
                        remedy="register the second one under another name",
                    )
                )
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise OptionError(
                explain(f"unknown {self.kind} {name!r}", remedy=did_you_mean(name, self._entries))
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def _where(entry: object) -> str:
    module = getattr(entry, "__module__", "?")
    return f"{module}.{getattr(entry, '__qualname__', repr(entry))}"

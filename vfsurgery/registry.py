"""One registry for everything that users may add by name: passes, matchers, normalizations, recipe tasks.

An installed package adds its own by an entry point of the group ``vfsurgery.plugins`` that names a module::

    [project.entry-points."vfsurgery.plugins"]
    my-package = "my_package.surgery"

Importing that module registers what it has (``@register_pass``, ``@rule``, ``MATCHERS.register``). It is imported when
a name is asked for that is not there, when a registry is listed, or when a model is first traced, since rules have no
names; not before. A plugin that cannot be imported is left out, with a :class:`PluginWarning` that names its
distribution: what a stranger's package breaks must not stop work that does not need it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from vfsurgery.errors import OptionError, PluginWarning, did_you_mean, explain

T = TypeVar("T")
E = TypeVar("E")

PLUGINS = "vfsurgery.plugins"
"""The group of entry points that name modules of plugins."""

_LOADING = threading.RLock()
_loaded = False


def load_plugins() -> None:
    """Import the modules of all installed plugins, once in a process.

    Warns:
        PluginWarning: one of them cannot be imported.
    """
    global _loaded
    with _LOADING:
        if _loaded:
            return
        _loaded = True  # before, not after: a plugin may look something up while it is imported
        for plugin in sorted(entry_points(group=PLUGINS), key=lambda plugin: (plugin.name, plugin.value)):
            _load(plugin)


def _load(plugin: EntryPoint) -> None:
    try:
        plugin.load()
    except Exception as error:
        owner = "an unknown distribution" if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"
        message = explain(
            f"the plugin {plugin.name!r} of {owner} was left out",
            module=plugin.value,
            because=f"{type(error).__name__}: {error}",
            remedy="mend or uninstall that package",
        )
        warnings.warn(PluginWarning(message), stacklevel=2)


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

    def register(self, name: str) -> Callable[[E], E]:
        """Return a decorator that enters what it decorates under ``name`` and hands it back, with its own type.

        Raises:
            OptionError: ``name`` is taken already; both places are named.
        """

        def enter(entry: E) -> E:
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
            self._entries[name] = cast(T, entry)
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise OptionError(explain(f"unknown {self.kind} {name!r}", remedy=did_you_mean(name, self._entries)))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            load_plugins()
        return name in self._entries


class Selection(Generic[T]):
    """Those entries of a registry for which a condition holds, as if they had a registry of their own.

    >>> numbers: Registry[int] = Registry("number")
    >>> _ = numbers.register("one")(1), numbers.register("two")(2)
    >>> even = Selection(numbers, "even number", lambda number: number % 2 == 0)
    >>> list(even), even["two"], "one" in even
    (['two'], 2, False)
    """

    def __init__(self, registry: Registry[T], kind: str, condition: Callable[[T], bool]) -> None:
        self.registry, self.kind, self.condition = registry, kind, condition

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise OptionError(explain(f"unknown {self.kind} {name!r}", remedy=did_you_mean(name, self)))
        return self.registry[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.registry if self.condition(self.registry[name]))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.registry and self.condition(self.registry[name])


def _where(entry: object) -> str:
    module = getattr(entry, "__module__", "?")
    return f"{module}.{getattr(entry, '__qualname__', repr(entry))}"

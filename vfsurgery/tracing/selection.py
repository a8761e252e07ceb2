"""Parts of a model chosen by users: modules to keep whole (``leaf=``), and modules or parameters to pin (``pins=``).

A pattern is a module path (``"layer1.0"``), a parameter or buffer name (``"fc.weight"``), or either with ``*``, ``?``
and ``[...]`` as in file names; a ``*`` matches dots too. A pattern that chooses nothing is an error, never ignored.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.ops import canonical_parameters

Leaf: TypeAlias = type[nn.Module] | str
"""A module class (its subclasses too), a module path, or a pattern of paths."""

NEAREST = 3
"""How many similar names an error offers."""


@dataclass(frozen=True)
class Pinned:
    """What ``pins=`` chose: canonical parameter names and module paths, each with the pattern that chose it."""

    parameters: dict[str, str]
    modules: dict[str, str]

    def pattern_of(self, path: str) -> str | None:
        """The pattern that pins a module or one around it; ``None`` if none does."""
        while path:
            if path in self.modules:
                return self.modules[path]
            path = path.rpartition(".")[0]
        return None


NO_PINS = Pinned({}, {})


def listed(given: object) -> list[Any]:
    """One entry, or several, as a list."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def leaf_paths(model: nn.Module, leaf: Leaf | Sequence[Leaf]) -> frozenset[str]:
    """The paths of the modules that ``leaf`` chooses; a module with several names goes by its first.

    Raises:
        OptionError: an entry is neither a module class nor text, or chooses no module inside the model.

    >>> sorted(leaf_paths(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), nn.ReLU))
    ['0', '1.0']
    """
    modules = _inner_modules(model)
    names = {id(module): path for path, module in reversed(modules.items())}
    chosen: set[str] = set()
    for entry in listed(leaf):
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            found = [path for path, module in modules.items() if isinstance(module, entry)]
            if not found:
                raise _no_match("leaf", entry.__name__, {type(module).__name__ for module in modules.values()})
        elif isinstance(entry, str):
            found = fnmatch.filter(modules, entry)
            if not found:
                raise _no_match("leaf", entry, modules)
        else:
            raise OptionError(explain(f"leaf holds {entry!r}", accepted="module classes, module paths, patterns"))
        chosen.update(names[id(modules[path])] for path in found)
    return frozenset(chosen)


def chosen_pins(model: nn.Module, pins: str | Sequence[str]) -> Pinned:
    """What ``pins`` chooses; a module's parameters and buffers, and those of modules inside it, are chosen with it.

    Raises:
        OptionError: an entry is no text, or chooses nothing.

    >>> chosen_pins(nn.Sequential(nn.Linear(2, 2)), "0").parameters
    {'0.weight': '0', '0.bias': '0'}
    """
    modules = _inner_modules(model)
    first = {id(module): path for path, module in reversed(modules.items())}
    parameters: dict[str, str] = {}
    paths: dict[str, str] = {}
    for pattern in listed(pins):
        if not isinstance(pattern, str):
            raise OptionError(explain(f"pins holds {pattern!r}", accepted="module paths, parameter names, patterns"))
        for name in chosen_tensors(model, pattern, "pins"):
            parameters.setdefault(name, pattern)
        for owner in fnmatch.filter(modules, pattern):
            paths.setdefault(first[id(modules[owner])], pattern)
    return Pinned(parameters, paths)


def chosen_tensors(model: nn.Module, pattern: str, argument: str) -> list[str]:
    """Canonical names of the parameters and buffers that a pattern chooses, by their own names or by modules' paths.

    Raises:
        OptionError: it chooses nothing; names ``argument``.

    >>> chosen_tensors(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "*.bias", "pins")
    ['0.bias', '1.bias']
    """
    modules = _inner_modules(model)
    canonical = canonical_parameters(model)
    tensors = {name: canonical[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    owners, named = fnmatch.filter(modules, pattern), fnmatch.filter(tensors, pattern)
    if not owners and not named:
        raise _no_match(argument, pattern, [*modules, *tensors])
    inside = [name for name in tensors if any(name.startswith(f"{owner}.") for owner in owners)]
    return list(dict.fromkeys(tensors[name] for name in (*named, *inside)))


def _inner_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path}


def _no_match(argument: str, pattern: str, known: Iterable[str]) -> OptionError:
    close = difflib.get_close_matches(pattern, list(known), NEAREST, cutoff=0.5)
    return OptionError(
        explain(
            f"{argument}={pattern!r} matches nothing in the model",
            remedy=f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "model.named_modules() lists the paths",
        )
    )

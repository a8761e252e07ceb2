"""Docstrings as the reference shows them: doctests in fences, cross-references as links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([^`]+)`")
DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {name for name, member in pkg.members.items() if member.is_alias}  # its modules are not
        for found in _docstrings(pkg):
            found.value = fenced(linked(paged(found.value), pkg.name, public))


def fenced(text: str) -> str:
    r"""Each doctest in a fence of its own.

    >>> fenced("Text.\n\n>>> 1 + 1\n2\n\nMore.")
    'Text.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.'
    """
    return DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


def paged(text: str) -> str:
    """Pages that are named as links, seen from a page of the reference.

    >>> paged("See docs/sparse.md.")
    'See [sparse](../sparse.md).'
    """
    return re.sub(r"\bdocs/(\w+)\.md", r"[\1](../\1.md)", text)


def linked(text: str, package: str, public: set[str]) -> str:
    """Roles as code; with a link where a public name is meant, to that name or the class that it is a member of.

    >>> linked("See :meth:`Pruner.score`, :func:`~lib.inner.tool` and :mod:`lib.inner`.", "lib", {"Pruner"})
    'See [`Pruner.score`][lib.Pruner], `tool` and `lib.inner`.'
    """

    def shown(found: re.Match[str]) -> str:
        short, name = found.groups()
        code = f"`{name.split('.')[-1] if short else name}`"
        last = [part for part in name.split(".") if part in public and (part[0].isupper() or name.endswith(part))]
        return f"[{code}][{package}.{last[0]}]" if last else code

    return ROLE.sub(shown, text)


def _docstrings(thing: griffe.Object) -> Iterator[griffe.Docstring]:
    if thing.docstring is not None:
        yield thing.docstring
    for member in thing.members.values():
        if not member.is_alias:
            yield from _docstrings(member)

"""Which of many are to blame, found by trying halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def culprits(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[tuple[str, ...]]:
    """Who is to blame for a failure of all names together: single names, or several that fail only together.

    Each culprit costs about twice as many tries as there are halvings from all names down to one.

    Args:
        names: They fail together.
        fails: Whether some of them fail.

    >>> culprits("abcdefgh", lambda names: "c" in names or "h" in names)
    [('c',), ('h',)]
    >>> culprits("abcd", lambda names: {"a", "d"} <= set(names))
    [('a', 'b', 'c', 'd')]
    """
    if len(names) == 1:
        return [tuple(names)]
    half = len(names) // 2
    parts = [part for part in (names[:half], names[half:]) if fails(part)]
    return [found for part in parts for found in culprits(part, fails)] or [tuple(names)]

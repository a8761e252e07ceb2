"""Which groups may lose units: not those that the user excludes, and of nested ones either blocks or units inside."""

from __future__ import annotations

from collections.abc import Sequence

from vfsurgery.discovery.roles import READS
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import GroupSet, PermutationGroup
from vfsurgery.pruning.layers import matches
from vfsurgery.tracing.selection import listed

EXCLUDED = "excluded by the user ({})"


def excluded(groups: GroupSet, exclude: str | Sequence[str]) -> dict[str, str]:
    """The groups that the user excludes, with the pattern that says so.

    A pattern names a group (``"g3"``), or modules or parameters that write its units.

    Raises:
        OptionError: a pattern matches no group.
    """
    found: dict[str, str] = {}
    for pattern in listed(exclude):
        matched = [group.name for group in groups if group.name == pattern or _is_written_by(group, pattern)]
        if not matched:
            raise OptionError(
                explain(
                    f"exclude={pattern!r} matches nothing that writes units of a group",
                    remedy=did_you_mean(pattern, {group.label for group in groups}),
                )
            )
        found |= {name: EXCLUDED.format(pattern) for name in matched}
    return found


def first_and_instead(groups: GroupSet) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The groups to cut first, and for each of them that is nested what can be cut in its stead.

    Cutting whole blocks (heads, groups of channels) and cutting every block alike both make it smaller; the finer one
    of the two comes first, as it hits the wanted fraction better.
    """
    first = [group.name for group in groups]
    instead: dict[str, tuple[str, ...]] = {}
    for outer in groups:
        inside = [group for group in groups if group.outer == outer.name]
        if not inside or outer.name not in first:
            continue
        names = tuple(group.name for group in inside)
        blocks_first = outer.size >= max(group.size for group in inside)
        chosen, other = ((outer.name,), names) if blocks_first else (names, (outer.name,))
        first = [name for name in first if name not in other]
        instead |= {name: other for name in chosen}
    return first, instead


def _is_written_by(group: PermutationGroup, pattern: str) -> bool:
    return any(matches(member.parameter, pattern) for member in group.members if member.role != READS)

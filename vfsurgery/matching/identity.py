"""Matchers that look at nothing: leave every unit where it is, or use orders that are known already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import Permutation
from vfsurgery.matching.base import MATCHERS, Matching, Problem


@MATCHERS.register("identity")
@dataclass(frozen=True)
class Identity:
    """No reordering: the merge is the plain average of the weights."""

    name: str = field(default="identity", init=False)
    needs_data: bool = field(default=False, init=False)

    def match(self, problem: Problem) -> list[Matching]:
        """No orders for any source."""
        return [Matching({}) for _ in problem.states[1:]]


@dataclass(frozen=True)
class Given:
    """Orders known beforehand, one mapping per source after the first (a single mapping for two sources).

    Raises:
        OptionError: when matching: a group does not exist, has another size, or the number of sources differs.
    """

    permutations: Mapping[str, Permutation] | tuple[Mapping[str, Permutation], ...]
    name: str = field(default="given", init=False)
    needs_data: bool = field(default=False, init=False)

    def match(self, problem: Problem) -> list[Matching]:
        """The given orders, checked against the groups."""
        per_source = self.permutations if isinstance(self.permutations, tuple) else (self.permutations,)
        if len(per_source) != len(problem.states) - 1:
            raise OptionError(f"{len(per_source)} sets of permutations given for {len(problem.states) - 1} sources")
        groups = {group.name: group for group in problem.groups}
        for permutations in per_source:
            for name, permutation in permutations.items():
                group = groups.get(name)
                if group is None or group.units != permutation.size:
                    raise OptionError(
                        explain(
                            f"a permutation of {permutation.size} units was given for group {name!r}",
                            units="no such group" if group is None else group.units,
                            remedy=did_you_mean(name, groups),
                        )
                    )
                if not group.accepts(permutation):
                    raise OptionError(
                        explain(
                            f"a permutation moves units of group {name!r} out of their block",
                            group=group,
                            remedy=f"order the {group.size} units within each of the {group.blocks} blocks",
                        )
                    )
        return [Matching(dict(permutations)) for permutations in per_source]

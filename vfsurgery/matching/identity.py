"""Matchers that look at nothing: leave every unit where it is, or use orders that are known already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from vfsurgery.discovery.maps import Order, UnitMap
from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import Permutation
from vfsurgery.matching.base import MATCHERS, Matching, Problem, Symmetries


@MATCHERS.register("identity")
@dataclass(frozen=True)
class Identity:
    """No reordering: the merge is the plain average of the weights."""

    name: str = field(default="identity", init=False)
    needs_data: bool = field(default=False, init=False)

    def match(self, problem: Problem) -> list[Matching]:
        """No orders for any source."""
        return [Matching({}) for _ in problem.states[1:]]


Orders: TypeAlias = Mapping[str, Order] | tuple[Mapping[str, Order], ...]
"""What :class:`Given` takes and :func:`vfsurgery.match` returns."""


@dataclass(frozen=True)
class Given:
    """Orders or maps known beforehand: one mapping per source after the first, a single one for two sources.

    A tuple of one per source gives the first source's, too.

    Raises:
        OptionError: when matching: a group does not exist, has another size, or the number of sources differs.
    """

    permutations: Orders
    name: str = field(default="given", init=False)
    needs_data: bool = field(default=False, init=False)

    @property
    def symmetries(self) -> Symmetries:
        """Whether there are maps among them."""
        mappings = self.permutations if isinstance(self.permutations, tuple) else (self.permutations,)
        maps = any(isinstance(order, UnitMap) for mapping in mappings for order in mapping.values())
        return "all" if maps else "permutations"

    def match(self, problem: Problem) -> list[Matching]:
        """The given orders, checked against the groups."""
        per_source = self.permutations if isinstance(self.permutations, tuple) else (self.permutations,)
        if not 0 <= len(problem.states) - len(per_source) <= 1:
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
                if isinstance(permutation, UnitMap) and not (group.mappable or group.symmetry.is_continuous):
                    raise OptionError(
                        explain(
                            f"a map of units was given for group {name!r}, which lets only permutations through",
                            group=group,
                            remedy="pass a Permutation",
                        )
                    )
                if isinstance(permutation, Permutation) and not group.accepts(permutation):
                    raise OptionError(
                        explain(
                            f"a permutation moves units of group {name!r} out of their block",
                            group=group,
                            remedy=f"order the {group.size} units within each of the {group.blocks} blocks",
                        )
                    )
        return [Matching(dict(permutations)) for permutations in per_source]

"""Groups that must lose equally many units: all layers and directions of a recurrent network have one hidden size.

Which units each of them loses is its own choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from vfsurgery.groups import GroupSet, PermutationGroup
from vfsurgery.tracing.ops import canonical_parameters

ONE_SIZE = "all layers and directions of {} have one {}, and not all of them can lose units"


@dataclass(frozen=True)
class Teams:
    """Which groups go together, by name; those in no team go alone. ``stuck`` says why some cannot lose any."""

    of: Mapping[str, tuple[str, ...]]
    stuck: Mapping[str, str]

    @staticmethod
    def find(model: nn.Module, groups: GroupSet) -> Teams:
        """The teams of a model."""
        names = canonical_parameters(model)
        teams: list[set[str]] = []
        stuck: dict[str, str] = {}
        for path, module in model.named_modules():
            if not isinstance(module, nn.RNNBase):
                continue
            for prefix, size in (("weight_hh", "hidden_size"), ("weight_hr", "proj_size")):
                weights = [w for name, w in module.named_parameters(recurse=False) if name.startswith(prefix)]
                written = [_written(groups, names[id(w)], getattr(module, size)) for w in weights]
                found = [group.name for group in written if group is not None]
                overlapping = [team for team in teams if not team.isdisjoint(found)]
                teams = [team for team in teams if team not in overlapping] + [set(found).union(*overlapping)]
                if len(found) < len(written):
                    stuck |= dict.fromkeys(found, ONE_SIZE.format(path, size))
        order = [group.name for group in groups]
        of = {name: tuple(sorted(team, key=order.index)) for team in teams for name in team}
        return Teams(of, Teams(of, {}).shared(stuck))

    def leaders(self, names: Iterable[str]) -> list[str]:
        """Of each team that is named the first, and the groups that are in none."""
        return list(dict.fromkeys(self.of.get(name, (name,))[0] for name in names))

    def members(self, leaders: Iterable[str]) -> list[str]:
        """All groups of the teams that are led by these."""
        return [name for leader in leaders for name in self.of.get(leader, (leader,))]

    def shared(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """What is said of one group, of all of its team; of several that something is said of, the first counts."""
        found: dict[str, str] = {}
        for name, reason in reasons.items():
            for other in self.of.get(name, (name,)):
                found.setdefault(other, reasons.get(other, reason))
        return found


def _written(groups: GroupSet, parameter: str, size: int) -> PermutationGroup | None:
    """The one group of that many units along the first dim of a parameter."""
    found = [group for group, member in groups.by_parameter.get(parameter, ()) if member.dim == 0]
    return found[0] if len(found) == 1 and found[0].units == size else None

"""Rotation before units are removed, so that principal directions of a stream go and not single units.

What is written into a stream between norms may be rotated if all that reads it is rotated back. SliceGPT (Ashkboos et
al., ICLR 2024) turns the principal directions of what the norms give out onto the units, and removes those of the least
energy. There LayerNorms become RMSNorms; here the network keeps its class, and a norm of fewer units has to compute
nearly the same:

- A LayerNorm subtracts the mean over its units. So the kept directions, which are orthogonal to ones, are laid where
  the kept units sum to zero: ``k`` units hold ``k - 1`` directions, and the mean stays the mean.
- A norm divides by the root of the mean square of ``k`` units instead of ``d``. The sum of squares is nearly the same,
  so its scale is multiplied by the root of ``d / k``.

Together this is a map ``T`` of ``k`` rows with ``T T' = 1``: what writes becomes ``T W``, what reads ``W T'``. It is
made in two steps. The first is a rotation in the group's own symmetry, which changes nothing and is checked; the second
belongs to the removal, and is proved with it.

With ``removed="fold"`` the kept directions also stand in for the removed ones: behind each norm, least squares gives
``x ~ A T x`` over the data, and what reads becomes ``W A``, ``A = E[x x'] T' (T E[x x'] T')^-1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vfsurgery.discovery.canonical import canonical
from vfsurgery.discovery.maps import UnitMap, map_tensor
from vfsurgery.discovery.roles import READS, WRITES
from vfsurgery.errors import OptionError, explain
from vfsurgery.groups import Folding, GroupSet, PermutationGroup, Symmetry
from vfsurgery.groups.symmetries import complement_of_ones
from vfsurgery.matching.similarity import is_matrix, member_rows
from vfsurgery.passes.mask import SPARSE
from vfsurgery.pruning.masks import Masks
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.reference import looks_across_units
from vfsurgery.pruning.units.resize import with_tensors
from vfsurgery.stats.collect import group_sites, survey
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.ops import OpReader
from vfsurgery.tracing.sources import Source, eval_mode

ROTATIONS = (Symmetry.ORTHOGONAL_FIXING_ONES, Symmetry.ORTHOGONAL)
RIDGE = 1e-3
"""Share of the mean second moment that holds a fit back from what few images do not show: towards ``A = T'``."""


@dataclass(frozen=True)
class Stream:
    """A space and its principal directions.

    ``directions`` are the columns of a matrix ``(size, count)``, the one of most energy first, ``energies`` their
    second moments ``(count,)``; of a group that is orthogonal fixing ones, those that are orthogonal to ones.
    ``behind`` has the second moments of the units, ``(size, size)``, behind norms, by node. All are float64.
    """

    group: PermutationGroup
    directions: Tensor
    energies: Tensor
    behind: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of(group: PermutationGroup, second: Tensor, behind: Mapping[str, Tensor] | None = None) -> Stream:
        """Find the directions of second moments ``(size, size)``."""
        basis = complement_of_ones(group.size) if _fixes_ones(group) else torch.eye(group.size, dtype=torch.float64)
        energies, directions = torch.linalg.eigh(basis.T @ second @ basis)
        return Stream(group, basis @ directions.flip(1), energies.flip(0).clamp_min(0), behind or {})

    def scores(self) -> np.ndarray:
        """The energy that goes with each unit, ``(size,)``, if the last one goes first."""
        energies = self.energies.numpy()
        return np.concatenate([energies[:1], energies])[-self.group.size :]

    def share(self, kept: np.ndarray) -> float:
        """How much of the energy is left, 0 to 1."""
        count = int(kept.sum()) - int(_fixes_ones(self.group))
        return float(self.energies[:count].sum() / self.energies.sum())

    def turn(self, kept: np.ndarray) -> Tensor:
        """The rotation that brings the first directions to the kept units, ``(size, size)``; one of the symmetry."""
        turn = _laid(kept, _fixes_ones(self.group)) @ self.directions.T
        return turn + 1 / self.group.size if _fixes_ones(self.group) else turn

    def narrow(self, kept: np.ndarray) -> Tensor:
        """What becomes of turned units when others are removed, ``(size, size)``: zeros where units are not kept."""
        mask = torch.from_numpy(kept).double()
        if not _fixes_ones(self.group):
            return torch.diag(mask)
        count, size = mask.sum(), len(mask)
        return torch.diag(mask) - mask.outer(mask) / count + mask.outer(torch.ones_like(mask)) / (count * size).sqrt()

    def fitted(self, node: str, kept: np.ndarray) -> Tensor:
        """What stands in for all turned units behind a norm, from what is left of them: ``(size, size)``."""
        turn, narrow = self.turn(kept), self.narrow(kept)
        second = turn @ self.behind[node] @ turn.T
        ridge = RIDGE * second.trace() / len(second) * torch.eye(len(second), dtype=second.dtype)
        return torch.linalg.solve(narrow @ second @ narrow.T + ridge, narrow @ (second + ridge)).T


@dataclass(frozen=True)
class Rotation:
    """The streams of a network that can be rotated: ``source`` is in canonical form, ``left`` says why others cannot.

    ``fold`` lets kept directions stand in for the removed ones.
    """

    source: Source
    groups: GroupSet
    streams: Mapping[str, Stream]
    left: Mapping[str, str]
    fold: bool = False

    @staticmethod
    def find(
        source: Source, groups: GroupSet, images: Callable[[str], Iterator[Tensor]] | None, fold: bool = False
    ) -> Rotation:
        """Find principal directions: of what norms give out, or without images of what weights write.

        Args:
            source: The network; it stays as it is.
            groups: Its groups.
            images: Gives one pass over calibration images under a label.
            fold: Whether kept directions are to stand in for the removed ones, which needs images.

        Raises:
            OptionError: there is nothing that can be rotated.
        """
        spaces = [group for group in groups if group.symmetry in ROTATIONS and not group.outer]
        form = canonical(source.state, groups)
        left = {group.name: form.left[group.name] for group in spaces if group.name in form.left}
        _check(source, groups, spaces, left)
        plain = _with(source, {name: x for name, x in form.state.items() if x is not source.state[name]})
        spaces = [group for group in spaces if group.name not in left]
        seen = {} if images is None else _second_moments(plain, groups, spaces, images("principal directions"))
        streams: dict[str, Stream] = {}
        for group in spaces:
            shown = seen.get(group.name, {})
            second = _sum([*shown.values()]) if shown else _written(group, plain.state)
            streams[group.name] = Stream.of(group, second, shown)
        return Rotation(plain, groups, streams, left, fold)

    def turned(self, kept: Mapping[str, np.ndarray]) -> Source:
        """The network with the streams of these groups rotated for what is kept of them; it computes the same."""
        turns = {name: self.streams[name].turn(mask) for name, mask in kept.items() if name in self.streams}
        maps = {name: UnitMap(turn, turn.T) for name, turn in turns.items()}
        return _with(self.source, self._mapped(self.source.state, maps))

    def narrowed(self, state: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
        """Weights of a turned network, made ready for a cut: norms of fewer units compute nearly the same."""
        kept = {name: mask for name, mask in cut.kept.items() if name in self.streams}
        narrow = {name: self.streams[name].narrow(mask) for name, mask in kept.items()}
        maps = {name: UnitMap(matrix, matrix.T) for name, matrix in narrow.items()}
        result = {**state, **self._mapped(state, maps)}
        for folding, node in self._norms():
            name = folding.scale.parameter
            owners = [group for group in kept if self._scales(folding, group)]
            if not owners:
                continue
            result[name] = result[name] * (state[name].numel() / cut.tensor(name, state[name]).numel()) ** 0.5
            fits = {
                group: UnitMap(narrow[group], self.streams[group].fitted(node, kept[group]))
                for group in owners
                if self.fold and node in self.streams[group].behind
            }
            for weight in dict.fromkeys(reader.weight.parameter for reader in folding.readers):
                result[weight] = map_tensor(weight, state[weight], self.groups, {**maps, **fits})
        return result

    def not_folded(self, names: Sequence[str]) -> list[PermutationGroup]:
        """Of these groups those that are read by something else than weights behind a norm."""
        folded = {reader.weight.parameter for folding, _ in self._norms() for reader in folding.readers}
        groups = [self.groups[name] for name in names]
        return [group for group in groups if {m.parameter for m in group.members if m.role == READS} - folded]

    def _norms(self) -> Iterator[tuple[Folding, str]]:
        """The norms whose scale is folded away, each once, with the first node that it runs at."""
        nodes = {op.node.name for op in OpReader(self.source.graph_module) if looks_across_units(op)}
        first = {folding.scale.parameter: folding for folding in reversed(self.groups.foldings)}
        yield from ((folding, node) for folding in first.values() if (node := folding.nodes[0]) in nodes)

    def _scales(self, folding: Folding, name: str) -> bool:
        return any(member.scales and member.overlaps(folding.scale) for member in self.groups[name].members)

    def _mapped(self, state: Mapping[str, Tensor], maps: Mapping[str, UnitMap]) -> dict[str, Tensor]:
        """The weights that maps change."""
        names = dict.fromkeys(member.parameter for name in maps for member in self.groups[name].members)
        return {name: map_tensor(name, state[name], self.groups, maps) for name in names}


def _check(source: Source, groups: GroupSet, spaces: Sequence[PermutationGroup], left: Mapping[str, str]) -> None:
    """Refuse networks without a stream that can be rotated.

    Raises:
        OptionError: there is none, or its weights forbid it.
    """
    remedy = "leave rotate= out: single units are then removed"
    if not spaces:
        shown = ", ".join(map(str, groups.groups[:4])) + (", …" if len(groups) > 4 else "")
        raise OptionError(
            explain(
                "rotate=True finds no stream between LayerNorms or RMSNorms whose units can be rotated",
                groups=shown or "none",
                remedy=remedy,
            )
        )
    sparsity = Masks.of(source.model).sparsity
    if sparsity >= SPARSE:
        raise OptionError(explain(f"rotate=True would fill zeros, which {sparsity:.0%} of weights are", remedy=remedy))
    if len(left) == len(spaces):
        raise OptionError(
            explain(
                "rotate=True cannot rotate these weights",
                reason="; ".join(f"{groups[name]}: {reason}" for name, reason in left.items()),
                remedy=f"{remedy}; of a model in half precision, prune its float() and bring the result back",
            )
        )


def _second_moments(
    source: Source, groups: GroupSet, spaces: Sequence[PermutationGroup], images: Iterator[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Second moments of the units of each space behind the norms, by group and node, float64."""
    sites = group_sites(source.graph_module, groups, source.device)
    sites = {group.name: sites[group.name] for group in spaces if group.name in sites}
    with eval_mode(source.graph_module):
        crossed = survey([source.graph_module], images, sites, {}, joint=True).crossed[0, 0]
    return {
        name: {
            site.node: (each.covariance() + each.a.mean.outer(each.a.mean)).cpu()
            for site, each in zip(sites[name], shown, strict=True)
        }
        for name, shown in crossed.items()
    }


def _written(group: PermutationGroup, state: Mapping[str, Tensor]) -> Tensor:
    """Second moments of what weights write into a space, ``(size, size)`` float64."""
    matrices = [m for m in group.members if m.role != READS and not m.dual and is_matrix(state[m.parameter])]
    writers = [m for m in matrices if m.role == WRITES] or matrices
    rows = [member_rows(state[m.parameter], m).double().cpu() for m in writers]
    nothing = torch.zeros(group.size, group.size, dtype=torch.float64)
    return torch.stack([nothing, *(each @ each.T for each in rows)]).sum(0)


def _sum(seconds: Sequence[Tensor]) -> Tensor:
    """Second moments of several places, each over its trace."""
    return torch.stack([each / each.trace().clamp_min(torch.finfo(each.dtype).tiny) for each in seconds]).sum(0)


def _with(source: Source, state: Mapping[str, Tensor]) -> Source:
    """A copy with other tensors."""
    model = with_tensors(source.model, state)
    return Source.of(model, put_over(model, source.graph_module))


def _fixes_ones(group: PermutationGroup) -> bool:
    return group.symmetry is Symmetry.ORTHOGONAL_FIXING_ONES


def _laid(kept: np.ndarray, fixes_ones: bool) -> Tensor:
    """Orthonormal columns, first those on kept units alone; orthogonal to ones, ``(size, size - 1)``, if it must be."""
    size = len(kept)
    places = [torch.from_numpy(np.flatnonzero(mask)) for mask in (kept, ~kept) if mask.any()]
    columns: list[Tensor] = []
    for place in places:
        inside = complement_of_ones(len(place)) if fixes_ones else torch.eye(len(place), dtype=torch.float64)
        columns.append(torch.zeros(size, inside.shape[1], dtype=torch.float64).index_copy(0, place, inside))
    if fixes_ones and len(places) > 1:  # the difference of both parts' means
        between = torch.from_numpy(np.where(kept, 1 / len(places[0]), -1 / len(places[1])))
        columns.append((between / between.norm())[:, None])
    return torch.cat(columns, 1)

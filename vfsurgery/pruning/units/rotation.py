"""Rotation before units are removed, so that principal directions of a stream go and not single units.

What is written into a stream between norms may be rotated if all that reads it is rotated back. SliceGPT (Ashkboos et
al., ICLR 2024) turns the principal directions of what the norms give out onto the units, and removes those of the least
energy. There norms become RMSNorms; here the network keeps its class, and a LayerNorm of fewer units has to compute
nearly the same:

- It subtracts the mean over its units. So the kept directions, which are orthogonal to ones, are laid where the kept
  units sum to zero: ``k`` units hold ``k - 1`` directions, and the mean of the stream, if it has one, stays the mean.
- It divides by the root of the mean square of ``k`` units, which are larger than the mean of all ``d``. So its scale is
  multiplied by the root of (mean square of the ``k``) / (mean square of the ``d``).

Both together are a map ``T`` of ``k`` rows with ``T T' = 1``: what writes becomes ``T W``, what reads ``W T'``. It is
made in two steps. The first is a rotation in the group's own symmetry, which changes nothing and is checked; the second
belongs to the removal, and is proved with it.
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
from vfsurgery.passes.centre_writers import SPARSE
from vfsurgery.pruning.masks import Masks
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.reference import looks_across_units
from vfsurgery.pruning.units.resize import with_tensors
from vfsurgery.stats.collect import group_sites, survey
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.ops import OpReader
from vfsurgery.tracing.sources import Source, eval_mode

Images = Callable[[str], Iterator[Tensor]]


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
        basis = basis.to(second.device)
        energies, directions = torch.linalg.eigh(basis.T @ second.double() @ basis)
        return Stream(group, basis @ directions.flip(1), energies.flip(0).clamp_min(0), behind or {})

    def scores(self) -> np.ndarray:
        """What is lost with each further unit, from the last one to the first, ``(size,)``."""
        energies = self.energies.cpu().numpy()
        return np.concatenate([energies[:1], energies])[-self.group.size :]

    def turn(self, kept: np.ndarray) -> Tensor:
        """The rotation that brings the first directions to the kept units, ``(size, size)``, in the symmetry."""
        return _laid(kept, _fixes_ones(self.group)) @ self.directions.cpu().T + _mean(self.group)

    def narrow(self, kept: np.ndarray) -> Tensor:
        """What becomes of turned units when others are removed, ``(size, size)``: zeros where units are not kept."""
        mask = torch.from_numpy(kept).double()
        if not _fixes_ones(self.group):
            return torch.diag(mask)
        ones, count = torch.ones_like(mask), mask.sum()
        return torch.diag(mask) - mask.outer(mask) / count + mask.outer(ones) / (count * len(mask)).sqrt()

    def growth(self, node: str, kept: np.ndarray) -> float:
        """Mean square of the kept units over that of all, behind a norm or, where nothing is known of it, of all."""
        own = self.behind.get(node)
        count = int(kept.sum())
        if own is None:
            share = self.energies[: count - int(_fixes_ones(self.group))].sum() / self.energies.sum()
        else:
            matrix = (self.narrow(kept) @ self.turn(kept)).to(own.device)
            share = (matrix @ own @ matrix.T).trace() / own.trace()
        return float(share) * len(kept) / count


@dataclass(frozen=True)
class Rotation:
    """The streams of a network that can be rotated: ``source`` is in canonical form, ``left`` says why others cannot."""

    source: Source
    groups: GroupSet
    streams: Mapping[str, Stream]
    left: Mapping[str, str]

    @staticmethod
    def find(source: Source, groups: GroupSet, images: Images | None) -> Rotation:
        """Find principal directions: of what norms give out, or without images of what weights write.

        Args:
            source: The network; it stays as it is.
            groups: Its groups.
            images: Gives one pass over calibration images under a label.

        Raises:
            OptionError: there is nothing to be rotated.
        """
        spaces = [group for group in groups if group.symmetry in _ROTATIONS and not group.outer]
        form = canonical(source.state, groups)
        left = {group.name: form.left[group.name] for group in spaces if group.name in form.left}
        _check(source, groups, spaces, left)
        model = with_tensors(source.model, {n: x for n, x in form.state.items() if x is not source.state[n]})
        plain = Source.of(model, put_over(model, source.graph_module))
        free = [group for group in spaces if group.name not in left]
        seen = {} if images is None else _second_moments(plain, groups, free, images("principal directions"))
        streams: dict[str, Stream] = {}
        for group in free:
            shown = seen.get(group.name)
            if shown:
                streams[group.name] = Stream.of(group, _sum(list(shown.values())), shown)
            elif bool((written := _written(group, plain.state)).any()):
                streams[group.name] = Stream.of(group, written)
            else:
                left[group.name] = "nothing writes these units but what is not a weight"
        return Rotation(plain, groups, streams, left)

    def turned(self, kept: Mapping[str, np.ndarray]) -> Source:
        """The network with the streams of these groups rotated; it computes the same."""
        turns = {name: self.streams[name].turn(mask) for name, mask in kept.items() if name in self.streams}
        state = _mapped(self.source.state, self.groups, {name: UnitMap(turn, turn.T) for name, turn in turns.items()})
        model = with_tensors(self.source.model, state)
        return Source.of(model, put_over(model, self.source.graph_module))

    def narrowed(self, state: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
        """Weights of a turned network, made ready for a cut: norms of fewer units compute nearly the same."""
        kept = {name: mask for name, mask in cut.kept.items() if name in self.streams}
        narrow = {name: self.streams[name].narrow(mask) for name, mask in kept.items()}
        maps = {name: UnitMap(matrix, matrix.T) for name, matrix in narrow.items()}
        result = {**state, **_mapped(state, self.groups, maps)}
        for folding, node in self._norms():
            grown = [self.streams[name].growth(node, mask) for name, mask in kept.items() if self._scales(folding, name)]
            if grown:
                scale = result[folding.scale.parameter]
                result[folding.scale.parameter] = scale * float(np.mean(grown)) ** 0.5
        return result

    def _norms(self) -> Iterator[tuple[Folding, str]]:
        """The norms whose scale is folded away, each once, with the first node that it runs at."""
        nodes = {op.node.name for op in OpReader(self.source.graph_module) if looks_across_units(op)}
        first = {folding.scale.parameter: folding for folding in reversed(self.groups.foldings)}
        yield from ((folding, node) for folding in first.values() if (node := folding.nodes[0]) in nodes)

    def _scales(self, folding: Folding, name: str) -> bool:
        return any(member.scales and member.overlaps(folding.scale) for member in self.groups[name].members)


_ROTATIONS = (Symmetry.ORTHOGONAL_FIXING_ONES, Symmetry.ORTHOGONAL)


def _check(
    source: Source, groups: GroupSet, spaces: Sequence[PermutationGroup], left: Mapping[str, str]
) -> None:
    """Refuse networks without a space that can be rotated.

    Raises:
        OptionError: there is none, or its weights forbid it.
    """
    remedy = "leave rotate= out: units are then removed one by one"
    if not spaces:
        shown = ", ".join(str(group) for group in groups.groups[:4]) + (", …" if len(groups) > 4 else "")
        raise OptionError(
            explain(
                "rotate=True finds no stream between LayerNorms or RMSNorms whose units can be rotated",
                groups=shown or "none",
                remedy=remedy,
            )
        )
    sparsity = Masks.of(source.model).sparsity
    if sparsity >= SPARSE:
        raise OptionError(explain(f"rotate=True would fill zeros: {sparsity:.0%} of the weights are", remedy=remedy))
    if len(left) == len(spaces):
        reasons = "; ".join(f"{groups[name]}: {reason}" for name, reason in left.items())
        raise OptionError(
            explain(
                "rotate=True cannot rotate these weights",
                reason=reasons,
                remedy=f"{remedy}; half precision: prune model.float() and bring the result back",
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
            site.node: each.covariance() + each.a.mean.outer(each.a.mean)
            for site, each in zip(sites[name], shown, strict=True)
        }
        for name, shown in crossed.items()
    }


def _written(group: PermutationGroup, state: Mapping[str, Tensor]) -> Tensor:
    """Second moments of what weights write into a space, ``(size, size)``: the squares of ``"magnitude"``, and more."""
    matrices = [m for m in group.members if m.role != READS and not m.dual and is_matrix(state[m.parameter])]
    writers = [m for m in matrices if m.role == WRITES] or matrices
    rows = [member_rows(state[m.parameter], m).double() for m in writers]
    return torch.stack([each @ each.T for each in rows]).sum(0) if rows else torch.zeros(group.size, group.size)


def _sum(seconds: Sequence[Tensor]) -> Tensor:
    """Second moments of several places, each over its trace."""
    return torch.stack([each / each.trace().clamp_min(torch.finfo(each.dtype).tiny) for each in seconds]).sum(0)


def _mapped(state: Mapping[str, Tensor], groups: GroupSet, maps: Mapping[str, UnitMap]) -> dict[str, Tensor]:
    """The weights that maps change."""
    names = dict.fromkeys(member.parameter for name in maps for member in groups[name].members)
    return {name: map_tensor(name, state[name], groups, maps) for name in names}


def _fixes_ones(group: PermutationGroup) -> bool:
    return group.symmetry is Symmetry.ORTHOGONAL_FIXING_ONES


def _mean(group: PermutationGroup) -> float:
    """Every entry of what keeps the mean over the units."""
    return 1 / group.size if _fixes_ones(group) else 0.0


def _laid(kept: np.ndarray, fixes_ones: bool) -> Tensor:
    """Orthonormal columns, first those on kept units alone; orthogonal to ones, ``(size, size - 1)``, if it must be."""
    size = len(kept)
    places = [torch.from_numpy(np.flatnonzero(mask)) for mask in (kept, ~kept)]
    places = [place for place in places if len(place)]
    columns: list[Tensor] = []
    for place in places:
        inside = complement_of_ones(len(place)) if fixes_ones else torch.eye(len(place), dtype=torch.float64)
        columns.append(torch.zeros(size, inside.shape[1], dtype=torch.float64).index_copy(0, place, inside))
    if fixes_ones and len(places) > 1:  # the difference of both parts' means
        between = torch.from_numpy(np.where(kept, 1 / len(places[0]), -1 / len(places[1])))
        columns.append((between / between.norm())[:, None])
    return torch.cat(columns, 1)

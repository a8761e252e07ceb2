"""Linear maps between the units of a source and those of a merged model; a permutation is the special case.

At each group the merged units are ``y = sum_i w_i M_i y_i`` and a source's units come back as ``y_i = U_i y`` (Stoica
et al., "ZipIt!", 2024, section 4; Qu & Horvath, CPAL 2025, section 5.4). Weights that write the group's units become
``M_i W_i``, weights that read them ``W_i U_i``, and what scales or shifts single units ``M_i v_i``
(:mod:`vfsurgery.discovery.roles`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from vfsurgery.discovery.roles import READS
from vfsurgery.errors import SurgeryError, explain
from vfsurgery.groups import GroupSet, Member, Permutation, gather_index, permute_tensor

ROUNDING = 1e-9
"""Entries of a map up to this far from those of the identity come from rounding."""


@dataclass(frozen=True, eq=False)
class UnitMap:
    """How one source's units of one group become merged units (``merge``), and the way back (``unmerge``).

    Both are ``(units, units)``; row ``r`` of ``merge`` says which units of the source make merged unit ``r``. Checked
    when made.

    >>> swap = UnitMap.of(Permutation((1, 0)))
    >>> swap.merge.tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    >>> bool((swap.unmerge @ swap.merge == torch.eye(2)).all())
    True
    """

    merge: Tensor
    unmerge: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(self.merge.shape), tuple(self.unmerge.shape)}
        if len(shapes) > 1 or self.merge.ndim != 2 or self.merge.shape[0] != self.merge.shape[1]:
            raise SurgeryError(explain("a map of units needs two square matrices of one size", shapes=sorted(shapes)))
        if not bool(torch.isfinite(self.merge).all() & torch.isfinite(self.unmerge).all()):
            raise SurgeryError("a map of units holds NaN or infinite values")

    @staticmethod
    def of(permutation: Permutation) -> UnitMap:
        """The map that reorders: ``new[r] = old[order[r]]``."""
        merge = torch.eye(permutation.size, dtype=torch.float64)[list(permutation.order)]
        return UnitMap(merge, merge.T)

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.merge)

    @property
    def moved(self) -> int:
        """How many merged units are something else than the source's unit of the same number."""
        eye = torch.eye(self.size, dtype=self.merge.dtype, device=self.merge.device)
        return int((self.merge != eye).any(1).sum())

    @property
    def is_identity(self) -> bool:
        """Whether merged units are the source's own but for rounding."""
        eye = torch.eye(self.size, dtype=self.merge.dtype, device=self.merge.device)
        return torch.allclose(self.merge, eye, rtol=0, atol=ROUNDING)


Order: TypeAlias = Permutation | UnitMap
"""What becomes of one source's units of one group."""


def map_tensor(name: str, tensor: Tensor, groups: GroupSet, orders: Mapping[str, Order]) -> Tensor:
    """Bring the units of one state-dict entry to those of the merged model; the input itself where nothing changes.

    Args:
        name: The entry's state-dict key.
        tensor: The entry, any shape; where a map applies, floating point.
        groups: The groups of its architecture.
        orders: An order or a map per group name; groups left out stay as they are. A map of a group whose symmetry is
            more than permutations supposes weights in canonical form (:mod:`vfsurgery.discovery.canonical`).
    """
    plain = {group: order for group, order in orders.items() if isinstance(order, Permutation)}
    tensor = permute_tensor(name, tensor, groups, plain)
    for group, member in groups.by_parameter.get(name, ()):
        order = orders.get(group.name)
        if isinstance(order, UnitMap) and not (member.scales and group.symmetry.is_continuous):
            is_undone = member.dual if group.symmetry.is_continuous else member.role == READS
            tensor = _apply(tensor, member, order.unmerge.T if is_undone else order.merge)
    return tensor


def exact_maps(groups: GroupSet, orders: Mapping[str, Order]) -> dict[str, UnitMap]:
    """The maps that change nothing in what a network computes: those of groups whose symmetry is more than orders."""
    maps = {name: order for name, order in orders.items() if isinstance(order, UnitMap)}
    return {name: order for name, order in maps.items() if groups[name].symmetry.is_continuous}


def map_units(units: Tensor, name: str, dim: int, groups: GroupSet, orders: Mapping[str, Order]) -> Tensor:
    """Bring units along the first dim of ``units``, laid out as dim ``dim`` of an entry, to those of the merged model.

    Args:
        units: ``(units, ...)``, for example activations of the layer whose weight the entry is.
        name: The entry's state-dict key.
        dim: Which of the entry's dims the units lie on.
        groups: The groups of its architecture.
        orders: As for :func:`map_tensor`.
    """
    entries = tuple((group, member) for group, member in groups.by_parameter.get(name, ()) if member.dim == dim)
    index = gather_index(entries, dim, len(units), permutations_of(orders))
    if index is not None:
        units = units.index_select(0, torch.from_numpy(index).to(units.device))
    for group, member in entries:
        order = orders.get(group.name)
        if isinstance(order, UnitMap) and not order.is_identity:
            units = _apply(units, replace(member, dim=0), order.merge)
    return units


def _apply(tensor: Tensor, member: Member, matrix: Tensor) -> Tensor:
    """Multiply the units along ``member.dim`` by ``matrix`` from the left, in float32 or better."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.movedim(member.dim, 0).to(dtype, copy=True)
    places = torch.from_numpy(member.positions()).to(tensor.device)  # (units, places per unit)
    units = rows[places].reshape(-1, len(matrix), rows[places[:1]].numel())  # one map may serve several blocks
    rows[places] = (matrix.to(units) @ units).reshape(*places.shape, *rows.shape[1:])
    return rows.movedim(0, member.dim).to(tensor.dtype)


def balanced(orders: Sequence[Mapping[str, Order]], weights: Sequence[float]) -> list[Mapping[str, Order]]:
    """Maps scaled so that what is merged and unmerged comes back as it was: ``sum_i w_i M_i U_i = 1``.

    Zipping makes merged units the mean of their members, which holds for equal weights ``w``; with others the shares of
    a merged unit's members are brought to a sum of one.
    """
    result = [dict(source) for source in orders]
    for name in {name for source in orders for name, order in source.items() if isinstance(order, UnitMap)}:
        maps = [order for source in orders if isinstance(order := source.get(name), UnitMap)]
        if len(maps) == len(orders):
            total = torch.stack([w * (m.merge * m.unmerge.T).sum(1) for w, m in zip(weights, maps, strict=True)]).sum(0)
            for source, unit_map in zip(result, maps, strict=True):
                source[name] = UnitMap(unit_map.merge / total[:, None], unit_map.unmerge)
    return list(result)


def permutations_of(orders: Mapping[str, Order]) -> dict[str, Permutation]:
    """The orders that are permutations."""
    return {name: order for name, order in orders.items() if isinstance(order, Permutation)}

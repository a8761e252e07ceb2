"""From a run of an axis to the member of a group: where units lie in a weight or in the value of a node."""

from __future__ import annotations

import math

import numpy as np

from vfsurgery.groups import Member
from vfsurgery.groups.axes import AxisRef
from vfsurgery.groups.layouts import Run


def member_of(axis: AxisRef, run: Run, place: int, outer: int | None) -> Member:
    """Where the units of factor ``place`` of a run lie on the axis, inside those of factor ``outer`` if there is one.

    Listed index by index where the run is irregular, or where the outer factor is the faster one.
    """
    grid = run.grid
    first = place if outer is None else outer
    size, blocks = grid[place], 1 if outer is None else grid[outer]
    before, between = math.prod(grid[:first]), 1 if outer is None else math.prod(grid[first + 1 : place])
    name, start, inner = axis.tensor.name, int(run.at[0]), math.prod(grid[place + 1 :])
    regular = np.array_equal(run.at, np.arange(start, start + len(run.at)))
    if regular and (outer is None or outer < place):
        return Member(name, axis.dim, size, start, inner, before, (), blocks, between)
    factors = [place] if outer is None else [outer, place]
    by_unit = np.moveaxis(run.at.reshape(grid), factors, range(len(factors))).reshape(-1)
    return Member(name, axis.dim, size, start, indices=tuple(by_unit.tolist()), blocks=blocks)

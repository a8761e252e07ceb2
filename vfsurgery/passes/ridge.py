"""Ridge regression of one layer's weights from moments, the ridge chosen on batches that were held out.

All of it runs on one thread: the factorizations have to (:mod:`vfsurgery.stats.threads`), and between them other
threads would only wait, which costs as much as work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfsurgery.passes.renormalize import unit_ratio
from vfsurgery.stats.patches import PatchMoments
from vfsurgery.stats.threads import threads

JUDGED_UNITS = 64
"""Units that a ridge is chosen on."""
MOST_CONDITION = 1e6
"""Of a matrix that float32 solves well enough to tell one ridge from another."""
CONSTANT = 1e-12
"""Variance, relative to the squared mean, up to which an input is constant: what rounding leaves."""


@dataclass
class Solution:
    """Ridge regression from the moments of what a layer reads and of its goals, on batches fitted on and held out."""

    fitted: PatchMoments
    held_out: PatchMoments

    @threads(1)
    def solve(
        self, average: Tensor, goal: tuple[Tensor, Tensor] | None, ridges: Sequence[float], first: int = 0
    ) -> tuple[Tensor, Tensor, int]:
        """Weight ``(units, columns)``, bias ``(units,)`` and which ridge does best on the held-out batches.

        The search starts at ``ridges[first]``.
        """
        fitted, held_out, columns = self._varying()
        spread = fitted.goal_variance.clamp_min(0).sqrt()
        goal_std = spread if goal is None else goal[1]
        whole = average.double()
        pulled = whole[:, columns] @ fitted.covariance
        ratio = unit_ratio(goal_std, _std(pulled, whole[:, columns]))[:, None]
        whole, pulled = whole * ratio, pulled * ratio
        scale = unit_ratio(goal_std, spread)[:, None]
        missing = scale * fitted.cross - pulled  # (units, inputs)
        ridge_unit = fitted.covariance.diagonal().sum() / average.shape[1]
        absolute = [float(ridge * ridge_unit) for ridge in ridges]
        goals = scale * held_out.cross
        search = _Search(fitted.covariance, missing, whole[:, columns], held_out.covariance, goals, goal_std)
        chosen = search.best(absolute, first) if len(ridges) > 1 else 0
        found = search.solved(absolute[chosen])
        share = self.held_out.count / (self.fitted.count + self.held_out.count)
        if found is not None:
            pulled += missing - absolute[chosen] * (found - whole[:, columns])  # found @ covariance
            whole[:, columns] = found
        if goal is not None:
            weight = whole[:, columns]
            apart = (weight @ (held_out.mean - fitted.mean)).square()
            within = (1 - share) * (pulled * weight).sum(1) + share * ((weight @ held_out.covariance) * weight).sum(1)
            variance = within + share * (1 - share) * apart
            whole = whole * unit_ratio(goal_std, variance.clamp_min(0).sqrt())[:, None]
        mean, goal_mean = (
            torch.lerp(a, b, share)
            for a, b in ((self.fitted.mean, self.held_out.mean), (self.fitted.goal_mean, self.held_out.goal_mean))
        )
        wanted = goal_mean if goal is None else goal[0]
        return whole, wanted - whole[:, self.fitted.columns] @ mean, chosen

    def _varying(self) -> tuple[PatchMoments, PatchMoments, Tensor]:
        """Without the inputs that are constant, whose weights no regression moves, and the columns that are left."""
        moments = self.fitted, self.held_out
        varies = torch.stack([m.covariance.diagonal() > CONSTANT * m.mean.square() for m in moments]).any(0)
        if not bool(varies.all()):
            moments = self.fitted.take(varies), self.held_out.take(varies)
        return *moments, moments[0].columns


@dataclass
class _Search:
    """The ridge with the lowest error on the held-out batches, up and down from a first guess until it rises.

    The ridge pulls weights to ``start``, ``(units, inputs)``, and ``missing`` is what these lack of the covariance of
    goals with inputs. The error is that on inputs of covariance ``held_out`` with covariance ``goals`` of the units'
    goals with them, which should have the standard deviations ``goal_std``.
    """

    covariance: Tensor
    missing: Tensor
    start: Tensor
    held_out: Tensor
    goals: Tensor
    goal_std: Tensor

    def best(self, ridges: Sequence[float], first: int) -> int:
        """Which of the ridges, in ascending order, is the best one."""
        sample = self._sample(min(ridges))
        errors: dict[int, float] = {}
        chosen, places = first, [first]
        while places:
            errors |= {place: sample.error(sample.solved(ridges[place])) for place in places}
            chosen = min(errors, key=errors.__getitem__)
            if errors[chosen] == float("inf"):  # a larger one may do
                places = [place for place in range(len(ridges)) if place not in errors]
            else:
                beside = (chosen - 1, chosen + 1)
                places = [place for place in beside if 0 <= place < len(ridges) and place not in errors]
        return chosen

    def _sample(self, smallest: float) -> _Search:
        """For some of the units, evenly spread; in float32 where the smallest ridge lets rounding do no harm."""
        step = -(-len(self.start) // JUDGED_UNITS)
        largest = float(self.covariance.diagonal().sum())  # no eigenvalue lies above
        dtype = torch.float32 if largest < MOST_CONDITION * smallest else self.covariance.dtype
        units = (part[::step].to(dtype) for part in (self.missing, self.start, self.goals, self.goal_std))
        missing, start, goals, goal_std = units
        return _Search(self.covariance.to(dtype), missing, start, self.held_out.to(dtype), goals, goal_std)

    def solved(self, ridge: float) -> Tensor | None:
        """The weights under a ridge; ``None`` where rounding leaves no solution."""
        matrix = self.covariance.clone()
        matrix.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return None if bool(failed) else self.start + torch.cholesky_solve(self.missing.T, factor).T

    def error(self, found: Tensor | None) -> float:
        """Squared deviation from the goals, each unit's in units of its own variance, but for a constant."""
        if found is None:
            return float("inf")
        error = ((found @ self.held_out - 2 * self.goals) * found).sum(1)
        return float((error / self.goal_std.square().clamp_min(torch.finfo(error.dtype).tiny)).sum())


def _std(pulled: Tensor, weight: Tensor) -> Tensor:
    """Standard deviation of what weights make of inputs, ``(units,)``, from ``weight @ covariance``."""
    return (pulled * weight).sum(1).clamp_min(0).sqrt()

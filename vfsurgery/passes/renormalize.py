"""REPAIR, RESCALE and RESHIFT: give every merged unit the statistics that its sources have.

For unit ``i`` of a target layer, on pre-activations, with goals averaged over the aligned sources (standard deviations,
not variances):

- REPAIR ``(f - E f) / Std f * mean(Std f_k) + mean(E f_k)`` (Jordan et al., REPAIR, 2023; Qu & Horvath, CPAL 2025,
  Alg. 1, 2),
- RESCALE ``f / Std f * mean(Std f_k)`` (CPAL 2025, section 5.3),
- RESHIFT ``f - E f + mean(E f_k)`` (CPAL 2025, A.3).

One pass over the data suffices for all layers: each batch flows on normalized by its own statistics, as in a BatchNorm
in training, while exact moments over all batches accumulate. ``sequential`` spends a pass per layer instead and is
exact. The correction is inserted as an affine node after the layer; :class:`~vfsurgery.passes.fold.Fold` then moves it
into the weights. Where more follows inside the layer's module (a norm with an activation built in), statistics are read
before that, and the correction goes into the weights at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.affine import Affine, absorb, insert_affine
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.beside import Beside
from vfsurgery.passes.mixture import Mixture
from vfsurgery.passes.producers import Producer, find_producers, has_prefixes, in_stages
from vfsurgery.stats.collect import Site
from vfsurgery.stats.moments import Moments, add_batch, weighted_goal
from vfsurgery.stats.prefix import Prefix

CONSTANT = 1e-4
"""A unit whose standard deviation is below this share of its goal counts as constant and is not scaled."""

Goal: TypeAlias = tuple[Tensor, Tensor]
"""What the units of one layer should have: means and standard deviations, ``(units,)`` float64."""


@dataclass(frozen=True, kw_only=True)
class Renormalize(Pass):
    """Match unit statistics of the merged model to its sources'.

    Targets are all producers but the network's output layer, unless ``include_output``. For the goals ``mu`` and
    ``sigma``, by default the sources' weighted means:

    - ``reference`` takes those of this one source instead, 0 for the first;
    - ``average`` gives all units of a layer one goal: ``sigma <- mean_c sigma_c``,
      ``mu_c <- sign(mu_c) mean_c |mu_c|``;
    - ``factor`` multiplies both.

    Raises:
        OptionError: ``factor`` is not a positive number, or ``reference`` is negative.
    """

    name: ClassVar[str] = "renormalize"
    needs_data: ClassVar[bool] = True
    needs_sources: ClassVar[bool] = True
    shifts: ClassVar[bool] = True
    """Whether it shifts units, which a layer has to take."""
    include_output: bool = False
    average: bool = False
    factor: float = 1.0
    reference: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise OptionError(explain(f"factor must be a positive number but is {self.factor}", remedy="1 is neutral"))
        if self.reference is not None and self.reference < 0:
            raise OptionError(
                explain(f"reference must be the number of a source but is {self.reference}", remedy="0 is the first")
            )

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that bring ``moments`` to the goal ``mean`` and ``std``."""
        raise TypeError(f"{type(self).__name__} does not say how to correct")

    def statistics(
        self, graph_module: fx.GraphModule, context: Context, targets: Sequence[Producer]
    ) -> Iterator[tuple[Producer, Moments, Goal]]:
        """Every target with the moments of its merged units and their goals.

        What is yielded is corrected before the next is asked for.
        """
        raise TypeError(f"{type(self).__name__} does not say how to find statistics")

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Measure the merged model against the sources and correct every target.

        Raises:
            OptionError: there is nothing to correct, or ``reference`` is not the number of a source.
        """
        targets = self.targets(graph_module, context.groups)
        if context.beside is not None:
            targets = [target for target in targets if target.node in context.beside.sites]
        if has_prefixes(graph_module) and all(target.is_output for target in targets):  # the ensemble
            context.notes.append(f"{self.name}: every layer is preserved")
            return graph_module
        if not targets:
            raise OptionError(
                explain(
                    f"{self.name} found no layer to correct",
                    because="each layer makes the output, computes its weight or bias or shares it, is called without "
                    "a bias, or is read by a BatchNorm alone",
                    remedy="use renormalize='auto', which leaves out what does not apply, or renormalize=None",
                )
            )
        if self.reference is not None and self.reference >= len(context.sources):
            raise OptionError(
                explain(
                    f"{self.name} has source {self.reference} as its reference, and there is no such source",
                    accepted=f"0 to {len(context.sources) - 1}",
                )
            )
        for target, moments, goal in self.statistics(graph_module, context, targets):
            affine = Affine(*self.correct(moments, *goal), target.dim)
            if target.inside:
                absorb(graph_module, target, affine, context)
            else:
                insert_affine(graph_module, target.node, affine)
        context.notes.append(f"{self.name}: {len(targets)} layers")
        return graph_module

    def applies(self, graph_module: fx.GraphModule, groups: GroupSet) -> bool:
        """Whether there are layers to correct."""
        return bool(self.targets(graph_module, groups))

    def targets(self, graph_module: fx.GraphModule, groups: GroupSet) -> list[Producer]:
        """The layers to correct, in graph order."""
        wanted = (p for p in find_producers(graph_module, groups) if self.include_output or not p.is_output)
        return [p for p in wanted if not p.feeds_norm and (p.takes_shift or not self.shifts)]

    def goal(self, aligned: Sequence[Moments], weights: Sequence[float]) -> Goal:
        """From the moments of the aligned sources and their shares to what the merged units should have."""
        if self.reference is not None:
            aligned, weights = [aligned[self.reference]], [1.0]
        mean, std = weighted_goal(aligned, weights)
        if self.average:
            mean, std = mean.sign() * mean.abs().mean(), std.mean().expand_as(std)
        return self.factor * mean, self.factor * std


@dataclass(frozen=True, kw_only=True)
class Measured(Renormalize):
    """Renormalization by what the merged model itself does on the data.

    Goals come with the pass over the sources. The merged model is run once, each batch flowing on corrected by its own
    statistics; those of a later layer are then only about those that the final corrections of earlier layers bring
    forth. With ``sequential`` layers are measured one after the other, all earlier ones corrected for good, so that
    goals are met exactly: a pass over the data per layer (layers side by side share one), each up to that layer, which
    for ``L`` layers is the work of about ``L / 2`` whole passes.
    """

    sequential: bool = False

    def reads(self, graph_module: fx.GraphModule, groups: GroupSet) -> Mapping[str, Site]:
        """The targets' output units."""
        return {target.node: target.site for target in self.targets(graph_module, groups)}

    def statistics(
        self, graph_module: fx.GraphModule, context: Context, targets: Sequence[Producer]
    ) -> Iterator[tuple[Producer, Moments, Goal]]:
        """Run the merged model, stage by stage if ``sequential``."""
        if context.beside is not None and not self.sequential:
            yield from self._beside(graph_module, context, context.beside, targets)
            return
        goals = {
            target.node: self.goal(moments, context.weights_of(target.weight))
            for target, moments in zip(targets, _aligned(targets, context, self.name, self.reference), strict=True)
        }
        for stage in in_stages(graph_module, targets) if self.sequential else [targets]:
            moments = self._measure(graph_module, context, stage, lambda images: goals)
            for target in stage:
                goal, (found, dtype) = goals[target.node], moments[target.node]
                yield target, above_rounding(found, goal[1], dtype), goal

    def _beside(
        self, graph_module: fx.GraphModule, context: Context, beside: Beside, targets: Sequence[Producer]
    ) -> Iterator[tuple[Producer, Moments, Goal]]:
        """The reference runs first on every batch, which then flows on with the reference's statistics of it."""
        totals: dict[str, Moments] = {}

        def goals(images: Tensor) -> dict[str, Goal]:
            batch = beside.moments(images)
            for node, moments in batch.items():
                add_batch(totals, node, moments)
            return {node: self.goal([moments], [1.0]) for node, moments in batch.items()}

        moments = self._measure(graph_module, context, targets, goals)
        for target in targets:
            goal, (found, dtype) = self.goal([totals[target.node]], [1.0]), moments[target.node]
            yield target, above_rounding(found, goal[1], dtype), goal

    def _measure(
        self,
        graph_module: fx.GraphModule,
        context: Context,
        stage: Sequence[Producer],
        goals: Callable[[Tensor], Mapping[str, Goal]],
    ) -> dict[str, tuple[Moments, torch.dtype]]:
        """Moments and dtype of the targets' values, each batch corrected to ``goals(images)`` as it flows on."""
        totals: dict[str, Moments] = {}
        types: dict[str, torch.dtype] = {}
        current: Mapping[str, Goal] = {}

        def watcher(target: Producer) -> Callable[[Tensor], Tensor]:
            def correct_batch(value: Tensor) -> Tensor:
                goal = current[target.node]
                batch = Moments.of(value, dim=target.dim)
                add_batch(totals, target.node, batch)
                types[target.node] = value.dtype
                return Affine(*self.correct(above_rounding(batch, goal[1], value.dtype), *goal), target.dim)(value)

            return correct_batch

        observer = Prefix(graph_module, {target.site.key: watcher(target) for target in stage})
        for images in context.images(f"{self.name} of the merged model"):
            current = goals(images)
            observer.run(images)
        return {node: (found, types[node]) for node, found in totals.items()}


@dataclass(frozen=True, kw_only=True)
class Repair(Measured):
    """Give every unit the mean and the standard deviation of its sources."""

    name: ClassVar[str] = "repair"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``s = goal std / std``, ``t = goal mean - s * mean``."""
        return to_both(moments, mean, std)


@dataclass(frozen=True, kw_only=True)
class Rescale(Measured):
    """Give every unit the standard deviation of its sources, and leave its mean to follow."""

    name: ClassVar[str] = "rescale"
    shifts: ClassVar[bool] = False

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``s = goal std / std``, no shift."""
        return unit_ratio(std, moments.std), torch.zeros_like(std)


@dataclass(frozen=True, kw_only=True)
class Reshift(Measured):
    """Give every unit the mean of its sources."""

    name: ClassVar[str] = "reshift"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``t = goal mean - mean``, no scale."""
        return torch.ones_like(std), mean - moments.mean


def to_both(moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of REPAIR: ``s = goal std / std``, ``t = goal mean - s * mean``."""
    scale = unit_ratio(std, moments.std)
    return scale, mean - scale * moments.mean


def unit_ratio(goal: Tensor, std: Tensor) -> Tensor:
    """``goal / std``, and 1 for units that are constant: dividing by their noise would blow up their offset."""
    return torch.where(std > CONSTANT * goal, goal / std.clamp_min(torch.finfo(std.dtype).tiny), 1.0)


def above_rounding(moments: Moments, goal: Tensor, dtype: torch.dtype) -> Moments:
    """Moments in which units that vary by no more than ``dtype`` rounds do not vary at all.

    Numbers of size ``m`` are rounded by up to ``eps / 2 * m``: beside a large mean a smaller deviation is noise, and
    weights that cancel leave no more than that of the sources' deviation.
    """
    floor = torch.finfo(dtype).eps / 2 * torch.maximum(goal, moments.mean.abs())
    return replace(moments, squares=torch.where(moments.std > floor, moments.squares, 0.0))


def _aligned(
    targets: Sequence[Producer], context: Context, label: str, reference: int | None = None
) -> list[list[Moments]]:
    """For each target the moments of every source's units, brought to the units of the merged model.

    With a ``reference`` they are right for that one source; only if that is mapped are the sources run again.
    """
    asked = context.permutations if reference is None else [context.permutations[reference]]
    if any(target.is_mapped(context.groups, orders) for target in targets for orders in asked):
        mixture = Mixture(targets, context)
        for images in context.images(f"{label}: statistics of the mapped sources"):
            mixture.see(images)
        return [[moments[target.node] for moments in mixture.sources] for target in targets]
    found = context.survey().moments
    result: list[list[Moments]] = []
    for target in targets:
        orders = [target.order(context.groups, orders) for orders in context.permutations]
        each = [moments[target.node] for moments in found]
        result.append(
            [m if order is None else m.take(order.to(m.mean.device)) for m, order in zip(each, orders, strict=True)]
        )
    return result

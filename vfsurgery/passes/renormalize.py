"""REPAIR, RESCALE and RESHIFT: give every merged unit the statistics that its sources have.

For unit ``i`` of a target layer, on pre-activations, with goals averaged over the aligned sources (standard deviations,
not variances):

- REPAIR ``(f - E f) / Std f * mean(Std f_k) + mean(E f_k)`` (Jordan et al., REPAIR, 2023; Qu & Horvath, CPAL 2025,
  Alg. 1, 2),
- RESCALE ``f / Std f * mean(Std f_k)`` (CPAL 2025, section 5.3),
- RESHIFT ``f - E f + mean(E f_k)`` (CPAL 2025, A.3).

One pass over the data suffices for all layers: each batch flows on normalized by its own statistics, as in a BatchNorm
in training, while exact moments over all batches accumulate. The correction is inserted as an affine node after the
layer; :class:`~vfsurgery.passes.fold.Fold` then moves it into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import Producer, find_producers, has_prefixes
from vfsurgery.stats.collect import Observer, Site
from vfsurgery.stats.moments import Moments, weighted_goal

CONSTANT = 1e-4
"""A unit whose standard deviation is below this share of its goal counts as constant and is not scaled."""


class Affine(nn.Module):
    """``scale * x + shift`` per unit along ``dim``; what renormalization inserts and folding removes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift; shape and dtype of ``x`` are kept."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        return (x * self.scale.view(shape) + self.shift.view(shape)).to(x.dtype)


Correction = Callable[[Moments, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a unit's moments, goal mean and goal standard deviation to its scale and shift."""


@dataclass(frozen=True, kw_only=True)
class Renormalize(Pass):
    """Match unit statistics of the merged model to its sources'.

    Targets are all producers but the network's output layer, unless ``include_output``.
    """

    name: ClassVar[str] = "renormalize"
    needs_data: ClassVar[bool] = True
    include_output: bool = False

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that bring ``moments`` to the goal ``mean`` and ``std``."""
        raise TypeError(f"{type(self).__name__} does not say how to correct")

    def reads(self, graph_module: fx.GraphModule, groups: GroupSet) -> Mapping[str, Site]:
        """The targets' output units."""
        return {target.node: target.site for target in self._targets(graph_module, groups)}

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Measure the merged model against the sources and insert one affine node per target.

        Raises:
            OptionError: there is nothing to correct.
        """
        targets = self._targets(graph_module, context.groups)
        if has_prefixes(graph_module) and all(target.is_output for target in targets):  # the ensemble
            context.notes.append(f"{self.name}: every layer is preserved")
            return graph_module
        if not targets:
            raise OptionError(
                explain(f"{self.name} found no layer to correct", remedy="use renormalize='reset' or renormalize=None")
            )
        goals = {target.node: self._goal(target, context) for target in targets}
        moments = self._measure(graph_module, context, targets, goals)
        for target in targets:
            scale, shift = self.correct(moments[target.node], *goals[target.node])
            insert_affine(graph_module, target.node, Affine(scale, shift, target.dim))
        context.notes.append(f"{self.name}: {len(targets)} layers")
        return graph_module

    def _targets(self, graph_module: fx.GraphModule, groups: GroupSet) -> list[Producer]:
        producers = find_producers(graph_module, groups)
        return [p for p in producers if not p.feeds_norm and (self.include_output or not p.is_output)]

    def _goal(self, target: Producer, context: Context) -> tuple[Tensor, Tensor]:
        """The sources' weighted mean and standard deviation, their units in the merged model's order."""
        aligned: list[Moments] = []
        for moments, orders in zip(context.survey().moments, context.permutations, strict=True):
            order = target.order(context.groups, orders)
            found = moments[target.node]
            aligned.append(found if order is None else found.take(order.to(found.mean.device)))
        return weighted_goal(aligned, context.weights)

    def _measure(
        self,
        graph_module: fx.GraphModule,
        context: Context,
        targets: Sequence[Producer],
        goals: dict[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Moments]:
        totals: dict[str, Moments] = {}

        def watcher(target: Producer) -> Callable[[Tensor], Tensor]:
            def correct_batch(value: Tensor) -> Tensor:
                batch = Moments.of(value, dim=target.dim)
                totals[target.node] = totals[target.node].merge(batch) if target.node in totals else batch
                return Affine(*self.correct(batch, *goals[target.node]), target.dim)(value)

            return correct_batch

        observer = Observer(graph_module, {target.node: watcher(target) for target in targets})
        for images in context.images(f"{self.name} of the merged model"):
            observer.run(images)
        return totals


@dataclass(frozen=True, kw_only=True)
class Repair(Renormalize):
    """Give every unit the mean and the standard deviation of its sources."""

    name: ClassVar[str] = "repair"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``s = goal std / std``, ``t = goal mean - s * mean``."""
        scale = _ratio(std, moments.std)
        return scale, mean - scale * moments.mean


@dataclass(frozen=True, kw_only=True)
class Rescale(Renormalize):
    """Give every unit the standard deviation of its sources, and leave its mean to follow."""

    name: ClassVar[str] = "rescale"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``s = goal std / std``, no shift."""
        return _ratio(std, moments.std), torch.zeros_like(std)


@dataclass(frozen=True, kw_only=True)
class Reshift(Renormalize):
    """Give every unit the mean of its sources."""

    name: ClassVar[str] = "reshift"

    def correct(self, moments: Moments, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``t = goal mean - mean``, no scale."""
        return torch.ones_like(std), mean - moments.mean


def _ratio(goal: Tensor, std: Tensor) -> Tensor:
    """``goal / std``, and 1 for units that are constant: dividing by their noise would blow up their offset."""
    return torch.where(std > CONSTANT * goal, goal / std.clamp_min(torch.finfo(std.dtype).tiny), 1.0)


def insert_affine(graph_module: fx.GraphModule, node_name: str, affine: Affine) -> None:
    """Put an affine node after a node; all its users read the affine node instead."""
    node = next(node for node in graph_module.graph.nodes if node.name == node_name)
    path = f"{node_name}_affine"
    while hasattr(graph_module, path):
        path += "_"
    graph_module.add_submodule(path, affine)
    with graph_module.graph.inserting_after(node):
        inserted = graph_module.graph.call_module(path, (node,))
    inserted.meta = dict(node.meta)
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)

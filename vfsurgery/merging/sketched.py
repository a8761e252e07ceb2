"""A network as shapes alone: how large it is, what it costs, and what a merge of several like it would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import ExampleInputError, RecipeError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.merging.budget import Budget, plan_prefix
from vfsurgery.passes.costs import cost_of
from vfsurgery.tracing.examples import BATCH, example_inputs_of
from vfsurgery.tracing.sources import eval_mode

MIB = 2**20


@dataclass(frozen=True)
class NetworkPlan:
    """One architecture: its size, cost, and permutation groups. ``flops`` are those of one image.

    What needs an image is ``None`` where nobody says how large one is.
    """

    model: str
    networks: tuple[str, ...]
    parameters: int
    megabytes: float
    image: tuple[int, ...] | None = None
    flops: float | None = None
    groups: int | None = None
    largest_group: int | None = None
    coverage: float | None = None

    def __str__(self) -> str:
        size = f"{self.parameters:,} parameters, {self.megabytes:,.1f} MiB"
        lines = [f"{', '.join(self.networks)}: {self.model}, {size}"]
        if self.flops is None or self.image is None:
            lines.append("  nobody says how large its images are: no groups and no FLOPs")
        else:
            shape = "x".join(map(str, self.image))
            lines.append(f"  {self.flops / 1e6:,.1f} MFLOPs per image of {shape}")
            groups = f"{self.groups} permutation groups, the largest of {self.largest_group} units"
            lines.append(f"  {groups}, {self.coverage:.1%} of the parameters")
        return "\n".join(lines)


@dataclass(frozen=True)
class Sketch:
    """A network of shapes, with inputs, its trace and its groups where it is known how large its images are."""

    spec: str
    model: nn.Module
    inputs: tuple[Tensor, ...] = ()
    graph_module: fx.GraphModule | None = None
    groups: GroupSet | None = None

    @classmethod
    def of(cls, spec: str, model: nn.Module, size: Sequence[int] | None) -> Self:
        """Trace a model on the meta device; ``size`` is the shape of an image, where somebody says it."""
        with eval_mode(model):
            try:
                given = None if size is None else torch.empty(BATCH, *size, device="meta")
                inputs = tuple(each.to("meta") for each in example_inputs_of(model, given))
            except ExampleInputError:
                return cls(spec, model)
            graph_module = record_or_export(model, inputs)
            return cls(spec, model, inputs, graph_module, discover(graph_module))

    @property
    def largest_group(self) -> int:
        """Its units; 0 where there is no group."""
        return max((group.size for group in self.groups or ()), default=0)

    def plan(self, names: Sequence[str], dtype: torch.dtype) -> NetworkPlan:
        """What a plan says of it; ``names`` are those of all networks like it."""
        tensors = self.model.state_dict().values()
        size = sum(each.numel() * (dtype if each.is_floating_point() else each.dtype).itemsize for each in tensors)
        found = NetworkPlan(self.spec, tuple(names), sum(each.numel() for each in self.model.parameters()), size / MIB)
        if self.groups is None:
            return found
        return replace(
            found,
            image=tuple(self.inputs[0].shape[1:]),
            flops=cost_of(self.model, self.inputs).flops,
            groups=len(self.groups),
            largest_group=self.largest_group,
            coverage=self.groups.coverage,
        )

    def merge_notes(self, options: Mapping[str, Any], sources: int) -> list[str]:
        """What a merge of such networks preserves and what that costs, and how large its assignments are."""
        notes: list[str] = []
        budget, preserve = Budget(options.get("max_flops"), options.get("max_params")), options.get("preserve", 0)
        if preserve or budget != Budget():
            if self.graph_module is None:
                raise RecipeError(
                    explain("what to preserve depends on how large images are", remedy="give sources an input_size")
                )
            kept = plan_prefix(self.graph_module, self.inputs, sources, preserve, budget)
            notes += [] if kept is None else [str(kept[1])]
        if self.groups is not None:
            size = f"{8 * self.largest_group**2 / MIB:.1f} MiB"
            notes.append(f"largest assignment: {self.largest_group} units, {size}")
        return notes

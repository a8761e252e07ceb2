"""The trunks of experts, merged: each expert is a source of one architecture, which is that of the joined network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import Combiner, Kind
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.data.batches import Batches
from vfsurgery.discovery import discover
from vfsurgery.discovery.maps import map_tensor
from vfsurgery.errors import OptionError, SurgeryError, explain
from vfsurgery.matching import Matcher
from vfsurgery.merging.aligned import Certified, certify_sources, match_sources
from vfsurgery.merging.ancestry import Ancestry, Plan
from vfsurgery.merging.choosing import Choice
from vfsurgery.merging.combined import Combined, Terms, combine
from vfsurgery.merging.multitask.heads import skeleton
from vfsurgery.merging.multitask.joined import Multitask, Task
from vfsurgery.merging.multitask.joining import Joined
from vfsurgery.merging.multitask.labels import Labels
from vfsurgery.merging.multitask.report import agreement
from vfsurgery.merging.prepared import Clock, Grouped
from vfsurgery.merging.shares import equal_shares
from vfsurgery.merging.surveyed import Surveyed, Way, plan_survey
from vfsurgery.passes import Pass
from vfsurgery.passes.normalizations import Renormalization, normalizations
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.stats.together import in_bound_runs
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.sources import Source, canonical_state


def grouped_twins(
    tasks: Mapping[str, nn.Module],
    joined: Joined,
    inputs: tuple[Tensor, ...],
    data: Batches | None,
    images: Mapping[str, Batches],
    pins: str | Sequence[str],
    seed: int,
    progress: bool,
    clock: Clock,
) -> Grouped:
    """The experts as sources of one architecture, that of the joined network: heads of others are zero in them.

    So heads have no say in matching: what is zero in one of two sources adds nothing to any pair of units. The graph
    of each source returns what its own task does.
    """
    twins = [_twin(task, model, joined) for task, model in tasks.items()]
    sources: list[Source] = []
    for task, twin in zip(tasks, twins, strict=True):
        own = put_over(twin, joined.graph_module)
        output = next(node for node in own.graph.nodes if node.op == "output")
        output.args = (output.args[0][task],)
        own.recompile()
        sources.append(Source.of(twin, own))
    groups = discover(joined.graph_module, pins=pins).only_ordered()
    modes = tuple(False for _ in twins[0].modules())
    data = in_bound_runs(data, joined.graph_module)
    return Grouped(
        twins[0], tuple(sources), inputs, data, modes, (), seed, progress, clock, own=(*images.values(),), groups=groups
    )


def _twin(task: str, model: nn.Module, joined: Joined) -> nn.Module:
    """The joined network with an expert's tensors, and zeros for the heads of other tasks."""
    twin = put_over(copied(joined.graph_module), joined.graph_module)
    own = {here: name for name, here in joined.places.names(task).items()}
    state = canonical_state(model)
    with torch.no_grad():
        for name, tensor in canonical_state(twin).items():
            if name in own:
                tensor.copy_(state[own[name]])
            elif name in state and name not in joined.places.in_heads:
                tensor.copy_(state[name])
            elif tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.zero_()
    return twin


@dataclass(frozen=True)
class Made:
    """A network, and how it came about."""

    result: Multitask
    choice: Choice
    ancestry: Ancestry
    notes: tuple[str, ...] = ()


class Trunks:
    """Combines the trunks of matched sources in one way or another, and puts heads behind."""

    def __init__(
        self,
        grouped: Grouped,
        joined: Joined,
        plan: Plan,
        matcher: Matcher,
        renormalize: Renormalization,
        tasks: Mapping[str, nn.Module],
    ) -> None:
        self.grouped, self.joined, self.plan, self.tasks = grouped, joined, plan, tasks
        first, base, foreign = grouped.sources[0].state, plan.ancestry.base, joined.places.in_heads
        traits = traits_of_graph(joined.graph_module)
        if isinstance(base, Mapping):
            foreign = foreign | {name for name in first if name not in base or base[name].shape != first[name].shape}
            base = {name: first[name] if name in foreign else base[name] for name in first}
        for name in foreign.intersection(name for name, trait in traits.items() if trait.kind is not Kind.FIXED):
            traits[name] = replace(traits[name], kind=Kind.HEAD)
        self.ancestry = replace(plan.ancestry, base=base).doubted(grouped.sources, traits)
        self.passes = self._passes(renormalize)
        self.surveyed: Surveyed = plan_survey(grouped, [Way(matcher, self.passes)])
        self.certified: Certified = certify_sources(self.surveyed, match_sources(self.surveyed, matcher))
        self.matcher = matcher

    def _passes(self, choice: Renormalization) -> tuple[Pass, ...]:
        """What restores the statistics of units that were aligned; those of BatchNorm layers are measured later."""
        grouped, has_data = self.grouped, self.grouped.data is not None
        measured = has_data and bool(batch_norm_nodes(grouped.graph_module))
        if choice == "auto" and (measured or not self.plan.aligned):
            return ()
        return normalizations(choice, grouped.graph_module, grouped.groups, has_data)

    def best(
        self,
        images: Mapping[str, Batches],
        labels: Mapping[str, Labels],
        classes: Mapping[str, int],
        settle: Callable[[Multitask], object],
    ) -> Made:
        """The network, by the method and scale that agree best with the experts where there are several.

        ``settle`` gives each that is tried the statistics that it would have.
        """
        combiners = self.plan.combiners
        if len(combiners) > 1 and not images:
            if not self.plan.open:
                remedy = "data={task: images, ...}; or a single scale"
                raise OptionError(
                    explain(f"{len(combiners)} values of scale, and nothing to judge them by", remedy=remedy)
                )
            combiners = combiners[:1]
        if len(combiners) == 1:
            return self.made(combiners[0], labels, classes)
        scores: list[tuple[float, Combiner]] = []
        notes: list[str] = []
        for combiner in combiners:
            try:
                found = self.made(combiner, labels, classes).result
                settle(found)
            except SurgeryError as error:
                notes.append(f"failed, {combiner}: {str(error).splitlines()[0]}")
                continue
            each = [agreement(found, task, self.tasks[task], own, every=5) for task, own in images.items()]
            scores.append((sum(each) / len(each), combiner))
            notes.append(f"tried {combiner}: agrees with the experts on {scores[-1][0]:.1%}")
        if not scores:
            return self.made(self.plan.combiners[0], labels, classes)  # which raises what is wrong
        kept = max(scores, key=lambda score: score[0])[1]
        made = self.made(kept, labels, classes)
        return replace(made, notes=(*made.notes, *notes, f"kept {kept}"))

    def made(self, combiner: Combiner, labels: Mapping[str, Labels], classes: Mapping[str, int]) -> Made:
        """The network by one method."""
        way = Way(self.matcher, self.passes, combiner)
        combined = self._combined(way)
        notes: tuple[str, ...] = ()
        if combined.context.created_biases or combined.context.restructured:
            steps = ", ".join(step.name for step in way.passes)
            notes = (f"left out, since no expert's model has the tensors that it adds: {steps}",)
            way = replace(way, passes=())
            combined = self._combined(way)
        state = canonical_state(combined.model)
        for number, task in enumerate(self.tasks):
            own, orders = self.grouped.sources[number].state, self.certified.each[number].permutations
            for name in self.joined.places.names(task).values():
                state[name].copy_(map_tensor(name, own[name], self.grouped.groups, orders))
        network = put_over(combined.model, self.joined.graph_module)
        known = {
            task: Task(classes[task], labels[task], skeleton(fresh(model, self.grouped.inputs)))
            for task, model in self.tasks.items()
        }
        choice = Choice(way, self.surveyed, self.certified, combined)
        return Made(Multitask(Joined(network, self.joined.places), known), choice, self.ancestry, notes)

    def _combined(self, way: Way) -> Combined:
        shares = equal_shares(len(self.tasks)).over(self.grouped.graph_module)
        terms = Terms(shares, None, None, self.ancestry)
        return combine(self.surveyed, self.certified, way.passes, terms, None, way.combiner)

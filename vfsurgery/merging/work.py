"""One merge from the traced sources to the report: what happens between the arguments and the result.

Everything that the sources are asked for is planned first, so that one pass over the data answers it. All checks, and
the certificate of every source, come before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, Data, progress_line
from vfsurgery.data.holdout import EVERY, every_for, first, split
from vfsurgery.discovery import discover
from vfsurgery.discovery.maps import Order, UnitMap, balanced, permutations_of
from vfsurgery.discovery.recording import hidden_norms, record_or_export
from vfsurgery.discovery.verification import certify, drift
from vfsurgery.errors import (
    CertificateError,
    DataError,
    IncompatibleModelsError,
    InvalidWeightsError,
    OptionError,
    TraceError,
    explain,
)
from vfsurgery.groups import GroupSet, Permutation
from vfsurgery.matching import Matcher, Matching, Problem
from vfsurgery.matching.pairwise import describe
from vfsurgery.merging.shares import SharePlan
from vfsurgery.merging.sparse import MaskPlan, refuse_hooks
from vfsurgery.passes import Average, Context, Fold, KeepZeros, Pass, Pipeline, Preserve
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.fitting import fits
from vfsurgery.passes.mask import aligned_members
from vfsurgery.passes.preserve import standalone
from vfsurgery.records.report import Certificate, GroupMatch, MergeReport, Preserved, Trial, version_of
from vfsurgery.stats.collect import Site, Survey, group_sites, survey
from vfsurgery.stats.precision import batches_for, image_dtype
from vfsurgery.stats.together import examples_of, in_bound_runs, note_on, outputs_of
from vfsurgery.tracing.bound import refuse_bound
from vfsurgery.tracing.computed import settle
from vfsurgery.tracing.copies import forget_kept, fresh
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.exported import EXPORTED
from vfsurgery.tracing.modes import limits
from vfsurgery.tracing.selection import Leaf, listed
from vfsurgery.tracing.sources import (
    Source,
    check_same_architecture,
    check_same_graph,
    check_weights,
    eval_mode,
    write_into,
)

MERGE_PARTS = (
    "  a part that can be recorded can be merged alone: merge(a.PART, b.PART, example_inputs=..., inplace=True)"
)
"""What to do about a model of which only parts can be recorded."""

JUDGED = 100
"""Calibration images from which on ways to merge are compared, on some that are held out."""

SURVEYED = 1000
"""Images that the sources' units are compared on, where several ways to merge are and there are twice as many."""


@dataclass
class Merging:
    """One merge in progress: traced sources, their groups, data on their device, and a clock.

    The sources' models are twins of the user's, which share their tensors; ``reference`` is the user's first one.
    """

    reference: nn.Module
    sources: list[Source]
    groups: GroupSet
    inputs: tuple[Tensor, ...]
    data: Batches | None
    seed: int
    progress: bool
    modes: list[bool]
    seconds: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    notes: list[str] = field(default_factory=list[str])
    pairs: dict[str, tuple[Site, ...]] = field(default_factory=dict[str, tuple[Site, ...]])
    units: dict[str, Site] = field(default_factory=dict[str, Site])
    held_out: Batches | None = None
    surveyed: Batches | None = None
    masks: MaskPlan | None = None
    layer_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    _joint: bool = False
    _all_pairs: bool = False
    _survey: Survey | None = None
    _unmatched: set[str] = field(default_factory=set[str])
    _target: Source | None = None

    @staticmethod
    def prepare(
        models: Sequence[nn.Module],
        data: Data | None,
        given: ExampleInputs | None,
        seed: int,
        progress: bool,
        leaf: Leaf | Sequence[Leaf] = (),
        pins: str | Sequence[str] = (),
    ) -> Merging:
        """Check, trace and group the sources."""
        started = time.perf_counter()
        refuse_hooks(models)
        device = common_device(models)
        check_same_architecture(models)
        check_weights(models)
        batches = None if data is None else batches_for(models[0], data, device)
        inputs, batches = examples_of(models[0], batches, given)
        if batches is not None and len(inputs) > 1:
            raise DataError(
                explain(
                    f"the model takes {len(inputs)} inputs, and data has images alone",
                    remedy="leave data out: matching by weights needs none; or merge the part that takes images",
                )
            )
        try:
            twins = [fresh(model, inputs) for model in models]
            sources = [Source.of(model, record_or_export(model, inputs, leaf)) for model in twins]
        except TraceError as error:
            if batches is None or given is not None:
                raise TraceError(f"{error}\n{MERGE_PARTS}") from error
            raise DataError(f"the model cannot run on images like those in the data\n{error}\n{MERGE_PARTS}") from error
        check_same_graph(sources)
        batches = in_bound_runs(batches, sources[0].graph_module)
        groups = discover(sources[0].graph_module, pins=pins)
        modes = [module.training for module in models[0].modules()]
        merging = Merging(models[0], sources, groups, inputs, batches, seed, progress, modes)
        merging.notes += [*_choices(leaf, pins), *_exported(sources[0]), *note_on(batches)]
        merging.seconds.append(("trace and groups", time.perf_counter() - started))
        return merging

    def share(self, planned: SharePlan) -> tuple[float, ...]:
        """Lay the shares over the layers; returns those over all of them."""
        shares = planned.over(self.sources[0].graph_module)
        self.layer_weights = shares.by_name
        if shares.by_name:
            self.notes.append(f"shares by layer: {planned}")
        return shares.overall

    @contextmanager
    def running(self) -> Generator[None]:
        """Sources in eval mode, no gradients, and torch's global random state kept."""
        devices = [self.sources[0].device] if self.sources[0].device.type == "cuda" else []
        modules = [module for source in self.sources for module in (source.model, source.graph_module)]
        with torch.random.fork_rng(devices), eval_mode(*modules):
            yield

    @contextmanager
    def clock(self, name: str) -> Generator[None]:
        """Note how long a step takes."""
        started = time.perf_counter()
        yield
        self.seconds.append((name, time.perf_counter() - started))

    def plan(self, matcher: Matcher, passes: Sequence[Pass], judged: bool = False) -> None:
        """Collect what is to be read from the sources, so that one pass over the data serves all.

        Called for every way to merge that will be tried; ``judged`` if one is to be chosen on held-out images.
        """
        graph_module = self.sources[0].graph_module
        if matcher.needs_data:
            self.pairs = self.pairs or group_sites(graph_module, self.groups, self.sources[0].device)
            self._joint |= getattr(matcher, "needs_joint", False)
            self._all_pairs |= getattr(matcher, "needs_pairs", False)
        self._unmatched.add(matcher.name)
        for step in passes:
            self.units.update(step.reads(graph_module, self.groups))
        if self.held_out is None and judged and self.data is not None:
            self.data, self.held_out = split(self.data, every_for(self.data))
            self.surveyed = first(self.data, SURVEYED)
        elif self.held_out is None and any(step.holds_out() for step in passes):
            self.data, self.held_out = split(self.data)

    def can_judge(self) -> bool:
        """Whether there are images enough to hold some out and judge by them."""
        if self.data is None:
            return False
        seen, enough = 0, max(JUDGED, EVERY * self.data.together)
        for images, _ in self.data:
            seen += len(images)
            if seen >= enough:
                return True
        return False

    def survey(self) -> Survey:
        """The statistics of all sources, from one pass over the data when first asked for."""
        if self._survey is None:
            started = time.perf_counter()
            images = calibration_images(self.surveyed or self.data, "statistics of the sources", self.progress)
            graph_modules = [source.graph_module for source in self.sources]
            self._survey = survey(graph_modules, images, self.pairs, self.units, self._joint, self._all_pairs)
            self.seconds.append(("statistics", time.perf_counter() - started))
        return self._survey

    def match(self, matcher: Matcher) -> list[Matching]:
        """Find every source's order of units."""
        if matcher.needs_data:
            self.survey()
        with self.clock("matching"), progress_line("matching", self.progress) as advance:
            states = [source.state for source in self.sources]
            correlations = lambda: self.survey().correlations  # noqa: E731
            joint = lambda: self.survey().crossed  # noqa: E731
            found = matcher.match(Problem(self.groups, states, correlations, self.seed, advance, joint))
        self._unmatched.discard(matcher.name)
        return found

    def certify(self, matchings: Sequence[Matching]) -> tuple[tuple[Certificate, ...], tuple[str, ...]]:
        """Prove that each source computes the same after its reordering; measure what maps of units do to it."""
        with self.clock("certificate"):
            compared = self._pairwise(matchings)
            self._forget_correlations()
            self._target = self.sources[0].clone()  # the result's tensors serve as scratch until the average is written
            scratch = self._target.state
            certificates: list[Certificate] = []
            for number, matching in enumerate(self._of_all_sources(matchings)):
                source, orders = self.sources[number], permutations_of(matching.permutations)
                mapped = _mapped(matching.permutations)
                if not number and not mapped:
                    continue  # the reference, as it is
                certificate = certify(number, source, self.groups, orders, self.inputs, scratch)
                if mapped:
                    error = drift(source, self.groups, matching.permutations, self.inputs)
                    certificate = replace(certificate, mapped=mapped, drift=error)
                certificates.append(certificate)
            return tuple(certificates), tuple(compared)

    def _forget_correlations(self) -> None:
        """Once all matchers have matched: beside a model they are the largest thing in memory."""
        if self._survey is not None and not self._unmatched:
            self._survey = replace(self._survey, crossed={})

    def _pairwise(self, matchings: Sequence[Matching]) -> list[str]:
        """For the report: how similar more than two sources are to each other, which no comparison with a says."""
        orders = [matching.permutations for matching in self._of_all_sources(matchings)]
        only_permuted = all(isinstance(order, Permutation) for own in orders for order in own.values())
        if len(orders) == 2 or not any(orders) or not only_permuted:
            return []
        pairs = self._survey.crossed if self._survey is not None and (self._joint or self._all_pairs) else None
        states = [source.state for source in self.sources]
        return describe(self.groups, states, [permutations_of(own) for own in orders], pairs)

    def _of_all_sources(self, matchings: Sequence[Matching]) -> list[Matching]:
        """With one for the first source, which has none unless it is mapped too."""
        return [*[Matching({})] * (len(self.sources) - len(matchings)), *matchings]

    def combine(
        self,
        shares: tuple[float, ...],
        matchings: Sequence[Matching],
        passes: tuple[Pass, ...],
        preserve: Preserve | None = None,
        data: Batches | None = None,
    ) -> tuple[nn.Module, Context]:
        """Average the aligned sources into a copy of a, put what is preserved before it, and renormalize it.

        ``data`` is what the passes see, by default all calibration images.

        Raises:
            CertificateError: the result's outputs are not finite.
            OptionError: the same, after maps of units.
        """
        if self.units:
            self.survey()
        target, self._target = self._target or self.sources[0].clone(), None
        orders = balanced([matching.permutations for matching in self._of_all_sources(matchings)], shares)
        context = Context(self.groups, self.sources, shares, orders, self.survey, data or self.data, self.progress)
        context.held_out, context.inputs, context.seed = self.held_out, self.inputs, self.seed
        context.layer_weights = self.layer_weights
        with self.clock("average and renormalize"), eval_mode(target.model, target.graph_module):
            first: tuple[Pass, ...] = (Average(),)
            # folded right away, since the next normalization reads weights
            folded = tuple(step for normalization in passes for step in (normalization, Fold()))
            if self.masks is not None:
                self.masks.check(lambda name: aligned_members(name, context))
                first, folded = (Average(), self.masks.mask()), (KeepZeros(steps=folded),)
            kept = () if preserve is None else (preserve,)

            def settled(previous: Pass | None, module: fx.GraphModule, following: Pass | None) -> None:
                if isinstance(previous, Average):  # before anything is measured
                    settle(target.model, self.sources[0].model)

            merged = Pipeline((*first, *kept, *folded), settled).run(target.graph_module, context)
            context.restructured = preserve is None and not fits(target.model, merged, self.sources[0].graph_module)
            result = merged if preserve is not None or context.restructured else target.model
            self._check_outputs(result, matchings, passes)
        return result, context

    def _check_outputs(self, result: nn.Module, matchings: Sequence[Matching], passes: Sequence[Pass]) -> None:
        """Refuse a result that overflows on the example where the first source does not."""
        if _is_finite(result, self.inputs) or not _is_finite(self.sources[0].model, self.inputs):
            return
        mapped = sum(_mapped(matching.permutations) for matching in matchings)
        fact, steps = "the merged network gives outputs that are not finite", ", ".join(step.name for step in passes)
        if mapped:
            raise OptionError(
                explain(
                    fact,
                    renormalization=steps or "none",
                    because=f"{mapped} groups are mapped by matrices, which may enlarge activations",
                    remedy="measure statistics on data: renormalize='reset', 'repair' or 'regress'; or match by "
                    "permutations: matching='activations' or 'weights'",
                )
            )
        raise CertificateError(
            explain(fact, renormalization=steps or "none", remedy="half precision overflows early: merge in float32")
        )

    def finish(self, merged: nn.Module, context: Context, inplace: bool, preserved: bool) -> nn.Module:
        """Give the result the reference's training modes, or write it into the reference.

        In place, the copy's values go into a's tensors at the very end: whatever fails before leaves a as it was.
        """
        reference = self.reference
        if inplace and context.restructured:
            raise OptionError(
                explain(
                    f"the result does not fit into model a, a {type(reference).__name__}",
                    because="a pass in renormalize= changed the graph and not tensors alone",
                    remedy="leave inplace out: the result is then a graph module",
                )
            )
        if inplace:
            write_into(reference, merged, context.created_biases)
            settle(reference, merged)
            return reference
        if preserved or context.restructured:
            refuse_bound(self.sources[0].graph_module)
            assert isinstance(merged, fx.GraphModule)
            paths = (path for path, _ in reference.named_modules())
            return standalone(merged, dict(zip(paths, self.modes, strict=True)), self.sources[0].model(*self.inputs))
        forget_kept(merged, self.sources[0].model)
        for module, training in zip(merged.modules(), self.modes, strict=True):
            module.training = training
        return merged

    def report(
        self,
        matcher: Matcher,
        matchings: Sequence[Matching],
        passes: tuple[Pass, ...],
        certificates: tuple[Certificate, ...],
        context: Context,
        preserved: Preserved | None = None,
        trials: tuple[Trial, ...] = (),
    ) -> MergeReport:
        """Freeze what happened."""
        matches = tuple(
            GroupMatch(
                number, g.group, self.groups[g.group].label, self.groups[g.group].units, g.before, g.after, g.moved
            )
            for number, matching in enumerate(self._of_all_sources(matchings))
            for g in matching.gains
        )
        return MergeReport(
            model=type(self.sources[0].model).__name__,
            sources=len(self.sources),
            weights=tuple(context.weights),
            matching=matcher.name,
            renormalize=tuple(step.name for step in passes),
            groups=self.groups,
            matches=matches,
            certificates=certificates,
            created_biases=tuple(context.created_biases),
            notes=(
                *self.notes,
                *self.groups.notes,
                *context.notes,
                *(limits(self.sources[0].graph_module) if context.restructured or preserved else ()),
                *([f"statistics of {self._survey.images} images"] if self._survey else []),
            ),
            guards=self.sources[0].graph_module.meta["guards"],
            seed=self.seed,
            versions=tuple((name, version_of(name)) for name in ("vfsurgery", "torch", "scipy", "networkx")),
            seconds=tuple(self.seconds),
            preserved=preserved,
            trials=trials,
        )


def _is_finite(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether outputs on the example are; also true where the model does not take the precision of the example."""
    dtype = image_dtype(model)
    outputs = outputs_of(model, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    return outputs is None or all(bool(x.isfinite().all()) for x in outputs)


def _mapped(orders: Mapping[str, Order]) -> int:
    """How many groups are mapped by matrices that are no identity."""
    return sum(isinstance(order, UnitMap) and bool(order.moved) for order in orders.values())


def _choices(leaf: Leaf | Sequence[Leaf], pins: str | Sequence[str]) -> list[str]:
    """For the report: what the user has kept whole and pinned."""
    notes = [f"kept as one node by the user: {getattr(entry, '__name__', entry)}" for entry in listed(leaf)]
    return [*notes, *(f"pinned by the user: {pattern}" for pattern in listed(pins))]


def _exported(source: Source) -> list[str]:
    """For the report: that ``torch.export`` stood in for ``fx``, why, and what that costs."""
    reason = source.graph_module.meta.get(EXPORTED)
    if reason is None:
        return []
    hidden = hidden_norms(source.graph_module)
    notes = [f"recorded through torch.export, since fx cannot: {reason}"]
    return [*notes, f"not renormalized: BatchNorm layers are hidden in {', '.join(hidden[:4])}"] if hidden else notes


def common_device(models: Sequence[nn.Module]) -> torch.device:
    """Where all models live.

    Raises:
        IncompatibleModelsError: they live in several places.
        InvalidWeightsError: they hold no values.
    """
    devices = {parameter.device for model in models for parameter in model.parameters()}
    if len(devices) > 1:
        raise IncompatibleModelsError(
            explain(
                f"the sources live on several devices: {', '.join(sorted(map(str, devices)))}",
                remedy="move them to one, for example with model.to('cuda')",
            )
        )
    device = devices.pop()
    if device.type == "meta":
        raise InvalidWeightsError(
            explain("the sources are on the meta device and hold no values", remedy="load weights")
        )
    return device

"""One merge from the traced sources to the report: what happens between the arguments and the result.

Everything that the sources are asked for is planned first, so that one pass over the data answers it. All checks, and
the certificate of every source, come before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.batches import Batches, Data, progress_line
from vfsurgery.discovery import discover
from vfsurgery.errors import DataError, IncompatibleModelsError, InvalidWeightsError, TraceError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.matching import Matcher, Matching, Problem
from vfsurgery.passes import Average, Context, Fold, Pass, Pipeline, Preserve
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.preserve import standalone
from vfsurgery.recording import hidden_norms, record_or_export
from vfsurgery.report import Certificate, GroupMatch, Preserved, Report
from vfsurgery.sources import Source, check_same_architecture, check_same_graph, check_weights, eval_mode, write_into
from vfsurgery.stats.collect import Site, Survey, group_sites, image_dtype, survey
from vfsurgery.tracing.examples import example_inputs_of
from vfsurgery.tracing.exported import EXPORTED
from vfsurgery.tracing.selection import Leaf, listed
from vfsurgery.verification import certify

MERGE_PARTS = (
    "  a part that can be recorded can be merged alone: merge(a.PART, b.PART, example_inputs=..., inplace=True)"
)
"""What to do about a model of which only parts can be recorded."""

ExampleInputs: TypeAlias = Tensor | Sequence[Tensor]


@dataclass
class Merging:
    """One merge in progress: traced sources, their groups, data on their device, and a clock."""

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
    _survey: Survey | None = None
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
        device, dtype = _device(models), image_dtype(models[0])
        check_same_architecture(models)
        check_weights(models)
        batches = None if data is None else Batches(data, device=device, dtype=dtype)
        inputs = _example(models[0], batches, given)
        try:
            sources = [Source.of(model, record_or_export(model, inputs, leaf)) for model in models]
        except TraceError as error:
            if batches is None or given is not None:
                raise TraceError(f"{error}\n{MERGE_PARTS}") from error
            raise DataError(f"the model cannot run on images like those in the data\n{error}\n{MERGE_PARTS}") from error
        check_same_graph(sources)
        groups = discover(sources[0].graph_module, pins=pins)
        modes = [module.training for module in models[0].modules()]
        merging = Merging(sources, groups, inputs, batches, seed, progress, modes)
        merging.notes += [*_choices(leaf, pins), *_exported(sources[0])]
        merging.seconds.append(("trace and groups", time.perf_counter() - started))
        return merging

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

    def plan(self, matcher: Matcher, passes: Sequence[Pass]) -> None:
        """Collect what is to be read from the sources, so that one pass over the data serves all."""
        graph_module = self.sources[0].graph_module
        if matcher.needs_data:
            self.pairs = group_sites(graph_module, self.groups, self.sources[0].device)
        for step in passes:
            self.units.update(step.reads(graph_module, self.groups))

    def survey(self) -> Survey:
        """The statistics of all sources, from one pass over the data when first asked for."""
        if self._survey is None:
            started = time.perf_counter()
            images = calibration_images(self.data, "statistics of the sources", self.progress)
            graph_modules = [source.graph_module for source in self.sources]
            self._survey = survey(graph_modules, images, self.pairs, self.units)
            self.seconds.append(("statistics", time.perf_counter() - started))
        return self._survey

    def match(self, matcher: Matcher) -> list[Matching]:
        """Find every source's order of units."""
        if matcher.needs_data:
            self.survey()
        with self.clock("matching"), progress_line("matching", self.progress) as advance:
            states = [source.state for source in self.sources]
            correlations = lambda: self.survey().correlations  # noqa: E731
            return matcher.match(Problem(self.groups, states, correlations, self.seed, advance))

    def certify(self, matchings: Sequence[Matching]) -> tuple[Certificate, ...]:
        """Prove that each source computes the same after its reordering."""
        with self.clock("certificate"):
            self._target = self.sources[0].clone()  # the result's tensors serve as scratch until the average is written
            scratch = self._target.state
            return tuple(
                certify(number, self.sources[number], self.groups, matching.permutations, self.inputs, scratch)
                for number, matching in enumerate(matchings, start=1)
            )

    def combine(
        self,
        shares: tuple[float, ...],
        matchings: list[Matching],
        passes: tuple[Pass, ...],
        inplace: bool,
        preserve: Preserve | None = None,
    ) -> tuple[nn.Module, Context]:
        """Average the aligned sources into a copy of a, put what is preserved before it, and renormalize it.

        In place, the copy's values go into a's tensors at the very end: whatever fails before leaves a as it was.
        """
        if self.units:
            self.survey()
        reference = self.sources[0].model
        target, self._target = self._target or self.sources[0].clone(), None
        orders = [{}, *(matching.permutations for matching in matchings)]
        context = Context(self.groups, self.sources, shares, orders, self.survey, self.data, self.progress)
        with self.clock("average and renormalize"), eval_mode(target.model, target.graph_module):
            first = (Average(),) if preserve is None else (Average(), preserve)
            merged = Pipeline((*first, *passes, Fold())).run(target.graph_module, context)
        if preserve is not None:
            paths = (path for path, _ in reference.named_modules())
            modes = dict(zip(paths, self.modes, strict=True))
            return standalone(merged, modes, reference(*self.inputs)), context
        if inplace:
            write_into(reference, target.model, context.created_biases)
            return reference, context
        for module, training in zip(target.model.modules(), self.modes, strict=True):
            module.training = training
        return target.model, context

    def report(
        self,
        matcher: Matcher,
        matchings: Sequence[Matching],
        passes: tuple[Pass, ...],
        certificates: tuple[Certificate, ...],
        context: Context,
        preserved: Preserved | None = None,
    ) -> Report:
        """Freeze what happened."""
        matches = tuple(
            GroupMatch(
                number, g.group, self.groups[g.group].label, self.groups[g.group].units, g.before, g.after, g.moved
            )
            for number, matching in enumerate(matchings, start=1)
            for g in matching.gains
        )
        return Report(
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
                *context.notes,
                *([f"statistics of {self._survey.images} images"] if self._survey else []),
            ),
            guards=self.sources[0].graph_module.meta["guards"],
            seed=self.seed,
            versions=tuple((name, _version(name)) for name in ("vfsurgery", "torch", "scipy", "networkx")),
            seconds=tuple(self.seconds),
            preserved=preserved,
        )


def _example(model: nn.Module, batches: Batches | None, given: ExampleInputs | None) -> tuple[Tensor, ...]:
    if given is None and batches is not None:
        images, _ = next(iter(batches))
        return (images[:2],)
    return example_inputs_of(model, given)


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


def _device(models: Sequence[nn.Module]) -> torch.device:
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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

"""Where a merge begins: sources checked against each other, as graphs, with the groups of their units."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.discovery import discover
from vfsurgery.discovery.canonical import fold, needed, obstacles
from vfsurgery.discovery.recording import hidden_norms, record_or_export
from vfsurgery.errors import DataError, IncompatibleModelsError, InvalidWeightsError, TraceError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.merging.sparse import is_sparse, refuse_hooks
from vfsurgery.stats.imagined import Imagined, stand_in
from vfsurgery.stats.precision import batches_for
from vfsurgery.stats.together import examples_of, in_bound_runs, note_on
from vfsurgery.tracing.compatibility import check_same_architecture, check_same_graph, check_weights
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.exported import EXPORTED
from vfsurgery.tracing.selection import Leaf, listed
from vfsurgery.tracing.sources import Source, eval_mode

MERGE_PARTS = (
    "  a part that can be recorded can be merged alone: merge(a.PART, b.PART, example_inputs=..., inplace=True)"
)
"""What to do about a model of which only parts can be recorded."""


@dataclass(frozen=True)
class Clock:
    """Seconds that each step of a merge has taken, for the report."""

    seconds: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        """Note how long a step takes."""
        started = time.perf_counter()
        yield
        self.seconds.append((name, time.perf_counter() - started))


@dataclass(frozen=True)
class Traced:
    """Sources of one architecture as graphs, what they are run on, and how the user wants the work done.

    The sources' models are twins of the user's, which share their tensors; ``reference`` is the user's first one, and
    ``modes`` are the training modes of its modules. ``data`` is on the sources' device; ``own`` are the images of each
    source, where they were given apart.
    """

    reference: nn.Module
    sources: tuple[Source, ...]
    inputs: tuple[Tensor, ...]
    data: Batches | None
    modes: tuple[bool, ...]
    notes: tuple[str, ...]
    seed: int
    progress: bool
    clock: Clock
    own: tuple[Batches, ...] = field(default=(), kw_only=True)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The first source's graph, which is that of all."""
        return self.sources[0].graph_module

    @contextmanager
    def running(self) -> Generator[None]:
        """Sources in eval mode, no gradients, and torch's global random state kept."""
        devices = [self.sources[0].device] if self.sources[0].device.type == "cuda" else []
        modules = [module for source in self.sources for module in (source.model, source.graph_module)]
        with torch.random.fork_rng(devices), eval_mode(*modules):
            yield


@dataclass(frozen=True)
class Grouped(Traced):
    """The same with the groups of their units.

    Where units of some may be mapped by more than orders, the sources are copies in canonical form, and ``originals``
    are they as they came.
    """

    groups: GroupSet
    originals: tuple[Source, ...] = ()


def trace_sources(
    models: Sequence[nn.Module],
    data: Data | str | None = None,
    given: ExampleInputs | None = None,
    *,
    leaf: Leaf | Sequence[Leaf] = (),
    imagine: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Traced:
    """Check and trace the sources of a merge; arguments and errors as for :func:`~vfsurgery.merge`."""
    clock = Clock()
    with clock("trace"):
        refuse_hooks(models)
        device = common_device(models)
        check_same_architecture(models)
        check_weights(models)
        data = stand_in(models, data, given, unasked=imagine, seed=seed, progress=progress)
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
            sources = tuple(Source.of(model, record_or_export(model, inputs, leaf)) for model in twins)
        except TraceError as error:
            if batches is None or given is not None:
                raise TraceError(f"{error}\n{MERGE_PARTS}") from error
            raise DataError(f"the model cannot run on images like those in the data\n{error}\n{MERGE_PARTS}") from error
        check_same_graph(sources)
        batches = in_bound_runs(batches, sources[0].graph_module)
        modes = tuple(module.training for module in models[0].modules())
        kept = (f"kept as one node by the user: {getattr(entry, '__name__', entry)}" for entry in listed(leaf))
        imagined = str(data.report).splitlines() if isinstance(data, Imagined) else []
        notes = (*kept, *_exported(sources[0]), *note_on(batches), *imagined)
    return Traced(models[0], sources, inputs, batches, modes, notes, seed, progress, clock)


def group_units(
    traced: Traced, pins: str | Sequence[str] = (), *, maps: bool = False, masks: str | None = None
) -> Grouped:
    """Find which units of the sources move together.

    Args:
        traced: The sources.
        pins: As for :func:`~vfsurgery.merge`.
        maps: Whether to bring the sources to canonical form where some units may then be mapped by more than orders.
        masks: As for :func:`~vfsurgery.merge`: by what it says, zeros of the sources mean nothing to such maps.
    """
    with traced.clock("groups"):
        groups = discover(traced.graph_module, pins=pins)
    pinned = (f"pinned by the user: {pattern}" for pattern in listed(pins))
    traced = replace(traced, notes=(*traced.notes, *pinned))
    grouped = Grouped(**vars(traced), groups=groups.only_ordered())
    if not maps or not any(group.symmetry.is_continuous for group in groups):
        return grouped
    with traced.clock("canonical form"):
        return _canonical(grouped, groups, masks)


def _canonical(grouped: Grouped, groups: GroupSet, masks: str | None) -> Grouped:
    """Copies of the sources in canonical form; the same sources where that would free nothing."""
    if is_sparse([source.model for source in grouped.sources], masks):
        note = "units are only reordered, not mapped by matrices: those would fill the sources' zeros"
        return replace(grouped, notes=(*grouped.notes, note))
    left = {name: why for source in grouped.sources for name, why in obstacles(source.state, groups).items()}
    groups = groups.only_ordered(left)
    notes = tuple(f"only reordered, not mapped: {groups[name]}, since {reason}" for name, reason in left.items())
    if not any(group.symmetry.is_continuous for group in groups):
        return replace(grouped, notes=(*grouped.notes, *notes))
    sources: list[Source] = []
    for source in grouped.sources:
        sources.append(source.clone())
        for folding in needed(groups):
            fold(sources[-1].state, folding)
    mapped = [group for group in groups if group.symmetry.is_continuous]
    streams = [str(group) for group in mapped if not group.outer]
    told = (
        "all sources brought to a canonical form, so that units are mapped by matrices: "
        f"{', '.join(streams) or 'no stream'}; {len(mapped) - len(streams)} spaces inside heads"
    )
    notes = (*grouped.notes, told, *notes)
    return replace(grouped, sources=tuple(sources), originals=grouped.sources, groups=groups, notes=notes)


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

"""Passes on one model, from Python: ``run_passes``, and the report of what they did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.holdout import split
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import record
from vfsurgery.errors import OptionError, explain
from vfsurgery.passes import PASSES, Context, Fold, Pass, Pipeline, build_pass
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.fitting import fits
from vfsurgery.passes.preserve import standalone
from vfsurgery.passes.renormalize import Renormalize
from vfsurgery.records.options import written
from vfsurgery.records.report import Report
from vfsurgery.records.results import remember
from vfsurgery.stats.collect import Site, Survey, survey
from vfsurgery.stats.imagined import stand_in
from vfsurgery.stats.precision import batches_for, image_dtype
from vfsurgery.stats.together import examples_of, in_bound_runs
from vfsurgery.tracing.bound import refuse_bound
from vfsurgery.tracing.compatibility import check_same_architecture, check_same_graph, check_weights
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.examples import example_inputs_of
from vfsurgery.tracing.modes import TRAINING
from vfsurgery.tracing.selection import Leaf
from vfsurgery.tracing.sources import Source, canonical_state, eval_mode, write_into
from vfsurgery.tracing.wrappers import as_given, network

Passes: TypeAlias = str | Pass | Sequence[str | Pass]


@dataclass(frozen=True, slots=True)
class PassRun:
    """What one pass did: nodes that came and went, notes, and the relative output error if it was to change nothing."""

    name: str
    options: tuple[tuple[str, Any], ...]
    seconds: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: float | None = None

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        nodes = f"; {len(self.added)} nodes added, {len(self.removed)} removed" if self.added or self.removed else ""
        proof = "" if self.error is None else f"; function preserved, relative error {self.error:.1e}"
        lines = [f"{self.name}({options}){nodes}{proof} ({self.seconds:.2f} s)", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


@dataclass(frozen=True)
class PassReport(Report):
    """What passes did to one model; ``restructured`` if the result is a graph module and not of the model's class."""

    model: str
    result: str
    passes: tuple[PassRun, ...]
    restructured: bool
    created_biases: tuple[str, ...]
    sources: int
    seed: int
    guards: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.passes)} passes on {self.model}"]
        lines += [f"  {line}" for step in self.passes for line in str(step).splitlines()]
        lines += [f"  created {bias}" for bias in self.created_biases]
        if self.restructured:
            lines.append("  the graph is another one: the result is an fx.GraphModule")
            lines += [f"  {guard}" for guard in self.guards if guard.startswith(TRAINING)]
        return "\n".join(lines)


def run_passes(
    model: nn.Module,
    passes: Passes,
    *,
    sources: Sequence[nn.Module] = (),
    weights: Sequence[float] | None = None,
    data: Data | str | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    leaf: Leaf | Sequence[Leaf] = (),
    pins: str | Sequence[str] = (),
    inplace: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Run passes on one model, in the order given, each held to what it declares.

    Args:
        model: Any model that :func:`~vfsurgery.trace` records. It is copied and stays as it is.
        passes: Passes, or names of registered ones: ``["reset", Repair(factor=0.9)]``.
        sources: Models of the same parameters that passes may go by, units in the same order: what a pruned network
            was before, for example.
        weights: Shares of the sources, summing to one; by default equal.
        data: Calibration images, as for :func:`~vfsurgery.merge`; ``"imagined"`` for images made from the sources, or
            from the model where there are none.
        example_inputs: As for :func:`~vfsurgery.trace`; by default two of ``data``'s images, else as configured.
        leaf: As for :func:`~vfsurgery.trace`.
        pins: As for :func:`~vfsurgery.find_groups`.
        inplace: Write the result into ``model``, whose tensors keep their storage, once all passes have succeeded.
        seed: For ``context.generator()``. torch's global random state is neither used nor changed.
        progress: Show bars for work that takes over a second.

    Returns:
        Where passes changed tensors alone, an instance of the model's class (``model`` itself if ``inplace``); where
        they changed the graph, an ``fx.GraphModule`` that saves, loads, exports and runs without this library.
        :func:`~vfsurgery.report_of` has a :class:`PassReport` for it.

    Raises:
        OptionError: a pass is unknown, stands at a wrong place, or needs sources; or with ``inplace`` the result does
            not fit into the model. Nothing is written.
        DataError: a pass needs data, or the data does not fit.
        CertificateError: a pass changed a function that it declares to preserve.
        TraceError: the model cannot be recorded.

    >>> import torch, vfsurgery as surgery
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fresh = run_passes(model, "reset", data=torch.randn(64, 3, 8, 8), progress=False)
    >>> print(surgery.report_of(fresh))
    1 passes on Sequential
      reset() (... s)
        reset: 1 BatchNorm layers
    """
    steps = resolve_passes(passes)
    given, model = model, network(model)
    sources = [network(source, f"source {number}") for number, source in enumerate(sources)]
    check_weights([model, *sources])
    check_same_architecture([model, *sources])
    device = next(iter(canonical_state(model).values())).device
    data = stand_in(sources or [model], data, example_inputs, seed=seed, progress=progress)
    batches = None if data is None else batches_for(model, data, device)
    dtype = image_dtype(model) if batches is None else batches.dtype
    if example_inputs is not None:
        placed = example_inputs_of(model, example_inputs)
        example_inputs = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in placed)
    inputs, batches = examples_of(model, batches, example_inputs)
    modes = {path: module.training for path, module in model.named_modules()}
    original, *others = (
        Source.of(twin, record(twin, inputs, leaf)) for twin in (fresh(each, inputs) for each in (model, *sources))
    )
    batches = in_bound_runs(batches, original.graph_module)
    check_same_graph([original, *others])
    target = original.clone()
    context = _context(original, others, weights, batches, inputs, steps, pins, seed, progress)
    with ExitStack() as stack:
        for source in (original, target, *others):
            stack.enter_context(eval_mode(source.model, source.graph_module))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        graph_module, runs = _run(steps, target.graph_module, context)
        context.restructured = not fits(target.model, graph_module, original.graph_module)
    result = _finished(model, target.model, graph_module, context, modes, inplace)
    guards = tuple(original.graph_module.meta["guards"])
    created = tuple(context.created_biases)
    named = type(model).__name__, type(result).__name__ if not context.restructured else "GraphModule"
    remember(result, PassReport(*named, runs, context.restructured, created, len(others), seed, guards))
    return as_given(result, given)


def resolve_passes(passes: Passes) -> tuple[Pass, ...]:
    """Passes from names and passes.

    Raises:
        OptionError: a name is unknown or its pass has an option without a default, or an entry is no pass.
    """
    given = [passes] if isinstance(passes, str | Pass) else list(passes)
    steps: list[Pass] = []
    for entry in given:
        step = build_pass(entry) if isinstance(entry, str) else entry
        if not isinstance(step, Pass):
            hint = f"make one of the class: {entry.__name__}()" if isinstance(entry, type) else None
            raise OptionError(explain(f"passes holds no pass but {entry!r}", accepted=", ".join(PASSES), remedy=hint))
        steps.append(step)
    return tuple(steps)


def _context(
    original: Source,
    others: Sequence[Source],
    weights: Sequence[float] | None,
    batches: Batches | None,
    inputs: tuple[Tensor, ...],
    steps: Sequence[Pass],
    pins: str | Sequence[str],
    seed: int,
    progress: bool,
) -> Context:
    """What the passes may look at; the statistics that they announce come from one pass over the data."""
    groups = discover(original.graph_module, pins=pins)
    shares = [1 / len(others) for _ in others] if weights is None else list(weights)
    if len(shares) != len(others) or (shares and abs(sum(shares) - 1) > 1e-6):
        raise OptionError(
            explain(f"weights are {shares} for {len(others)} sources", accepted="one per source, summing to one")
        )
    units: dict[str, Site] = {}
    for step in steps:
        units.update(step.reads(original.graph_module, groups))
    held_out = None
    if any(step.holds_out() for step in steps):
        batches, held_out = split(batches)
    surveyed: list[Survey] = []

    def statistics() -> Survey:
        if not surveyed:
            images = calibration_images(batches, "statistics of the sources", progress)
            surveyed.append(survey([source.graph_module for source in others], images, {}, units))
        return surveyed[0]

    context = Context(groups, others, shares, [{} for _ in others], statistics, batches, progress)
    context.held_out, context.inputs, context.seed = held_out, inputs, seed
    return context


def _run(
    steps: Sequence[Pass], graph_module: fx.GraphModule, context: Context
) -> tuple[fx.GraphModule, tuple[PassRun, ...]]:
    """Run the passes, and fold what a renormalization inserted before the next one reads weights."""
    whole = tuple(part for step in steps for part in ((step, Fold()) if isinstance(step, Renormalize) else (step,)))
    runs: list[PassRun] = []
    started, names, noted, proven = 0.0, list[str](), 0, 0

    def observe(previous: Pass | None, module: fx.GraphModule, following: Pass | None) -> None:
        nonlocal started, names, noted, proven
        before, names = names, [node.name for node in module.graph.nodes]
        if previous is not None:
            error = context.errors[proven][1] if len(context.errors) > proven else None
            runs.append(
                PassRun(
                    name=previous.name,
                    options=tuple((name, _writable(value)) for name, value in written(previous).items()),
                    seconds=time.perf_counter() - started,
                    added=tuple(name for name in names if name not in before),
                    removed=tuple(name for name in before if name not in names),
                    notes=tuple(context.notes[noted:]),
                    error=error,
                )
            )
        started, noted, proven = time.perf_counter(), len(context.notes), len(context.errors)

    return Pipeline(whole, observe).run(graph_module, context), tuple(runs)


def _writable(value: object) -> object:
    """An option as it stands in the report: what JSON does not know as text."""
    return value if isinstance(value, str | int | float | list | dict | None) else repr(value)


def _finished(
    model: nn.Module,
    copied: nn.Module,
    graph_module: fx.GraphModule,
    context: Context,
    modes: dict[str, bool],
    inplace: bool,
) -> nn.Module:
    """The result with the model's training modes: the model itself, a copy of it, or a graph module."""
    if inplace:
        _check_room(model, copied, context)
        with torch.no_grad():
            write_into(model, copied, context.created_biases)
        return model
    if context.restructured:
        refuse_bound(graph_module)
        return standalone(graph_module, modes, None)
    return copied


def _check_room(model: nn.Module, copied: nn.Module, context: Context) -> None:
    """Refuse a result that does not fit into the model's tensors."""
    old, new = canonical_state(model), canonical_state(copied)
    other = next((name for name in old if name not in new or old[name].shape != new[name].shape), None)
    extra = next((name for name in new if name not in old and name not in context.created_biases), None)
    if context.restructured or other or extra:
        raise OptionError(
            explain(
                f"the result does not fit into the model, a {type(model).__name__}",
                because="a pass changed the graph" if context.restructured else f"a pass changed {other or extra}",
                remedy="leave inplace out",
            )
        )

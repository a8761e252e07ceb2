"""One repair in progress: both networks traced and their layers paired, the passes run, and the result delivered."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import hidden_norms, record_or_export
from vfsurgery.errors import DataError, OptionError, SurgeryError, TraceError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes import Context, Fold, Pass, Pipeline, Repair, Reset
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.beside import Beside
from vfsurgery.pruning import Masks
from vfsurgery.pruning.renormalizing.pairing import Keep, Pair, Pairing, Unpaired, find_others, find_stages, pair_stages
from vfsurgery.pruning.renormalizing.references import check_outputs, check_pairing, trace_reference
from vfsurgery.pruning.renormalizing.report import LayerPair, RenormalizeReport
from vfsurgery.records.report import version_of
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.stats.collect import Survey, survey
from vfsurgery.stats.precision import batches_for
from vfsurgery.stats.threads import device_of
from vfsurgery.stats.together import examples_of, in_bound_runs, note_on
from vfsurgery.tracing.computed import PlainCopy, fake_quantized, plain_copy, refresh
from vfsurgery.tracing.copies import copied, forget_kept, fresh
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.precision import is_inexact
from vfsurgery.tracing.sources import Source, canonical_state, eval_mode


class _Counted(Batches):
    """Batches that know how many images the last pass had."""

    images = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        self.images = 0
        for images, labels in super().__iter__():
            self.images += len(images)
            yield images, labels


@dataclass
class Work:
    """One repair in progress."""

    plain: PlainCopy
    graph_module: fx.GraphModule
    groups: GroupSet
    source: Source
    pairing: Pairing
    unpaired: tuple[Unpaired, ...]
    batches: _Counted
    progress: bool
    before: Masks
    sparsity: float
    notes: list[str] = field(default_factory=list[str])
    seconds: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])

    @staticmethod
    def prepare(
        compressed: nn.Module,
        reference: nn.Module,
        data: Data,
        given: ExampleInputs | None,
        keep: Keep | None,
        progress: bool,
    ) -> Work:
        """Trace both networks and pair their layers."""
        started = time.perf_counter()
        plain = plain_copy(compressed)
        counted = batches_for(plain.model, data, device_of(compressed), _Counted)
        inputs, batches = examples_of(plain.model, counted, given)
        plain = replace(plain, model=fresh(plain.model, inputs))
        graph_module = _trace(plain.model, inputs, given)
        batches = in_bound_runs(batches, graph_module)
        groups = discover(graph_module)
        source = trace_reference(reference, inputs)
        check_outputs(graph_module, source.graph_module)
        ours, theirs = (find_stages(g, s) for g, s in ((graph_module, groups), (source.graph_module, GroupSet(()))))
        pairing = pair_stages(ours, theirs, keep)
        check_pairing(pairing, compressed, reference)
        pairing, computed = _writable(pairing, plain)
        others = find_others(graph_module, groups)
        missing = [entry for entry in pairing.missing if entry.layer not in {other.layer for other in others}]
        unpaired = (*pairing.unpaired, *computed, *others, *pairing.factors, *missing)
        state = canonical_state(plain.model)
        before = Masks({name: tensor != 0 for name, tensor in state.items() if tensor.ndim > 1})
        work = Work(plain, graph_module, groups, source, pairing, unpaired, batches or counted, progress, before, 0.0)
        work.notes += note_on(batches)
        work.sparsity, theirs_sparsity = (Masks.of(model).sparsity for model in (plain.model, reference))
        if theirs_sparsity > work.sparsity:
            work.notes.append(f"{theirs_sparsity:.2%} of the reference's weights are zero: are the two swapped?")
        work.seconds.append(("trace and pairs", time.perf_counter() - started))
        return work

    def sensible(self) -> tuple[Pass, ...]:
        """What ``"auto"`` stands for: see :func:`renormalize` and docs/pruning.md, which has the figures."""
        bare = [n for n in batch_norm_nodes(self.graph_module).values() if not n.affine]
        repair = Repair(include_output=True)
        return (Reset(), repair) if bare else (repair,)

    def run(self, passes: Sequence[Pass]) -> tuple[Context, tuple[str, ...]]:
        """Correct the plain copy.

        Raises:
            SurgeryError: a weight has become zero, or infinite.
        """
        started = time.perf_counter()
        beside = Beside(self.source.graph_module, {node: pair.site for node, pair in self.pairing.by_node.items()})
        context = Context(
            self.groups, [self.source], (1.0,), [{}], lambda: self._survey(beside), self.batches, self.progress
        )
        context.beside = beside
        models = (self.plain.model, self.graph_module, self.source.model, self.source.graph_module)
        with eval_mode(*models):
            Pipeline(tuple(step for each in passes for step in (each, Fold()))).run(self.graph_module, context)
        _check_result(self.plain.model, self.before)
        self.seconds.append(("statistics and folding", time.perf_counter() - started))
        return context, tuple(step.name for step in passes)

    def _survey(self, beside: Beside) -> Survey:
        images = calibration_images(self.batches, "statistics of the reference", self.progress)
        return survey([self.source.graph_module], images, {}, beside.sites)

    @torch.no_grad()
    def deliver(self, compressed: nn.Module, context: Context, inplace: bool) -> nn.Module:
        """Bring what the plain copy has become to the network asked for."""
        if self.plain.is_exact and not inplace:
            return self.plain.model
        target = compressed if inplace else copied(compressed)
        for name in context.created_biases:
            owner, _, own = name.rpartition(".")
            bias = self.plain.model.get_parameter(name)
            target.get_submodule(owner).register_parameter(own, nn.Parameter(bias.detach(), bias.requires_grad))
        state = canonical_state(self.plain.model)
        for name, tensor in canonical_state(target).items():
            if name in state:
                tensor.copy_(state[name])
        forget_kept(target, self.plain.model)
        for name, scale, _ in context.folded:
            if name in self.plain.masked:
                self._scale_masked(target, name, scale)
        return target

    def _scale_masked(self, target: nn.Module, name: str, scale: Tensor) -> None:
        """Scale the weight that pruning hooks multiply by their mask; masks and hooks stay."""
        path, _, own = name.rpartition(".")
        module = target.get_submodule(path)
        rows = next(p.stage.end.rows for p in self.pairing.pairs if p.stage.end.weight == name)
        stored = module.get_parameter(f"{own}_orig").detach()
        wide = torch.promote_types(stored.dtype, torch.float32)
        shape = [-1 if dim == rows else 1 for dim in range(stored.ndim)]
        stored.copy_(stored.to(wide) * scale.to(wide).view(shape))
        refresh(module)

    def report(
        self, compressed: nn.Module, reference: nn.Module, passes: tuple[str, ...], context: Context
    ) -> RenormalizeReport:
        """Freeze what happened."""
        logs: dict[str, float] = {}
        for name, scale, _ in context.folded:
            logs[name] = logs.get(name, 0.0) + float(scale.abs().clamp_min(1e-30).log().mean())
        paired = tuple(_described(pair, logs) for pair in self.pairing.pairs)
        return RenormalizeReport(
            model=type(compressed).__name__,
            reference=type(reference).__name__,
            passes=passes,
            paired=paired,
            unpaired=self.unpaired,
            images=self.batches.images,
            sparsity=self.sparsity,
            created_biases=tuple(context.created_biases),
            notes=(*self.notes, *context.notes),
            seconds=tuple(self.seconds),
            versions=tuple((name, version_of(name)) for name in ("vfsurgery", "torch")),
        )


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], given: ExampleInputs | None) -> fx.GraphModule:
    try:
        graph_module = record_or_export(model, inputs, fake_quantized(model))
    except TraceError as error:
        if given is not None:
            raise
        raise DataError(f"the model cannot run on images like those in the data\n{error}") from error
    hidden = hidden_norms(graph_module)
    if hidden:
        raise OptionError(
            explain(
                "renormalize cannot find the BatchNorm layers: it needs an fx trace, and fx cannot record this model",
                layers=", ".join(hidden[:4]),
                remedy="renormalize a part that fx can record, with example_inputs= and inplace=True",
            )
        )
    return graph_module


def _writable(pairing: Pairing, plain: PlainCopy) -> tuple[Pairing, list[Unpaired]]:
    """The pairs whose weights and biases can be written, and the others with the reason."""
    pairs: list[Pair] = []
    others: list[Unpaired] = []
    for pair in pairing.pairs:
        end = pair.stage.end
        how = plain.computed.get(end.weight) or plain.computed.get(end.bias or "")
        if how is not None:
            others.append(Unpaired(pair.stage.name, f"nothing can be folded into its weight: {how}"))
        elif end.bias in plain.masked:
            others.append(Unpaired(pair.stage.name, "pruning hooks mask its bias, which a shift would have to change"))
        else:
            pairs.append(pair)
    return replace(pairing, pairs=tuple(pairs)), others


def _check_result(model: nn.Module, before: Masks) -> None:
    """Refuse a weight that has lost its zero pattern, which rounding to zero can bring about, or has overflowed."""
    for name, tensor in canonical_state(model).items():
        if is_inexact(tensor) and not bool(tensor.isfinite().all()):
            fact, entries = "has become infinite", ~tensor.isfinite()
        elif name in before and not torch.equal(tensor != 0, before[name]):
            fact, entries = "has lost its zero pattern", (tensor != 0) != before[name]
        else:
            continue
        raise SurgeryError(
            explain(
                f"{name} {fact} in {tensor.dtype}",
                entries=int(entries.sum()),
                because="a unit of it is scaled beyond what this precision can hold",
                remedy="renormalize in float32, model.float(), and convert the result",
            )
        )


def _described(pair: Pair, logs: Mapping[str, float]) -> LayerPair:
    scale = math.exp(logs.get(pair.stage.end.weight, 0.0))
    return LayerPair(pair.stage.name, pair.partner.name, pair.by, pair.stage.units, scale)

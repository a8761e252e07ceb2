"""Aligned sources become one network: averaged, with what is preserved before it, and renormalized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from vfsurgery.combining.base import Combiner
from vfsurgery.data.batches import Batches
from vfsurgery.discovery.maps import balanced
from vfsurgery.errors import CertificateError, OptionError, explain
from vfsurgery.merging.aligned import Matched
from vfsurgery.merging.ancestry import Ancestry
from vfsurgery.merging.shares import Shares
from vfsurgery.merging.sparse import MaskPlan
from vfsurgery.merging.surveyed import Surveyed
from vfsurgery.passes import Average, Context, Fold, KeepZeros, Pass, Pipeline, Preserve
from vfsurgery.passes.combine import Combine
from vfsurgery.passes.fitting import fits
from vfsurgery.passes.mask import aligned_members
from vfsurgery.passes.renormalize import Renormalize
from vfsurgery.stats.precision import image_dtype
from vfsurgery.stats.together import outputs_of
from vfsurgery.tracing.computed import settle
from vfsurgery.tracing.sources import eval_mode


@dataclass(frozen=True)
class Terms:
    """What every way to merge has in common: what each source contributes, what is kept of it, what zeros mean.

    ``ancestry`` says what sources were fine-tuned from, where they are combined by another method than the average.
    """

    shares: Shares
    preserve: Preserve | None = None
    masks: MaskPlan | None = None
    ancestry: Ancestry | None = None


@dataclass(frozen=True)
class Combined:
    """A merged network, and what its passes saw and found.

    ``model`` is of the sources' class, or a graph module where something is preserved or the graph was changed.
    """

    model: nn.Module
    context: Context = field(repr=False)


def combine(
    surveyed: Surveyed,
    matched: Matched,
    passes: Sequence[Pass],
    terms: Terms,
    data: Batches | None = None,
    combiner: Combiner | None = None,
) -> Combined:
    """Average the aligned sources into a copy of the first, put what is preserved before it, and renormalize it.

    ``data`` is what the passes see, by default all calibration images; ``combiner`` stands in for the average.

    Raises:
        CertificateError: the result's outputs are not finite.
        OptionError: the same, after maps of units or steps that scale them.
    """
    moments = surveyed.moments()  # before there is a copy in memory
    grouped, shares = surveyed.grouped, terms.shares
    reference = grouped.sources[0]
    target = reference.clone()
    orders = balanced([matching.permutations for matching in matched.each], shares.overall)
    context = Context(
        groups=grouped.groups,
        sources=grouped.sources,
        weights=shares.overall,
        layer_weights=shares.by_name,
        permutations=orders,
        survey=lambda: moments,
        data=data or surveyed.data,
        held_out=surveyed.held_out,
        inputs=grouped.inputs,
        seed=grouped.seed,
        progress=grouped.progress,
        own=surveyed.own,
    )
    with grouped.clock("average and renormalize"), eval_mode(target.model, target.graph_module):
        first: tuple[Pass, ...] = (Average(),)
        if combiner is not None and (given := terms.ancestry) is not None:
            first = (
                Combine(
                    combiner=combiner, base=given.base, weights=given.weights, traits=given.traits, line=given.line
                ),
            )
        # folded right away, since the next normalization reads weights
        folded = tuple(step for normalization in passes for step in (normalization, Fold()))
        if terms.masks is not None:
            terms.masks.check(lambda name: aligned_members(name, context))
            first, folded = (*first, terms.masks.mask()), (KeepZeros(steps=folded),)
        kept = () if terms.preserve is None else (terms.preserve,)

        def settled(previous: Pass | None, module: fx.GraphModule, following: Pass | None) -> None:
            if isinstance(previous, Average | Combine):  # before anything is measured
                settle(target.model, reference.model)

        merged = Pipeline((*first, *kept, *folded), settled).run(target.graph_module, context)
        context.restructured = not kept and not fits(target.model, merged, reference.graph_module)
        result = Combined(merged if kept or context.restructured else target.model, context)
        _check_outputs(result.model, surveyed, matched, passes)
    return result


def _check_outputs(result: nn.Module, surveyed: Surveyed, matched: Matched, passes: Sequence[Pass]) -> None:
    """Refuse a result that overflows on the example where the first source does not."""
    inputs = surveyed.grouped.inputs
    if _is_finite(result, inputs) or not _is_finite(surveyed.grouped.sources[0].model, inputs):
        return
    fact, steps = "the merged network gives outputs that are not finite", ", ".join(step.name for step in passes)
    maps = f"{matched.mapped} groups are mapped by matrices, which may enlarge activations"
    if matched.mapped or any(isinstance(step, Renormalize) for step in passes):
        raise OptionError(
            explain(
                fact,
                renormalization=steps or "none",
                because=maps if matched.mapped else "layers are scaled up one by one, and in deep networks it adds up",
                remedy="measure statistics on data: renormalize='reset', 'repair' or 'regress'"
                + ("; or match by permutations: matching='activations' or 'weights'" if matched.mapped else ""),
            )
        )
    raise CertificateError(
        explain(fact, renormalization=steps or "none", remedy="half precision overflows early: merge in float32")
    )


def _is_finite(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether outputs on the example are; also true where the model does not take the precision of the example."""
    dtype = image_dtype(model)
    outputs = outputs_of(model, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    return outputs is None or all(bool(x.isfinite().all()) for x in outputs)

"""Sources that were fine-tuned from one checkpoint: what is asked for, checked, and the ways to combine them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from torch import Tensor, nn

from vfsurgery.combining.ancestor import doubts
from vfsurgery.combining.base import COMBINERS, Combiner, InMemory, Kind, Store, Trait
from vfsurgery.combining.named import combiner_of
from vfsurgery.combining.running import check_weights_of
from vfsurgery.combining.traits import traits_of_graph, with_heads
from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.holdout import Interleaved, mixed
from vfsurgery.errors import DataError, IncompatibleModelsError, InvalidWeightsError, OptionError, explain, warn
from vfsurgery.matching import Identity, Matcher
from vfsurgery.merging.prepared import Grouped
from vfsurgery.merging.surveyed import Way
from vfsurgery.passes.base import Pass
from vfsurgery.passes.combine import Base, Line
from vfsurgery.stats.threads import affordable_flops
from vfsurgery.tracing.compatibility import check_finite
from vfsurgery.tracing.sources import Source, canonical_state
from vfsurgery.tracing.wrappers import network

Combining: TypeAlias = str | Combiner
Scale: TypeAlias = float | Sequence[float] | None

MADE = ("first", "mean")
"""Bases that are made of the aligned sources, for those that have none."""

FLOPS_OF_SVD = 80
"""Times rows, columns and the smaller of both; they come four times slower than those of products."""

GRID: Mapping[str, tuple[float, ...]] = {
    "mean": (1.0,),
    "task-arithmetic": (0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "ties": (0.5, 0.8, 1.0, 1.3),
    "tsv-m": (0.5, 1.0, 1.5),
    "iso-c": (0.5, 1.0, 1.5, 2.0),
    "regmean": (1.0,),
}
"""What ``combine="auto"`` tries with images to judge by: methods, and scales of each."""


@dataclass(frozen=True)
class Ancestry:
    """What the sources were fine-tuned from, and a number and a trait for each source and tensor.

    ``told`` is what the report calls the base.
    """

    base: Base
    weights: tuple[float, ...]
    told: str
    traits: Mapping[str, Trait] = field(default_factory=dict[str, Trait], repr=False)
    line: Line | None = field(default=None, repr=False)
    """While scales are compared: what the method came to last."""
    doubts: tuple[str, ...] = ()
    """What speaks against the base."""

    def over(self, sources: Sequence[Source]) -> Ancestry:
        """The same with what the graph says of each tensor.

        Raises:
            IncompatibleModelsError: the base is of another architecture or size.

        Warns:
            SurgeryWarning: the sources do not come from the base, with the figure that shows it.
        """
        graph_module, state = sources[0].graph_module, sources[0].state
        traits = traits_of_graph(graph_module)
        if isinstance(self.base, Mapping):
            traits = with_heads(traits, state, self.base)
            _check_base(self.base, state, traits)
        return self.doubted(sources, traits)

    def doubted(self, sources: Sequence[Source], traits: Mapping[str, Trait]) -> Ancestry:
        """The same with these traits, and with what speaks against the base.

        Warns:
            SurgeryWarning: see above.
        """
        if not isinstance(self.base, Mapping):
            return replace(self, traits=traits)  # made of the sources
        shapes = {name: tuple(tensor.shape) for name, tensor in sources[0].state.items()}
        stores: dict[str, Store] = {f"source {n}": InMemory(source.state) for n, source in enumerate(sources)}
        found = doubts(InMemory(self.base), stores, shapes, traits)
        for each in found:
            warn(each)
        return replace(self, traits=traits, doubts=tuple(found))


@dataclass(frozen=True)
class Plan:
    """What the arguments of a merge say about combining: which methods may be tried, and on what."""

    combiners: tuple[Combiner, ...]
    ancestry: Ancestry
    open: bool
    """Whether the method is to be chosen."""

    @property
    def aligned(self) -> bool:
        """Whether units may be in different orders, so that sources are matched before."""
        return not isinstance(self.ancestry.base, Mapping)

    def ways(self, source: Source, matcher: Matcher, passes: tuple[Pass, ...], chosen: bool, judged: bool) -> list[Way]:
        """What to try: every method at every scale, and where that was not asked for, without renormalization, too.

        Without images to judge by, the first of them. What would take too long is not tried unless it was asked for.

        Raises:
            OptionError: several scales were given, and nothing can be judged.
        """
        if chosen and not any(step.needs_data for step in passes):
            passes = ()  # averaged statistics of siblings are better than what weights tell
        affordable = not self.open or _flops(source.state, self.ancestry.weights) <= affordable_flops(source.device)
        found = [Way(matcher, passes, each) for each in self.combiners if affordable or not each.decomposes]
        if judged:
            both = (passes, ()) if passes and chosen else (passes,)
            return [replace(way, passes=each) for way in found for each in both]
        if len(found) > 1 and not self.open:
            raise OptionError(
                explain(
                    f"{len(found)} values of scale were given, and nothing to judge them by",
                    remedy="data= at least 100 images, labels are not looked at; or a single scale",
                )
            )
        return found[:1]


def plan_combining(
    count: int,
    base: nn.Module | Mapping[str, Tensor] | str | None,
    combine: Combining | None,
    scale: Scale,
    weights: object,
) -> Plan | None:
    """Read ``base``, ``combine``, ``scale`` and ``weights``; ``None`` where sources are merged by their weighted
    average.

    Raises:
        OptionError: they do not fit together, or a name is unknown.
        InvalidWeightsError: the base holds NaN or infinite values.
    """
    if combine is None and base is None:
        if scale is not None:
            raise OptionError(explain("scale= is for combine=", remedy="combine='task-arithmetic', and base="))
        return None
    if weights is not None and (isinstance(weights, Mapping | str) or not isinstance(weights, Sequence)):
        remedy = "weights=[1.0, -1.0]"
        raise OptionError(explain("with combine=, weights are one number for each source", remedy=remedy))
    numbers = check_weights_of(count, weights)
    combiners = _combiners(combine, scale, count)
    told = "none"
    if isinstance(base, str):
        if base not in MADE:
            accepted = "a model, a state dict, or of sources without a common checkpoint 'first' or 'mean'"
            raise OptionError(explain(f"unknown base {base!r}", accepted=accepted))
    elif base is None and any(each.needs_base for each in combiners):
        base = "mean"  # of aligned sources: all that is left where nothing was fine-tuned from anything
    if base in MADE:
        told = "the mean of the aligned sources" if base == "mean" else "source 0"
    elif base is not None:
        state = canonical_state(network(base, "the base")) if isinstance(base, nn.Module) else {**base}
        check_finite("the base", state)
        base, told = state, "the checkpoint that was given"
    return Plan(combiners, Ancestry(base, numbers, told), combine in (None, "auto"))  # pyright: ignore[reportArgumentType]


def images_apart(data: Data | Mapping[int, Data] | str | None, count: int) -> tuple[Data | str | None, list[Batches]]:
    """Images of all sources, and those of each, where they were given by the sources' numbers.

    What a model needs of images is found out from all of them; then :func:`read_apart`.

    Raises:
        OptionError: a source has none, or a number is none of theirs.
    """
    if not isinstance(data, Mapping):
        return data, []
    own = cast("Mapping[int, Data]", data)
    if sorted(own, key=str) != list(range(count)):
        raise OptionError(
            explain(
                f"data has images of {', '.join(map(repr, own)) or 'nobody'}, and there are {count} sources",
                remedy="one entry for each, by its number: data={0: images, 1: others}",
            )
        )
    each = [Batches(own[number]) for number in range(count)]
    return Interleaved(each), each


def read_apart(grouped: Grouped, apart: Sequence[Batches]) -> Grouped:
    """Let images of all sources be those of each in turns, so that both are read in one way."""
    if not apart or grouped.data is None:
        return grouped
    own = tuple(each.read_as(grouped.data) for each in apart)
    return replace(grouped, data=mixed(own), own=own)


def fitting_to(plan: Plan, matching: str | Matcher, alpha: object) -> str | Matcher:
    """The matching of a merge that combines: units of fine-tuned models correspond already.

    Raises:
        OptionError: something was asked for that excludes combining.
    """
    if alpha != 0.5:
        raise OptionError(explain("alpha= is for the average of two models", remedy="weights= or scale= with combine="))
    if plan.aligned:
        return matching
    if matching not in ("auto", "identity") and not isinstance(matching, Identity):
        raise OptionError(
            explain(
                f"matching={getattr(matching, 'name', matching)!r} and a base exclude each other",
                because="what was fine-tuned from one checkpoint has its units in that one's order",
                remedy="leave matching out; or base='mean' for models of different seeds",
            )
        )
    return Identity()


def _combiners(combine: Combining | None, scale: Scale, count: int) -> tuple[Combiner, ...]:
    """The methods that may be tried: one, or one at several scales, or those of :data:`GRID`."""
    if combine is None or combine == "auto":
        if scale is not None:
            remedy = "name a method, or leave scale out"
            raise OptionError(explain("combine='auto' chooses a scale itself", remedy=remedy))
        if count == 1:
            return tuple(COMBINERS["wise-ft"]().scaled(each) for each in (0.5, 0.25, 0.75, 1.0))
        return tuple(COMBINERS[name]().scaled(each) for name, scales in GRID.items() for each in scales)
    method = combiner_of(combine, also=("auto",))
    if scale is None:
        return (method,)
    scales = [scale] if isinstance(scale, int | float) else [*scale]
    if not scales or any(isinstance(each, bool) or not isinstance(each, int | float) for each in scales):
        raise OptionError(explain(f"scale is one number or several, not {scale!r}", remedy="scale=[0.3, 0.5, 1.0]"))
    return tuple(combiner_of(method, scale=each) for each in scales)


def check_data(plan: Plan, has_data: bool) -> None:
    """Refuse methods that look at images where there are none.

    Raises:
        DataError: names the method.
    """
    for combiner in () if has_data or plan.open else plan.combiners:
        if combiner.needs_data:
            remedy = "pass data=, or data='imagined'; data={0: images, 1: images} where tasks differ"
            raise DataError(explain(f"combine={combiner.name!r} needs data", remedy=remedy))


def _flops(state: Mapping[str, Tensor], weights: Sequence[float]) -> float:
    """About what it takes to decompose all matrices of all sources and what is made of them."""
    sizes = ((len(x), x.numel() // max(len(x), 1)) for x in state.values() if x.ndim > 1)
    return FLOPS_OF_SVD * (len(weights) + 2) * sum(rows * columns * min(rows, columns) for rows, columns in sizes)


def _check_base(base: Mapping[str, Tensor], state: Mapping[str, Tensor], traits: Mapping[str, Trait]) -> None:
    """Refuse a base that differs in more than heads: those are read last, or in training alone.

    Raises:
        IncompatibleModelsError: names the first tensor.
        InvalidWeightsError: a tensor is of no floating-point type.
    """
    for name, trait in traits.items():
        shapes = f"{tuple(base[name].shape) if name in base else 'absent'}, {tuple(state[name].shape)}"
        if trait.kind is Kind.HEAD and trait.depth is not None and trait.depth < 1:
            raise IncompatibleModelsError(
                explain(
                    "the base is not what the sources were fine-tuned from: they differ in more than a head",
                    parameter=name,
                    shapes=shapes,
                    remedy="base= a model of the same architecture and image size; where positions were resampled for "
                    "another size, load the base the same way: timm.create_model(..., img_size=...)",
                )
            )
        if trait.kind in (Kind.MATRIX, Kind.REST) and not base[name].is_floating_point():
            raise InvalidWeightsError(
                explain("the base has a tensor that is no weight", parameter=name, dtype=base[name].dtype)
            )

"""One method over all tensors of all sources, the same in memory and from files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vfsurgery.combining.arithmetic import weighted_sum
from vfsurgery.combining.base import Combiner, Entry, Images, InMemory, Kind, Problem, Store, Trait
from vfsurgery.combining.traits import traits_of_states
from vfsurgery.data.progress import progress
from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.sources import Source

TRAINED = (Kind.MATRIX, Kind.REST)
FEWEST, SAMPLE = 32, 1 << 14
"""Numbers of a matrix from which on an angle to the base says something, and how many are enough."""
FOREIGN, TRUSTED = 0.5, 0.9
"""Cosines to the base: below the first a layer was begun anew, if half of all lie above the second."""


@dataclass(frozen=True)
class Listing:
    """The tensors that there are: shapes, the dtypes of the result, and traits."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    traits: Mapping[str, Trait]


@dataclass(frozen=True)
class Combination:
    """What is combined: the sources' stores and weights, the base's if there is one, what tensors there are, and how.

    Iterate :meth:`parts` for the result. Tensors come by name, whatever their order in files, since ties go by place.
    ``notes`` are for the report; ``shown`` has bars for what goes through all tensors before. ``traced`` and ``images``
    are for methods that look at data.
    """

    listing: Listing
    stores: Sequence[Store]
    base: Store | None
    combiner: Combiner
    weights: tuple[float, ...]
    seed: int = 0
    notes: list[str] = field(default_factory=list[str])
    shown: bool = False
    traced: Sequence[Source] = ()
    images: Images | None = None

    def __post_init__(self) -> None:
        if self.combiner.needs_base and self.base is None:
            raise OptionError(
                explain(
                    f"{self.combiner.name} combines what training added to a base, and there is none",
                    remedy="base= the checkpoint that all were fine-tuned from; combine='mean' needs none",
                )
            )
        if self.combiner.needs_data and (self.images is None or len(self.traced) != len(self.stores)):
            raise OptionError(
                explain(
                    f"{self.combiner.name} runs the sources on images, and there are tensors alone",
                    remedy="surgery.merge(models, combine=..., data=images) has both; combine='task-arithmetic' needs "
                    "neither",
                )
            )

    def parts(self, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, int, Tensor]]:
        """The result part by part: name, where in the flat tensor it begins, and its numbers, of the tensor's dtype.

        Args:
            skip: Tensors that are done already.
        """
        traits = self.settled

        def trained() -> Iterator[Entry]:
            names = [name for name, trait in traits.items() if trait.kind in TRAINED]
            for name in progress(names, f"{self.combiner.name}: looking at all tensors", enabled=self.shown):
                yield self._entry(name, traits[name])

        problem = Problem(trained, len(self.stores), self.seed, self.notes, self.traced, self.images)
        combined = self.combiner.plan(problem)
        for name, trait in traits.items():
            if name in skip:
                continue
            entry, dtype = self._entry(name, trait), self.listing.dtypes[name]
            if trait.kind is Kind.FIXED:
                keeper = self.base or self.stores[0]
                for part in entry.parts():
                    yield name, part.start, keeper.read(name, part.start, part.stop)
            elif trait.kind in TRAINED:
                for part in entry.parts() if self.combiner.elementwise else [entry]:
                    total = combined(part).mul_(self.combiner.scale)
                    if self.base is not None:
                        total.add_(part.origin())
                    yield name, part.start, total.reshape(-1).to(dtype)
            else:
                for part in entry.parts():
                    yield name, part.start, self._mean(part).reshape(-1).to(dtype)

    def _mean(self, part: Entry) -> Tensor:
        """The mean of the sources, whatever the method; those that are taken away count for nothing."""
        weights = tuple(max(weight, 0.0) for weight in self.weights)
        weights = weights if any(weights) else (1.0,) * len(weights)
        return weighted_sum(replace(part, base=None, weights=weights)).div_(sum(weights))

    @cached_property
    def settled(self) -> Mapping[str, Trait]:
        """What each tensor is; layers that fine-tuning began anew, as a head of the base's shape, count as heads.

        Their weights have nothing to do with the base's, while all others are nearly parallel to it; that shows in a
        few thousand numbers of each. In the order of names.
        """
        traits, cosines = dict(sorted(self.listing.traits.items())), dict[str, float]()
        for name, trait in traits.items() if self.base is not None else ():
            if trait.kind is Kind.MATRIX and math.prod(self.listing.shapes[name]) >= FEWEST:
                cosines[name] = self._cosine_to_base(self._entry(name, trait))
        if not cosines or statistics.median(cosines.values()) < TRUSTED:
            return traits
        for name, cosine in cosines.items():
            if cosine < FOREIGN:
                layer = name.rpartition(".")[0]
                own = [each for each in traits if each.rpartition(".")[0] == layer and traits[each].kind in TRAINED]
                traits |= {each: replace(traits[each], kind=Kind.HEAD) for each in own}
                self.notes.append(
                    f"{layer or name} was begun anew after the base (cosine {cosine:.2f}; {TRUSTED} and more "
                    "elsewhere): it is the mean of the sources"
                )
        return traits

    def _cosine_to_base(self, entry: Entry) -> float:
        """The mean over sources, of the first numbers."""
        part = replace(entry, stop=min(entry.stop, SAMPLE))
        origin, plain = part.origin().reshape(-1), replace(part, base=None)
        own = [plain.task_vector(source).reshape(-1) for source in range(len(self.stores))]
        return statistics.fmean(float(torch.cosine_similarity(each, origin, dim=0)) for each in own)

    def _entry(self, name: str, trait: Trait) -> Entry:
        shape, stored = self.listing.shapes[name], self.listing.dtypes[name]
        dtype = torch.promote_types(stored, torch.float32) if stored.is_floating_point else torch.float32
        base = self.base if trait.kind in TRAINED else None
        return Entry(name, shape, trait, self.weights, dtype, self.stores, base, 0, math.prod(shape))


def combine_states(
    states: Sequence[Mapping[str, Tensor]],
    combiner: Combiner,
    *,
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    traits: Mapping[str, Trait] | None = None,
    seed: int = 0,
    notes: list[str] | None = None,
    traced: Sequence[Source] = (),
    images: Images | None = None,
) -> dict[str, Tensor]:
    """Combine state dicts in memory.

    Args:
        states: Of all sources, with the same names and shapes.
        combiner: The method.
        base: State dict of the checkpoint that they were fine-tuned from.
        weights: A number for each, by default 1.
        traits: What the tensors are; by default what names and shapes tell.
        seed: Of random draws.
        notes: Takes sentences for a report.
        traced: The sources with their graphs, for methods that look at data.
        images: Batches of images for each, by its number, for these methods.

    Returns:
        New tensors, of the base's dtypes, or of the first source's where it has none.

    Raises:
        OptionError: the method cannot combine these.

    >>> from vfsurgery.combining import TaskArithmetic
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> combine_states([tuned, tuned], TaskArithmetic(scale=0.25), base=base)
    {'w': tensor([0.5000, 0.5000])}
    """
    first = states[0]
    traits = traits_of_states(states, base) if traits is None else traits
    if base is not None:
        base = completed(base, first, traits)
    dtypes = {name: (base or {}).get(name, first[name]).dtype for name in traits}
    listing = Listing({name: tuple(first[name].shape) for name in traits}, dtypes, traits)
    stores = [InMemory(state) for state in states]
    combination = Combination(
        listing,
        stores,
        None if base is None else InMemory(base),
        combiner,
        check_weights_of(len(states), weights),
        seed,
        [] if notes is None else notes,
        traced=traced,
        images=images,
    )
    found = {
        name: torch.empty(shape, dtype=dtypes[name], device=first[name].device)
        for name, shape in listing.shapes.items()
    }
    for name, start, part in combination.parts():
        found[name].view(-1)[start : start + part.numel()] = part
    return found


def completed(
    base: Mapping[str, Tensor], first: Mapping[str, Tensor], traits: Mapping[str, Trait]
) -> dict[str, Tensor]:
    """A base with the counters and tables that it lacks, or has in another shape: those of the first source."""
    lacking = {
        name: first[name]
        for name, trait in traits.items()
        if trait.kind is Kind.FIXED and (name not in base or base[name].shape != first[name].shape)
    }
    return {**base, **lacking}


def check_weights_of(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """One finite number for each source.

    Raises:
        OptionError: there are others.
    """
    found = (1.0,) * count if weights is None else tuple(map(float, weights))
    if len(found) != count or not all(map(math.isfinite, found)):
        raise OptionError(explain(f"weights are one number for each of {count} sources, not {list(found)}"))
    return found

"""``"auto"``: try the sensible ways to match and renormalize, and keep the one that agrees best with the sources.

A merged model is wanted that does what its sources do together. So every way is judged on held-out calibration
images, without labels, by how often its largest logit is that of the sources' ensemble (their mean logits, weighted as
the merge is); where chance may have made the difference, by the cross-entropy to the ensemble's probabilities. Where
that is the same, too, reordered sources, which are certified, win over mapped ones, which cannot be. What was tried,
and what came of it, is in the report.

Traps are left out beforehand: REPAIR after CCA takes its goals from the first source alone, since a rotated source is
no good reference (Qu & Horvath, CPAL 2025, section 5.4); BatchNorm statistics are measured anew in every way. The
regression takes several times as long as all else, so it is tried behind one matcher: the one that did best before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import fx, nn

from vfsurgery.data.batches import Batches, named
from vfsurgery.data.holdout import first
from vfsurgery.discovery.recording import hidden_norms
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet
from vfsurgery.matching import ActivationMatching, CCAMatching, Matcher, Matching, ZipMatching
from vfsurgery.merging.sparse import MaskPlan
from vfsurgery.merging.work import Merging
from vfsurgery.passes import Context, Pass, Preserve, Regress, Repair, Rescale
from vfsurgery.passes.agreement import Judgement, Known, best_of, judge
from vfsurgery.passes.base import calibration_images
from vfsurgery.records.report import Certificate, Trial
from vfsurgery.stats.batch_norms import batch_norm_nodes

MAPPABLE = 0.5
"""Share of the units that must allow maps for matchers of maps to be tried."""
MOST_FLOPS = {"cpu": 2e13}
"""Floating-point operations above which the regression is not tried unasked, by device; some minutes each."""
MOST_FLOPS_ELSEWHERE = 2e15
JUDGED_ON = 400
"""Held-out images that ways are judged on, where there are twice as many."""
SCREENED = 400
"""Images that ways are compared on, where there are twice as many; the best one is then made anew with all."""
WITHOUT_LOGITS = "chosen by architecture: without logits there is nothing to judge others by"


@dataclass(frozen=True)
class Way:
    """One way to merge."""

    matcher: Matcher
    passes: tuple[Pass, ...]

    @property
    def is_dear(self) -> bool:
        """Whether it takes several times as long as others: it fits every layer."""
        return any(isinstance(step, Regress) for step in self.passes)

    def __str__(self) -> str:
        return f"{self.matcher.name} + {', '.join(step.name for step in self.passes) or 'no renormalization'}"


@dataclass(frozen=True)
class Merged:
    """What one way came to."""

    way: Way
    model: nn.Module
    matchings: Sequence[Matching]
    certificates: tuple[Certificate, ...]
    context: Context


Matched: TypeAlias = tuple[Sequence[Matching], tuple[Certificate, ...], tuple[str, ...]]
"""The matchings of a matcher, their certificates, and notes for the report."""


def sensible(
    graph_module: fx.GraphModule,
    groups: GroupSet,
    matcher: Matcher | None,
    default: tuple[Pass, ...],
    fixed: bool,
    masks: MaskPlan | None = None,
) -> list[Way]:
    """The ways with calibration data, the plain choice by architecture first, dear ones last.

    Args:
        graph_module: The trace of a source.
        groups: Its groups.
        matcher: The one asked for; ``None`` to try several.
        default: The normalization by architecture, or the one asked for.
        fixed: Whether that one was asked for.
        masks: Of sparse sources: what would undo their pruning is left out.
    """
    plain = ActivationMatching() if matcher is None else matcher
    found = [Way(plain, default)]
    has_batch_norm, is_rescaled = bool(batch_norm_nodes(graph_module)), default == (Rescale(),)
    if is_rescaled and not fixed:
        found.append(Way(plain, (Repair(),)))
    regress = Regress()
    regresses = not fixed and not hidden_norms(graph_module) and regress.applies(graph_module, groups)
    affordable = MOST_FLOPS.get(next(graph_module.parameters()).device.type, MOST_FLOPS_ELSEWHERE)
    regresses = regresses and regress.flops(graph_module, groups) <= affordable
    dear = [Way(plain, (regress,))] if regresses else []
    units = sum(group.units for group in groups)
    if matcher is None and units and sum(group.units for group in groups if group.mappable) >= MAPPABLE * units:
        if fixed or has_batch_norm or not default:
            found += [Way(CCAMatching(), default), Way(ZipMatching(), default)]
        elif is_rescaled:
            found += [Way(CCAMatching(), (Repair(reference=0),)), Way(ZipMatching(), default)]
        if regresses:
            dear.append(Way(CCAMatching(), (regress,)))
    found += dear
    if masks is not None:  # maps of units mix their zeros away
        found = [way for way in found if way.matcher == plain and not any(step.fills_zeros for step in way.passes)]
    return found


def choose(
    work: Merging, ways: Sequence[Way], shares: tuple[float, ...], preserve: Preserve | None
) -> tuple[Merged, tuple[Trial, ...]]:
    """Merge in every way and keep the best; a single one is not judged.

    Where there are many images, ways are compared on the first of them, and the best one is made anew with all.
    Besides the sources, two merged models are in memory at a time. Which one is kept: :func:`best_of`, those of mapped
    sources being unproven.

    Raises:
        SurgeryError: no way succeeds; it is the first one's error.
    """
    for way in ways:
        work.plan(way.matcher, way.passes, judged=len(ways) > 1)
    judged_on = None if work.held_out is None else first(work.held_out, JUDGED_ON) or work.held_out
    choice = _Choice(work, shares, preserve, judged_on)
    if len(ways) == 1:
        return choice.merge(ways[0]), ()
    few = None if work.data is None else first(work.data, SCREENED)
    best = choice.compare(ways, few)
    if not choice.judgements:
        best = best if few is None else choice.merge(best.way)
        best.context.notes.append(WITHOUT_LOGITS)
        return best, ()
    place = choice.best(choice.judgements)
    way = ways[place]
    if few is not None:
        with named(f"{way} on all images"):
            best = choice.attempt(place, way)
        best.context.notes.append(f"ways compared with statistics of {SCREENED} images; the one kept has those of all")
    elif best.way is not way:  # one that was let go has come to be the best after all
        best = choice.merge(way)
    best.context.notes.extend(f"failed, {way}: {str(error).splitlines()[0]}" for way, error in choice.failures)
    return best, tuple(replace(trial, kept=number == place) for number, trial in choice.trials.items())


@dataclass
class _Choice:
    """Merges in several ways, what they have in common, and what came of them."""

    work: Merging
    shares: tuple[float, ...]
    preserve: Preserve | None
    judged_on: Batches | None
    trials: dict[int, Trial] = field(default_factory=dict[int, Trial])
    judgements: dict[int, Judgement] = field(default_factory=dict[int, Judgement])
    failures: list[tuple[Way, SurgeryError]] = field(default_factory=list[tuple[Way, SurgeryError]])
    mapped: set[int] = field(default_factory=set[int])
    _matched: dict[str, Matched] = field(default_factory=dict[str, Matched])
    _known: Known = field(default_factory=Known)

    def compare(self, ways: Sequence[Way], data: Batches | None) -> Merged:
        """Try all ways on some data; the best so far is returned, or the first one where there are no logits.

        Raises:
            SurgeryError: no way succeeds; it is the first one's error.
        """
        best: Merged | None = None
        for place, way in enumerate(ways):
            if way.is_dear and self._is_outdone(way, ways):
                continue
            try:
                with named(f"trying {place + 1} of {len(ways)}: {way}"):
                    merged = self.attempt(place, way, data)
            except SurgeryError as error:
                self.failures.append((way, error))
                continue
            if not self.judgements:
                return merged
            if self.best(self.judgements) == place:
                best = merged
        if best is None:
            raise self.failures[0][1]
        return best

    def best(self, judgements: Mapping[int, Judgement]) -> int:
        """The best of some ways; where nothing speaks for one, one whose sources are certified."""
        return best_of(judgements, self.mapped)

    def _is_outdone(self, way: Way, ways: Sequence[Way]) -> bool:
        """Whether another matcher, which the dear step may follow too, did better with what is cheap."""
        rivals = [other.matcher.name for other in ways if other.passes == way.passes]
        cheap = {place: each for place, each in self.judgements.items() if not ways[place].is_dear}
        known = {place: each for place, each in cheap.items() if ways[place].matcher.name in rivals}
        return bool(known) and ways[self.best(known)].matcher.name != way.matcher.name

    def attempt(self, place: int, way: Way, data: Batches | None = None) -> Merged:
        """Merge in one way and judge the result on held-out images; without logits there is no judgement."""
        started = time.perf_counter()
        merged = self.merge(way, data)
        sources = [source.graph_module for source in self.work.sources]
        images = calibration_images(self.judged_on, "agreement with the ensemble", self.work.progress)
        judgement = judge(merged.model, sources, self.shares, images, self._known)
        if judgement is not None:
            self.judgements[place] = judgement
            if any(certificate.mapped for certificate in merged.certificates):
                self.mapped.add(place)
            before = self.trials[place].seconds if place in self.trials else 0.0
            self.trials[place] = _trial(way, judgement, before + time.perf_counter() - started)
        return merged

    def merge(self, way: Way, data: Batches | None = None) -> Merged:
        """Merge in one way; ``data`` is what its passes see, by default all."""
        if way.matcher.name not in self._matched:
            matchings = self.work.match(way.matcher)
            self._matched[way.matcher.name] = matchings, *self.work.certify(matchings)
        matchings, certificates, notes = self._matched[way.matcher.name]
        model, context = self.work.combine(self.shares, matchings, way.passes, self.preserve, data)
        context.notes[:0] = notes
        return Merged(way, model, matchings, certificates, context)


def _trial(way: Way, judgement: Judgement, seconds: float) -> Trial:
    names = tuple(step.name for step in way.passes)
    images = len(judgement.agreed)
    return Trial(way.matcher.name, names, judgement.agreement, judgement.cross_entropy, images, seconds)

"""``"auto"``: try the sensible ways to match and renormalize, and keep the one that agrees best with the sources.

A merged model is wanted that does what its sources do together. So every way is judged on held-out calibration
images, without labels, by how often its largest logit is that of the sources' ensemble (their mean logits, weighted as
the merge is); where chance may have made the difference, by the cross-entropy to the ensemble's probabilities. Where
that is the same, too, reordered sources, which are certified, win over mapped ones, which cannot be. What was tried,
and what came of it, is in the report. Once a way is chosen, nothing is judged any more, so it is made again with all
images, as it would be if it had been asked for.

Traps are left out beforehand: REPAIR after CCA takes its goals from the first source alone, since a rotated source is
no good reference (Qu & Horvath, CPAL 2025, section 5.4); BatchNorm statistics are measured anew in every way. The
regression takes several times as long as all else, so it is tried behind one matcher: the one that did best before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import first
from vfsurgery.data.progress import named
from vfsurgery.discovery.recording import hidden_norms
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet
from vfsurgery.matching import ActivationMatching, CCAMatching, Matcher, ZipMatching
from vfsurgery.merging.aligned import Certified, Matched, certify_sources, match_sources, settle_maps
from vfsurgery.merging.combined import Combined, Terms, combine
from vfsurgery.merging.prepared import Grouped
from vfsurgery.merging.sparse import MaskPlan
from vfsurgery.merging.surveyed import Surveyed, Way, plan_survey, with_all
from vfsurgery.passes import Pass, Regress, Repair, Rescale
from vfsurgery.passes.agreement import Judgement, Known, best_of, judge
from vfsurgery.passes.base import calibration_images
from vfsurgery.passes.combine import Line
from vfsurgery.records.report import Trial
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.stats.threads import affordable_flops, device_of

MAPPABLE = 0.5
"""Share of the units that must allow maps for matchers of maps to be tried."""
JUDGED_ON = 400
"""Held-out images that ways are judged on, where there are twice as many."""
SCREENED = 400
"""Images whose statistics ways are compared with, where there are twice as many."""
WITHOUT_LOGITS = "chosen by architecture: without logits there is nothing to judge others by"


@dataclass(frozen=True)
class Choice:
    """The way that was kept and what it came to, what was tried (nothing where there was one way), and notes on that.

    ``surveyed`` has the statistics of the sources without correlations.
    """

    way: Way
    surveyed: Surveyed
    certified: Certified
    combined: Combined
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()


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
    regresses = regresses and regress.flops(graph_module, groups) <= affordable_flops(device_of(graph_module))
    dear = [Way(plain, (regress,))] if regresses else []
    if matcher is None and any(group.symmetry.is_continuous for group in groups):
        ordered = ActivationMatching(symmetries="permutations")
        found += [Way(ordered, way.passes) for way in found]
        dear += [Way(ordered, (regress,))] if regresses else []
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


def choose(grouped: Grouped, ways: Sequence[Way], terms: Terms) -> Choice:
    """Merge in every way, keep the best, and make it again with all images; a single one is not judged.

    Where there are many images, ways are compared on the first of them. Besides the sources, one merged model is in
    memory at a time. Which one is kept: :func:`best_of`, those of mapped sources being unproven.

    Raises:
        SurgeryError: no way succeeds; it is the first one's error.
    """
    surveyed = plan_survey(grouped, ways, judged=len(ways) > 1)
    contest = _Contest(surveyed, ways, terms)
    if len(ways) == 1:
        return contest.merge(ways[0], last=True)
    few = None if surveyed.data is None else first(surveyed.data, SCREENED)
    place = contest.compare(few)
    way = ways[place]
    with named(f"{way} on all images"):
        kept = contest.again(way)
    if not contest.judgements:
        return replace(kept, notes=(WITHOUT_LOGITS,))
    notes = [] if few is None else [f"ways compared with statistics of {SCREENED} images"]
    notes += ["the chosen way is made again with all images, those that it was judged on among them"]
    notes += [f"failed, {way}: {str(error).splitlines()[0]}" for way, error in contest.failures]
    trials = tuple(replace(trial, kept=number == place) for number, trial in contest.trials.items())
    return replace(kept, trials=trials, notes=tuple(notes))


class _Contest:
    """Merges in several ways, what they have in common, and what came of them."""

    def __init__(self, surveyed: Surveyed, ways: Sequence[Way], terms: Terms) -> None:
        self.surveyed, self.ways, self.terms = surveyed, ways, terms
        shares = terms.shares.overall
        alone = [tuple(float(place == number) for place in range(len(shares))) for number in range(len(shares))]
        judges = zip(alone, surveyed.apart, strict=True) if surveyed.apart else [(shares, surveyed.held_out)]
        each = JUDGED_ON // max(len(surveyed.apart), 1)
        self._judges = [(weights, first(data, each) or data, Known()) for weights, data in judges if data is not None]
        self.trials: dict[int, Trial] = {}
        self.judgements: dict[int, Judgement] = {}
        self.failures: list[tuple[Way, SurgeryError]] = []
        self._mapped: set[int] = set()
        self._certified: dict[str, Certified] = {}
        self._settled: dict[str, tuple[Surveyed, Matched]] = {}
        self._unmatched = {way.matcher.name for way in ways}

    def compare(self, data: Batches | None) -> int:
        """Try all ways on some data; which is the best, or the first that succeeds where there are no logits.

        Raises:
            SurgeryError: no way succeeds; it is the first one's error.
        """
        if self.terms.ancestry is not None:
            self.terms = replace(self.terms, ancestry=replace(self.terms.ancestry, line=Line()))
        for place, way in enumerate(self.ways):
            if way.is_dear and self._is_outdone(way):
                continue
            try:
                with named(f"trying {place + 1} of {len(self.ways)}: {way}"):
                    self._try(place, way, data)
            except SurgeryError as error:
                self.failures.append((way, error))
                continue
            if not self.judgements:
                return place
        if not self.judgements:
            raise self.failures[0][1]
        return self.best(self.judgements)

    def best(self, judgements: Mapping[int, Judgement]) -> int:
        """The best of some ways; where nothing speaks for one, one whose sources are certified."""
        return best_of(judgements, self._mapped)

    def _is_outdone(self, way: Way) -> bool:
        """Whether another matcher, which the dear step may follow too, did better with what is cheap."""
        rivals = [other.matcher.name for other in self.ways if other.passes == way.passes]
        cheap = {place: each for place, each in self.judgements.items() if not self.ways[place].is_dear}
        known = {place: each for place, each in cheap.items() if self.ways[place].matcher.name in rivals}
        return bool(known) and self.ways[self.best(known)].matcher.name != way.matcher.name

    def _try(self, place: int, way: Way, data: Batches | None) -> None:
        """Merge in one way and judge the result on held-out images; without logits there is no judgement."""
        started = time.perf_counter()
        merged = self.merge(way, data)
        judgement = self._judged(merged.combined.model)
        if judgement is not None:
            self.judgements[place] = judgement
            if merged.certified.mapped:
                self._mapped.add(place)
            self.trials[place] = _trial(way, judgement, time.perf_counter() - started, bool(self.surveyed.apart))

    def _judged(self, model: nn.Module) -> Judgement | None:
        """How near a model comes to the ensemble, or to each source on that one's images."""
        grouped, found = self.surveyed.grouped, list[Judgement]()
        sources = [source.graph_module for source in grouped.sources]
        for weights, data, known in self._judges:
            label = f"agreement with the {'sources' if self.surveyed.apart else 'ensemble'}"
            images = calibration_images(data, label, grouped.progress)
            used = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
            judgement = judge(model, [source for source, _ in used], [weight for _, weight in used], images, known)
            if judgement is None:
                return None
            found.append(judgement)
        return Judgement(torch.cat([one.agreed for one in found]), torch.cat([one.crossed for one in found]))

    def again(self, way: Way) -> Choice:
        """Merge in one way with all images, those that were held out among them."""
        self._settled.clear()
        if self.terms.ancestry is not None:  # as the method gives it, to the last bit
            self.terms = replace(self.terms, ancestry=replace(self.terms.ancestry, line=None))
        before, self.surveyed = self.surveyed, with_all(self.surveyed, way)
        if way.matcher.needs_data and self.surveyed.images is not before.images:
            self._certified.clear()
        return self.merge(way, last=True)

    def merge(self, way: Way, data: Batches | None = None, last: bool = False) -> Choice:
        """Merge in one way; ``data`` is what its passes see, by default all."""
        name = way.matcher.name
        if name not in self._certified:
            matched = match_sources(self.surveyed, way.matcher)
            self._certified[name] = certify_sources(self.surveyed, matched)
            self._settled.clear()  # one at a time: a model more
            self._unmatched.discard(name)
            if not self._unmatched:
                self.surveyed = self.surveyed.without_correlations()
        certified = self._certified[name]
        if name not in self._settled:
            self._settled = {name: settle_maps(self.surveyed, certified, last)}
        combined = combine(*self._settled[name], way.passes, self.terms, data, way.combiner)
        return Choice(way, self.surveyed, certified, combined)


def _trial(way: Way, judgement: Judgement, seconds: float, apart: bool) -> Trial:
    names = tuple(step.name for step in way.passes)
    images = len(judgement.agreed)
    method = "" if way.combiner is None else str(way.combiner)
    return Trial(
        way.matcher.name,
        names,
        judgement.agreement,
        judgement.cross_entropy,
        images,
        seconds,
        combine=method,
        apart=apart,
    )

"""``"auto"``: try the sensible ways to match and renormalize, and keep the one that agrees best with the sources.

A merged model is wanted that does what its sources do together. So every way is judged on held-out calibration
images, without labels, by how often its largest logit is that of the sources' ensemble (their mean logits, weighted as
the merge is); where chance may have made the difference, by the cross-entropy to the ensemble's probabilities. What was
tried, and what came of it, is in the report.

Traps are left out beforehand: REPAIR after CCA takes its goals from the first source alone, since a rotated source is
no good reference (Qu & Horvath, CPAL 2025, section 5.4); BatchNorm statistics are measured anew in every way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx, nn

from vfsurgery.batches import named
from vfsurgery.discovery.recording import hidden_norms
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet
from vfsurgery.matching import ActivationMatching, CCAMatching, Matcher, Matching, ZipMatching
from vfsurgery.merging import Merging
from vfsurgery.passes import Context, Pass, Preserve, Regress, Repair, Rescale
from vfsurgery.passes.agreement import Judgement, best_of, judge
from vfsurgery.report import Certificate, Trial
from vfsurgery.sparse import MaskPlan
from vfsurgery.stats.batch_norms import batch_norm_nodes

MAPPABLE = 0.5
"""Share of the units that must allow maps for matchers of maps to be tried."""
MOST_FLOPS = {"cpu": 2e13}
"""Floating-point operations above which the regression is not tried unasked, by device; some minutes each."""
MOST_FLOPS_ELSEWHERE = 2e15
WITHOUT_LOGITS = "chosen by architecture: without logits there is nothing to judge others by"


@dataclass(frozen=True)
class Way:
    """One way to merge."""

    matcher: Matcher
    passes: tuple[Pass, ...]

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
    """The ways with calibration data, the plain choice by architecture first.

    Args:
        graph_module: The trace of a source.
        groups: Its groups.
        matcher: The one asked for; ``None`` to try several.
        default: The normalization by architecture, or the one asked for.
        fixed: Whether that one was asked for.
        masks: Of sparse sources: what would undo their pruning is left out.
    """
    first = ActivationMatching() if matcher is None else matcher
    found = [Way(first, default)]
    has_batch_norm, is_rescaled = bool(batch_norm_nodes(graph_module)), default == (Rescale(),)
    if is_rescaled and not fixed:
        found.append(Way(first, (Repair(),)))
    regress = Regress()
    regresses = not fixed and not hidden_norms(graph_module) and regress.applies(graph_module, groups)
    affordable = MOST_FLOPS.get(next(graph_module.parameters()).device.type, MOST_FLOPS_ELSEWHERE)
    regresses = regresses and regress.flops(graph_module, groups) <= affordable
    if regresses:
        found.append(Way(first, (regress,)))
    units = sum(group.units for group in groups)
    if matcher is None and units and sum(group.units for group in groups if group.mappable) >= MAPPABLE * units:
        if fixed or has_batch_norm or not default:
            found += [Way(CCAMatching(), default), Way(ZipMatching(), default)]
        elif is_rescaled:
            found += [Way(CCAMatching(), (Repair(reference=0),)), Way(ZipMatching(), default)]
        if regresses:
            found.append(Way(CCAMatching(), (regress,)))
    if masks is not None:  # maps of units mix their zeros away
        found = [way for way in found if way.matcher == first and not any(step.fills_zeros for step in way.passes)]
    return found


def choose(
    work: Merging, ways: Sequence[Way], shares: tuple[float, ...], preserve: Preserve | None
) -> tuple[Merged, tuple[Trial, ...]]:
    """Merge in every way and keep the best; a single one is not judged.

    Besides the sources, two merged models are in memory at a time. Which one is kept: :func:`best_of`.

    Raises:
        SurgeryError: no way succeeds; it is the first one's error.
    """
    for way in ways:
        work.plan(way.matcher, way.passes, judged=len(ways) > 1)
    best: Merged | None = None
    kept = -1
    trials: dict[int, Trial] = {}
    judgements: dict[int, Judgement] = {}
    failures: list[tuple[Way, SurgeryError]] = []
    matched: dict[str, Matched] = {}
    for place, way in enumerate(ways):
        started = time.perf_counter()
        try:
            with named(f"trying {place + 1} of {len(ways)}: {way}" if len(ways) > 1 else ""):
                merged = _merge(work, way, shares, preserve, matched)
                judgement = _judged(work, merged.model, shares) if len(ways) > 1 else None
        except SurgeryError as error:
            failures.append((way, error))
            continue
        if judgement is None:
            if len(ways) > 1:
                merged.context.notes.append(WITHOUT_LOGITS)
            return merged, ()
        judgements[place] = judgement
        trials[place] = _trial(way, judgement, time.perf_counter() - started)
        if best_of(judgements) == place:
            best, kept = merged, place
    if best is None:
        raise failures[0][1]
    chosen = best_of(judgements)
    if kept != chosen:  # one that was let go has come to be the best after all
        best = _merge(work, ways[chosen], shares, preserve, matched)
    best.context.notes.extend(f"failed, {way}: {str(error).splitlines()[0]}" for way, error in failures)
    return best, tuple(replace(trial, kept=place == chosen) for place, trial in trials.items())


def _trial(way: Way, judgement: Judgement, seconds: float) -> Trial:
    names = tuple(step.name for step in way.passes)
    images = len(judgement.agreed)
    return Trial(way.matcher.name, names, judgement.agreement, judgement.cross_entropy, images, seconds)


def _merge(
    work: Merging, way: Way, shares: tuple[float, ...], preserve: Preserve | None, matched: dict[str, Matched]
) -> Merged:
    if way.matcher.name not in matched:
        matchings = work.match(way.matcher)
        matched[way.matcher.name] = matchings, *work.certify(matchings)
    matchings, certificates, notes = matched[way.matcher.name]
    model, context = work.combine(shares, matchings, way.passes, preserve)
    context.notes[:0] = notes
    return Merged(way, model, matchings, certificates, context)


def _judged(work: Merging, model: nn.Module, shares: Sequence[float]) -> Judgement | None:
    """How near a model comes to the ensemble on held-out images; ``None`` without logits."""
    sources = [source.graph_module for source in work.sources]
    return judge(model, sources, shares, work.held_out_images("agreement with the ensemble"))

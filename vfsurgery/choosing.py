"""``"auto"``: try the sensible ways to match and renormalize, and keep the one that agrees best with the sources.

A merged model is wanted that does what its sources do together. So every way is judged on held-out calibration
images, without labels, by how often its largest logit is that of the sources' ensemble (their mean logits, weighted as
the merge is). What was tried, and what came of it, is in the report.

Traps are left out beforehand: REPAIR after CCA takes its goals from the first source alone, since a rotated source is
no good reference (Qu & Horvath, CPAL 2025, section 5.4); BatchNorm statistics are measured anew in every way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn

from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet
from vfsurgery.matching import ActivationMatching, CCAMatching, Matcher, Matching, ZipMatching
from vfsurgery.merging import Merging
from vfsurgery.passes import Context, Pass, Preserve, Regress, Repair, Rescale
from vfsurgery.passes.agreement import class_logits, ensemble_classes
from vfsurgery.passes.recalibrate import batch_norm_nodes
from vfsurgery.report import Certificate, Trial
from vfsurgery.sparse import MaskPlan

MAPPABLE = 0.5
"""Share of the units that must allow maps for matchers of maps to be tried."""
MOST_FLOPS = {"cpu": 2e13}
"""Floating-point operations above which the regression is not tried unasked, by device; some minutes each."""
MOST_FLOPS_ELSEWHERE = 2e15


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
    affordable = MOST_FLOPS.get(next(graph_module.parameters()).device.type, MOST_FLOPS_ELSEWHERE)
    regresses = bool(default) and not fixed and regress.flops(graph_module, groups) <= affordable
    if regresses:
        found.append(Way(first, (regress,)))
    units = sum(group.units for group in groups)
    if matcher is None and units and sum(group.units for group in groups if group.mappable) >= MAPPABLE * units:
        if fixed or has_batch_norm:
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

    Besides the sources, two merged models are in memory at a time.

    Raises:
        SurgeryError: no way succeeds; it is the first one's error.
    """
    for way in ways:
        work.plan(way.matcher, way.passes, judged=len(ways) > 1)
    best: Merged | None = None
    trials: list[Trial] = []
    failures: list[tuple[Way, SurgeryError]] = []
    matched: dict[str, Matched] = {}
    for way in ways:
        started = time.perf_counter()
        try:
            merged = _merge(work, way, shares, preserve, matched)
            if len(ways) == 1:
                return merged, ()
            agreement = _agreement(work, merged.model, shares)
            if agreement is None:
                merged.context.notes.append(
                    "chosen by architecture: without logits there is nothing to judge others by"
                )
                return merged, ()
        except SurgeryError as error:
            failures.append((way, error))
            continue
        names = tuple(step.name for step in way.passes)
        if best is None or agreement > max(trial.agreement for trial in trials):
            best = merged
        trials.append(Trial(way.matcher.name, names, agreement, time.perf_counter() - started))
    if best is None:
        raise failures[0][1]
    best.context.notes.extend(f"failed, {way}: {str(error).splitlines()[0]}" for way, error in failures)
    return best, tuple(trials)


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


def _agreement(work: Merging, model: nn.Module, shares: Sequence[float]) -> float | None:
    """Share of held-out images for which a model's largest logit is the ensemble's; ``None`` without logits."""
    agreed, count = 0.0, 0
    for images in work.held_out_images("agreement with the ensemble"):
        logits = class_logits(model, images)
        classes = ensemble_classes([source.graph_module for source in work.sources], shares, images)
        if logits is None or classes is None:
            return None
        same = logits.argmax(1) == classes
        agreed, count = agreed + float(same.sum()), count + same.numel()
    return agreed / count

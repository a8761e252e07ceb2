"""``"auto"``: try the sensible ways to match and renormalize, and keep the one that agrees best with the sources.

A merged model is wanted that does what its sources do together. So every candidate is judged on held-out calibration
images, without labels, by how often its largest logit is that of the sources' ensemble (their mean logits, weighted as
the merge is). What was tried, and what came of it, is in the report.

Traps are left out beforehand: REPAIR after CCA takes its goals from the first source alone, since a rotated source is
no good reference (Qu & Horvath, CPAL 2025, section 5.4); BatchNorm statistics are measured anew in every candidate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from vfsurgery.errors import DataError, OptionError, SurgeryError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.matching import ActivationMatching, CCAMatching, Matcher, Matching, ZipMatching
from vfsurgery.merging import Merging
from vfsurgery.passes import Context, Pass, Regress, Repair, Rescale, Reset
from vfsurgery.passes.recalibrate import batch_norm_nodes
from vfsurgery.report import Certificate, Trial
from vfsurgery.stats.collect import image_dtype

MAPPABLE = 0.5
"""Share of the units that must allow maps for matchers of maps to be tried."""
MOST_FLOPS = {"cpu": 2e13}
"""Floating-point operations above which the regression is not tried unasked, by device; some minutes each."""
MOST_FLOPS_ELSEWHERE = 2e15


@dataclass(frozen=True)
class Candidate:
    """One way to merge."""

    matcher: Matcher
    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return f"{self.matcher.name} + {', '.join(step.name for step in self.passes) or 'no renormalization'}"


@dataclass(frozen=True)
class Merged:
    """What one candidate came to."""

    candidate: Candidate
    model: nn.Module
    matchings: Sequence[Matching]
    certificates: tuple[Certificate, ...]
    context: Context


def sensible(
    graph_module: fx.GraphModule,
    groups: GroupSet,
    device: torch.device,
    matcher: Matcher | None,
    default: tuple[Pass, ...],
    fixed: bool,
) -> list[Candidate]:
    """The candidates with calibration data, the plain choice by architecture first.

    Args:
        graph_module: The trace of a source.
        groups: Its groups.
        device: Where it lives.
        matcher: The one asked for; ``None`` to try several.
        default: The normalization by architecture, or the one asked for.
        fixed: Whether that one was asked for.
    """
    first = ActivationMatching() if matcher is None else matcher
    found = [Candidate(first, default)]
    has_batch_norm, is_rescaled = bool(batch_norm_nodes(graph_module)), default == (Rescale(),)
    if not fixed and default:
        if is_rescaled:
            found.append(Candidate(first, (Repair(),)))
        regress = Regress()
        if regress.flops(graph_module, groups) <= MOST_FLOPS.get(device.type, MOST_FLOPS_ELSEWHERE):
            found.append(Candidate(first, (regress,)))
    units = sum(group.units for group in groups)
    if matcher is None and units and sum(group.units for group in groups if group.mappable) >= MAPPABLE * units:
        if fixed or has_batch_norm:
            found += [Candidate(CCAMatching(), default), Candidate(ZipMatching(), default)]
        elif is_rescaled:
            found += [Candidate(CCAMatching(), (Repair(reference=0),)), Candidate(ZipMatching(), default)]
    return found


def choose(work: Merging, candidates: Sequence[Candidate], shares: tuple[float, ...]) -> tuple[Merged, tuple[Trial, ...]]:
    """Merge in every way and keep the best; with a single candidate nothing is judged.

    Raises:
        SurgeryError: no candidate succeeds; it is the first one's error.
    """
    best: Merged | None = None
    trials: list[Trial] = []
    failure: SurgeryError | None = None
    matched: dict[str, tuple[Sequence[Matching], tuple[Certificate, ...]]] = {}
    for candidate in candidates:
        started = time.perf_counter()
        try:
            if candidate.matcher.name not in matched:
                matchings = work.match(candidate.matcher)
                matched[candidate.matcher.name] = matchings, work.certify(matchings)
            matchings, certificates = matched[candidate.matcher.name]
            model, context = work.combine(shares, matchings, candidate.passes)
        except SurgeryError as error:
            failure = failure or error
            continue
        merged = Merged(candidate, model, matchings, certificates, context)
        if len(candidates) == 1:
            return merged, ()
        agreement = _agreement(work, model, shares)
        names = tuple(step.name for step in candidate.passes)
        trials.append(Trial(candidate.matcher.name, names, agreement, time.perf_counter() - started))
        if best is None or agreement > max(trial.agreement for trial in trials[:-1]):
            best = merged
    if best is None:
        assert failure is not None
        raise failure
    return best, tuple(trials)


def _agreement(work: Merging, model: nn.Module, shares: Sequence[float]) -> float:
    """Share of held-out images for which a model's largest logit is the ensemble's."""
    agreed, count = 0.0, 0
    for images in work.held_out_images("agreement with the ensemble"):
        logits = [weight * _logits(source.graph_module, images) for source, weight in zip(work.sources, shares, strict=True)]
        same = _logits(model, images).argmax(1) == torch.stack(logits).sum(0).argmax(1)
        agreed, count = agreed + float(same.sum()), count + same.numel()
    return agreed / count


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The first tensor that a model returns, classes along dim 1, in float32 or better."""
    leaves = tree_leaves(model(images.to(image_dtype(model))))
    logits = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if logits is None or logits.ndim < 2 or logits.shape[1] < 2:
        found = "no tensor" if logits is None else f"shape {tuple(logits.shape)}"
        raise OptionError(explain("'auto' judges by classes, and this model returns no logits", found=found))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

"""What the sources are asked for: planned for all ways to merge, so that one pass over the data answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vfsurgery.combining.base import Combiner
from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import EVERY, every_for, first, mixed, split
from vfsurgery.matching import Matcher
from vfsurgery.merging.prepared import Grouped
from vfsurgery.passes import Pass, Regress
from vfsurgery.passes.base import calibration_images
from vfsurgery.stats.collect import Site, Survey, group_sites, survey

JUDGED = 100
"""Calibration images from which on ways to merge are compared, on some that are held out."""

SURVEYED = 1000
"""Images that the sources' units are compared on, where several ways to merge are and there are twice as many."""


@dataclass(frozen=True)
class Way:
    """One way to merge; without a ``combiner``, by the weighted average."""

    matcher: Matcher
    passes: tuple[Pass, ...]
    combiner: Combiner | None = None

    @property
    def is_dear(self) -> bool:
        """Whether it takes several times as long as others: it fits every layer."""
        return any(isinstance(step, Regress) for step in self.passes)

    def __str__(self) -> str:
        steps = ", ".join(step.name for step in self.passes) or "no renormalization"
        return f"{self.matcher.name} + {steps}" if self.combiner is None else f"{self.combiner} + {steps}"


@dataclass(frozen=True)
class Surveyed:
    """Grouped sources with their statistics, which are read in one pass over the data when first asked for.

    ``data`` is what passes may see and ``held_out`` what ways are judged on; ``pairs`` are the sites where units are
    correlated between sources, ``units`` those whose moments are taken, and ``images`` what both are read on.
    ``joint`` and ``all_pairs`` say which sources are correlated, as for :func:`~vfsurgery.stats.collect.survey`.
    ``known`` are statistics that were read before. ``own`` are the images of each source, where they were given
    apart, and ``apart`` those of them that are held out.
    """

    grouped: Grouped
    data: Batches | None
    held_out: Batches | None
    images: Batches | None
    pairs: Mapping[str, tuple[Site, ...]]
    units: Mapping[str, Site]
    joint: bool
    all_pairs: bool

    known: Survey | None = None
    own: tuple[Batches, ...] = ()
    apart: tuple[Batches, ...] = ()

    @cached_property
    def statistics(self) -> Survey:
        """Of all sources, correlations of their units among them."""
        if self.known is not None:
            return self.known
        images = calibration_images(self.images, "statistics of the sources", self.grouped.progress)
        graph_modules = [source.graph_module for source in self.grouped.sources]
        with self.grouped.clock("statistics"):
            return survey(graph_modules, images, self.pairs, self.units, self.joint, self.all_pairs)

    @property
    def taken(self) -> Survey | None:
        """The statistics if anything has asked for them."""
        return self.known or vars(self).get("statistics")

    def moments(self) -> Survey:
        """What passes read of the statistics; empty where none does."""
        if self.units:
            return replace(self.statistics, crossed={})
        return Survey({}, [{} for _ in self.grouped.sources], 0)

    def without_correlations(self) -> Surveyed:
        """The same once all matchers have matched: correlations are the largest thing in memory beside a model."""
        taken = self.taken
        return self if taken is None else replace(self, known=replace(taken, crossed={}))


def plan_survey(grouped: Grouped, ways: Sequence[Way], judged: bool = False) -> Surveyed:
    """Collect what ways to merge need of the sources; ``judged`` if one is to be chosen on held-out images."""
    matchers = [way.matcher for way in ways if way.matcher.needs_data]
    passes = [step for way in ways for step in way.passes]
    data, held_out, images = grouped.data, None, None
    own, apart = grouped.own, tuple[Batches, ...]()
    if judged and data is not None:
        every = every_for(data)
        if grouped.own:  # of each its own share, so that none is judged on what statistics have seen
            parts = [split(each, every) for each in grouped.own]
            own, apart = tuple(rest for rest, _ in parts), tuple(held for _, held in parts)
            data, held_out = mixed(own), mixed(apart)
        else:
            data, held_out = split(data, every)
        images = first(data, SURVEYED)
    elif any(step.holds_out() for step in passes):
        data, held_out = split(data)
    units: dict[str, Site] = {}
    for step in passes:
        units |= step.reads(grouped.graph_module, grouped.groups)
    return Surveyed(
        grouped,
        data,
        held_out,
        images or data,
        pairs=group_sites(grouped.graph_module, grouped.groups, grouped.sources[0].device) if matchers else {},
        units=units,
        joint=any(getattr(matcher, "needs_joint", False) for matcher in matchers),
        all_pairs=any(getattr(matcher, "needs_pairs", False) for matcher in matchers),
        own=own,
        apart=apart,
    )


def with_all(surveyed: Surveyed, way: Way) -> Surveyed:
    """For the way that was chosen: the same with all images, those that were held out to choose it among them.

    Statistics are read anew, unless they are of so many images as are enough.
    """
    whole = plan_survey(surveyed.grouped, [way])
    if surveyed.images is surveyed.data:
        return whole
    return replace(surveyed, data=whole.data, own=whole.own, held_out=whole.held_out, known=surveyed.taken)


def can_judge(data: Batches | None) -> bool:
    """Whether there are images enough to hold some out and judge by them."""
    if data is None:
        return False
    seen, enough = 0, max(JUDGED, EVERY * data.together)
    for images, _ in data:
        seen += len(images)
        if seen >= enough:
            return True
    return False

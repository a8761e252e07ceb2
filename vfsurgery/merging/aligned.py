"""The order of every source's units, and the proof that each source still computes what it computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vfsurgery.data.progress import progress_line
from vfsurgery.discovery.maps import Order, UnitMap, permutations_of
from vfsurgery.discovery.verification import certify, drift
from vfsurgery.groups import Permutation
from vfsurgery.matching import Given, Matcher, Matching, Problem
from vfsurgery.matching.pairwise import describe
from vfsurgery.merging.surveyed import Surveyed
from vfsurgery.records.report import Certificate


@dataclass(frozen=True)
class Matched:
    """What a matcher found: a matching for every source, an empty one for a reference that stays as it is."""

    matcher: Matcher
    found: tuple[Matching, ...]
    each: tuple[Matching, ...]

    @property
    def orders(self) -> Given:
        """The same as a matcher, to merge once more."""
        return Given(tuple(dict(matching.permutations) for matching in self.found))

    @property
    def mapped(self) -> int:
        """How many groups are mapped by matrices that are no identity, over all sources."""
        return sum(count_maps(matching.permutations) for matching in self.each)


@dataclass(frozen=True)
class Certified(Matched):
    """The same with a certificate for every source that was reordered, and notes for the report."""

    certificates: tuple[Certificate, ...]
    notes: tuple[str, ...]


def match_sources(surveyed: Surveyed, matcher: Matcher) -> Matched:
    """Find every source's order of units."""
    grouped = surveyed.grouped
    if matcher.needs_data:
        surveyed.statistics  # noqa: B018 - read now: a step of its own, on the clock and on the screen
    with grouped.clock("matching"), progress_line("matching", grouped.progress) as advance:
        states = [source.state for source in grouped.sources]
        correlations = lambda: surveyed.statistics.correlations  # noqa: E731
        joint = lambda: surveyed.statistics.crossed  # noqa: E731
        found = matcher.match(Problem(grouped.groups, states, correlations, grouped.seed, advance, joint))
    return Matched(matcher, (*found,), (*[Matching({})] * (len(grouped.sources) - len(found)), *found))


def certify_sources(surveyed: Surveyed, matched: Matched) -> Certified:
    """Prove that each source computes the same after its reordering; measure what maps of units do to it.

    Raises:
        CertificateError: a source does not.
    """
    grouped = surveyed.grouped
    with grouped.clock("certificate"):
        certificates: list[Certificate] = []
        for number, (source, matching) in enumerate(zip(grouped.sources, matched.each, strict=True)):
            mapped = count_maps(matching.permutations)
            if not number and not mapped:
                continue  # the reference, as it is
            orders = permutations_of(matching.permutations)
            certificate = certify(number, source, grouped.groups, orders, grouped.inputs)
            if mapped:
                error = drift(source, grouped.groups, matching.permutations, grouped.inputs)
                certificate = replace(certificate, mapped=mapped, drift=error)
            certificates.append(certificate)
        return Certified(**vars(matched), certificates=(*certificates,), notes=(*_similarities(surveyed, matched),))


def count_maps(orders: Mapping[str, Order]) -> int:
    """How many groups are mapped by matrices that are no identity."""
    return sum(isinstance(order, UnitMap) and bool(order.moved) for order in orders.values())


def _similarities(surveyed: Surveyed, matched: Matched) -> Sequence[str]:
    """For the report: how similar more than two sources are to each other, which no comparison with a says."""
    orders = [matching.permutations for matching in matched.each]
    only_permuted = all(isinstance(order, Permutation) for own in orders for order in own.values())
    if len(orders) == 2 or not any(orders) or not only_permuted:
        return []
    by_data = matched.matcher.needs_data and (surveyed.joint or surveyed.all_pairs)
    states = [source.state for source in surveyed.grouped.sources]
    pairs = surveyed.statistics.crossed if by_data else None
    return describe(surveyed.grouped.groups, states, [permutations_of(own) for own in orders], pairs)

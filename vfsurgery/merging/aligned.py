"""The order of every source's units, and the proof that each source still computes what it computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vfsurgery.data.progress import progress_line
from vfsurgery.discovery.maps import Order, UnitMap, exact_maps, map_tensor, permutations_of
from vfsurgery.discovery.verification import certify, drift
from vfsurgery.groups import Permutation, PermutationGroup
from vfsurgery.matching import Given, Matcher, Matching, Problem
from vfsurgery.matching.pairwise import describe
from vfsurgery.merging.surveyed import Surveyed
from vfsurgery.records.report import Certificate
from vfsurgery.stats.collect import Site
from vfsurgery.tracing.sources import Source


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

    @property
    def mapped(self) -> int:
        """How many groups are mapped by matrices that nothing certifies: exact ones are."""
        return sum(certificate.mapped for certificate in self.certificates)


def match_sources(surveyed: Surveyed, matcher: Matcher) -> Matched:
    """Find every source's order of units."""
    grouped = surveyed.grouped
    if matcher.needs_data:
        surveyed.statistics  # noqa: B018 - read now: a step of its own, on the clock and on the screen
    with grouped.clock("matching"), progress_line("matching", grouped.progress) as advance:
        states = [source.state for source in grouped.sources]
        correlations = lambda: surveyed.statistics.correlations  # noqa: E731
        joint = lambda: surveyed.statistics.crossed  # noqa: E731
        duals = {name: _duals(grouped.groups[name], sites) for name, sites in surveyed.pairs.items()}
        problem = Problem(grouped.groups, states, correlations, grouped.seed, advance, joint, duals)
        found = matcher.match(problem)
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
            exact = exact_maps(grouped.groups, matching.permutations)
            mapped = count_maps({name: order for name, order in matching.permutations.items() if name not in exact})
            original = grouped.originals[number] if grouped.originals else None
            if not number and not mapped and original is None:
                continue  # the reference, as it is
            orders = {**permutations_of(matching.permutations), **exact}
            certificate = certify(number, source, grouped.groups, orders, grouped.inputs, original)
            if mapped:
                error = drift(source, grouped.groups, matching.permutations, grouped.inputs)
                certificate = replace(certificate, mapped=mapped, drift=error)
            certificates.append(certificate)
        return Certified(**vars(matched), certificates=(*certificates,), notes=(*_similarities(surveyed, matched),))


def settle_maps(surveyed: Surveyed, certified: Certified, last: bool = False) -> tuple[Surveyed, Matched]:
    """Sources that exact maps were found for, as they are under them; with orders alone nothing changes.

    For the ``last`` merge their copies in canonical form are written over, which saves a model in memory.

    So what averages, renormalizes and preserves reads them as if they had been trained so. Their statistics are read
    anew, if anything asks: those of rotated units do not follow from those of the units.
    """
    grouped = surveyed.grouped
    if not any(exact_maps(grouped.groups, matching.permutations) for matching in certified.each):
        return surveyed, certified
    sources: list[Source] = []
    for source, matching in zip(grouped.sources, certified.each, strict=True):
        aligned = source.clone() if matching.permutations and not (last and grouped.originals) else source
        for name, tensor in source.state.items() if matching.permutations else ():
            aligned.state[name].copy_(map_tensor(name, tensor, grouped.groups, matching.permutations))
        sources.append(aligned)
    anew = replace(surveyed, grouped=replace(grouped, sources=tuple(sources)), pairs={}, known=None)
    as_they_are = tuple(replace(matching, permutations={}) for matching in certified.each)
    return anew, Matched(certified.matcher, certified.found, as_they_are)


def _duals(group: PermutationGroup, sites: Sequence[Site]) -> tuple[bool, ...]:
    """Of each site, whether the units there are mapped by the inverse transposed."""
    dual = {(member.parameter, member.dim): member.dual for member in group.activations}
    return tuple(dual.get((site.node, site.dim), False) for site in sites)


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

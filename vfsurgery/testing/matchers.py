"""The conformance suite of matchers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vfsurgery.discovery.finding import find_groups
from vfsurgery.discovery.maps import Order, UnitMap
from vfsurgery.groups import GroupSet, Permutation
from vfsurgery.matching import MATCHERS, Matcher
from vfsurgery.merging.merge import match, merge
from vfsurgery.testing.nets import NETS, example_images, make_net
from vfsurgery.testing.watching import expect, untouched

IMAGES = 64


def check_matcher(matcher: Matcher, *, nets: Sequence[str] | None = None, registered: bool = True) -> None:
    """Check all that the library expects of a matcher, on several tiny networks.

    It has a name and says whether it needs data; gives for two and for three sources orders of the groups that exist,
    each of the right size; gives the same again; leaves the sources and the global random states alone; and what it
    gives can be merged, where every reordering is certified.

    Args:
        matcher: An instance.
        nets: Names of :data:`~vfsurgery.testing.NETS`; all by default.
        registered: Whether its name is to be found in the registry.

    Raises:
        AssertionError: something does not hold; the message says what.

    >>> from vfsurgery.matching import WeightMatching
    >>> check_matcher(WeightMatching(), nets=["chain"])
    """
    expect(isinstance(matcher, Matcher), f"{matcher!r} is no matcher", remedy="it takes name, needs_data and match()")
    expect(not isinstance(matcher, type), f"{matcher!r} is a class", remedy="give check_matcher an instance")
    if registered:
        expect(
            matcher.name in MATCHERS,
            f"matcher {matcher.name!r} is not registered under its name",
            remedy='put @MATCHERS.register("...") over it, or check_matcher(..., registered=False)',
        )
    for name in NETS if nets is None else nets:
        for count in (2, 3):
            _check_on(matcher, name, [make_net(name, seed) for seed in range(count)])


def _check_on(matcher: Matcher, net: str, sources: list[nn.Module]) -> None:
    where = f"matcher {matcher.name!r} on {len(sources)} x {net!r}"
    data = example_images(IMAGES) if matcher.needs_data else None
    groups = find_groups(sources[0], example_images(2))
    with untouched(where, sources):
        found = [_matched(matcher, sources, data) for _ in range(2)]
    expect(
        _plain(found[0]) == _plain(found[1]),
        f"{where} gives other orders the second time",
        remedy="draw from problem.generator()",
    )
    expect(len(found[0]) in (len(sources) - 1, len(sources)), f"{where} gives {len(found[0])} matchings")
    for orders in found[0]:
        _check_orders(where, orders, groups)
    with untouched(where, sources):
        merge(sources, data=data, matching=matcher, renormalize=None, example_inputs=example_images(2), progress=False)


def _matched(matcher: Matcher, sources: list[nn.Module], data: object) -> list[Mapping[str, Order]]:
    found = match(sources, data=data, matching=matcher, example_inputs=example_images(2), progress=False)  # type: ignore[arg-type]
    return [found] if isinstance(found, Mapping) else list(found)


def _plain(found: list[Mapping[str, Order]]) -> list[dict[str, object]]:
    """Orders as values that compare: maps of units hold tensors."""
    return [
        {name: order.merge.tolist() if isinstance(order, UnitMap) else order for name, order in orders.items()}
        for orders in found
    ]


def _check_orders(where: str, orders: Mapping[str, Order], groups: GroupSet) -> None:
    known = {group.name for group in groups}
    for name, order in orders.items():
        expect(name in known, f"{where} orders a group that does not exist", group=name)
        if isinstance(order, UnitMap):
            continue
        expect(
            isinstance(order, Permutation) and groups[name].accepts(order),
            f"{where} gives an order that does not fit to its group",
            group=groups[name],
            order=order,
        )

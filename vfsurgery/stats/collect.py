"""One pass over the data that gathers all statistics of all sources.

Sources run in lockstep: on each batch the reference runs first and keeps its centred activations, then every other
source runs and is correlated with it as it goes. Activations are read the moment they are computed, so ops that
overwrite their input do no harm, and freed when the graph needs them no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from vfsurgery.groups import GroupSet, Member, PermutationGroup
from vfsurgery.stats.correlation import Centred, CrossMoments
from vfsurgery.stats.moments import Moments, add_batch
from vfsurgery.stats.own_outputs import OwnCall
from vfsurgery.stats.precision import taken_by
from vfsurgery.tracing.dataflow import reached_by_input
from vfsurgery.tracing.excerpts import Runner
from vfsurgery.tracing.ops import Key, canonical_key
from vfsurgery.tracing.values import VALUE, TensorValue, floats_per_image, takes_single_images

INSIDE = ".inside"
"""Ends the key of what is read inside a node's module; names of nodes have no dots."""


@dataclass(frozen=True)
class Site:
    """Where units are read: the value of a node, along ``dim``, at ``places`` (all indices in order if ``None``).

    ``inside`` if they are read inside the node's module, before what follows the call with its own weight.
    """

    node: str
    dim: int
    places: Tensor | None = None
    inside: bool = False

    @property
    def key(self) -> str:
        """What callbacks for it are found by."""
        return f"{self.node}{INSIDE}" if self.inside else self.node

    @staticmethod
    def of(member: Member, length: int, device: torch.device) -> Site:
        """The site of a group's activation member on a dim of ``length`` indices."""
        positions = torch.from_numpy(member.positions())
        plain = positions.shape == (length, 1) and bool((positions[:, 0] == torch.arange(length)).all())
        return Site(member.parameter, member.dim, None if plain else positions.to(device))


class Observer(Runner):
    """Runs a graph module and shows chosen nodes' values to a callback as they appear; see :attr:`Site.key`."""

    def __init__(self, graph_module: fx.GraphModule, watch: Mapping[str, Callable[[Tensor], Tensor | None]]) -> None:
        super().__init__(graph_module)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a watcher that returns a tensor replaces the node's value by it."""
        inside = self.watch.get(f"{n.name}{INSIDE}")
        if inside is None:
            value = super().run_node(n)
        else:
            with OwnCall(self.fetch_attr(str(n.target)), inside):
                value = super().run_node(n)
        watcher = self.watch.get(n.name)
        if watcher is not None:
            replacement = watcher(value)
            return value if replacement is None else replacement
        return value


@dataclass(frozen=True)
class Survey:
    """Statistics of all sources from one pass over the data.

    ``crossed`` has for each pair of sources (the first with every other one, or all pairs, each source with itself
    among them) and each name, for each of its sites, the cross moments of both sources' units. ``moments`` has one
    entry per source. ``images`` were seen.
    """

    crossed: dict[tuple[int, int], dict[str, tuple[CrossMoments, ...]]]
    moments: list[dict[str, Moments]]
    images: int

    @property
    def correlations(self) -> list[dict[str, tuple[CrossMoments, ...]]]:
        """Of the first source with every other one, in order."""
        return [self.crossed[0, number] for number in range(1, len(self.moments))]


ALL = 2**31
"""More images than any batch has."""
LEAST_WAITING = 2**22
"""Numbers that may always wait to be correlated, 16 MiB of float32."""

Reading: TypeAlias = tuple[str, int]
"""A name, and which of its sites."""


def survey(
    sources: Sequence[fx.GraphModule],
    batches: Iterable[Tensor],
    pairs: Mapping[str, Sequence[Site]],
    units: Mapping[str, Site],
    joint: bool = False,
    all_pairs: bool = False,
) -> Survey:
    """Gather all statistics of all sources, each source run once on each batch.

    Args:
        sources: Graph modules of one architecture, in eval mode, on one device.
        batches: Images, ``(batch, channels, height, width)``, on that device.
        pairs: Where to correlate the units of the first source with those of every other one, by name.
        units: Where to take moments of the units of every source, by name.
        joint: Correlate the units of every source with those of every source, itself included.
        all_pairs: Correlate the units of every source with those of every other one.
    """
    readings = {(name, place): site for name, sites in pairs.items() for place, site in enumerate(sites)}
    numbers = range(len(sources))
    chosen = [(i, j) for i in numbers for j in numbers if i <= j and (joint or (all_pairs and i < j) or i == 0 < j)]
    crossed: dict[tuple[int, int], dict[Reading, CrossMoments]] = {pair: {} for pair in chosen}
    moments: list[dict[str, Moments]] = [{} for _ in sources]
    last = {i: max(j for other, j in chosen if other == i) for i, _ in chosen}
    most = _images_at_once(sources[0], readings.values(), len(sources))
    seen = 0
    for images in (part for batch in batches for part in batch.split(most)):
        kept: dict[tuple[int, Reading], Centred] = {}
        for number, source in enumerate(sources):
            watch = moments_watch(units, moments[number])
            partners = {i: crossed[i, j] for i, j in chosen if j == number}
            for reading, site in readings.items():
                watch.add(site.key, _correlate(reading, site, number, kept, partners, last))
            Observer(source, watch).run(taken_by(source, images))
        seen += len(images)
    by_pair = {
        pair: {name: tuple(found[name, place] for place in range(len(sites))) for name, sites in pairs.items()}
        for pair, found in crossed.items()
    }
    return Survey(by_pair, moments, seen)


def _images_at_once(graph_module: fx.GraphModule, sites: Iterable[Site], sources: int) -> int:
    """How many images may be run at once; statistics do not depend on it.

    Units that wait to be correlated with those of other sources may take an eighth of a model. On other devices than
    the CPU small batches would cost too much time.
    """
    parameters = list(graph_module.parameters())
    if not parameters or parameters[0].device.type != "cpu" or not takes_single_images(graph_module.graph):
        return ALL
    nodes = {node.name: node for node in graph_module.graph.nodes}
    waiting = (sources - 1) * sum(floats_per_image(nodes[site.node]) for site in sites)
    size = max(sum(parameter.numel() for parameter in parameters) // 8, LEAST_WAITING)
    return max(size // waiting, 1) if waiting else ALL


class Watch(dict[str, Callable[[Tensor], "Tensor | None"]]):
    """Callbacks by key of the site; several may look at one."""

    def add(self, key: str, callback: Callable[[Tensor], None]) -> None:
        """Have ``callback`` see the value there after those that were added before."""
        earlier = self.get(key)

        def both(value: Tensor) -> None:
            if earlier is not None:
                earlier(value)
            callback(value)

        self[key] = both


def moments_watch(units: Mapping[str, Site], totals: dict[str, Moments]) -> Watch:
    """Callbacks that add the moments of units to ``totals`` under their names."""
    watch = Watch()
    for name, site in units.items():
        watch.add(site.key, _take_moments(name, site, totals))
    return watch


def _take_moments(name: str, site: Site, totals: dict[str, Moments]) -> Callable[[Tensor], None]:
    def see(value: Tensor) -> None:
        batch = Moments.of(value, site.places, site.dim)
        add_batch(totals, name, batch)

    return see


def _correlate(
    reading: Reading,
    site: Site,
    number: int,
    kept: dict[tuple[int, Reading], Centred],
    partners: Mapping[int, dict[Reading, CrossMoments]],
    last: Mapping[int, int],
) -> Callable[[Tensor], None]:
    """Cross moments of one source's units with those of earlier sources, and its own kept until the last has come."""

    def see(value: Tensor) -> None:
        own = Centred.of(value, site.places, site.dim)
        for partner, totals in partners.items():
            other = own
            if partner != number:
                other = kept.pop((partner, reading)) if last[partner] == number else kept[partner, reading]
            add_batch(totals, reading, CrossMoments.of(other, own))
        if last.get(number, number) > number:
            kept[number, reading] = own

    return see


NONLINEAR = "relu relu6 leakyrelu rrelu elu selu celu gelu silu mish tanh hardswish hardtanh softplus prelu"
"""Activations that cut off or bend, by name without underscores; gates (sigmoids) are not among them."""


def group_sites(graph_module: fx.GraphModule, groups: GroupSet, device: torch.device) -> dict[str, tuple[Site, ...]]:
    """Where each group's units are read for matching: after its first non-linearity and after its last.

    Qu & Horvath match post-activation units, a residual stream at its last block (CPAL 2025, A.2). But what the early
    blocks read counts as much as what the late ones do, so streams are read at both ends. Groups without a
    non-linearity of their own are read after their first and last sum (the streams of transformers), else at their
    largest and latest value; queries and keys both count.

    Groups that can be rotated are read behind the norms whose scale is folded away, where all lengths are alike.

    Nested groups are read where their units lie inside the blocks on one axis, all of them at once, and no other group
    of the same blocks lies there. The outer group is read only where no inner one lies: elsewhere blocks could be
    compared only once the units inside are paired.

    Only what the input reaches is read: values made of parameters alone are no activations, and show units of other
    groups where activations have samples; complex values have no one standard deviation. A group that lies on nothing
    else has no site.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    modules = dict(graph_module.named_modules())
    reached = {name for name in reached_by_input(graph_module.graph) if _has_numbers(nodes[name])}
    sites: dict[str, tuple[Site, ...]] = {}
    for group in groups:
        candidates = _candidates(group, groups, reached)
        normed = {node for folding in groups.foldings if folding.readers for node in folding.nodes}
        behind = [m for m in candidates if m.parameter in normed and group.symmetry.is_continuous]
        members = behind or _read_at(candidates, nodes, modules)
        if members:
            lengths = [nodes[member.parameter].meta[VALUE].shape[member.dim] for member in members]
            sites[group.name] = tuple(
                Site.of(member, length, device) for member, length in zip(members, lengths, strict=True)
            )
    return sites


def _candidates(group: PermutationGroup, groups: GroupSet, reached: Collection[str]) -> list[Member]:
    """Where a group's units can be compared before any order is known."""
    values = [m for m in group.activations if m.parameter in reached]
    inside = [m for other in groups if other.outer == (group.outer or group.name) for m in other.activations]
    if group.outer:
        others = [member for member in inside if member not in values]
        return [m for m in values if m.blocks > 1 and not any(_mixed_with(m, other) for other in others)]
    hidden = {member.parameter for member in inside}
    return [m for m in values if m.parameter not in hidden]


def _has_numbers(node: fx.Node) -> bool:
    """Whether what a node gives can be measured: real numbers, and neither a mask nor indices."""
    value = node.meta.get(VALUE)
    return not isinstance(value, TensorValue) or value.dtype.is_floating_point


def _mixed_with(member: Member, other: Member) -> bool:
    """Whether what a node shows of one group's units depends on the order of another's."""
    return member.parameter == other.parameter and (member.dim != other.dim or member.overlaps(other))


def _read_at(candidates: list[Member], nodes: Mapping[str, fx.Node], modules: Mapping[str, Any]) -> Sequence[Member]:
    def per_unit(member: Member) -> int:
        shape = torch.Size(nodes[member.parameter].meta[VALUE].shape)
        return shape.numel() // shape[member.dim]

    bent = [member for member in candidates if _is_nonlinear(nodes[member.parameter], modules)]
    sums = [member for member in candidates if _key(nodes[member.parameter]) == "add"]
    if bent or sums:
        return _ends(bent or sums)
    if not candidates:
        return ()
    best = max(reversed(candidates), key=per_unit)
    return _ends([member for member in candidates if member.parameter == best.parameter])


def _ends(members: Sequence[Member]) -> Sequence[Member]:
    """The first and the last of several."""
    return members if len(members) == 1 else (members[0], members[-1])


def _key(node: fx.Node) -> Key:
    return canonical_key(node.target) if node.op in ("call_function", "call_method") else ""


def _is_nonlinear(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__.lower() in NONLINEAR.split()
    key = _key(node)
    return isinstance(key, str) and key.replace("_", "") in NONLINEAR.split()

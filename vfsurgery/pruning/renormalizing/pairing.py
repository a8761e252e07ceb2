"""Which layer of a compressed network stands where in the network that it was made from.

Compared are *stages*: layers whose output units can be scaled and shifted, each taken at its end, behind the BatchNorm
that alone reads it if there is one. So a convolution into which its BatchNorm was folded is compared with convolution
and BatchNorm together.

Stages are paired by name first: the same module path, or a path below the other's (``conv1.1`` below ``conv1``, where
two low-rank factors have replaced a layer), of which the last counts. What is left is paired by its place in the graph:
between two neighbours that are paired, in order, with equal kind and number of units. Where several layers could be the
partner none is taken; every layer without one is named with the reason.

Names can lie: who deletes a layer of an ``nn.Sequential`` renumbers all that follow. So weights of equal shape must
have something in common. Compression leaves what it keeps much as it was, and two layers that were trained apart agree
in nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, fx

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.affine import tensor_of
from vfsurgery.passes.producers import CONV, LINEAR, TRANSPOSED, Producer, find_producers, is_layer, is_norm
from vfsurgery.records.report import Unpaired
from vfsurgery.stats.collect import Site
from vfsurgery.tracing.ops import Op, OpReader

Keep: TypeAlias = Mapping[str, Tensor | Sequence[int]]
"""For layers by name, the indices of the reference's units that are left, in their order."""

AKIN = 0.3
"""Mean cosine of the rows of two layers' weights from which on one counts as made from the other."""


@dataclass(frozen=True)
class Stage:
    """A layer at whose end (its own, or its BatchNorm's) units can be scaled and shifted.

    ``names`` are those of its end and of the layer before, ``kind`` and ``rows`` (the weight, units first) are of the
    layer that starts it.
    """

    end: Producer
    names: tuple[str, ...]
    kind: str
    rows: Tensor = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """What people call it: the module path of its end."""
        return self.names[0]

    @property
    def units(self) -> int:
        """Number of output units."""
        return self.end.units

    def resembles(self, other: Stage) -> bool:
        """Whether another network's stage has as many units, made in the same way."""
        return (self.kind, self.units, self.end.dim) == (other.kind, other.units, other.end.dim)

    def cosine(self, reference: Stage) -> float | None:
        """Mean cosine of this layer's rows with those it may be made from, over the entries that are not zero here.

        ``None`` where weights do not tell: of different shape, of norm layers, all zero, or with a norm folded into
        them, which may turn a row's sign.
        """
        folded = len(self.names) != len(reference.names)
        if folded or self.rows.shape != reference.rows.shape or self.rows.ndim < 2:
            return None
        mine = self.rows.flatten(1).double()
        theirs = torch.where(mine != 0, reference.rows.flatten(1).double(), 0.0)
        lively = (mine != 0).any(1) & (theirs != 0).any(1)
        cosines = torch.nn.functional.cosine_similarity(mine[lively], theirs[lively], eps=0.0)
        return float(cosines.mean()) if bool(lively.any()) else None

    def is_stranger(self, reference: Stage) -> bool:
        """Whether the weights say that it was not made from another network's stage."""
        cosine = self.cosine(reference)
        return cosine is not None and cosine < AKIN


@dataclass(frozen=True)
class Pair:
    """A stage of the compressed network with its partner; ``by`` says what made them one.

    ``kept`` lists the partner's units that are left, ``None`` if all are.
    """

    stage: Stage
    partner: Stage
    by: str
    kept: Tensor | None = field(default=None, compare=False)

    @property
    def site(self) -> Site:
        """Where the partner's units are read."""
        return replace(self.partner.end.site, places=None if self.kept is None else self.kept.unsqueeze(1))


@dataclass(frozen=True)
class Pairing:
    """All pairs in the compressed network's order, and what has no partner.

    ``factors`` need none, ``missing`` are layers of the reference that nothing in the compressed network stands for.
    """

    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    factors: tuple[Unpaired, ...] = ()
    missing: tuple[Unpaired, ...] = ()

    @property
    def by_node(self) -> dict[str, Pair]:
        """The pairs by the compressed network's node."""
        return {pair.stage.end.node: pair for pair in self.pairs}

    @property
    def coverage(self) -> float:
        """The share of the compressed network's stages that have a partner, factors aside."""
        total = len(self.pairs) + len(self.unpaired)
        return len(self.pairs) / total if total else 0.0


def pair_stages(compressed: Sequence[Stage], reference: Sequence[Stage], keep: Keep | None = None) -> Pairing:
    """Pair the stages of two networks; see the module's docstring.

    Args:
        compressed: Stages of the network to be corrected, in graph order.
        reference: Stages of the network that it was made from.
        keep: For layers of ``compressed`` that have lost units, by name, the indices of the partner's that are left.

    Raises:
        OptionError: ``keep`` names no layer, or does not fit it.
    """
    work = _Pairing(list(compressed), list(reference), dict(keep or {}))
    work.pair_by_name()
    work.pair_by_position(by_weights=True)
    work.pair_by_position(by_weights=False)
    pairs = tuple(work.found[place] for place in sorted(work.found))
    unpaired = tuple(Unpaired(compressed[place].name, work.reasons[place]) for place in sorted(work.reasons))
    factors = tuple(Unpaired(compressed[place].name, work.factors[place]) for place in sorted(work.factors))
    names = {name for stage in compressed for name in stage.names}
    missing = tuple(
        Unpaired(stage.name, "only the reference has it")
        for place, stage in enumerate(reference)
        if place not in work.taken and names.isdisjoint(stage.names)
    )
    return Pairing(pairs, unpaired, factors, missing)


def find_stages(graph_module: fx.GraphModule, groups: GroupSet) -> list[Stage]:
    """All stages of a traced network, in graph order."""
    ops = {op.node.name: op for op in OpReader(graph_module)}
    producers = find_producers(graph_module, groups)
    readers = {next(iter(ops[p.node].node.users)).name: p for p in producers if p.feeds_norm}
    stages: list[Stage] = []
    for producer in producers:
        if not producer.feeds_norm:
            first = readers.get(producer.node, producer)
            names = tuple(dict.fromkeys(layer_name(each.weight) for each in (producer, first)))
            rows = tensor_of(graph_module, first.weight).movedim(first.rows, 0)
            stages.append(Stage(producer, names, _kind(ops[first.node]), rows))
    return stages


def find_others(graph_module: fx.GraphModule, groups: GroupSet) -> list[Unpaired]:
    """The layers of a traced network that are no part of a stage, in graph order."""
    producers = {producer.node: producer for producer in find_producers(graph_module, groups)}
    ends = {stage.end.node for stage in find_stages(graph_module, groups)}
    others: list[Unpaired] = []
    for op in OpReader(graph_module):
        name = op.path or op.node.name
        producer = producers.get(op.node.name)
        if producer is not None and producer.feeds_norm and next(iter(op.node.users)).name not in ends:
            others.append(Unpaired(name, "the BatchNorm behind it has no scale and shift; renormalize='reset' sets it"))
        elif producer is None and (is_layer(op) or is_norm(op)):
            others.append(Unpaired(name, "its weight is used in several places, or computed in the forward"))
        elif producer is None and op.module is not None and any(p.ndim > 1 for p in op.module.parameters()):
            others.append(Unpaired(name, f"nothing can be folded into a {type(op.module).__qualname__}"))
    return others


def layer_name(weight: str) -> str:
    """The name of the layer that a weight belongs to: its module's path, or its own name if it has another one.

    >>> layer_name("layer1.conv.weight"), layer_name("attn.w_q")
    ('layer1.conv', 'attn.w_q')
    """
    path, _, own = weight.rpartition(".")
    return path if own == "weight" else weight


def _kind(op: Op) -> str:
    kinds = {"conv": CONV, "transposed conv": TRANSPOSED, "linear": LINEAR}
    return next((kind for kind, keys in kinds.items() if op.key in keys), "norm")


class _Pairing:
    """Pairs found so far, by place in the compressed network, and for every other place the reason."""

    def __init__(
        self, compressed: list[Stage], reference: list[Stage], keep: dict[str, Tensor | Sequence[int]]
    ) -> None:
        self.compressed, self.reference, self.keep = compressed, reference, keep
        self.found: dict[int, Pair] = {}
        self.reasons: dict[int, str] = {}
        self.factors: dict[int, str] = {}
        self.taken: dict[int, int] = {}  # place in the compressed network by that in the reference
        names = [name for stage in compressed for name in stage.names]
        for name in keep:
            if name not in names:
                raise OptionError(explain(f"keep names no layer: {name!r}", remedy=did_you_mean(name, names)))

    def pair_by_name(self) -> None:
        """Equal names first; then, of names below the reference's, the last one."""
        known = {name: place for place, stage in reversed(list(enumerate(self.reference))) for name in stage.names}
        below: dict[int, list[int]] = {}
        for place, stage in enumerate(self.compressed):
            equal = next((known[name] for name in stage.names if name in known), None)
            above = next((known[path] for name in stage.names for path in _above(name) if path in known), None)
            if equal is not None:
                self._pair(place, equal, "name")
            elif above is not None:
                below.setdefault(above, []).append(place)
        for theirs, places in below.items():
            if theirs not in self.taken:
                self._pair(places.pop(), theirs, "name")
            last = f", which {self.compressed[self.taken[theirs]].name} completes" if theirs in self.taken else ""
            for place in places:
                self.factors[place] = f"a factor of {self.reference[theirs].name}{last}"

    def pair_by_position(self, by_weights: bool) -> None:
        """Between neighbours that are paired, what is certain (see :func:`certain_pairs`); first where weights tell."""
        anchors = [(-1, -1), *sorted((mine, theirs) for theirs, mine in self.taken.items())]
        anchors.append((len(self.compressed), len(self.reference)))
        for (mine, theirs), (next_mine, next_theirs) in pairwise(anchors):
            left = [x for x in range(mine + 1, next_mine) if x not in self.found and x not in self.factors]
            free = [x for x in range(theirs + 1, next_theirs) if x not in self.taken]
            same = [[self._may_be(i, j, by_weights) for j in free] for i in left]
            for i, j in certain_pairs(same):
                self._pair(left[i], free[j], "position")
            for place, possible in zip(left, same, strict=True):
                if place not in self.found and not by_weights:
                    self._explain(place, [self.reference[j].name for j, may in zip(free, possible, strict=True) if may])

    def _may_be(self, mine: int, theirs: int, by_weights: bool) -> bool:
        """Whether a place suits; a layer that its name has misled always needs the word of its weights."""
        stage, partner = self.compressed[mine], self.reference[theirs]
        cosine = stage.cosine(partner)
        known = cosine is not None or not (by_weights or mine in self.reasons)
        return stage.resembles(partner) and known and not stage.is_stranger(partner)

    def _explain(self, place: int, possible: Sequence[str]) -> None:
        stage = self.compressed[place]
        missing = f"no {stage.kind} layer of {stage.units} units is left in its place of the reference"
        self.reasons.setdefault(place, f"could be any of {', '.join(possible)}" if possible else missing)

    def _pair(self, mine: int, theirs: int, by: str) -> None:
        """Make a pair, or note why these two are none."""
        stage, partner = self.compressed[mine], self.reference[theirs]
        kept = next((self.keep[name] for name in stage.names if name in self.keep), None)
        indices = None if kept is None else _indices(kept, stage, partner)
        if theirs in self.taken:
            self.reasons[mine] = f"{self.compressed[self.taken[theirs]].name} is paired with {partner.name} already"
        elif indices is None and stage.units != partner.units:
            self.reasons[mine] = (
                f"{stage.units} units where {partner.name} of the reference has {partner.units}; keep= says which"
            )
        elif indices is None and stage.is_stranger(partner):
            self.reasons[mine] = f"its weights have nothing in common with {partner.name} of the reference"
        else:
            self.taken[theirs] = mine
            self.reasons.pop(mine, None)
            self.found[mine] = Pair(stage, partner, by, indices)


def certain_pairs(same: Sequence[Sequence[bool]]) -> Iterator[tuple[int, int]]:
    """The pairs that all longest alignments of two sequences have in common.

    Args:
        same: Whether item ``i`` of the first sequence may be paired with item ``j`` of the second, ``same[i][j]``.

    With ``P`` the longest alignment of what lies before two items and ``S`` of what lies behind, a pair is in some
    longest alignment if ``P + 1 + S`` is its length, and then always its ``P``-th pair: in all of them if no other has
    that place.

    >>> list(certain_pairs([[True, False], [False, True]])), list(certain_pairs([[True, True]]))
    ([(0, 0), (1, 1)], [])
    """
    rows, columns = len(same), len(same[0]) if same else 0
    before = _longest(same)
    behind = _longest([row[::-1] for row in same[::-1]])
    whole = before[rows][columns]
    by_place: dict[int, list[tuple[int, int]]] = {}
    for i in range(rows):
        for j in range(columns):
            if same[i][j] and before[i][j] + 1 + behind[rows - 1 - i][columns - 1 - j] == whole:
                by_place.setdefault(before[i][j], []).append((i, j))
    for place in sorted(by_place):
        if len(by_place[place]) == 1:
            yield by_place[place][0]


def _longest(same: Sequence[Sequence[bool]]) -> list[list[int]]:
    """Length of the longest alignment of the first ``i`` with the first ``j`` items, for all ``i`` and ``j``."""
    rows, columns = len(same), len(same[0]) if same else 0
    lengths = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            longer = lengths[i][j] + 1 if same[i][j] else 0
            lengths[i + 1][j + 1] = max(longer, lengths[i][j + 1], lengths[i + 1][j])
    return lengths


def _above(name: str) -> Iterator[str]:
    """The module paths above a name, nearest first; the whole network (an empty path) last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _indices(kept: Tensor | Sequence[int], stage: Stage, partner: Stage) -> Tensor:
    indices = torch.as_tensor(kept, dtype=torch.int64)
    fits = indices.ndim == 1 and len(indices) == stage.units
    if not fits or not bool(((indices >= 0) & (indices < partner.units)).all()):
        raise OptionError(
            explain(
                f"keep of {stage.name} does not fit",
                shapes=f"{tuple(indices.shape)} indices for {stage.units} units, {partner.units} in the reference",
                remedy="list for each unit that is left its index among the reference's",
            )
        )
    return indices

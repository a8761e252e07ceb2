"""Where a preserved prefix ends: which nodes run once per source, and how their values enter the merged rest.

A cut is an ancestor-closed set of nodes. It is found from the graph alone, before any weights are looked at:

- What does not depend on the sources' weights (the input, sizes, index tables) is computed once for all of them.
- A layer on the border is linear, so the mean of its copies' outputs is *one* layer ``[w_1 W_1 | ... | w_N W_N]`` on
  the concatenated inputs, with bias ``sum_i w_i b_i`` (Qu & Horvath, CPAL 2025, section 5.4, in closed form); where
  all copies would read one input, it is the averaged layer itself.
- Every other value that crosses the border is averaged.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.producers import TRANSPOSED, is_layer, weight_depths
from vfsurgery.tracing.ops import Op, OpReader, canonical_key
from vfsurgery.tracing.values import VALUE, TensorValue, holds_tensor

NEAREST = 3
"""How many similar names an error offers."""


@dataclass(frozen=True)
class JoinedLayer:
    """A layer on the border: its weight's name, and the dim of that weight which reads the input."""

    weight: str
    columns: int


@dataclass(frozen=True)
class Cut:
    """What a boundary means in one graph; all names are those of nodes.

    ``copied`` run once per source; ``joined`` layers, by node, read all copies at once; ``averaged`` are the copied
    ones of which the rest reads the mean. ``sizes`` are kept nodes whose values are no tensors, the same for every
    source. ``layers`` of ``depth`` weight layers on the longest path are preserved.
    """

    boundary: int | str
    layers: int
    depth: int
    copied: frozenset[str]
    joined: Mapping[str, JoinedLayer]
    averaged: frozenset[str]
    sizes: frozenset[str]

    @property
    def preserves(self) -> bool:
        """Whether anything is kept of each source; if not, the result is that of plain merging."""
        return bool(self.copied)


class Boundaries:
    """What is the same for all cuts of one graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.ops = {op.node: op for op in OpReader(graph_module)}
        self.layers = {node for node, op in self.ops.items() if is_layer(op)}
        self.depths = weight_depths(graph_module)
        self.varying, self.fed = _varying(graph_module, self.nodes), _fed(self.nodes)

    @property
    def depth(self) -> int:
        """Weight layers on the longest path."""
        return max(self.depths.values(), default=0)

    def cut(self, boundary: int | str) -> Cut:
        """The cut after the ``boundary``-th weight layer, or after the named node or module.

        Raises:
            OptionError: there is no such layer, node or module, or what crosses there cannot be averaged.
        """
        if isinstance(boundary, str):
            kept = _closed([_named(self.nodes, boundary)])
        else:
            kept = _closed(self._first_layers(_checked(boundary, self.depth)))
        linear, joined = _border(self.ops, self.layers & kept, kept, self.varying)
        layers = max((self.depths[node.name] for node in kept), default=0)
        kept = _closed((kept & self.fed) - linear)
        kept |= _taken_along(self.nodes, kept)
        return Cut(
            boundary=boundary,
            layers=layers,
            depth=self.depth,
            copied=frozenset(node.name for node in kept & self.varying),
            joined=joined,
            averaged=frozenset(_averaged(self.nodes, kept, kept & self.varying & self.fed, joined)),
            sizes=frozenset(n.name for n in kept - self.varying if not holds_tensor(n.meta.get(VALUE))),
        )

    def cuts(self) -> Iterator[Cut]:
        """The cuts after 0, 1, ... weight layers, but for those where what crosses cannot be averaged."""
        for layers in range(self.depth + 1):
            with contextlib.suppress(OptionError):
                yield self.cut(layers)

    def _first_layers(self, count: int) -> set[fx.Node]:
        """The layers of depth ``count``, and all that is computed from the input before them."""
        here = {node for node in self.layers if self.depths[node.name] == count}
        return here | {node for node in self.fed if self.depths[node.name] < count}


def find_cut(graph_module: fx.GraphModule, boundary: int | str) -> Cut:
    """The cut after the ``boundary``-th weight layer, or after the named node or module.

    Raises:
        OptionError: there is no such layer, node or module, or what crosses there cannot be averaged.
    """
    return Boundaries(graph_module).cut(boundary)


def _checked(boundary: int, depth: int) -> int:
    if isinstance(boundary, bool) or not isinstance(boundary, int) or not 0 <= boundary <= depth:
        raise OptionError(
            explain(
                f"preserve={boundary!r} is no boundary of this network",
                accepted=f"0 (plain merging) to {depth}, the weight layers on the longest path, or a module's name",
            )
        )
    return boundary


def _fed(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the network's input; the others depend on weights alone."""
    fed: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return fed


def _named(nodes: Iterable[fx.Node], name: str) -> fx.Node:
    """The node of that name, or the last one of the module of that path."""
    computing = [node for node in nodes if node.op.startswith("call_")]
    named = [node for node in computing if node.name == name]
    named = named or [node for node in computing if name in _paths(node) and holds_tensor(node.meta.get(VALUE))]
    if named:
        return named[-1]
    known = sorted({*(node.name for node in computing), *(path for node in computing for path in _paths(node))})
    close = difflib.get_close_matches(name, known, NEAREST, cutoff=0.5)
    raise OptionError(
        explain(
            f"preserve={name!r} names no node or module that the network computes with",
            remedy=f"did you mean {' or '.join(map(repr, close))}?" if close else "surgery.trace(...).graph lists them",
        )
    )


def _paths(node: fx.Node) -> set[str]:
    """The modules whose forward made a node; the second call of a module has ``@1`` behind its path."""
    stack = {str(path).partition("@")[0] for path in node.meta.get("nn_module_stack") or ()}
    return stack | ({str(node.target)} if node.op == "call_module" else set())


def _closed(chosen: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes with all that they are computed from, what was written into it by then included."""
    closed: set[fx.Node] = set()
    waiting = list(chosen)
    while waiting:
        node = waiting.pop()
        if node in closed:
            continue
        closed.add(node)
        for before in node.all_input_nodes:
            writes = (user for user in before.users if canonical_key(user.target) == "setitem" and user < node)
            waiting += [before, *writes]
    return closed


def _varying(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on the sources' weights. Sizes do not, whatever they are read from."""
    state = {name for name, tensor in graph_module.state_dict().items() if tensor.is_floating_point()}
    varying: set[fx.Node] = set()
    for node in nodes:
        target = str(node.target)
        owns = node.op == "get_attr" and target in state
        if node.op == "call_module":
            module = graph_module.get_submodule(target).state_dict()
            owns = any(tensor.is_floating_point() for tensor in module.values())
        if (holds_tensor(node.meta.get(VALUE)) or _writes(node)) and (
            owns or not varying.isdisjoint(node.all_input_nodes)
        ):
            varying.add(node)
            if _writes(node):
                varying.update(_written_into(node.args[0]))
    return varying


def _written_into(place: object) -> Iterator[fx.Node]:
    """The node that is written into, and all that it may be a view of."""
    while isinstance(place, fx.Node) and place.op not in ("placeholder", "get_attr"):
        yield place
        place = place.args[0] if place.args else None


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and canonical_key(node.target) == "setitem"


def _border(
    ops: Mapping[fx.Node, Op], layers: set[fx.Node], kept: set[fx.Node], varying: set[fx.Node]
) -> tuple[set[fx.Node], dict[str, JoinedLayer]]:
    """The layers that no kept node reads and that one layer of the merged rest can stand for.

    All of them, and those of them whose copies would read different inputs.
    """
    uses = Counter(_weight(op) for op in ops.values())
    linear: set[fx.Node] = set()
    joined: dict[str, JoinedLayer] = {}
    for node in sorted(layers):
        op, weight = ops[node], _weight(ops[node])
        data = node.args[0] if node.args else None
        if weight is None or uses[weight] > 1 or not isinstance(data, fx.Node) or not kept.isdisjoint(node.users):
            continue
        if data not in varying:
            linear.add(node)
        elif op.argument("groups", 6, 1) == 1:
            linear.add(node)
            joined[node.name] = JoinedLayer(weight, 0 if op.key in TRANSPOSED else 1)
    return linear, joined


def _weight(op: Op) -> str | None:
    tensor = op.param("weight", 1)
    return tensor.name if tensor is not None and tensor.kind == "parameter" else None


def _taken_along(nodes: Iterable[fx.Node], kept: set[fx.Node]) -> set[fx.Node]:
    """What only reads sizes of kept values, or picks one of several: neither can be averaged, so it stays with them."""
    taken: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if node in kept or node.op == "output" or not inputs or not (kept | taken).issuperset(inputs):
            continue
        picks = canonical_key(node.target) == "getitem" and isinstance(inputs[0].meta.get(VALUE), tuple | list)
        if picks or not (holds_tensor(node.meta.get(VALUE)) or _writes(node)):
            taken.add(node)
    return taken


def _averaged(
    nodes: Iterable[fx.Node], kept: set[fx.Node], crossing: set[fx.Node], joined: Mapping[str, JoinedLayer]
) -> Iterator[str]:
    """Which of the values that may cross the border the rest reads otherwise than by a joined layer."""
    seen: set[fx.Node] = set()
    for node in nodes:
        for value in crossing.intersection(node.all_input_nodes if node not in kept else ()) - seen:
            if node.name in joined and value is node.args[0]:
                continue
            abstract = value.meta.get(VALUE)
            if not isinstance(abstract, TensorValue) or not abstract.dtype.is_floating_point:
                raise OptionError(
                    explain(
                        f"the boundary cuts {value.name}, whose value cannot be averaged over the sources",
                        value=abstract,
                        read_by=node.name,
                        remedy="preserve one layer less or more, or name another node",
                    )
                )
            seen.add(value)
            yield value.name

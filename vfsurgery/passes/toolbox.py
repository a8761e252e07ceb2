"""Tools for people who write passes: find nodes, edit the graph and keep it in order, measure what nodes give."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.progress import progress as with_bar
from vfsurgery.errors import OptionError, SurgeryError, did_you_mean, explain
from vfsurgery.groups import GroupSet, PermutationGroup
from vfsurgery.passes.producers import find_producers
from vfsurgery.stats.collect import Observer, Site, Watch
from vfsurgery.stats.moments import Moments, add_batch
from vfsurgery.stats.precision import image_dtype
from vfsurgery.tracing.excerpts import note_node
from vfsurgery.tracing.ops import canonical_key, canonical_parameters, module_path
from vfsurgery.tracing.shapes import renew_values
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.values import VALUE, TensorValue

OpChoice: TypeAlias = str | type[nn.Module] | Callable[..., Any]
"""An op in any spelling: ``torch.relu``, ``"relu"``, ``nn.ReLU``."""
Called: TypeAlias = nn.Module | Callable[..., Any]
"""What a new node calls."""


def select(
    graph_module: fx.GraphModule,
    *,
    op: OpChoice | Sequence[OpChoice] | None = None,
    module: str | Sequence[str] | None = None,
    group: PermutationGroup | None = None,
    where: Callable[[fx.Node], bool] | None = None,
) -> list[fx.Node]:
    """The nodes for which all that is given holds, in graph order.

    Args:
        graph_module: A graph from :func:`~vfsurgery.trace`, or what a pass is given.
        op: What they compute: a module class (subclasses too), a function, or a name. ``"relu"`` is ``torch.relu``,
            ``x.relu_()``, ``F.relu`` and ``nn.ReLU`` alike. Of several, any.
        module: Where they are: a module path or a pattern, in which ``*`` matches dots too. What is inside a module
            belongs to it. Of several, any.
        group: Whose units they carry: nodes whose value or whose parameters are members of the group.
        where: What else must hold.

    Raises:
        OptionError: a pattern matches no module.

    >>> import torch
    >>> from vfsurgery import find_groups, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    >>> graph_module = trace(net, torch.randn(2, 4))
    >>> select(graph_module, op="relu", module="2")
    [_2_1]
    >>> select(graph_module, group=find_groups(graph_module).groups[0])
    [_0, _1, _2_0]
    """
    nodes = list(graph_module.graph.nodes)
    modules = dict(graph_module.named_modules())
    if op is not None:
        wanted = _several(op)
        nodes = [node for node in nodes if any(_computes(node, each, modules) for each in wanted)]
    if module is not None:
        paths = _modules_of(graph_module, _several(module))
        nodes = [node for node in nodes if not paths.isdisjoint(_enclosing(node))]
    if group is not None:
        names = {member.parameter for member in (*group.members, *group.activations)}
        parameters = canonical_parameters(graph_module)
        nodes = [node for node in nodes if not names.isdisjoint({node.name, *_tensors_of(node, modules, parameters)})]
    return nodes if where is None else [node for node in nodes if where(node)]


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, tuple | list) else [given]


def _computes(node: fx.Node, wanted: OpChoice, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        called = modules[str(node.target)]
        if isinstance(wanted, type):
            return isinstance(called, wanted)
        key = canonical_key(wanted)
        return isinstance(key, str) and type(called).__name__.lower() == key.replace("_", "").lower()
    if node.op not in ("call_function", "call_method") or isinstance(wanted, type):
        return False
    return canonical_key(node.target) == canonical_key(wanted)


def _modules_of(graph_module: fx.GraphModule, patterns: Iterable[str]) -> set[str]:
    known = {place for node in graph_module.graph.nodes for place in _enclosing(node)}
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise OptionError(
                explain(f"module={pattern!r} matches no module of the graph", remedy=did_you_mean(pattern, known))
            )
        chosen.update(found)
    return chosen


def _enclosing(node: fx.Node) -> list[str]:
    """Paths of the modules that a node lies in, its own first."""
    path = str(node.target) if node.op == "call_module" else module_path(node)
    if node.op == "get_attr":
        path = str(node.target).rpartition(".")[0]
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _tensors_of(node: fx.Node, modules: Mapping[str, nn.Module], names: Mapping[int, str]) -> list[str]:
    """The parameters and buffers that a node reads, by name."""
    if node.op == "get_attr":
        return [str(node.target)]
    if node.op != "call_module":
        return [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    called = modules[str(node.target)]
    return [names[id(each)] for each in (*called.parameters(), *called.buffers()) if id(each) in names]


class Editor:
    """Edits of one graph; :func:`edit` makes one. New modules and functions are called with what they stand behind."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph

    def select(
        self,
        *,
        op: OpChoice | Sequence[OpChoice] | None = None,
        module: str | Sequence[str] | None = None,
        group: PermutationGroup | None = None,
        where: Callable[[fx.Node], bool] | None = None,
    ) -> list[fx.Node]:
        """As :func:`select`, in this graph."""
        return select(self.graph_module, op=op, module=module, group=group, where=where)

    def insert_after(self, node: fx.Node, called: Called, *args: Any, **kwargs: Any) -> fx.Node:
        """Put a call of ``called(node, *args, **kwargs)`` behind a node; all that read the node read the call."""
        with self.graph.inserting_after(node):
            made = self._call(node, called, (node, *args), kwargs)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return made

    def insert_before(self, node: fx.Node, called: Called, *args: Any, **kwargs: Any) -> fx.Node:
        """Put a call of ``called(x, *args, **kwargs)`` between a node and its first input ``x``; only it reads it."""
        source = self._input(node)
        with self.graph.inserting_before(node):
            made = self._call(source, called, (source, *args), kwargs)
        node.replace_input_with(source, made)
        return made

    def replace(self, node: fx.Node, called: Called, *args: Any, **kwargs: Any) -> fx.Node:
        """Have a node call ``called`` instead, with its arguments unless others are given; it keeps its name.

        A module comes under the path of the one that it replaces, if nothing else calls that one.
        """
        old = str(node.target) if node.op == "call_module" and len(self._calls(str(node.target))) == 1 else None
        if args or kwargs:
            node.args, node.kwargs = args, kwargs
        if isinstance(called, nn.Module):
            path = old or self._free_path(f"{node.name}_{type(called).__name__.lower()}")
            self.graph_module.add_submodule(path, called)
            node.op, node.target = "call_module", path
        else:
            node.op, node.target = "call_function", called
            if old is not None:
                self.graph_module.delete_submodule(old)
        return node

    def remove(self, node: fx.Node) -> None:
        """Take a node out: what read it reads its first input. A module that nothing calls any more goes with it."""
        node.replace_all_uses_with(self._input(node))
        self.graph.erase_node(node)
        if node.op == "call_module" and not self._calls(str(node.target)):
            self.graph_module.delete_submodule(str(node.target))

    def _call(self, like: fx.Node, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if isinstance(called, nn.Module):
            path = self._free_path(f"{like.name}_{type(called).__name__.lower()}")
            self.graph_module.add_submodule(path, called)
            made = self.graph.call_module(path, args, kwargs)
        else:
            made = self.graph.call_function(called, args, kwargs)
        made.meta = dict(like.meta)
        return made

    def _free_path(self, wanted: str) -> str:
        path, number = wanted, 1
        while hasattr(self.graph_module, path):
            path, number = f"{wanted}_{number}", number + 1
        return path

    def _calls(self, path: str) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_module" and node.target == path]

    def _input(self, node: fx.Node) -> fx.Node:
        if not node.all_input_nodes:
            raise OptionError(explain(f"node {node.name} reads no other node", remedy="choose a node that computes"))
        return node.all_input_nodes[0]


@contextmanager
def edit(graph_module: fx.GraphModule) -> Generator[Editor]:
    """Edit a graph: at the end it is linted, the shapes of all nodes are computed anew, and it is recompiled.

    Raises:
        SurgeryError: the graph that the body left cannot run; says at which node.

    >>> import torch
    >>> from vfsurgery import trace
    >>> graph_module = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    >>> with edit(graph_module) as graph:
    ...     for node in graph.select(op=nn.ReLU):
    ...         _ = graph.insert_after(node, torch.mul, 0.5)
    >>> [node.name for node in graph_module.graph.nodes]
    ['input_1', '_0', '_1', 'mul', '_2', 'output']
    """
    yield Editor(graph_module)
    try:
        graph_module.graph.lint()
    except Exception as error:
        raise SurgeryError(explain("the edited graph is invalid", because=error)) from error
    guilty = renew_values(graph_module)
    if guilty is not None:
        raised = SurgeryError(
            explain(
                f"the edited graph cannot run: its node {guilty.name} does not fit to what it reads",
                remedy="compare the shapes below with what the node takes",
            )
        )
        note_node(raised, guilty, graph_module)
        raise raised
    graph_module.recompile()


def measure(
    graph_module: fx.GraphModule,
    nodes: Iterable[fx.Node],
    data: Data,
    *,
    dim: int | None = None,
    progress: bool = True,
) -> dict[str, Moments]:
    """Count, mean and variance of the units of chosen nodes, from one pass over the data.

    Args:
        graph_module: A graph from :func:`~vfsurgery.trace`, or what a pass is given.
        nodes: Whose values; :func:`select` finds them.
        data: Images, as for :func:`~vfsurgery.merge`.
        dim: On which dim of the values the units lie; by default where the layer has them that a value comes from: 1
            behind a convolution, the last one behind a linear layer.
        progress: Show a bar for work that takes over a second.

    Returns:
        By node name the :class:`~vfsurgery.stats.moments.Moments` of its units, each ``(units,)`` in float64.

    Raises:
        OptionError: a value is no tensor, or does not tell where its units lie.

    >>> import torch
    >>> from vfsurgery import trace
    >>> graph_module = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(2, 3, 8, 8))
    >>> found = measure(graph_module, select(graph_module, op="relu"), torch.randn(64, 3, 8, 8), progress=False)
    >>> found["_1"].mean.shape, found["_1"].count == 64 * 6 * 6
    (torch.Size([8]), True)
    """
    dims = _unit_dims(graph_module)
    sites = [Site(node.name, _dim_of(node, dims) if dim is None else dim) for node in nodes]
    totals: dict[str, Moments] = {}
    watch = Watch()
    for site in sites:
        watch.add(site.node, _adding(totals, site))
    device = next((tensor.device for tensor in tree_leaves(graph_module.state_dict())), None)
    batches = Batches(data, device=device, dtype=image_dtype(graph_module))
    with eval_mode(graph_module):
        observer = Observer(graph_module, watch)
        for images, _ in with_bar(batches, "statistics", batches.length(), progress):
            observer.run(images)
    return totals


def _adding(totals: dict[str, Moments], site: Site) -> Callable[[Tensor], None]:
    def see(value: Tensor) -> None:
        add_batch(totals, site.node, Moments.of(value, dim=site.dim))

    return see


def _unit_dims(graph_module: fx.GraphModule) -> dict[str, int]:
    """For nodes behind a layer, the dim of their value on which that layer's units lie."""
    dims = {producer.node: producer.dim for producer in find_producers(graph_module, GroupSet(()))}
    for node in graph_module.graph.nodes:
        value = node.meta.get(VALUE)
        if node.name in dims or not isinstance(value, TensorValue):
            continue
        for source in node.all_input_nodes:
            before = source.meta.get(VALUE)
            same = isinstance(before, TensorValue) and len(before.shape) == len(value.shape)
            if same and source.name in dims and before.shape[dims[source.name]] == value.shape[dims[source.name]]:
                dims[node.name] = dims[source.name]
    return dims


def _dim_of(node: fx.Node, dims: dict[str, int]) -> int:
    if node.name not in dims:
        raise OptionError(
            explain(
                f"node {node.name} does not tell on which dim its units lie",
                value=node.meta.get(VALUE),
                remedy="say it: measure(..., dim=1)",
            )
        )
    return dims[node.name]

"""What each tensor of a model is, decided once and before any method.

The graph tells best: a matrix is what an op multiplies activations by and sums over, whatever its rank and name, so a
table of positions is none, and a packed projection that no module calls is one. Where there are files alone, names and
shapes have to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from vfsurgery.combining.base import Kind, Trait
from vfsurgery.combining.packing import parts_by_name, parts_of_graph
from vfsurgery.discovery.unification import Unification
from vfsurgery.errors import IncompatibleModelsError, explain
from vfsurgery.groups.axes import AxisRef, Fresh, Reads, Tie, mentioned
from vfsurgery.stats.batch_norms import is_batch_norm
from vfsurgery.tracing.ops import OpReader
from vfsurgery.tracing.sources import canonical_state

RUNNING = ("running_mean", "running_var")
EMBEDDINGS = ("embed", "embedding", "embeddings", "position", "positions", "token", "tokens")
"""Words in names of tables of rank 2; what such a name is part of counts, too."""


def traits_of_graph(graph_module: fx.GraphModule) -> dict[str, Trait]:
    """What the ops of a traced model say of its parameters and buffers, by canonical name.

    Grouped and depthwise convolutions count as rest: they are no single matrix.

    >>> import torch, vfsurgery as surgery
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3, groups=8))
    >>> traits = traits_of_graph(surgery.trace(net, torch.randn(2, 3, 8, 8)))
    >>> {name: trait.kind.value for name, trait in traits.items() if "weight" in name or "mean" in name}
    {'0.weight': 'matrix', '1.weight': 'rest', '1.running_mean': 'statistics', '2.weight': 'rest'}
    """
    solved = Unification(graph_module)
    reads = dict(_operands(solved))
    depths = depths_of(graph_module)
    parameters = {id(parameter) for parameter in graph_module.parameters()}
    state = graph_module.state_dict(keep_vars=True)
    statistics = {
        f"{path}.{name}".lstrip(".")
        for path, module in graph_module.named_modules(remove_duplicate=False)
        if is_batch_norm(module)
        for name in RUNNING
    }
    parts = parts_of_graph(solved, {name: 1 - dim for name, dim in reads.items()})
    found: dict[str, Trait] = {}
    for name, tensor in canonical_state(graph_module).items():
        kind = Kind.MATRIX if name in reads else Kind.REST
        if id(state[name]) not in parameters:
            kind = Kind.STATISTICS if name in statistics else Kind.FIXED
        if not tensor.is_floating_point():
            kind = Kind.FIXED
        found[name] = Trait(kind, reads.get(name, 1), depths.get(name), parts.get(name, ()))
    return found


def _operands(solved: Unification) -> Iterator[tuple[str, int]]:
    """Parameters that are multiplied with activations and summed over, and the dim of theirs for which that holds.

    What is made of parameters alone (transposed, cut out, put together) leads to those that it is made of.
    """
    nodes = {node.name: node for graph in solved.graphs for node in graph.graph.nodes}
    names = OpReader(solved.graph_module).parameter_names
    by_axis = {axis: solved.atoms(axis) for axis in [*solved.axes] if isinstance(axis, AxisRef)}
    for said in solved.said:
        for constraint in said.constraints:
            axes: list[AxisRef | Fresh] = []
            if isinstance(constraint, Tie) and constraint.dual:
                axes = [*mentioned(constraint)]
            elif isinstance(constraint, Reads):
                axes = [constraint.axis]
            for axis in axes:
                if isinstance(axis, Fresh):
                    continue
                if axis.tensor.kind == "parameter":
                    if axis.tensor.ndim > 1 and axis.dim < 2:
                        yield axis.tensor.name, axis.dim
                elif axis.tensor.name in nodes and axis.tensor.name not in solved.roles.reached:
                    yield from _made_of(nodes[axis.tensor.name], axis, by_axis, names, solved.graph_module)


def _made_of(
    node: fx.Node,
    axis: AxisRef,
    by_axis: Mapping[AxisRef, Sequence[object]],
    names: Mapping[int, str],
    graph_module: fx.GraphModule,
) -> Iterator[tuple[str, int]]:
    """The parameters of rank 2 and more behind a node, by the dim that holds the units of its axis."""
    atoms = set(by_axis.get(axis, ()))
    behind, waiting = set[fx.Node](), [node]
    while waiting:
        behind.add(each := waiting.pop())
        waiting += [above for above in each.all_input_nodes if above not in behind]
    state = graph_module.state_dict(keep_vars=True)
    read = {
        names[id(state[str(each.target)])] for each in behind if each.op == "get_attr" and str(each.target) in state
    }
    for other, own in by_axis.items():
        tensor = other.tensor
        if (
            tensor.kind == "parameter"
            and tensor.name in read
            and tensor.ndim > 1
            and other.dim < 2
            and atoms & set(own)
        ):
            yield tensor.name, other.dim


def depths_of(graph_module: fx.GraphModule) -> dict[str, float]:
    """How deep each parameter or buffer is read: ops with weights on the longest path to it, from 0 to 1.

    >>> import torch, vfsurgery as surgery
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    >>> depths = depths_of(surgery.trace(net, torch.randn(1, 2)))
    >>> {name: depth for name, depth in depths.items() if "weight" in name}
    {'0.weight': 0.0, '2.weight': 0.5, '3.weight': 1.0}
    """
    reader = OpReader(graph_module)
    length: dict[fx.Node, int] = {}
    found: dict[str, int] = {}
    read: dict[fx.Node, set[str]] = {}
    for op in reader:
        named = {tensor.name for tensor in (*op.inputs, *op.parameters.values()) if tensor.kind == "parameter"}
        read.setdefault(op.node, set()).update(named)
    for node in graph_module.graph.nodes:
        names = read.get(node, set())
        before = max((length[each] for each in node.all_input_nodes), default=0)
        length[node] = before + bool(names)
        for name in names:
            found[name] = max(found.get(name, 0), length[node])
    deepest = max(found.values(), default=1)
    return {name: (depth - 1) / max(deepest - 1, 1) for name, depth in found.items()}


def traits_of_states(
    states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None
) -> dict[str, Trait]:
    """What names and shapes tell of state dicts; heads by comparison with the base.

    Raises:
        IncompatibleModelsError: names or shapes differ between sources.

    >>> import torch
    >>> state = {"conv.weight": torch.zeros(4, 3, 3, 3), "pos_embed": torch.zeros(1, 5), "steps": torch.tensor(3)}
    >>> {name: trait.kind.value for name, trait in traits_of_states([state]).items()}
    {'conv.weight': 'matrix', 'pos_embed': 'rest', 'steps': 'fixed'}
    """
    check_same_tensors(states)
    shapes = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
    found = {name: _told(name, tensor, shapes) for name, tensor in states[0].items()}
    return with_heads(found, states[0], base)


def with_heads(
    traits: Mapping[str, Trait], state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> dict[str, Trait]:
    """The same, trained tensors being heads where the base has another shape of them, or none."""
    if base is None:
        return dict(traits)
    trained = (Kind.MATRIX, Kind.REST)
    foreign = {
        name
        for name, trait in traits.items()
        if trait.kind in trained and (name not in base or base[name].shape != state[name].shape)
    }
    return {name: replace(trait, kind=Kind.HEAD) if name in foreign else trait for name, trait in traits.items()}


def check_same_tensors(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse state dicts that do not have the same tensors.

    Raises:
        IncompatibleModelsError: names the first that differs.
    """
    for number, state in enumerate(states[1:], start=1):
        for name in [*states[0], *state]:
            shapes = [str(tuple(each[name].shape)) if name in each else "absent" for each in (states[0], state)]
            if shapes[0] != shapes[1]:
                raise IncompatibleModelsError(
                    explain(
                        f"sources 0 and {number} differ in {name}",
                        shapes=", ".join(shapes),
                        remedy="combine models of one architecture; different heads cannot be combined",
                    )
                )


def _told(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Trait:
    words = set(name.replace(".", "_").split("_"))
    last = name.rpartition(".")[2]
    if not tensor.is_floating_point():
        return Trait(Kind.FIXED)
    if last in RUNNING:
        return Trait(Kind.STATISTICS)
    weight = last == "weight" or last.endswith("_weight")
    table = tensor.ndim == 2 and not words.isdisjoint(EMBEDDINGS)
    depthwise = tensor.ndim > 2 and tensor.shape[1] == 1
    if weight and tensor.ndim > 1 and not table and not depthwise:
        return Trait(Kind.MATRIX, parts=parts_by_name(name, shapes))
    return Trait(Kind.REST)

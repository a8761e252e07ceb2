"""Preserve-first merging: the first layers of every source run side by side, the rest is merged (PFM).

What merging loses in an early layer is lost for all later ones, and early layers are cheap to keep. So the input goes
through the aligned prefix of each source, their results are combined into one representation, and that runs on through
one merged network (Qu & Horvath, CPAL 2025, section 5.4). An aligned prefix computes exactly what its source computes,
in the reference's order of units, so combining is a weighted mean, and at a layer on the border it is one layer on the
concatenated inputs; :mod:`vfsurgery.passes.cut` says where. Preserving one layer of a network is plain merging,
preserving all of them is the mean of the sources' logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.cut import Cut, JoinedLayer, find_cut
from vfsurgery.passes.prefixes import Aligned, Branches, Prefixes, put_tensor
from vfsurgery.passes.stacking import Stacked, unstackable
from vfsurgery.tracing.exported import is_exported
from vfsurgery.tracing.modes import nearest_mode
from vfsurgery.tracing.values import PRESERVED, VALUE, TensorValue

Form: TypeAlias = Literal["auto", "grouped", "branches"]
FORMS = ("auto", "grouped", "branches")


@dataclass(frozen=True, kw_only=True)
class Preserve(Pass):
    """Put the prefixes of all sources before the averaged rest.

    ``boundary`` counts weight layers on the longest path, or names a node or module. ``form`` says how the prefixes run
    side by side: as ``"branches"``, which any network allows; ``"grouped"``, as one prefix with the channels of all
    sources, in grouped convolutions; or ``"auto"``, which is what docs/benchmarks.md found faster on batches: branches.

    >>> import vfsurgery as surgery
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in "ab")
    >>> kept = Preserve(boundary=2, form="branches")
    >>> merged = surgery.merge(a, b, preserve=kept, example_inputs=torch.randn(2, 4))
    >>> [path for path, module in merged.named_modules() if isinstance(module, nn.Linear)]
    ['source_0.0', 'source_1.0', '2', '4']
    """

    name: ClassVar[str] = "preserve"
    needs_sources: ClassVar[bool] = True
    after_merge: ClassVar[bool] = False
    boundary: int | str
    form: Form = "auto"

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Build the prefixes from ``context.sources``; ``graph_module`` holds the average of all sources.

        Raises:
            OptionError: there is no such boundary, or no such form of it.
        """
        cut, aligned = find_cut(graph_module, self.boundary), Aligned.of(context)
        if not cut.preserves or len(aligned.sources) == 1:
            return graph_module
        context.notes += _loose(graph_module, cut, context)
        nodes = list(graph_module.graph.nodes)
        form = chosen_form(self.form, graph_module, cut)
        prefixes = Stacked(graph_module, aligned) if form == "grouped" else Branches(graph_module, aligned)
        _insert(graph_module, cut, aligned, prefixes)
        if isinstance(prefixes, Branches):
            for node in reversed(nodes):
                if node.name in cut.copied and not node.users:
                    graph_module.graph.erase_node(node)
            prefixes.run_in_turn(cut.sizes)
        return graph_module


def chosen_form(form: Form, graph_module: fx.GraphModule, cut: Cut) -> Literal["grouped", "branches"]:
    """The form that is built.

    Raises:
        OptionError: there is no such form, or the prefix cannot be grouped.
    """
    if form not in FORMS:
        raise OptionError(explain(f"form={form!r} is unknown", accepted=", ".join(FORMS)))
    if form != "grouped":
        return "branches"
    reason = unstackable(graph_module, cut)
    if reason is not None:
        raise OptionError(explain("the prefix has no grouped form", because=reason, remedy="form='auto' or 'branches'"))
    return "grouped"


def _loose(graph_module: fx.GraphModule, cut: Cut, context: Context) -> list[str]:
    """For the report: what crosses the border in an order that nothing may change; its mean is exact all the same."""
    ordered = {member.parameter for group in context.groups for member in group.activations}
    crossing = [node for node in graph_module.graph.nodes if node.name in cut.averaged or node.name in cut.joined]
    loose = [n.name for n in crossing if n.name not in ordered and all(user.op != "output" for user in n.users)]
    return [f"units at the boundary {name} are pinned: averaged in the order they have" for name in loose]


def _insert(graph_module: fx.GraphModule, cut: Cut, aligned: Aligned, prefixes: Prefixes) -> None:
    """Keep what the cut keeps, and let the rest read the sources' values combined."""
    graph, means = graph_module.graph, dict[fx.Node, fx.Node]()
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.name in cut.copied:
                prefixes.keep(node)
                continue
            layer = cut.joined.get(node.name)
            if layer is not None:
                _join(graph_module, node, layer, aligned, prefixes)
                continue
            for value in node.all_input_nodes:
                if node.name in cut.sizes:
                    if value.name in cut.copied:
                        node.replace_input_with(value, prefixes.first(value))
                elif value.name in cut.averaged:
                    if value not in means:  # right before its first reader: no write that it sees is missed
                        means[value] = _mean(graph_module, value, aligned, prefixes)
                    node.replace_input_with(value, means[value])


def _join(
    graph_module: fx.GraphModule, node: fx.Node, layer: JoinedLayer, aligned: Aligned, prefixes: Prefixes
) -> None:
    """Let a layer read all sources' values at once: ``sum_i w_i W_i x_i = [w_1 W_1 | ... | w_N W_N] [x_1; ...; x_N]``.

    It keeps its node and its names, so normalization finds it, and its bias, which is averaged already.
    """
    data = node.args[0]
    assert isinstance(data, fx.Node)
    is_module = node.op == "call_module"
    function_weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    target = f"{node.target}.weight" if is_module else str(getattr(function_weight, "target", ""))
    owner, _, name = target.rpartition(".")
    module = graph_module.get_submodule(owner)
    averaged = getattr(module, name)
    is_parameter = isinstance(averaged, nn.Parameter)
    wide = torch.promote_types(averaged.dtype, torch.float32)
    parts = [
        share * tensor.to(wide)
        for share, tensor in zip(aligned.weights_of(layer.weight), aligned.at_border(layer.weight), strict=True)
    ]
    weight = torch.cat(parts, layer.columns).to(averaged.dtype)
    put_tensor(module, name, nn.Parameter(weight, averaged.requires_grad) if is_parameter else weight)
    if is_module:
        width = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        setattr(module, width, len(parts) * getattr(module, width))
    dim = -1 if averaged.ndim == 2 else 1 - averaged.ndim
    node.args = (prefixes.joined(data, dim), *node.args[1:])


def _mean(graph_module: fx.GraphModule, value: fx.Node, aligned: Aligned, prefixes: Prefixes) -> fx.Node:
    """Nodes for ``sum_i w_i M_i x_i``; ``M_i`` only where units are mapped by matrices."""
    graph, values = graph_module.graph, list(prefixes.each(value))
    meta = {key: entry for key, entry in values[0].meta.items() if key != PRESERVED}
    for dim, matrices in aligned.border_maps(value.name, values[0].meta[VALUE].shape):
        values = [
            _mapped(graph_module, node, dim, matrix, f"{value.name}_{dim}_{number}")
            for number, (node, matrix) in enumerate(zip(values, matrices, strict=True))
        ]
    total = graph.call_function(torch.mul, (values[0], aligned.weights[0]))
    total.meta = dict(meta)
    for share, other in zip(aligned.weights[1:], values[1:], strict=True):
        total = graph.call_function(torch.add, (total, other), {"alpha": share})
        total.meta = dict(meta)
    return total


def _mapped(graph_module: fx.GraphModule, value: fx.Node, dim: int, matrix: Tensor, name: str) -> fx.Node:
    """Nodes that multiply a value along ``dim`` by a matrix, kept as a buffer."""
    like, graph = next(graph_module.parameters()), graph_module.graph
    graph_module.register_buffer(f"border_{name}", matrix.to(like))
    order = [*(place for place in range(len(value.meta[VALUE].shape)) if place != dim), dim]
    last = graph.call_method("movedim", (value, dim, -1))
    product = graph.call_function(functional.linear, (last, graph.get_attr(f"border_{name}")))
    back = graph.call_method("movedim", (product, -1, dim))
    back.meta = dict(value.meta)
    for node in (last, product):
        shape = tuple(value.meta[VALUE].shape[place] for place in order)
        node.meta = {**value.meta, VALUE: TensorValue(shape, value.meta[VALUE].dtype)}
    return back


def standalone(graph_module: fx.GraphModule, modes: Mapping[str, bool], expected: Any) -> fx.GraphModule:
    """The same network with nothing but what it computes with: no unused modules, no notes of this library.

    Args:
        graph_module: A network whose modules come from a model and, below containers of their own, from its sources.
        modes: The training mode of each of that model's modules, by path; ``""`` is the model itself.
        expected: What that model returns. A graph from ``torch.export`` returns a tuple, whatever the model does.

    Raises:
        OptionError: the model returns something that such a graph cannot.
    """
    graph = fx.Graph()
    result: Any = graph.graph_copy(graph_module.graph, val_map={})
    if is_exported(graph_module):
        if not isinstance(expected, Tensor | tuple):
            raise OptionError(
                explain(
                    f"a network with preserved prefixes cannot return a {type(expected).__name__}",
                    because="fx cannot record the model, and torch.export keeps the tensors alone",
                    remedy="leave preserve out",
                )
            )
        result = result[0] if isinstance(expected, Tensor) else result
    graph.output(result)
    for node in reversed(graph.nodes):
        node.meta = {}
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    network = fx.GraphModule(graph_module, graph, type(graph_module).__name__)
    for path, module in network.named_modules():
        top, _, inner = path.partition(".")
        module.training = nearest_mode(modes, path if top in modes else inner)  # or below a source's container
    return network

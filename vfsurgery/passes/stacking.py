"""The prefixes of all sources in one graph, grouped: one prefix that carries the channels of all sources.

A value of ``C`` channels becomes one of ``N * C``, source after source. The first convolution, which reads the input
that all share, has the outputs of all sources; later ones have ``N`` times the groups, each source's weights in groups
of their own; what acts on each channel by itself (norms over the batch, activations, pooling, sums) is as before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from vfsurgery.discovery.rules.pointwise import ACTIVATIONS, DROPOUTS
from vfsurgery.passes.cut import Cut
from vfsurgery.passes.prefixes import Aligned, put_tensor, widened
from vfsurgery.stats.batch_norms import is_batch_norm
from vfsurgery.tracing.ops import canonical_key, canonical_parameters
from vfsurgery.tracing.values import PRESERVED, VALUE, TensorValue

BY_ELEMENT = (*ACTIVATIONS, *DROPOUTS)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Upsample, nn.Identity,
)  # fmt: skip
BY_CHANNEL = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardsigmoid hardswish hardtanh softplus "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d clone contiguous"
)
ARITHMETIC = "add sub mul div maximum minimum"
REDUCTIONS = "mean sum amax amin"

Shape: TypeAlias = tuple[int, ...]


class Stacked:
    """Kept nodes in place, each with the channels of all sources."""

    def __init__(self, graph_module: fx.GraphModule, aligned: Aligned) -> None:
        self.graph_module, self.graph, self.aligned = graph_module, graph_module.graph, aligned
        self.count = len(aligned.sources)
        self.names = canonical_parameters(graph_module)

    def keep(self, node: fx.Node) -> None:
        """Widen a node, or the module that it calls."""
        if node.op == "call_module":
            self._widen(self.graph_module.get_submodule(str(node.target)), node)
        elif canonical_key(node.target) == "cat":
            self._cat_by_source(node)
        node.meta[VALUE] = widened(node.meta[VALUE], 1, self.count)
        node.meta[PRESERVED] = True

    def first(self, node: fx.Node) -> fx.Node:
        """Sizes of one source are not at hand here: :func:`unstackable` refuses where they are asked for."""
        raise AssertionError(node)

    def each(self, node: fx.Node) -> Sequence[fx.Node]:
        """The blocks of channels."""
        value = node.meta[VALUE]
        one = TensorValue((value.shape[0], value.shape[1] // self.count, *value.shape[2:]), value.dtype)
        chunks = self.graph.call_function(torch.chunk, (node, self.count, 1))
        chunks.meta = {VALUE: (one,) * self.count, PRESERVED: True}
        blocks = [self.graph.call_function(operator.getitem, (chunks, number)) for number in range(self.count)]
        for block in blocks:
            block.meta = {VALUE: one, PRESERVED: True}
        return blocks

    def joined(self, node: fx.Node, dim: int) -> fx.Node:
        """The node itself."""
        return node

    def _widen(self, module: nn.Module, node: fx.Node) -> None:
        """Give a convolution or norm the weights of all sources, one after the other along the first dim."""
        names = {local: self.names[id(tensor)] for local, tensor in module.state_dict(keep_vars=True).items()}
        for local, name in names.items():
            averaged = getattr(module, local)
            if averaged.ndim:
                wide = torch.cat([*self.aligned.tensors(name)])
                kept = nn.Parameter(wide, averaged.requires_grad) if isinstance(averaged, nn.Parameter) else wide
                put_tensor(module, local, kept)
        if isinstance(module, CONV):
            if PRESERVED in node.all_input_nodes[0].meta:
                module.in_channels, module.groups = self.count * module.in_channels, self.count * module.groups
            module.out_channels *= self.count
        elif is_batch_norm(module):
            module.num_features = self.count * int(module.num_features)  # type: ignore[arg-type]

    def _cat_by_source(self, node: fx.Node) -> None:
        """Concatenate the channels of each source by themselves: ``(b, N, c_1), (b, N, c_2) -> (b, N, c_1 + c_2)``."""
        parts = [
            self._new(torch.unflatten, (part, 1, (self.count, -1)), _split(part.meta[VALUE], self.count))
            for part in node.all_input_nodes
        ]
        value = node.meta[VALUE]
        together = TensorValue((value.shape[0], self.count, *value.shape[1:]), value.dtype)
        node.target, node.args, node.kwargs = torch.flatten, (self._new(torch.cat, (parts, 2), together), 1, 2), {}

    def _new(self, target: Callable[..., Any], args: tuple[Any, ...], value: TensorValue) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta = {VALUE: value, PRESERVED: True}
        return made


def _split(value: TensorValue, count: int) -> TensorValue:
    return TensorValue((value.shape[0], count, value.shape[1] // count, *value.shape[2:]), value.dtype)


def unstackable(graph_module: fx.GraphModule, cut: Cut) -> str | None:
    """Why the kept nodes cannot run as one prefix that carries the channels of all sources; ``None`` if they can."""
    modules = dict(graph_module.named_modules())
    nodes = list(graph_module.graph.nodes)
    called = [modules[str(node.target)] for node in nodes if node.op == "call_module"]
    owners = Counter(id(tensor) for module in called for tensor in _tensors(module))
    for node in nodes:
        if node.name in cut.copied:
            module = modules[str(node.target)] if node.op == "call_module" else None
            shared = module is not None and any(owners[id(tensor)] > 1 for tensor in _tensors(module))
            if shared or not _stacks(node, module, cut):
                return f"{node.name} ({node.target}) does not act on each channel by itself, or reads sizes"
        elif node.name in cut.sizes and any(value.name in cut.copied for value in node.all_input_nodes):
            return f"{node.name} ({node.target}) reads sizes"
    return None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _stacks(node: fx.Node, module: nn.Module | None, cut: Cut) -> bool:
    """Whether a node computes on stacked channels what it computes for every source, once it is widened."""
    inputs = node.all_input_nodes
    shapes = [each.meta[VALUE].shape for each in (node, *inputs) if isinstance(each.meta.get(VALUE), TensorValue)]
    if len(shapes) <= len(inputs) or min(map(len, shapes)) < 2:
        return False
    stacked = [before.name in cut.copied for before in inputs]
    if isinstance(module, CONV) and type(module) in CONV:
        return stacked == [True] or (stacked == [False] and module.groups == 1)
    if not all(stacked):  # what is the same for all sources would have to be repeated
        return False
    if module is not None:
        return _module_stacks(module)
    return node.op in ("call_function", "call_method") and _call_stacks(node, *shapes)


def _module_stacks(module: nn.Module) -> bool:
    if is_batch_norm(module):  # subclasses bring activations along
        own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        return own <= known and all(type(child) in (*BY_ELEMENT, nn.Identity) for child in module.children())
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim == 1)
    return type(module) in (*BY_ELEMENT, *POOLING)


def _call_stacks(node: fx.Node, shape: Shape, *operands: Shape) -> bool:
    key = canonical_key(node.target)
    if key in ARITHMETIC.split():
        return all(len(other) == len(shape) and other[1] == shape[1] for other in operands)
    if key == "cat":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        return node.op == "call_function" and dim in (1, 1 - len(shape))
    if key == "flatten":
        return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)) == 1)
    if key in REDUCTIONS.split():
        return _dims(node, len(operands[0])).isdisjoint({0, 1})
    return key in BY_CHANNEL.split() and operands[0][:2] == shape[:2]


def _dims(node: fx.Node, ndim: int) -> set[int]:
    """The dims that a reduction sums over, counted from the first; all if none is given."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    dims: Any = given if isinstance(given, tuple | list) else range(ndim) if given is None else (given,)
    return {dim % ndim if isinstance(dim, int) else 0 for dim in dims}

"""Whose entries arrive where: the vectors among a network's parameters, followed through its graph entry by entry.

Every entry of every vector has a number, and numbers are moved along with the units through reshapes, transpositions,
picks and concatenations. Anything else (a norm, a rotary embedding) ends their way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.tracing.ops import (
    PERMUTES,
    RESHAPE_MODULES,
    RESHAPES,
    SHAPE_QUERIES,
    Key,
    canonical_key,
    canonical_parameters,
)
from vfsurgery.tracing.values import VALUE, TensorValue

NONE = -1
"""The number of what is no entry of a vector."""
_PICKS = "getitem unbind select chunk split split_with_sizes tensor_split narrow repeat_interleave"
_LIKE = "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty"
SHAPED = frozenset(["view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as"])
PICKS, LIKE = frozenset(_PICKS.split()), frozenset(_LIKE.split())
EXPANDS = ("expand", "expand_as")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
SHAPED_LIKE = ("type_as", "view_as", "reshape_as", "expand_as")
"""Ops that look at nothing but the shape or precision of a second operand."""


class Numbers:
    """The numbers of one graph; ``first`` has that of the first entry of every vector, by its key, ``ranges`` all."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        self.names = canonical_parameters(graph_module)
        self.first: dict[str, int] = {}
        self.ranges: dict[str, range] = {}
        count = 0
        for name, tensor in graph_module.state_dict(keep_vars=True).items():
            if tensor.ndim == 1 and self.names[id(tensor)] == name:
                self.first[name] = count
                self.ranges[name] = range(count, count := count + len(tensor))

    def hands_on(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether the numbers of a node are those of its user too."""
        if self.is_layer(user):
            return argument(user, "bias", 2) is node and operands(user).count(node) == 1
        return self.key(user) == "cat" or (self._moves(user) and user.args[0] is node)

    def of(self, node: fx.Node) -> Any:
        """The numbers of the entries that are added to each element of a node's value; ``None`` if there are none.

        Of several tensors a tuple.
        """
        if node.op == "get_attr":
            name = self.name_of(node)
            return self._vector(name) if name in self.first else None
        if self.is_layer(node):
            return self._of_layer(node)
        if self.key(node) == "cat":
            return self._joined(node)
        if self._moves(node) and isinstance(node.args[0], fx.Node):
            numbers = self.of(node.args[0])
            return None if numbers is None else self.moved(node, node.args[0], numbers)
        return None

    def _of_layer(self, node: fx.Node) -> Tensor | None:
        """A linear layer or convolution adds its bias to everything it gives out."""
        module, shape = self.module(node), shape_of(node)
        bias = argument(node, "bias", 2) if module is None else None
        numbers = self.of(bias) if isinstance(bias, fx.Node) else None
        if module is not None:
            numbers = self.of_vector(module.bias)
        if numbers is None:
            return None
        key = self.key(node)
        after = CONVOLUTIONS.get(str(key), 0) if module is None else module.weight.ndim - 2
        return numbers.view(-1, *[1] * after).expand(shape)

    def _joined(self, node: fx.Node) -> Tensor | None:
        parts: Any = argument(node, "tensors", 0)
        if not isinstance(parts, tuple | list):
            return None
        numbers = [self.of(part) if isinstance(part, fx.Node) else None for part in parts]
        if not any(isinstance(each, Tensor) for each in numbers):
            return None
        whole = [
            torch.tensor(NONE).expand(shape_of(p)) if n is None else n for p, n in zip(parts, numbers, strict=True)
        ]
        return torch.cat(whole, argument(node, "dim", 1) or 0)

    def moved(self, node: fx.Node, source: fx.Node, numbers: Any) -> Any:
        """What becomes of numbers in a node that moves them; ``None`` if it does something else."""
        key, module = self.key(node), self.module(node)
        if not self._moves(node) or node.args[0] is not source or operands(node).count(source) != 1:
            return None
        if module is not None:
            return numbers if self.is_dropout(node) else numbers.reshape(shape_of(node))
        if key in SHAPED:
            return numbers.reshape(shape_of(node))
        if key in EXPANDS:
            return numbers.expand(shape_of(node))
        if key in PERMUTES:
            attribute = getattr(numbers, str(key))
            return attribute(*_values(node.args[1:]), **_values(node.kwargs)) if callable(attribute) else attribute
        if key in PICKS:
            function = numbers.__getitem__ if key == "getitem" else getattr(torch, str(key))
            given = _values(node.args[1:])
            return function(*given) if key == "getitem" else function(numbers, *given, **_values(node.kwargs))
        return numbers

    def _moves(self, node: fx.Node) -> bool:
        """Whether a node moves the elements of its first operand, or hands them on as they are."""
        if node.op not in ("call_function", "call_method", "call_module") or not node.args:
            return False
        key, module = self.key(node), self.module(node)
        if module is not None:
            return isinstance(module, RESHAPE_MODULES) or self.is_dropout(node)
        known = key in RESHAPES or key in PERMUTES or key in PICKS or key in EXPANDS or self.is_dropout(node)
        tensors = [each for each in operands(node)[1:] if isinstance(each.meta.get(VALUE), TensorValue)]
        return known and (not tensors or key in SHAPED_LIKE)

    def is_dropout(self, node: fx.Node) -> bool:
        """Whether a node is dropout."""
        return isinstance(self.module(node), DROPOUTS) or self.key(node) == "dropout"

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a linear layer or a convolution, which add their bias."""
        module = self.module(node)
        if module is not None:
            return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return self.key(node) in ("linear", *CONVOLUTIONS)

    def asks_for_shape(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node sees no numbers of its source."""
        key = self.key(node)
        return key in SHAPE_QUERIES or key in LIKE or (key in SHAPED_LIKE and node.args[0] is not source)

    def key(self, node: fx.Node) -> Key:
        """What a node does, as of any spelling; of a module, that it is one."""
        if node.op not in ("call_function", "call_method"):
            return node.op
        return str(node.args[1]) if node.target is getattr else canonical_key(node.target)

    def module(self, node: fx.Node) -> Any:
        """The module that a node calls, if it calls one."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def vectors_of(self, node: fx.Node) -> Iterator[str]:
        """The vectors that a node reads, itself or from its module."""
        if node.op == "call_module":
            tensors = [*self.module(node).parameters(), *self.module(node).buffers()]
            yield from (name for each in tensors if (name := self.names.get(id(each))) in self.first)
        yield from (name for each in operands(node) if (name := self.name_of(each)) in self.first)

    def name_of(self, node: object) -> str | None:
        """The state-dict key of what a node picks from the model."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        path, _, leaf = str(node.target).rpartition(".")
        return self.names.get(id(getattr(self._graph_module.get_submodule(path), leaf)))

    def of_vector(self, tensor: Tensor | None) -> Tensor | None:
        """The numbers of a parameter, if it is a vector."""
        name = None if tensor is None else self.names.get(id(tensor))
        return self._vector(name) if name in self.first else None

    def _vector(self, name: str | None) -> Tensor:
        return torch.tensor(self.ranges[str(name)])


def argument(node: fx.Node, name: str, place: int) -> Any:
    """An argument of a call by name or place; of a module, of its call."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if place < len(node.args) else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, each as often as it is there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes."""
    value = node.meta.get(VALUE)
    return value.shape if isinstance(value, TensorValue) else ()


def _values(arguments: Any) -> Any:
    """Arguments with computed sizes as numbers."""
    return map_arg(arguments, lambda node: node.meta.get(VALUE))

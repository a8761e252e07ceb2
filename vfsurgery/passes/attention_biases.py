"""Which biases attention makes superfluous, found from the graph: whose numbers arrive at keys, and whose at values.

With a softmax over keys, what is added to all keys alike adds ``q . b`` to all logits of a query, and changes no
weights. These sum to one, so what is added to all values alike is added to the result.

Every entry of every vector among the parameters has a number, and numbers are moved along with the units through
reshapes, transpositions, picks and concatenations. Anything else (a norm of keys, a rotary embedding) ends their way,
and an entry counts only if all its ways end at keys, or all at values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.tracing.dataflow import reached_by_input
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
PRODUCTS = ("matmul", "bmm", "__matmul__")
Slot: TypeAlias = tuple[fx.Node, fx.Node]
"""A node and one of those that it reads."""


@dataclass(frozen=True)
class Projection:
    """A linear layer that reads the results of attention: ``numbers`` says which entry reaches which of its columns."""

    weight: str
    bias: str
    numbers: tuple[int, ...]


@dataclass
class DeadBiases:
    """Numbers of entries that are dead as keys, and of those that ``projections``, in graph order, can take over."""

    keys: set[int] = field(default_factory=set[int])
    values: set[int] = field(default_factory=set[int])
    projections: dict[Projection, None] = field(default_factory=dict[Projection, None])

    def both(self, other: DeadBiases) -> DeadBiases:
        """What is dead in two graphs of one network."""
        found = DeadBiases(self.keys & other.keys, self.values & other.values)
        for each in self.projections | other.projections:
            if each in self.projections and each in other.projections:
                found.projections[each] = None
            else:
                found.values -= {*each.numbers}
        return found


class AttentionBiases:
    """The biases of one graph by their numbers; ``first`` has that of the first entry of every vector, by its key."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module, self._nodes = graph_module, list(graph_module.graph.nodes)
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        self._names = canonical_parameters(graph_module)
        self._reached = reached_by_input(graph_module.graph)
        self.first: dict[str, int] = {}
        self._ranges: dict[str, range] = {}
        count = 0
        for name, tensor in graph_module.state_dict(keep_vars=True).items():
            if tensor.ndim == 1 and self._names[id(tensor)] == name:
                self.first[name] = count
                self._ranges[name] = range(count, count := count + len(tensor))
        self._keys: set[Slot] = set()
        self._values: dict[Slot, list[Projection]] = {}
        self._ways: dict[str, set[int]] = {"key": set(), "value": set(), "other": set()}
        self._readers: dict[str, set[str]] = defaultdict(set)
        """By the key of a projection's bias, the nodes that add it."""
        self._projecting: dict[Projection, set[str]] = defaultdict(set)

    def dead(self) -> DeadBiases:
        """What can be dropped."""
        for node in self._nodes:
            self._look_at(node)
        for node in self._nodes:
            self._follow(node)
        ways = self._ways
        found = DeadBiases(ways["key"] - ways["value"] - ways["other"], ways["value"] - ways["key"] - ways["other"])
        by_bias: dict[str, list[Projection]] = defaultdict(list)
        for each in self._projecting:
            by_bias[each.bias].append(each)
        for each, nodes in self._projecting.items():
            if len(by_bias[each.bias]) == 1 and nodes == self._readers[each.bias]:
                found.projections[each] = None
            else:  # the bias is added elsewhere too, where these values are not
                found.values -= {*each.numbers}
        return found

    def _look_at(self, node: fx.Node) -> None:
        """Note where a node takes keys and values, and whose biases it adds."""
        key = self._key(node)
        for name in self._vectors_of(node):
            self._readers[name].add(node.name)
        if key == "scaled_dot_product_attention":
            self._fused(node)
        elif key in PRODUCTS:
            self._written_out(node)
        elif key == "multi_head_attention_forward" or isinstance(self._module(node), nn.MultiheadAttention):
            self._multihead(node)

    def _fused(self, node: fx.Node) -> None:
        _, k, v = (_argument(node, name, place) for place, name in enumerate(("query", "key", "value")))
        mask = _argument(node, "attn_mask", 3)
        numbers = self._numbers(k) if isinstance(k, fx.Node) else None
        if numbers is not None and _is_constant(numbers, -2):
            self._keys.add((node, k))
        if isinstance(v, fx.Node) and not self._may_mask_all(mask):
            self._take_values(node, v)

    def _written_out(self, node: fx.Node) -> None:
        """``softmax(q @ k.T + mask) @ v``; ``node`` is the first product."""
        columns = node.args[1] if len(node.args) > 1 else None
        if not isinstance(columns, fx.Node) or (found := self._softmax_of(node)) is None:
            return
        softmax, masked = found
        numbers = self._numbers(columns)
        if numbers is not None and numbers.ndim > 1 and _is_constant(numbers, -1):
            self._keys.add((node, columns))
        for product in [] if masked else self._products_of(softmax):
            values = product.args[1]
            if isinstance(values, fx.Node):
                self._take_values(product, values)

    def _softmax_of(self, node: fx.Node) -> tuple[fx.Node, bool] | None:
        """The softmax over the last dim that logits go into and nothing else, and whether an input masks them."""
        masked = False
        while True:
            users = [user for user in node.users if not self._asks_for_shape(user, node)]
            if len(users) != 1:
                return None
            user, key = users[0], self._key(users[0])
            others = [each for each in _operands(user) if each is not node]
            tensors = [each for each in others if isinstance(each.meta.get(VALUE), TensorValue)]
            if key == "softmax" or isinstance(self._module(user), nn.Softmax):
                dim = getattr(self._module(user), "dim", _argument(user, "dim", 1))
                return (user, masked) if dim in (-1, len(_shape(node)) - 1) else None
            if key in ("add", "sub", "masked_fill") and (key == "add" or user.args[0] is node):
                masked |= any(map(self._may_mask_all, tensors))
            elif key in ("mul", "div") and (key == "mul" or user.args[0] is node):
                if any((_shape(each) or (1,))[-1] != 1 for each in tensors):
                    return None
            elif not self._keeps_last(user, node):
                return None
            if _operands(user).count(node) != 1 or _shape(user)[-1] != _shape(node)[-1]:
                return None
            node = user

    def _products_of(self, weights: fx.Node) -> Iterator[fx.Node]:
        """The products of attention weights with values."""
        for user in weights.users:
            if self._key(user) in PRODUCTS and user.args[0] is weights:
                yield user
            elif self._is_dropout(user) or self._keeps_last(user, weights):
                yield from self._products_of(user)

    def _keeps_last(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node reshapes or casts its source and leaves the last dim alone."""
        shaped = self._key(node) in RESHAPES and bool(node.args) and node.args[0] is source
        return shaped and _shape(node)[-1:] == _shape(source)[-1:]

    def _multihead(self, node: fx.Node) -> None:
        """All of it in one node: thirds of the packed bias belong to queries, keys and values."""
        module = self._module(node)
        if isinstance(module, nn.MultiheadAttention):
            numbers = self._numbers_of(module.in_proj_bias)
            weight, bias = self._names.get(id(module.out_proj.weight)), self._names.get(id(module.out_proj.bias))
            plain = module.bias_k is None and not module.add_zero_attn
            masks = [_argument(node, "key_padding_mask", 3), _argument(node, "attn_mask", 5)]
        else:
            packed = _argument(node, "in_proj_bias", 6)
            numbers = self._numbers(packed) if isinstance(packed, fx.Node) else None
            weight, bias = (
                self._name_of(_argument(node, *at)) for at in (("out_proj_weight", 11), ("out_proj_bias", 12))
            )
            plain = _argument(node, "bias_k", 7) is None and not _argument(node, "add_zero_attn", 9)
            plain &= _argument(node, "static_k", 21) is None and _argument(node, "static_v", 22) is None
            masks = [_argument(node, "key_padding_mask", 14), _argument(node, "attn_mask", 16)]
        if numbers is None:
            return
        queries, keys, values = numbers.chunk(3)
        folds = plain and weight is not None and bias is not None and not any(map(self._may_mask_all, masks))
        self._ways["other"] |= _set(queries)
        self._ways["key" if plain else "other"] |= _set(keys)
        self._ways["value" if folds else "other"] |= _set(values)
        if folds:
            self._projecting[Projection(str(weight), str(bias), tuple(values.tolist()))].add(node.name)

    def _take_values(self, node: fx.Node, values: fx.Node) -> None:
        """Follow the constant part of values through attention to the projections that read its result."""
        numbers = self._numbers(values)
        if numbers is None or numbers.ndim < 2 or not _is_constant(numbers, -2):
            return
        one, shape = numbers.narrow(-2, 0, 1), _shape(node)
        if one.ndim > 2 and one.shape[-3] != shape[-3] and shape[-3] % one.shape[-3] == 0:  # fewer heads of values
            one = one.repeat_interleave(shape[-3] // one.shape[-3], -3)
        found: list[Projection] = []
        waiting: list[tuple[fx.Node, Tensor]] = [(node, one.expand(shape))]
        readers: list[tuple[Projection, str]] = []
        while waiting:
            made, carried = waiting.pop()
            for user in made.users:
                if self._asks_for_shape(user, made):
                    continue
                moved = self._moved(user, made, carried)
                if isinstance(moved, Tensor):
                    waiting.append((user, moved))
                    continue
                projection = self._projection(user, made, carried)
                if projection is None:
                    return
                found.append(projection)
                readers.append((projection, user.name))
        self._values[node, values] = found
        for projection, reader in readers:
            self._projecting[projection].add(reader)

    def _projection(self, node: fx.Node, made: fx.Node, numbers: Tensor) -> Projection | None:
        """The node as a linear layer with a bias that reads what attention has made."""
        module = self._module(node)
        if isinstance(module, nn.Linear):
            weight, bias = self._names.get(id(module.weight)), self._names.get(id(module.bias))
        elif self._key(node) == "linear" and _argument(node, "input", 0) is made and _operands(node).count(made) == 1:
            weight, bias = (self._name_of(_argument(node, *at)) for at in (("weight", 1), ("bias", 2)))
        else:
            return None
        row = _flat(numbers)
        if weight is None or bias is None or row is None:
            return None
        return Projection(weight, bias, tuple(row.tolist()))

    def _follow(self, node: fx.Node) -> None:
        """Note where the numbers that a node hands on come to their ends."""
        module = self._module(node)
        if module is not None and not self._is_layer(node) and not isinstance(module, nn.MultiheadAttention):
            for name in self._vectors_of(node):  # added in another way than by a layer
                self._ways["other"].update(self._ranges[name])
        ends = [user for user in node.users if not self._hands_on(user, node) and not self._asks_for_shape(user, node)]
        if node.op == "output" or not ends or (numbers := self._numbers(node)) is None:
            return
        for user in ends:
            alone = _operands(user).count(node) == 1
            packed = self._key(user) == "multi_head_attention_forward" and _argument(user, "in_proj_bias", 6) is node
            if packed and alone:  # said already
                continue
            way = "key" if (user, node) in self._keys else "value" if (user, node) in self._values else "other"
            self._ways[way if alone else "other"] |= _set(numbers)

    def _hands_on(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether the numbers of a node are those of its user too."""
        if self._is_layer(user):
            return _argument(user, "bias", 2) is node and _operands(user).count(node) == 1
        return self._key(user) == "cat" or (self._moves(user) and user.args[0] is node)

    def _numbers(self, node: fx.Node) -> Any:
        """The numbers of the entries that are added to each element of a node's value; ``None`` if there are none.

        Of several tensors a tuple.
        """
        if node.op == "get_attr":
            name = self._name_of(node)
            return self._vector(name) if name in self.first else None
        if self._is_layer(node):
            return self._of_layer(node)
        if self._key(node) == "cat":
            return self._joined(node)
        if self._moves(node) and isinstance(node.args[0], fx.Node):
            numbers = self._numbers(node.args[0])
            return None if numbers is None else self._moved(node, node.args[0], numbers)
        return None

    def _of_layer(self, node: fx.Node) -> Tensor | None:
        """A linear layer or convolution adds its bias to everything it gives out."""
        module, shape = self._module(node), _shape(node)
        bias = _argument(node, "bias", 2) if module is None else None
        numbers = self._numbers(bias) if isinstance(bias, fx.Node) else None
        if module is not None:
            numbers = self._numbers_of(module.bias)
        if numbers is None:
            return None
        key = self._key(node)
        after = CONVOLUTIONS.get(str(key), 0) if module is None else module.weight.ndim - 2
        return numbers.view(-1, *[1] * after).expand(shape)

    def _joined(self, node: fx.Node) -> Tensor | None:
        parts: Any = _argument(node, "tensors", 0)
        if not isinstance(parts, tuple | list):
            return None
        numbers = [self._numbers(part) if isinstance(part, fx.Node) else None for part in parts]
        if not any(isinstance(each, Tensor) for each in numbers):
            return None
        whole = [torch.tensor(NONE).expand(_shape(p)) if n is None else n for p, n in zip(parts, numbers, strict=True)]
        return torch.cat(whole, _argument(node, "dim", 1) or 0)

    def _moved(self, node: fx.Node, source: fx.Node, numbers: Any) -> Any:
        """What becomes of numbers in a node that moves them; ``None`` if it does something else."""
        key, module = self._key(node), self._module(node)
        if not self._moves(node) or node.args[0] is not source or _operands(node).count(source) != 1:
            return None
        if module is not None:
            return numbers if self._is_dropout(node) else numbers.reshape(_shape(node))
        if key in SHAPED:
            return numbers.reshape(_shape(node))
        if key in EXPANDS:
            return numbers.expand(_shape(node))
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
        key, module = self._key(node), self._module(node)
        if module is not None:
            return isinstance(module, RESHAPE_MODULES) or self._is_dropout(node)
        known = key in RESHAPES or key in PERMUTES or key in PICKS or key in EXPANDS or self._is_dropout(node)
        tensors = [each for each in _operands(node)[1:] if isinstance(each.meta.get(VALUE), TensorValue)]
        return known and (not tensors or key in SHAPED_LIKE)

    def _is_dropout(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), DROPOUTS) or self._key(node) == "dropout"

    def _is_layer(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return self._key(node) in ("linear", *CONVOLUTIONS)

    def _asks_for_shape(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node sees no numbers of its source."""
        key = self._key(node)
        return key in SHAPE_QUERIES or key in LIKE or (key in SHAPED_LIKE and node.args[0] is not source)

    def _may_mask_all(self, mask: object) -> bool:
        """Whether a mask comes in with the input, and so may leave a query no key at all."""
        return isinstance(mask, fx.Node) and mask.name in self._reached

    def _key(self, node: fx.Node) -> Key:
        if node.op not in ("call_function", "call_method"):
            return node.op
        return str(node.args[1]) if node.target is getattr else canonical_key(node.target)

    def _module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _vectors_of(self, node: fx.Node) -> Iterator[str]:
        """The vectors that a node reads, itself or from its module."""
        if node.op == "call_module":
            tensors = [*self._module(node).parameters(), *self._module(node).buffers()]
            yield from (name for each in tensors if (name := self._names.get(id(each))) in self.first)
        yield from (name for each in _operands(node) if (name := self._name_of(each)) in self.first)

    def _name_of(self, node: object) -> str | None:
        """The state-dict key of what a node picks from the model."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        path, _, leaf = str(node.target).rpartition(".")
        return self._names.get(id(getattr(self._graph_module.get_submodule(path), leaf)))

    def _numbers_of(self, tensor: Tensor | None) -> Tensor | None:
        name = None if tensor is None else self._names.get(id(tensor))
        return self._vector(name) if name in self.first else None

    def _vector(self, name: str | None) -> Tensor:
        return torch.tensor(self._ranges[str(name)])


def _argument(node: fx.Node, name: str, place: int) -> Any:
    """An argument of a call by name or place; of a module, of its call."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if place < len(node.args) else None


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, each as often as it is there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get(VALUE)
    return value.shape if isinstance(value, TensorValue) else ()


def _values(arguments: Any) -> Any:
    """Arguments with computed sizes as numbers."""
    return map_arg(arguments, lambda node: node.meta.get(VALUE))


def _is_constant(numbers: Tensor, dim: int) -> bool:
    return numbers.ndim >= -dim and bool((numbers == numbers.narrow(dim, 0, 1)).all())


def _flat(numbers: Tensor) -> Tensor | None:
    """The numbers along the last dim, if they are the same everywhere."""
    row = numbers.reshape(-1, numbers.shape[-1])
    return row[0] if bool((row == row[0]).all()) else None


def _set(numbers: Any) -> set[int]:
    """All numbers in tensors; dims along which they are repeated are looked at once."""
    if isinstance(numbers, tuple | list):
        return set[int]().union(*map(_set, numbers))
    for dim, stride in enumerate(numbers.stride()):
        numbers = numbers.narrow(dim, 0, 1) if stride == 0 and numbers.shape[dim] > 1 else numbers
    return set(numbers.unique().tolist()) - {NONE}

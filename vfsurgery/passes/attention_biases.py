"""Which biases attention makes superfluous, found from the graph: whose numbers arrive at keys, and whose at values.

With a softmax over keys, what is added to all keys alike adds ``q . b`` to all logits of a query, and changes no
weights. These sum to one, so what is added to all values alike is added to the result.

An entry counts only if all its ways (:mod:`vfsurgery.passes.bias_numbers`) end at keys, or all at values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from vfsurgery.passes.bias_numbers import NONE, Numbers, argument, operands, shape_of
from vfsurgery.tracing.dataflow import reached_by_input
from vfsurgery.tracing.ops import RESHAPES
from vfsurgery.tracing.values import VALUE, TensorValue

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
    """The biases of one graph, as ``numbers`` of their entries."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.numbers, self._nodes = Numbers(graph_module), list(graph_module.graph.nodes)
        self._reached = reached_by_input(graph_module.graph)
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
        key = self.numbers.key(node)
        for name in self.numbers.vectors_of(node):
            self._readers[name].add(node.name)
        if key == "scaled_dot_product_attention":
            self._fused(node)
        elif key in PRODUCTS:
            self._written_out(node)
        elif key == "multi_head_attention_forward" or isinstance(self.numbers.module(node), nn.MultiheadAttention):
            self._multihead(node)

    def _fused(self, node: fx.Node) -> None:
        _, k, v = (argument(node, name, place) for place, name in enumerate(("query", "key", "value")))
        mask = argument(node, "attn_mask", 3)
        numbers = self.numbers.of(k) if isinstance(k, fx.Node) else None
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
        numbers = self.numbers.of(columns)
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
            users = [user for user in node.users if not self.numbers.asks_for_shape(user, node)]
            if len(users) != 1:
                return None
            user, key = users[0], self.numbers.key(users[0])
            others = [each for each in operands(user) if each is not node]
            tensors = [each for each in others if isinstance(each.meta.get(VALUE), TensorValue)]
            if key == "softmax" or isinstance(self.numbers.module(user), nn.Softmax):
                dim = getattr(self.numbers.module(user), "dim", argument(user, "dim", 1))
                return (user, masked) if dim in (-1, len(shape_of(node)) - 1) else None
            if key in ("add", "sub", "masked_fill") and (key == "add" or user.args[0] is node):
                masked |= any(map(self._may_mask_all, tensors))
            elif key in ("mul", "div") and (key == "mul" or user.args[0] is node):
                if any((shape_of(each) or (1,))[-1] != 1 for each in tensors):
                    return None
            elif not self._keeps_last(user, node):
                return None
            if operands(user).count(node) != 1 or shape_of(user)[-1] != shape_of(node)[-1]:
                return None
            node = user

    def _products_of(self, weights: fx.Node) -> Iterator[fx.Node]:
        """The products of attention weights with values."""
        for user in weights.users:
            if self.numbers.key(user) in PRODUCTS and user.args[0] is weights:
                yield user
            elif self.numbers.is_dropout(user) or self._keeps_last(user, weights):
                yield from self._products_of(user)

    def _keeps_last(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node reshapes or casts its source and leaves the last dim alone."""
        shaped = self.numbers.key(node) in RESHAPES and bool(node.args) and node.args[0] is source
        return shaped and shape_of(node)[-1:] == shape_of(source)[-1:]

    def _multihead(self, node: fx.Node) -> None:
        """All of it in one node: thirds of the packed bias belong to queries, keys and values."""
        module = self.numbers.module(node)
        if isinstance(module, nn.MultiheadAttention):
            numbers = self.numbers.of_vector(module.in_proj_bias)
            weight, bias = (
                self.numbers.names.get(id(module.out_proj.weight)),
                self.numbers.names.get(id(module.out_proj.bias)),
            )
            plain = module.bias_k is None and not module.add_zero_attn
            masks = [argument(node, "key_padding_mask", 3), argument(node, "attn_mask", 5)]
        else:
            packed = argument(node, "in_proj_bias", 6)
            numbers = self.numbers.of(packed) if isinstance(packed, fx.Node) else None
            weight, bias = (
                self.numbers.name_of(argument(node, *at)) for at in (("out_proj_weight", 11), ("out_proj_bias", 12))
            )
            plain = argument(node, "bias_k", 7) is None and not argument(node, "add_zero_attn", 9)
            plain &= argument(node, "static_k", 21) is None and argument(node, "static_v", 22) is None
            masks = [argument(node, "key_padding_mask", 14), argument(node, "attn_mask", 16)]
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
        numbers = self.numbers.of(values)
        if numbers is None or numbers.ndim < 2 or not _is_constant(numbers, -2):
            return
        one, shape = numbers.narrow(-2, 0, 1), shape_of(node)
        if one.ndim > 2 and one.shape[-3] != shape[-3] and shape[-3] % one.shape[-3] == 0:  # fewer heads of values
            one = one.repeat_interleave(shape[-3] // one.shape[-3], -3)
        found: list[Projection] = []
        waiting: list[tuple[fx.Node, Tensor]] = [(node, one.expand(shape))]
        readers: list[tuple[Projection, str]] = []
        while waiting:
            made, carried = waiting.pop()
            for user in made.users:
                if self.numbers.asks_for_shape(user, made):
                    continue
                moved = self.numbers.moved(user, made, carried)
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
        module = self.numbers.module(node)
        if isinstance(module, nn.Linear):
            weight, bias = self.numbers.names.get(id(module.weight)), self.numbers.names.get(id(module.bias))
        elif (
            self.numbers.key(node) == "linear"
            and argument(node, "input", 0) is made
            and operands(node).count(made) == 1
        ):
            weight, bias = (self.numbers.name_of(argument(node, *at)) for at in (("weight", 1), ("bias", 2)))
        else:
            return None
        row = _flat(numbers)
        if weight is None or bias is None or row is None:
            return None
        return Projection(weight, bias, tuple(row.tolist()))

    def _follow(self, node: fx.Node) -> None:
        """Note where the numbers that a node hands on come to their ends."""
        module = self.numbers.module(node)
        if module is not None and not self.numbers.is_layer(node) and not isinstance(module, nn.MultiheadAttention):
            for name in self.numbers.vectors_of(node):  # added in another way than by a layer
                self._ways["other"].update(self.numbers.ranges[name])
        ends = [
            user
            for user in node.users
            if not self.numbers.hands_on(user, node) and not self.numbers.asks_for_shape(user, node)
        ]
        if node.op == "output" or not ends or (numbers := self.numbers.of(node)) is None:
            return
        for user in ends:
            alone = operands(user).count(node) == 1
            packed = (
                self.numbers.key(user) == "multi_head_attention_forward" and argument(user, "in_proj_bias", 6) is node
            )
            if packed and alone:  # said already
                continue
            way = "key" if (user, node) in self._keys else "value" if (user, node) in self._values else "other"
            self._ways[way if alone else "other"] |= _set(numbers)

    def _may_mask_all(self, mask: object) -> bool:
        """Whether a mask comes in with the input, and so may leave a query no key at all."""
        return isinstance(mask, fx.Node) and mask.name in self._reached


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

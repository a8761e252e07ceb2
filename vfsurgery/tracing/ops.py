"""The view of one graph node that coupling rules get, under one canonical key per operation.

``torch.relu``, ``x.relu_()``, ``F.relu`` and ``aten.relu`` share the key ``"relu"``; a module is known by its class.
Purely index-moving nodes (reshape, permute, …) that follow each other are shown to rules as one op, since only together
do they tell what happens: ``view, transpose, view`` is a channel shuffle. Picks of single indices at the end of such a
chain belong to it too: ``view, permute, unbind`` takes packed queries, keys and values apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from vfsurgery.groups.axes import TensorRef
from vfsurgery.tracing.values import RETURNS_INPUT, VALUE, TensorValue

Key: TypeAlias = str | type[nn.Module] | Callable[..., Any]

_RESHAPES = (
    "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as contiguous clone detach to float "
    "double half type type_as requires_grad_ alias data"
)
_PERMUTES = "permute transpose swapaxes swapdims movedim moveaxis t T mT adjoint"
RESHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity)
_SHAPE_QUERIES = "size dim ndimension numel shape dtype device stride is_contiguous is_floating_point itemsize nelement"
RESHAPES, PERMUTES = frozenset(_RESHAPES.split()), frozenset(_PERMUTES.split())
SHAPE_QUERIES = frozenset(_SHAPE_QUERIES.split())
TORCH_NAMESPACES = ("aten", "prims", "_operator")
ALIASES = {"dim": "axis"}  # torch takes numpy's names too
NAMED = {"values": 0, "indices": 1}
"""Names of two results, as of ``x.max(1).values``."""


def canonical_key(target: Any) -> Key:
    """One key for all spellings of a torch operation; anything else is its own key.

    >>> canonical_key(torch.relu_), canonical_key(operator.iadd), canonical_key("mul_")
    ('relu', 'add', 'mul')
    """
    if isinstance(target, str):
        return _plain(target)
    target = getattr(target, "_opoverload", target)  # what torch.library.custom_op returns
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = qualified.partition(".")[0].partition("::")
        return _plain(name) if namespace in TORCH_NAMESPACES else f"{namespace}::{name}"
    module = getattr(target, "__module__", None) or type(target).__module__
    name = getattr(target, "__name__", "")
    if module in ("_operator", "operator"):
        inplace = name.startswith("i") and (hasattr(operator, name[1:]) or hasattr(operator, name[1:] + "_"))
        name = name[1:] if inplace else name
        return {"truediv": "div", "concat": "cat"}.get(name, _plain(name))
    torch_function = module.split(".")[0] in ("torch", "math", "builtins") or module.startswith("torch.")
    if torch_function and name and name != "fn" and not isinstance(target, type):
        return _plain(name)
    return target


def _plain(name: str) -> str:
    return name if name.startswith("__") else name.removesuffix("_")


@dataclass(frozen=True)
class Step:
    """One index movement: a reshape to ``shape``, or a permutation of dims by ``order`` when that is given."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None


PICK = "pick"
"""Key of a chain of index movements that ends in picks."""


@dataclass(frozen=True)
class Pick:
    """Single indices picked from dim ``dim``: the op's output ``i`` is index ``indices[i]``, without that dim."""

    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operation of a traced model, as coupling rules see it.

    ``inputs`` and ``outputs`` are the activations (and directly used parameters) in argument order; ``args`` and
    ``kwargs`` hold the call's arguments with tensors as :class:`TensorRef` and computed sizes as numbers.
    """

    node: fx.Node
    key: Key
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorRef, ...]
    module: nn.Module | None = None
    path: str = ""
    parameters: dict[str, TensorRef] = field(default_factory=dict[str, TensorRef])
    steps: tuple[Step, ...] = ()
    pick: Pick | None = None

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """All tensors among the arguments."""
        return tuple(_tensors((self.args, self.kwargs)))

    @property
    def input(self) -> TensorRef:
        """The first tensor among the arguments."""
        return self.inputs[0]

    @property
    def output(self) -> TensorRef:
        """The first tensor of the result."""
        return self.outputs[0]

    @property
    def input_name(self) -> str:
        """Name of the node whose value the first tensor is; of one tensor of several, the node that picks it."""
        return self.node.all_input_nodes[0].name

    def is_read(self, item: int) -> bool:
        """Whether anything may look at that one of several tensors that the node computes."""
        if len(self.outputs) <= item:
            return False
        return any(_picked(user) is None or (user.users and _picked(user) == item) for user in self.node.users)

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """An argument of a function or method call by name or position, or the module's attribute of that name."""
        if self.module is not None:
            return getattr(self.module, name, default)
        for spelling in (name, ALIASES.get(name)):
            if spelling in self.kwargs:
                return self.kwargs[spelling]
        return self.args[position] if position < len(self.args) else default

    def param(self, name: str, position: int) -> TensorRef | None:
        """A parameter or buffer: the module's own of that name, or the tensor given at that position."""
        if self.module is not None:
            return self.parameters.get(name)
        found = self.argument(name, position)
        return found if isinstance(found, TensorRef) else None

    @property
    def name(self) -> str:
        """The operation's name for people."""
        if isinstance(self.key, str):
            return self.key
        return f"{self.key.__module__}.{getattr(self.key, '__qualname__', self.key)}"

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.inputs)
        return f"{self.name} at node {self.node.name}{f' ({self.path})' if self.path else ''}, inputs {shapes}"


class OpReader:
    """Turns the nodes of a traced graph into :class:`Op` views, one by one and in order."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))
        self.parameter_names = canonical_parameters(graph_module)
        self._refs: dict[fx.Node, Any] = {}

    def __iter__(self) -> Iterator[Op]:
        for node in self.graph_module.graph.nodes:
            self._refs[node] = self._reference(node)
            if node.op in ("call_function", "call_method", "call_module"):
                op = self._read(node)
                if op is not None:
                    yield op

    def tensors_of(self, node: fx.Node) -> tuple[TensorRef, ...]:
        """The tensors of a node's value; for the output node, of what it returns."""
        return tuple(_tensors(self._refs[node] if node.op != "output" else self._resolve(node.args)))

    def _reference(self, node: fx.Node) -> Any:
        """The node's value with tensors as references; picking from a tuple refers to the tuple's own tensor."""
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(self.graph_module)
            if not isinstance(tensor, Tensor):  # a branch of a conditional
                return None
            name = self.parameter_names.get(id(tensor))
            kind = "constant" if name is None else "parameter"
            return TensorRef(kind, name or str(node.target), tuple(tensor.shape))
        if self._is_alias(node):
            return self._resolve(node.args[0])[self._resolve(_picked(node))]
        if _makes_record(node):
            parts = self._resolve((node.args, dict(node.kwargs)))
            return dict(parts[1]) if is_dataclass(node.target) else (*parts[0], *parts[1].values())
        value = node.meta.get(VALUE)
        if isinstance(value, TensorValue):
            return TensorRef("node", node.name, value.shape)
        if isinstance(value, tuple | list | dict):
            return _enumerate_tensors(node.name, value, [-1])
        return value

    def _read(self, node: fx.Node) -> Op | None:
        """The op of a node; ``None`` if it looks at shapes alone, takes from or fills a container, or continues."""
        if self._is_alias(node) or _makes_record(node):
            return None
        outputs, key = tuple(_tensors(self._refs[node])), self._key(node)
        if not outputs and (key in SHAPE_QUERIES or not self._has_tensor_input(node)):
            return None
        if not outputs and node.target is getattr:
            return None
        chain = self._chain(node)
        if chain and self._moves_indices(node) and self._continues(node):
            return None
        pick = self._pick(node) if chain and not self._moves_indices(node) else None
        first = chain[0] if chain else node
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        return Op(
            node=node,
            key=key if pick is None else PICK,
            args=self._resolve(first.args[:1] if chain else first.args),  # of a second one only the shape counts
            kwargs={} if chain else self._resolve(dict(first.kwargs)),
            outputs=outputs,
            module=module,
            path=str(node.target) if module is not None else module_path(node),
            parameters=self._module_parameters(module, str(node.target)),
            steps=tuple(self._step(link) for link in chain if self._moves_indices(link)),
            pick=pick,
        )

    def _is_alias(self, node: fx.Node) -> bool:
        return _picked(node) is not None and isinstance(self._resolve(node.args[0]), tuple | list | dict)

    def _has_tensor_input(self, node: fx.Node) -> bool:
        return any(True for _ in _tensors(self._resolve((node.args, dict(node.kwargs)))))

    def _key(self, node: fx.Node) -> Key:
        if node.meta.get(RETURNS_INPUT) and isinstance(node.meta.get(VALUE), TensorValue):
            return "alias"
        if node.op == "call_module":
            return type(self.modules[str(node.target)])
        if node.target is getattr:
            return str(node.args[1])
        return canonical_key(node.target)

    def _moves_indices(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method", "call_module"):
            return False
        key = self._key(node)
        return key in RESHAPES or key in PERMUTES or key in RESHAPE_MODULES

    def _continues(self, node: fx.Node) -> bool:
        """Whether what follows this index movement will speak for it: the next movement, or picks from one dim."""
        users = [user for user in node.users if not self._is_shape_query(user)]
        if any(user.op == "output" or not user.args or user.args[0] is not node for user in users):
            return False
        if len(users) == 1 and self._moves_indices(users[0]):
            return True
        picks = [self._pick(user) for user in users]
        return len({pick.dim for pick in picks if pick is not None}) == 1 and None not in picks

    def _is_shape_query(self, node: fx.Node) -> bool:
        return node.op != "output" and self._key(node) in SHAPE_QUERIES

    def _pick(self, node: fx.Node) -> Pick | None:
        """What a node picks, if that is single indices along one dim of a tensor."""
        first = node.args[0] if node.args and node.op in ("call_function", "call_method") else None
        source = first.meta.get(VALUE) if isinstance(first, fx.Node) else None
        if not isinstance(source, TensorValue):
            return None
        key, ndim = self._key(node), len(source.shape)
        if key not in ("unbind", "select", "getitem"):
            return None
        arguments: Any = map_arg((*node.args[1:], *node.kwargs.values()), lambda argument: argument.meta.get(VALUE))
        if key == "unbind":
            dim = (arguments[0] if arguments else 0) % ndim
            return Pick(dim, tuple(range(source.shape[dim])))
        if key == "select":
            return Pick(arguments[0] % ndim, (arguments[1] % source.shape[arguments[0]],))
        index = arguments[0] if isinstance(arguments[0], tuple) else (arguments[0],)
        picked = [place for place, item in enumerate(index) if isinstance(item, int) and not isinstance(item, bool)]
        whole = all(item == slice(None) for place, item in enumerate(index) if place not in picked)
        return Pick(picked[0], (index[picked[0]] % source.shape[picked[0]],)) if whole and len(picked) == 1 else None

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The index movements that end in ``node``, or in the picks it makes, first to last; empty if it is neither."""
        if not self._moves_indices(node) and self._pick(node) is None:
            return []
        chain = [node]
        while isinstance(chain[0].args[0], fx.Node):
            before = chain[0].args[0]
            if not (self._moves_indices(before) and self._continues(before)):
                break
            chain.insert(0, before)
        return chain if len(chain) > 1 or self._moves_indices(node) else []

    def _step(self, node: fx.Node) -> Step:
        shape = node.meta[VALUE].shape
        key = self._key(node)
        if key not in PERMUTES:
            return Step(shape)
        before: TensorRef = self._resolve(node.args[0])
        return Step(shape, _dim_order(str(key), before.ndim, self._resolve(node.args[1:]), self._resolve(node.kwargs)))

    def _module_parameters(self, module: nn.Module | None, path: str) -> dict[str, TensorRef]:
        if module is None:
            return {}
        found: dict[str, TensorRef] = {}
        for local, tensor in (*module.named_parameters(), *module.named_buffers()):
            name = self.parameter_names.get(id(tensor))
            found[local] = TensorRef(
                "constant" if name is None else "parameter", name or f"{path}.{local}", tuple(tensor.shape)
            )
        return found

    def _resolve(self, arguments: Any) -> Any:
        """Replace nodes by what they refer to, at any depth."""
        return map_arg(arguments, lambda node: self._refs[node])


def _makes_record(node: fx.Node) -> bool:
    """Whether a node puts values into a dataclass or a named tuple."""
    is_class = node.op == "call_function" and isinstance(node.target, type)
    return is_class and (is_dataclass(node.target) or hasattr(node.target, "_fields"))


def canonical_parameters(module: nn.Module) -> dict[int, str]:
    """For every parameter and persistent buffer, by ``id``: its first ``state_dict`` key (tied ones share it)."""
    persistent = module.state_dict(keep_vars=True)
    return {id(tensor): name for name, tensor in reversed(persistent.items())}


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node; empty at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "") if stack else ""


def _picked(node: fx.Node) -> Any:
    """The place, or the name, of what a node picks from a value of several; ``None`` if it does not look like that."""
    if node.target is getattr:
        whole, name = cast(fx.Node, node.args[0]).meta.get(VALUE), str(node.args[1])
        return name if isinstance(whole, dict) and name in whole else NAMED.get(name)  # a field of a dataclass
    return node.args[1] if node.target is operator.getitem else None


def _dim_order(key: str, ndim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Which input dim each output dim is, found by letting torch move the dims of an empty tensor."""
    probe = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    attribute: Any = getattr(probe, key)
    moved = cast(Tensor, attribute(*args, **kwargs) if callable(attribute) else attribute)
    return tuple(size - 2 for size in moved.shape)


def _tensors(tree: Any) -> Iterator[TensorRef]:
    if isinstance(tree, TensorRef):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, Iterable) and not isinstance(tree, str):
        for item in tree:
            yield from _tensors(item)


def _enumerate_tensors(name: str, tree: Any, counter: list[int]) -> Any:
    if isinstance(tree, TensorValue):
        counter[0] += 1
        return TensorRef("node", name, tree.shape, counter[0])
    if isinstance(tree, tuple | list):
        return tuple(_enumerate_tensors(name, item, counter) for item in tree)
    if isinstance(tree, dict):
        return {key: _enumerate_tensors(name, item, counter) for key, item in tree.items()}
    return tree

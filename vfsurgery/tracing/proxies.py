"""Proxies that know their value in the example run, and the values of whatever holds some."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_map

STATIC_ATTRIBUTES = frozenset({"is_cuda", "is_sparse", "is_quantized", "is_nested", "requires_grad", "layout"})


class GuardingTracer(fx.Tracer):
    """A tracer that notes in ``guards`` what the example run decides."""

    guards: list[str]


class ValueProxy(fx.Proxy):
    """A proxy that knows its value in the example run, and answers with it where Python needs an answer."""

    def __init__(self, node: fx.Node, tracer: GuardingTracer) -> None:
        super().__init__(node, tracer)
        self.value: Any = None

    def _decide(self, convert: Callable[[Any], Any]) -> Any:
        return self._decided(f"{convert.__name__}({self.node})", convert(self.value))

    def _decided(self, question: str, answer: Any) -> Any:
        """An answer that is fixed in the graph from now on."""
        cast(GuardingTracer, self.tracer).guards.append(f"{question} == {answer!r}")
        return answer

    def __bool__(self) -> bool:
        return self._decide(bool)

    def __int__(self) -> int:
        return self._decide(int)

    def __float__(self) -> float:
        return self._decide(float)

    def __index__(self) -> int:
        return self._decide(operator.index)

    def __len__(self) -> int:
        held = isinstance(self.value, Tensor)
        return self._decided(f"len({self.node})", self.value.shape[0]) if held else self.value.__len__()

    def __contains__(self, item: object) -> bool:
        return self._decided(f"{item!r} in {self.node}", values_of(item) in self.value)

    def __hash__(self) -> int:
        return id(self)

    def __iter__(self) -> Iterator[ValueProxy]:
        return iter([operator.getitem(cast(Any, self), index) for index in range(self.__len__())])

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    def __getattr__(self, name: str) -> Any:
        if name == "value":  # while being constructed
            raise AttributeError(name)
        concrete = getattr(self.value, name)
        if name in STATIC_ATTRIBUTES:
            return self._decided(f"{self.node}.{name}", concrete)
        if name == "ndim" or isinstance(self.value, torch.device):  # the graph is for inputs of this many dims anyway
            return concrete
        if callable(concrete):
            return Attribute(self, name)
        if isinstance(self.value, tuple):  # by its place, which rules understand: x.max(1).values is item 0
            place = next(place for place, item in enumerate(self.value) if item is concrete)
            return operator.getitem(cast(Any, self), place)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """The value's type, so that ``isinstance(size, int)`` in a forward holds as it would in a real run.

        Not for tensors: torch's C++ code would believe it and read a tensor where there is none.
        """
        value = self.__dict__.get("value")
        return ValueProxy if value is None or isinstance(value, Tensor) else type(value)


@contextmanager
def recording_lengths() -> Generator[None]:
    """Record ``len(x)`` of a tensor as its first size, which goes with the batch; Python takes none but a number."""

    def first_size(value: Any) -> Any:
        recorded = type(value) is ValueProxy and isinstance(value.value, Tensor)
        return value.size(0) if recorded else length(value)

    length = builtins.len
    builtins.len = first_size
    try:
        yield
    finally:
        builtins.len = length


def values_of(arguments: Any) -> Any:
    """Replace proxies by their values, at any depth."""
    if type(arguments) is ValueProxy:
        return arguments.value
    if type(arguments) is Attribute:
        return getattr(values_of(arguments.root), arguments.attr)
    if type(arguments) is slice:
        return slice(*(values_of(part) for part in (arguments.start, arguments.stop, arguments.step)))
    if type(arguments) in (tuple, list):
        return type(arguments)(values_of(item) for item in arguments)
    if type(arguments) is dict:
        return {key: values_of(item) for key, item in arguments.items()}
    return tree_map(values_of, arguments) if hasattr(arguments, "_fields") else arguments


def holds_proxy(arguments: Any) -> bool:
    if type(arguments) in (tuple, list):
        return any(map(holds_proxy, arguments))
    if type(arguments) is dict:
        return any(map(holds_proxy, arguments.values()))
    return type(arguments) in (ValueProxy, Attribute)

"""What a trace keeps of each node's value: shapes and dtypes of tensors, and plain Python values as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

VALUE = "vfsurgery"
"""Key under which a node's abstract value lies in ``node.meta``."""
RETURNS_INPUT = "vfsurgery_returns_input"
"""Key in ``node.meta``: the module returned its only argument itself, as stochastic depth does in eval mode."""
PRESERVED = "preserved"
"""Key in ``node.meta``: the node computes for one source what that source computes, with weights of its own."""

LOGITS = "logits"
"""What a result is called by which several ones are judged, where they have names."""

KEPT_WHOLE: set[Any] = set()
"""Functions that have a coupling rule: where ``torch.fx.wrap`` marks one, it stays a single node of the trace."""


@dataclass(frozen=True, slots=True)
class TensorValue:
    """Shape and dtype of a tensor in the example run."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def abstract(value: Any) -> Any:
    """Replace every tensor in ``value`` by its :class:`TensorValue`.

    >>> abstract((torch.zeros(2, 3), 7))
    (TensorValue(shape=(2, 3), dtype=torch.float32), 7)
    """
    if isinstance(value, Tensor):
        return TensorValue(tuple(value.shape), value.dtype)
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, tuple | list):
        return type(value)(map(abstract, value)) if type(value) in (tuple, list) else tuple(map(abstract, value))
    if isinstance(value, dict):
        return {key: abstract(item) for key, item in value.items()}
    return {name: abstract(item) for name, item in fields_of(value).items()} if is_record(value) else value


def is_record(value: object) -> bool:
    """Whether a value is an instance of a dataclass that somebody else has written, as forwards return them.

    >>> is_record(TensorValue((2,), torch.float32)), is_record((1, 2))
    (False, False)
    """
    return is_dataclass(value) and not isinstance(value, type | TensorValue)


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass's instance that its constructor takes, by name."""
    return {field.name: getattr(record, field.name) for field in fields(record) if field.init}


def tensors_of(result: object) -> list[Tensor]:
    """The tensors in what a model returns, in order: alone, in tuples, lists, mappings and dataclasses, at any depth.

    >>> [tuple(tensor.shape) for tensor in tensors_of((torch.zeros(2), {"mask": torch.ones(3) > 0, "size": 7}))]
    [(2,), (3,)]
    """
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for item in result.values() for tensor in tensors_of(item)]
    if isinstance(result, tuple | list):
        return [tensor for item in result for tensor in tensors_of(item)]
    return tensors_of(fields_of(result)) if is_record(result) else []


def holds_tensor(value: Any) -> bool:
    """Whether an abstract value is a tensor's, or has one inside.

    >>> holds_tensor(abstract([torch.zeros(2), 7])), holds_tensor((2, 3))
    (True, False)
    """
    if isinstance(value, dict):
        return any(map(holds_tensor, value.values()))
    return isinstance(value, TensorValue) or (isinstance(value, tuple | list) and any(map(holds_tensor, value)))


def floats_per_image(node: fx.Node) -> int:
    """How many numbers a node's value has for each image, from the shape that tracing left behind."""
    value = node.meta.get(VALUE)
    if node.op == "get_attr" or not isinstance(value, TensorValue) or not value.shape:
        return 0
    return torch.Size(value.shape).numel() // max(value.shape[0], 1)


def takes_single_images(graph: fx.Graph) -> bool:
    """Whether every value has as many entries along its first dim as there are images, so that batches may be cut."""
    values = [node.meta.get(VALUE) for node in graph.nodes if node.op not in ("get_attr", "output")]
    sizes = {value.shape[:1] for value in values if isinstance(value, TensorValue)}
    return len(sizes) == 1 and sizes != {()}


def judged(output: object) -> Tensor | None:
    """The logits in what a model returns: what has that name, else the first tensor; ``None`` where there is none.

    >>> judged({"features": torch.zeros(2, 3), "logits": torch.ones(2, 5)}).shape
    torch.Size([2, 5])
    """
    if is_dataclass(output) and not isinstance(output, type):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    named = cast("Mapping[str, object]", output).get(LOGITS) if isinstance(output, Mapping) else None
    named = getattr(output, LOGITS, named)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, Mapping | tuple | list):
        inside = cast("Mapping[str, object]", output).values() if isinstance(output, Mapping) else output
        return next((found for each in cast("Iterable[object]", inside) if (found := judged(each)) is not None), None)
    return next(iter(tensors_of(output)), None)

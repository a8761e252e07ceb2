"""Tensors of which there is no mean, so that sources must share them: constants of forwards, saved integers, masks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from vfsurgery.errors import IncompatibleModelsError, explain
from vfsurgery.tracing.copies import plain_tensors
from vfsurgery.tracing.dataflow import reaching_output
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.precision import is_inexact
from vfsurgery.tracing.sources import Source, canonical_state


def check_constants(first: Source, other: Source, number: int) -> None:
    """Refuse sources whose forwards read different constants: tensors that are in no checkpoint."""
    constants = [_constants(source) for source in (first, other)]
    for name, mine in constants[0].items():
        theirs = constants[1].get(name)
        if theirs is None or not same_values(mine, theirs):
            raise _different_constants(number, _place(first, name, mine), mine, theirs)


def whole_numbers(source: Source) -> set[str]:
    """Saved tensors of integers or truth values that the outputs depend on: indices, masks, numbers of something."""
    names, reaching = canonical_parameters(source.graph_module), reaching_output(source.graph_module.graph)
    read = [node for node in source.graph_module.graph.nodes if node.op == "get_attr" and node.name in reaching]
    tensors = [operator.attrgetter(str(node.target))(source.graph_module) for node in read]
    return {names[id(x)] for x in tensors if isinstance(x, Tensor) and id(x) in names and not is_inexact(x)}


def check_whole_numbers(first: Source, other: Source, number: int) -> None:
    """Refuse sources that compute with different saved integers or truth values, of which there is no mean."""
    for name in sorted(whole_numbers(first)):
        if not same_values(first.state[name], other.state[name]):
            raise _different_whole_numbers(number, name, first.state[name], other.state[name])


def check_saved_whole_numbers(models: Sequence[nn.Module], read: Callable[[], Collection[str] | None]) -> None:
    """Refuse models that compute with different saved integers or truth values, of which there is no mean.

    For models that are averaged without a trace. Numbers of batches that norm layers have seen may differ.

    Args:
        models: Of one architecture.
        read: Names what outputs depend on; ``None`` if nobody can say. Asked only where something differs.

    Raises:
        IncompatibleModelsError: names the first that differs.
    """
    states = [canonical_state(model) for model in models]
    differing = {
        name: number
        for number, other in reversed([*enumerate(states)][1:])
        for name, tensor in states[0].items()
        if not is_inexact(tensor) and not name.endswith("num_batches_tracked") and not same_values(tensor, other[name])
    }
    names = read() if differing else None
    for name, number in sorted(differing.items()):
        if names is None or name in names:
            hint = "; or pass calibration= images, which show what no output depends on" if names is None else ""
            raise _different_whole_numbers(number, name, states[0][name], states[number][name], hint)


def _different_whole_numbers(
    number: int, name: str, mine: Tensor, theirs: Tensor, hint: str = ""
) -> IncompatibleModelsError:
    return IncompatibleModelsError(
        explain(
            f"sources 0 and {number} compute with different integers or masks, which cannot be averaged",
            buffer=name,
            **{"source 0": described(mine), f"source {number}": described(theirs)},
            remedy=f"give both the same values, as in b.{name}.copy_(a.{name}), if the difference means "
            f"nothing; networks that were trained with different ones cannot be merged{hint}",
        )
    )


def _different_constants(
    number: int, where: str | None, mine: Tensor | None, theirs: Tensor | None
) -> IncompatibleModelsError:
    same = "the same values" if where is None else f"the same values, as in b.{where} = a.{where},"
    return IncompatibleModelsError(
        explain(
            f"sources 0 and {number} compute with different constants, which no checkpoint holds",
            constant=where or "made in the forward of what is no tensor: a NumPy array or a list of numbers",
            **{"source 0": described(mine), f"source {number}": described(theirs)},
            remedy=f"give both {same} if the difference means nothing; what was "
            "drawn at random and trained with belongs to its network, and such networks cannot be merged",
        )
    )


def check_unsaved(models: Sequence[nn.Module]) -> None:
    """Refuse models that hold different tensors which no checkpoint has, whether their forwards read them or not.

    For models that are averaged without a trace.

    Raises:
        IncompatibleModelsError: names the first that differs.
    """
    unsaved = [unsaved_tensors(model) for model in models]
    for number, other in enumerate(unsaved[1:], start=1):
        for name in [*unsaved[0], *other]:
            mine, theirs = unsaved[0].get(name), other.get(name)
            if mine is None or theirs is None or not same_values(mine, theirs):
                raise _different_constants(number, name, mine, theirs)


def unsaved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not persistent, and plain tensors, by path."""
    known = canonical_parameters(model)
    held = [
        *model.named_buffers(),
        *((plain.path, tensor) for plain in plain_tensors(model) for tensor in plain.tensors),
    ]
    return {name: tensor for name, tensor in held if id(tensor) not in known}


def _constants(source: Source) -> dict[str, Tensor]:
    """Tensors that the traced forward reads and that are no state, by their path in the graph module."""
    known = canonical_parameters(source.graph_module)
    found: dict[str, Tensor] = {}
    for node in source.graph_module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(source.graph_module)
            if isinstance(value, Tensor) and id(value) not in known:
                found[str(node.target)] = value
        if node.op == "call_module":
            module = source.graph_module.get_submodule(str(node.target))
            inside = unsaved_tensors(module)
            found |= {f"{node.target}.{name}": value for name, value in inside.items() if id(value) not in known}
    return found


def _place(source: Source, name: str, constant: Tensor) -> str | None:
    """Where the user's model has a constant of the trace; ``None`` where it holds no such tensor."""
    unsaved = unsaved_tensors(source.model)
    return name if name in unsaved else next((p for p, value in unsaved.items() if same_values(value, constant)), None)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN at the same places included.

    >>> import torch
    >>> same_values(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    equal = a == b
    return bool((equal | ((a != a) & (b != b))).all())


def described(tensor: Tensor | None) -> str:
    """Shape, dtype and the first values of a constant."""
    if tensor is None:
        return "absent"
    values = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:4].tolist())
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}: {values}{', ...' * (tensor.numel() > 4)}"

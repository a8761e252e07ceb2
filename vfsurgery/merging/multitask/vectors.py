"""Task vectors of a trunk, one tensor at a time: their weighted sums, and gradients by the weights.

``theta = theta_0 + sum_k lambda_k tau_k`` is linear in the coefficients, so ``dL / dlambda_k = <dL / dtheta, tau_k>``:
one backward pass through an ordinary network and a dot product for each coefficient, without a graph of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import Entry, InMemory, Kind, Problem, Trait
from vfsurgery.combining.ties import summed, thresholds, trimmed

Grouping: TypeAlias = Literal["task", "block", "module", "tensor"]
DENSITY = 0.2
"""Of each task vector, the share that "++" keeps."""

Vectors: TypeAlias = Callable[[Entry], Iterable[Tensor]]
"""The task vectors of all sources in one tensor, of its shape, one at a time, each free to be written to."""


def entries_of(
    names: Iterable[str], base: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]
) -> dict[str, Entry]:
    """Tensors of all sources beside those of the base, by name."""
    stores, origin = [InMemory(state) for state in states], InMemory(base)
    found: dict[str, Entry] = {}
    for name in names:
        shape, dtype = tuple(base[name].shape), torch.promote_types(states[0][name].dtype, torch.float32)
        weights = (1.0,) * len(states)
        found[name] = Entry(name, shape, Trait(Kind.REST), weights, dtype, stores, origin, 0, math.prod(shape))
    return found


def plain(entry: Entry) -> Iterable[Tensor]:
    """``tau_k = theta_k - theta_0``."""
    return (entry.task_vector(source) for source in range(len(entry.stores)))


def agreeing(entries: Sequence[Entry]) -> Vectors:
    """Task vectors as "++" takes them: of each what TIES keeps of it, where it has the elected sign."""
    problem = Problem(lambda: iter(entries), len(entries[0].stores))
    trims = thresholds(problem, DENSITY, "model")
    majority = sum(float(torch.sign(summed(trimmed(part, trims))).sum()) for part in problem.parts())
    fallback = -1.0 if majority < 0 else 1.0

    def vectors(entry: Entry) -> Iterable[Tensor]:
        kept: list[Tensor] = []
        for part in entry.parts():
            found = trimmed(part, trims).reshape(len(entry.stores), -1)
            elected = torch.sign(summed(found))
            elected[elected == 0] = fallback
            kept.append(found.mul_(found * elected > 0))
        return torch.cat(kept, 1).reshape(len(entry.stores), *entry.shape)

    return vectors


def added(entry: Entry, vectors: Vectors, coefficients: Sequence[float]) -> Tensor:
    """``theta_0 + sum_k coefficients[k] tau_k`` of one tensor, added up as task arithmetic does, to the last bit.

    >>> base, tuned = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.tensor([0.0, 2.0])}]
    >>> added(entries_of(["w"], base, tuned)["w"], plain, [0.5, 0.25])
    tensor([0.5000, 1.0000])
    """
    common = coefficients[0] if len(set(coefficients)) == 1 else 1.0
    total: Tensor | None = None
    for vector, own in zip(vectors(entry), coefficients, strict=True):
        weight = own if common == 1 else 1.0
        total = vector.mul_(weight) if total is None else total.add_(vector, alpha=weight)
    assert total is not None
    return total.mul_(common).add_(entry.origin())


def slopes(entry: Entry, vectors: Vectors, gradient: Tensor) -> list[float]:
    """``<dL / dtheta, tau_k>`` for each source."""
    flat = gradient.to(entry.dtype).reshape(-1)
    return [float(torch.dot(flat, vector.reshape(-1))) for vector in vectors(entry)]


def rows_of(names: Iterable[str], model: nn.Module, by: Grouping) -> dict[str, str]:
    """By name of a tensor, the row of coefficients that it belongs to.

    A block is the innermost module that stands in an ``nn.Sequential`` or ``nn.ModuleList``, has modules of its own
    and is no such container itself; what lies in none goes by its module.

    >>> layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    >>> names = ["norm.weight", "layers.1.linear1.weight", "layers.1.self_attn.in_proj_weight"]
    >>> rows_of(names, nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4)), "block")
    {'norm.weight': 'norm', 'layers.1.linear1.weight': 'layers.1', 'layers.1.self_attn.in_proj_weight': 'layers.1'}
    """
    if by == "task":
        return dict.fromkeys(names, "all")
    if by == "tensor":
        return {name: name for name in names}
    found = {name: name.rpartition(".")[0] or name for name in names}
    return found if by == "module" else {name: _block_of(path, model) for name, path in found.items()}


def _block_of(path: str, model: nn.Module) -> str:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        inside, around = ".".join(parts[:length]), ".".join(parts[: length - 1])
        try:
            module, holder = model.get_submodule(inside), model.get_submodule(around)
        except AttributeError:  # the name of a parameter
            continue
        containers = nn.Sequential | nn.ModuleList
        if (
            isinstance(holder, containers)
            and not isinstance(module, containers)
            and any(True for _ in module.children())
        ):
            return inside
    return path

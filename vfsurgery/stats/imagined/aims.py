"""What BatchNorm layers remember of the images that a network was trained on, and how far others are from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from vfsurgery.stats.batch_norms import BatchNorm, batch_norm_nodes, calls_of
from vfsurgery.tracing.excerpts import Runner
from vfsurgery.tracing.values import judged

FLOOR = 1e-12
"""Of variances, in units of the layer's: a dead unit's deviation has no gradient at 0."""


@dataclass(frozen=True)
class Aim:
    """One BatchNorm layer: the nodes that call it, in order, and the statistics that it keeps.

    Units that were constant in training keep a variance of about 0, of which nothing can be a multiple: they are left
    out by ``alive``.
    """

    name: str
    calls: tuple[str, ...]
    shares: tuple[float, ...]
    mean: Tensor
    var: Tensor
    alive: Tensor

    @staticmethod
    def of(name: str, calls: Sequence[str], norm: BatchNorm) -> Aim:
        """Later calls count more, as in training: by what the momentum forgets of the earlier ones."""
        momentum = norm.momentum or 0.0
        shares = [(1 - momentum) ** (len(calls) - 1 - place) for place in range(len(calls))]
        mean, var = (cast(Tensor, buffer).detach() for buffer in (norm.running_mean, norm.running_var))
        alive = var > FLOOR + 1e-4 * var.mean()
        return Aim(name, tuple(calls), tuple(share / sum(shares) for share in shares), mean, var, alive)

    def distance(self, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean over the units of ``(mean - running mean)^2 / running var + (std / running std - 1)^2``.

        Args:
            seen: Mean and variance of every call's input, per unit.
        """
        mean, var = (
            torch.stack([share * each for share, each in zip(self.shares, values, strict=True)]).sum(0)[self.alive]
            for values in zip(*seen, strict=True)
        )
        own_mean, own_var = self.mean[self.alive], self.var[self.alive]
        ratio = (var / own_var + FLOOR).sqrt()
        return ((mean - own_mean).square() / own_var + (ratio - 1).square()).mean()


def aims_of(graph_module: fx.GraphModule) -> tuple[Aim, ...]:
    """The layers of a traced network whose statistics have been trained, in graph order.

    A mean of 0 and a variance of 1 in every unit are what a layer begins with.
    """
    norms = batch_norm_nodes(graph_module)
    paths = {node.name: str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    found = [Aim.of(paths.get(calls[0], calls[0]), calls, norm) for norm, calls in calls_of(norms).items()]
    return tuple(aim for aim in found if aim.alive.any() and not _is_new(aim))


def _is_new(aim: Aim) -> bool:
    return bool((aim.mean == 0).all() and (aim.var == 1).all())


class Watched(Runner):
    """Runs a traced network and sees what its BatchNorm layers are given; in eval mode, so nothing is updated.

    >>> from vfsurgery.tracing.modes import trace_module
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    >>> _ = net(torch.randn(50, 1, 8, 8)), net.eval()
    >>> watched = Watched(trace_module(net, (torch.zeros(1, 1, 8, 8),)))
    >>> [aim.name for aim in watched.aims]
    ['1']
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.graph_module = graph_module
        self.aims = aims_of(graph_module)
        self._calls = {call for aim in self.aims for call in aim.calls}
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        tensors = (*self.graph_module.parameters(), *self.graph_module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def look(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The distance of each layer's statistics on these images, and the logits, if any."""
        self._seen.clear()
        output = self.run(images)
        distances = [aim.distance([self._seen[call] for call in aim.calls]) for aim in self.aims]
        self._seen.clear()
        return distances, classes_in(output, len(images))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; of the input of a BatchNorm, note mean and variance."""
        if n.name in self._calls:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value: Tensor = next(iter((*args, *kwargs.values())))
            dims = [dim for dim in range(value.ndim) if dim != 1]
            single = value.numel() == value.shape[1]
            var, mean = torch.var_mean(value, dim=dims, correction=0 if single else 1)
            self._seen[n.name] = mean, var
        return super().run_node(n)


def classes_in(output: object, count: int) -> Tensor | None:
    """The logits in what a network returns, ``(count, classes)``; ``None`` where it tells no classes apart."""
    logits = judged(output)
    if logits is None or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        return None
    return logits if logits.is_floating_point() else None

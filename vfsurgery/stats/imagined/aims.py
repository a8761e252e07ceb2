"""What BatchNorm layers remember of the images that a network was trained on, and how far others are from it.

Every BatchNorm, of whatever class, functional or not, ends in ``torch.nn.functional.batch_norm`` with the running
statistics that it keeps. That call is what is watched here, so a network need not be traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.values import judged

MEAN, VAR = "running_mean", "running_var"
PLACES: dict[Any, tuple[str, ...]] = {
    functional.batch_norm: ("input", MEAN, VAR, "weight", "bias", "training", "momentum"),
    torch.batch_norm: ("input", "weight", "bias", MEAN, VAR, "training", "momentum"),
}
"""Names of the arguments of what normalizes by the batch or by running statistics, in order."""
DEAD = 1e-4
"""Units whose variance is less than this share of their layer's mean are constants: nothing is a multiple of it."""
TINY = 1e-12
"""Added to ratios of variances: the root of one that is 0 has no gradient."""


@dataclass(frozen=True)
class Aim:
    """The statistics that one BatchNorm layer keeps, and what its momentum forgets of a call until the next."""

    name: str
    mean: Tensor
    var: Tensor
    momentum: float

    def distance(self, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean over the units of ``(mean - running mean)^2 / running var + (std / running std - 1)^2``.

        Of several calls, later ones count more, as they did in training.

        Args:
            seen: Mean and variance, per unit, of the input of every call.
        """
        shares = [(1 - self.momentum) ** (len(seen) - 1 - place) for place in range(len(seen))]
        parts = [(share * mean, share * var) for share, (mean, var) in zip(shares, seen, strict=True)]
        mean, var = (torch.stack(values).sum(0)[self.alive] / sum(shares) for values in zip(*parts, strict=True))
        own_mean, own_var = self.mean[self.alive], self.var[self.alive]
        ratio = (var / own_var + TINY).sqrt()
        return ((mean - own_mean).square() / own_var + (ratio - 1).square()).mean()

    @cached_property
    def alive(self) -> Tensor:
        """The units that are no constants, as indices."""
        return (self.var > DEAD * self.var.mean()).nonzero().flatten()

    @property
    def is_new(self) -> bool:
        """Whether it has never been trained: a mean of 0 and a variance of 1 in every unit are what it begins with."""
        return bool((self.mean == 0).all() and (self.var == 1).all())


class Watched:
    """A twin of a network in eval mode, whose BatchNorm layers are watched; nothing of the network itself changes.

    Attributes:
        device: Where it lives.
        aims: Its BatchNorm layers with trained statistics, by the address of their running means.
        new: The names of those that have never been trained.
        bytes: What an image's values take that are computed in a forward.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    >>> _ = net(torch.randn(50, 1, 8, 8))
    >>> [aim.name for aim in Watched(net, torch.zeros(2, 1, 8, 8)).aims.values()]
    ['1']
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._twin = fresh(model, (example,)).eval()
        self.device = example.device
        names = {tensor.data_ptr(): name for name, tensor in self._twin.named_buffers() if tensor.numel()}
        with torch.no_grad(), _Onlooker() as onlooker:
            self._twin(example.clone())
        self.bytes = onlooker.bytes // len(example)
        found: dict[int, Aim] = {}
        for place, (mean, var, momentum) in onlooker.kept.items():
            name = names.get(place, f"batch_norm {len(found)}").removesuffix(f".{MEAN}")
            found[place] = Aim(name, mean.detach().clone(), var.detach().clone(), momentum)
        self.aims = {place: aim for place, aim in found.items() if not aim.is_new and len(aim.alive)}
        self.new = [aim.name for aim in found.values() if aim.is_new]

    def look(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The distance of each layer's statistics on these images, and the logits, if any."""
        with _Onlooker(self.aims) as onlooker:
            output = self._twin(images)
        distances = [aim.distance(onlooker.seen[place]) for place, aim in self.aims.items() if place in onlooker.seen]
        return distances, classes_in(output, len(images))


class _Onlooker(TorchFunctionMode):
    """Sees the running statistics that are used, and mean and variance of what comes to those that are aimed at."""

    def __init__(self, aims: Mapping[int, Aim] | None = None) -> None:
        super().__init__()
        self.aims = aims or {}
        self.kept: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PLACES:
            self._see(func, args, kwargs)
        result = func(*args, **kwargs)
        self.bytes += result.nbytes if isinstance(result, Tensor) else 0
        return result

    def _see(self, func: Any, args: Any, kwargs: Any) -> None:
        names = PLACES[func]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        images, mean, var = given["input"], given.get(MEAN), given.get(VAR)
        if mean is None or var is None:
            return
        place = mean.data_ptr()
        self.kept.setdefault(place, (mean, var, given.get("momentum", 0.1)))
        if place in self.aims:
            dims = [dim for dim in range(images.ndim) if dim != 1]
            single = images.numel() == images.shape[1]
            spread, middle = torch.var_mean(images, dim=dims, correction=0 if single else 1)
            self.seen.setdefault(place, []).append((middle, spread))


def classes_in(output: object, count: int) -> Tensor | None:
    """The logits in what a network returns, ``(count, classes)``; ``None`` where it tells no classes apart."""
    logits = judged(output)
    if logits is None or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        return None
    return logits if logits.is_floating_point() else None

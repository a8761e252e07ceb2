"""Fisher averaging: each number of a model counts as much as its predictions depend on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfsurgery.combining.base import Combined, Combiner, Entry, Problem, register_combiner
from vfsurgery.combining.images import first_images, positive_weights, weighted_mean
from vfsurgery.data.labels import check_logits, draw_labels
from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.sources import Source, eval_mode

Named: TypeAlias = dict[str, Tensor]
AT_ONCE = 2**26
"""Numbers of gradients that are held at a time, 256 MiB of float32."""


@register_combiner
@dataclass(frozen=True)
class Fisher(Combiner):
    """``sum_i w_i F_i tau_i / sum_i w_i F_i`` for every number (Matena & Raffel, NeurIPS 2022). All tensors but heads.

    ``F_i = E_x sum_c p(c|x) (d log p(c|x) / d theta)^2`` is the exact diagonal of the Fisher matrix of source ``i`` at
    its own weights, with its own head, in eval mode, over ``images`` of its images; no labels are needed. One backward
    pass for every image and class; ``classes="drawn"`` draws one class for each image from the softmax instead, which
    gives the same on average. Memory: one more model for each source.

    To each ``F_i`` a part ``floor`` of its mean over all numbers and sources is added, so that numbers on which no
    prediction depends become the mean. ``normalize`` divides each ``F_i`` by its norm first, so that no source counts
    more because it is less sure.

    Published codes differ: the authors' adds its floor of 1e-6 to the first model alone, which so wins where all are
    zero; MergeLM and FusionBench square the gradient of a sum over a batch and over the roots of ``p(c|x)``, whose
    cross terms do not vanish.
    """

    images: int = 256
    classes: Literal["all", "drawn"] = "all"
    floor: float = 1e-6
    normalize: bool = False
    scale: float = 1.0
    name: ClassVar[str] = "fisher"
    elementwise: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.images < 1 or self.floor < 0:
            raise OptionError(explain(f"fisher needs images >= 1 and floor >= 0, not {self.images} and {self.floor}"))

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        dtypes = {entry.name: entry.dtype for entry in problem.entries()}
        names = [*dtypes]
        positive_weights(self.name, next(iter(problem.entries()), None))
        found: list[Named] = []
        for number, source in enumerate(problem.traced):
            batches = first_images(problem, number, self.images)
            generator = _generator(problem.seed, number) if self.classes == "drawn" else None
            own = fisher_diagonal(source, names, batches, generator)
            if self.normalize:
                norm = torch.stack([value.square().sum() for value in own.values()]).sum().sqrt()
                own = {name: value / norm.clamp_min(torch.finfo(norm.dtype).tiny) for name, value in own.items()}
            found.append({name: value.to(dtypes[name]) for name, value in own.items()})
        count = sum(value.numel() for own in found for value in own.values())
        mean = float(sum(float(value.sum()) for own in found for value in own.values())) / max(count, 1)
        floor = max(self.floor * mean, 1e-300)
        problem.notes.append(
            f"fisher: diagonals on {self.images} images of each source at most; mean {mean:.2g}, floor {floor:.2g}"
        )
        return lambda entry: (
            _averaged(entry, [own[entry.name] for own in found], floor)
            if entry.name in found[0]
            else weighted_mean(entry)  # a table that is no parameter: nothing has a gradient by it
        )


def _averaged(entry: Entry, fishers: list[Tensor], floor: float) -> Tensor:
    total = weight = torch.zeros((), dtype=torch.float64)
    for source, own in enumerate(fishers):
        vector = entry.task_vector(source)
        own = own.reshape(-1)[entry.start : entry.stop].reshape(vector.shape)
        share = (own.to(vector.device, torch.float64) + floor) * entry.weights[source]
        total, weight = total + share * vector, weight + share
    return (total / weight).to(entry.dtype)


def fisher_diagonal(
    source: Source, names: list[str], batches: list[Tensor], generator: torch.Generator | None = None
) -> Named:
    """The diagonal of the Fisher matrix of a classifier, ``E_x sum_c p(c|x) (d log p(c|x) / d theta)^2``.

    Args:
        source: A traced model whose output is logits ``(batch, classes)``.
        names: Parameters of it.
        batches: Images, ``(batch, channels, height, width)``.
        generator: Draws one class for each image; without it all count, each as much as it is probable.

    Returns:
        By name, of the parameter's shape, float64.

    Raises:
        DataError: the output is no logits.

    >>> import vfsurgery as surgery
    >>> from vfsurgery.tracing.sources import Source
    >>> net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    >>> source = Source.of(net, surgery.trace(net, x))
    >>> p = net(x).softmax(1)[:, 0]
    >>> expected = (x.square() * (p * (1 - p))[:, None]).mean(0)
    >>> torch.allclose(fisher_diagonal(source, ["weight"], [x])["weight"][0].float(), expected)
    True
    """
    graph_module = source.graph_module
    aliases = canonical_parameters(source.model)
    own = {name: tensor.detach() for name, tensor in graph_module.named_parameters()}
    called = {name: aliases.get(id(tensor), name) for name, tensor in graph_module.named_parameters()}
    wanted = {name: tensor for name, tensor in own.items() if called[name] in set(names)}
    fixed = {name: tensor for name, tensor in own.items() if name not in wanted}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in wanted.items()}

    def log_odds(parameters: Named, image: Tensor) -> Tensor:
        logits = functional_call(graph_module, {**fixed, **parameters}, (image[None],))
        return logits[0].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(0)

    squares = _Squares(log_odds, wanted, sums)
    with eval_mode(graph_module), sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap
        for images in batches:
            logits = graph_module(images)
            check_logits(logits, len(images), "combine with a method that looks at no predictions")
            odds = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
            chosen = torch.eye(odds.shape[1], dtype=odds.dtype, device=odds.device).expand(len(images), -1, -1)
            if generator is not None:
                drawn = draw_labels(logits.detach(), generator)
                chosen, odds = chosen[torch.arange(len(images)), drawn][:, None], torch.ones_like(odds[:, :1])
            squares.add(images, chosen, odds)
    count = sum(map(len, batches))
    return {called[name]: total.div_(max(count, 1)) for name, total in sums.items()}


@dataclass
class _Squares:
    """Sums of squared gradients, many images at once where the network lets :func:`torch.func.vmap` do that."""

    log_odds: Callable[[Named, Tensor], Tensor]
    wanted: Named
    sums: Named
    together: bool = True

    def add(self, images: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Add ``sum_k weights[x, k] (d (chosen[x, k] @ log p(.|x)))^2`` of each image ``x``.

        Args:
            images: ``(batch, channels, height, width)``.
            chosen: ``(batch, k, classes)``.
            weights: ``(batch, k)``.
        """
        size = chosen.shape[1] * sum(tensor.numel() for tensor in self.wanted.values())
        most = AT_ONCE // max(size, 1)
        if self.together and most:
            try:
                gathered: Named = {}
                for part in zip(*(x.split(most) for x in (images, chosen, weights)), strict=True):
                    for name, value in vmap(self._of_image, (0, 0, 0))(*part).items():
                        total = value.sum(0, dtype=torch.float64)
                        gathered[name] = gathered[name] + total if name in gathered else total
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an op that looks at values, or writes where vmap does not let it
                self.together = False
            else:
                self._take(gathered)
                return
        for image, rows, shares in zip(images, chosen, weights, strict=True):
            pull = vjp(lambda parameters, image=image: self.log_odds(parameters, image), self.wanted)[1]
            for row, share in zip(rows, shares, strict=True):
                (found,) = pull(row)
                self._take({name: share.double() * value.double().square() for name, value in found.items()})

    def _of_image(self, image: Tensor, rows: Tensor, shares: Tensor) -> Named:
        pull = vjp(lambda parameters: self.log_odds(parameters, image), self.wanted)[1]
        (found,) = vmap(pull)(rows)
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in found.items()}
        return {name: torch.tensordot(shares.to(value), value.square(), 1) for name, value in wide.items()}

    def _take(self, found: Named) -> None:
        for name, value in found.items():
            self.sums[name] += value


def _generator(seed: int, source: int) -> torch.Generator:
    key = f"{seed}/{source}/classes".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)

"""How near a model comes to the ensemble of its sources: what choices on held-out images are judged by.

First by the class that both find: how often the model's largest logit is the ensemble's. A count over some hundred
images does not tell good ways apart, though; where it leaves a choice open, the cross-entropy to the ensemble's
probabilities decides, which sees how sure the model is of each image. Labels are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import are_tokens
from vfsurgery.stats.precision import taken_by
from vfsurgery.tracing.values import judged

K = TypeVar("K", bound=Hashable)

TIE = 1e-3
"""Cross-entropies that differ by no more than this share of them speak for neither."""


def first_output(model: nn.Module, images: Tensor) -> Tensor | None:
    """What a model is judged by, of all that it returns; see :func:`judged`."""
    return judged(model(taken_by(model, images)))


def class_logits(model: nn.Module, images: Tensor) -> Tensor | None:
    """A model's first output, ``(N, classes, ...)``, as float64; ``None`` if it does not tell classes apart."""
    logits = first_output(model, images)
    return None if logits is None or logits.ndim < 2 or logits.shape[1] < 2 else logits.double()


def ensemble_logits(models: Sequence[nn.Module], weights: Sequence[float], images: Tensor) -> Tensor | None:
    """The weighted mean logits of all models, ``(N, classes, ...)``; ``None`` if one has no logits."""
    each = [class_logits(model, images) for model in models]
    shares = [weight * logits for weight, logits in zip(weights, each, strict=True) if logits is not None]
    return torch.stack(shares).sum(0) if len(shares) == len(each) else None


def ensemble_classes(models: Sequence[nn.Module], weights: Sequence[float], images: Tensor) -> Tensor | None:
    """The class with the largest weighted mean logit of all models; ``None`` if one has no logits."""
    logits = ensemble_logits(models, weights, images)
    return None if logits is None else logits.argmax(1)


@dataclass(frozen=True)
class Judgement:
    """How near a model comes to its sources' ensemble, image by image, ``(N,)``.

    ``agreed`` is 1 where both have the same largest logit, else 0; for several answers per image, as in segmentation,
    the share of those. ``crossed`` is the cross-entropy of the model's probabilities to the ensemble's, in nats.
    """

    agreed: Tensor
    crossed: Tensor

    @property
    def agreement(self) -> float:
        """The mean of ``agreed``."""
        return float(self.agreed.mean())

    @property
    def cross_entropy(self) -> float:
        """The mean of ``crossed``; infinite where the model returns NaN."""
        return float(self.crossed.nan_to_num(nan=float("inf")).mean())

    def as_good_as(self, other: Judgement) -> bool:
        """Whether ``other`` agrees on no more images than chance explains: by one standard error of the difference.

        Both have seen the same images, so those on which they fare alike say nothing. If chance alone decided the
        others, each as likely to speak for one as for the other, the difference would vary by the root of its squares'
        sum (McNemar, "Note on the sampling error of the difference between correlated proportions", 1947).
        """
        ahead = other.agreed - self.agreed
        return float(ahead.sum()) <= float(ahead.square().sum().sqrt())


Known: TypeAlias = dict[tuple[float, ...], Tensor]
"""Logits of an ensemble by what tells a batch from others: the sum of each of its images, or all of its tokens."""


@torch.no_grad()
def judge(
    model: nn.Module,
    sources: Sequence[nn.Module],
    weights: Sequence[float],
    batches: Iterable[Tensor],
    known: Known | None = None,
) -> Judgement | None:
    """Hold a model against the weighted ensemble of its sources; ``None`` if one of them returns no logits.

    ``known`` keeps the ensemble's logits for the next model, so that its sources need not run again.
    """
    agreed: list[Tensor] = []
    crossed: list[Tensor] = []
    for images in batches:
        logits, ensemble = class_logits(model, images), _known_logits(sources, weights, images, known)
        if logits is None or ensemble is None:
            return None
        same = (logits.argmax(1) == ensemble.argmax(1)).double()
        shares = ensemble.softmax(1)
        loss = -torch.where(shares > 0, shares * logits.log_softmax(1), 0).sum(1)  # of masked classes, 0 * -inf
        agreed.append(same.flatten(1).mean(1) if same.ndim > 1 else same)
        crossed.append(loss.flatten(1).mean(1) if loss.ndim > 1 else loss)
    return Judgement(torch.cat(agreed), torch.cat(crossed))


def _known_logits(
    models: Sequence[nn.Module], weights: Sequence[float], images: Tensor, known: Known | None
) -> Tensor | None:
    told = images.flatten() if are_tokens(images) else images.flatten(1).sum(1, dtype=torch.float64)
    key = () if known is None else tuple(told.tolist())
    found = ensemble_logits(models, weights, images) if known is None or key not in known else known[key]
    if known is not None and found is not None and found.ndim == 2:  # those of every pixel would take much memory
        known[key] = found
    return found


def best_of(judgements: Mapping[K, Judgement], unproven: Collection[K] = ()) -> K:
    """The one of lowest cross-entropy among those that agree as often as the one that does most often.

    Of equals the first is taken; of those that are as good as equal (:data:`TIE`) one that is not ``unproven``.

    >>> by_luck = Judgement(torch.tensor([1.0, 1, 1, 1]), torch.tensor([0.9, 0.8, 0.9, 0.8]))
    >>> sure = Judgement(torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.1, 0.1, 0.1, 0.7]))
    >>> best_of({"by luck": by_luck, "sure": sure})
    'sure'
    >>> best_of({"by maps": sure, "by luck": by_luck, "the same": sure}, unproven=["by maps"])
    'the same'
    """
    most = max(judgements.values(), key=lambda judgement: judgement.agreement)
    near = [name for name, judgement in judgements.items() if judgement.as_good_as(most)]
    crossed = {name: judgements[name].cross_entropy for name in near}
    least = min(crossed.values())
    proven = [name for name in near if name not in unproven and crossed[name] <= (1 + TIE) * least]
    return min(proven or near, key=lambda name: crossed[name])

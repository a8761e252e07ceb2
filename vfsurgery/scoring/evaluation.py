"""Accuracy and loss of models and of their logit ensemble.

Everything here only reads: weights, buffers, training mode and random state of what goes in come back as they were,
also when something fails. Nothing is read from the device until a pass is over, so a GPU is never kept waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vfsurgery.data.batches import Batches, Data, are_tokens
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import DataError, IncompatibleModelsError, OptionError, explain
from vfsurgery.stats.precision import accepted_dtype, batches_for
from vfsurgery.stats.threads import device_of
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.values import judged
from vfsurgery.tracing.wrappers import checked

ENSEMBLE = "ensemble"
"""Under this name :func:`compare` returns the score of the mean logits."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model classifies ``count`` images: ``accuracy`` from 0 to 1, ``loss`` the mean cross-entropy in nats.

    >>> print(Score(accuracy=0.8015, loss=0.5731, count=10000))
    80.15%, loss 0.5731, 10000 images
    """

    accuracy: float
    loss: float
    count: int

    def __str__(self) -> str:
        return f"{self.accuracy:.2%}, loss {self.loss:.4f}, {self.count} images"


def evaluate(model: nn.Module, data: Data, *, device: torch.device | str | None = None, progress: bool = True) -> Score:
    """Score one classifier on labelled data, in evaluation mode.

    Args:
        model: Returns logits of shape ``(N, classes)``, or a mapping, tuple or dataclass that has them first or
            under the name ``logits``, as :func:`~vfsurgery.merge` judges.
        data: Batches ``(images, labels)``; see :mod:`vfsurgery.data.batches`.
        device: Where to compute; ``None`` means where the model is. A model elsewhere is copied, not moved.
        progress: Show a bar when it takes over a second.

    Raises:
        DataError: The data is empty, unlabeled, of the wrong shape, or has labels outside the model's classes.
        OptionError: The model is none but a path or a state dict, or does not return logits.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> evaluate(model, [(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]))]).accuracy
    0.5
    """
    return score_together([model], None, data, device, progress)[0]


def evaluate_ensemble(
    models: Sequence[nn.Module],
    data: Data,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Score:
    """Score the ensemble of ``models``: the mean of their logits, weighted by ``weights`` where given.

    Raises:
        OptionError: There is no model, or the weights do not match the models or do not sum to one.
        IncompatibleModelsError: The models return logits of different shapes.
        DataError: As for :func:`evaluate`.
    """
    return score_together(models, _ensemble_weights(models, weights), data, device, progress)[-1]


def compare(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """Score every model and, under ``"ensemble"``, their mean logits, reading the data once.

    Raises:
        OptionError: A model is named ``"ensemble"``, or as for :func:`evaluate_ensemble`.

    >>> a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> list(compare({"a": a, "b": b}, (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))))
    ['a', 'b', 'ensemble']
    """
    if ENSEMBLE in models:
        raise OptionError(explain(f"a model is named {ENSEMBLE!r}", remedy="that is the mean of all; rename the model"))
    sources = list(models.values())
    scores = score_together(sources, _ensemble_weights(sources, weights), data, device, progress)
    return dict(zip([*models, ENSEMBLE], scores, strict=True))


def _ensemble_weights(models: Sequence[nn.Module], weights: Sequence[float] | None) -> list[float]:
    weights = [1 / len(models)] * len(models) if weights is None and models else list(weights or ())
    if not models or len(weights) != len(models) or abs(sum(weights) - 1) > 1e-6:
        raise OptionError(
            explain(
                f"{len(weights)} weights {weights} do not average {len(models)} models",
                remedy="pass at least one model, and one weight per model, that sum to one",
            )
        )
    return weights


def score_together(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None,
    data: Data,
    device: torch.device | str | None,
    progress: bool,
) -> list[Score]:
    """One pass: a score per model and, if there are weights, one more for the weighted mean of the logits."""
    models = [checked(model) for model in models]
    device = torch.device(device) if device is not None else device_of(models[0])
    models = [model if device_of(model) == device else copied(model).to(device) for model in models]
    batches = Batches(data, device=device)
    tallies = [_Tally() for _ in range(len(models) + (weights is not None))]
    with eval_mode(*models):
        for images, labels in progress_bar(batches.labeled(), "evaluating", batches.length(), progress):
            outputs = [logits_of(model, images) for model in models]
            if weights is not None:
                outputs.append(_mean_logits(outputs, weights))
            for tally, logits in zip(tallies, outputs, strict=True):
                tally.add(logits, labels)
    return [tally.score() for tally in tallies]


class _Tally:
    """Per batch, on the device: correct answers, summed loss, and labels that no class can be."""

    def __init__(self) -> None:
        self.count = self.classes = 0
        self.correct: list[Tensor] = []
        self.loss: list[Tensor] = []
        self.strays: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits ``(N, classes)``, labels ``(N,)``."""
        self.count += len(labels)
        self.classes = logits.shape[1]
        known = labels.clamp(0, self.classes - 1)  # a stray label would abort the whole CUDA context
        self.strays.append((known != labels).sum())
        self.correct.append((logits.argmax(1) == labels).sum())
        self.loss.append(functional.cross_entropy(logits, known, reduction="sum"))

    def score(self) -> Score:
        """Read the device, once."""
        strays, correct, loss = (
            torch.stack(column).to("cpu", torch.float64).sum().item()
            for column in (self.strays, self.correct, self.loss)
        )
        if strays:
            raise DataError(
                explain(
                    f"{int(strays)} of {self.count} labels are outside the model's {self.classes} classes",
                    expected=f"class indices from 0 to {self.classes - 1}",
                    remedy="use the labels that the model was trained with",
                )
            )
        return Score(accuracy=correct / self.count, loss=loss / self.count, count=self.count)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Run the model in its own dtype and return float logits, shape ``(N, classes)``."""
    try:
        output: object = model(images if are_tokens(images) else images.to(accepted_dtype(model, images[:1])))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DataError(
            explain("the model cannot take these images", images=tuple(images.shape), cause=str(error).split("\n")[0])
        ) from error
    logits = judged(output)
    if logits is None or logits.ndim != 2 or len(logits) != len(images):
        found = f"shape {tuple(logits.shape)}" if logits is not None else type(output).__name__
        raise OptionError(
            explain(f"{type(model).__name__} does not return logits", found=found, expected=f"({len(images)}, classes)")
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_logits(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    classes = [output.shape[1] for output in outputs]
    if len(set(classes)) > 1:
        raise IncompatibleModelsError(
            explain("the models of an ensemble tell different numbers of classes apart", classes=classes)
        )
    return sum((weight * logits for weight, logits in zip(weights, outputs, strict=True)), torch.zeros_like(outputs[0]))


def first_images(model: nn.Module, data: Data) -> Tensor:
    """Two images on the model's device and in its dtype, to trace it with."""
    images, _ = next(iter(batches_for(model, data, device_of(model))))
    return images[:2]

"""Negative flips: what a new model gets wrong that an old one got right.

Two models of equal accuracy may err on different images, and whoever replaces one by the other notices those that have
become wrong (Yan et al., "Positive-Congruent Training", 2021). Here the sources are the old models, and the merged,
partly merged or pruned network is the new one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.scoring.evaluation import logits_of
from vfsurgery.shown import Shown
from vfsurgery.stats.threads import device_of
from vfsurgery.tracing.sources import eval_mode

ALL_RIGHT = "where all were right"
"""Name of the row over the images that every old model classified rightly."""


@dataclass(frozen=True, slots=True)
class FlipRates:
    """How the answers of a new model differ from an old one's on ``count`` labelled images; counts of images.

    ``negative`` counts right answers that became wrong, ``positive`` wrong ones that became right. A rate whose
    denominator is 0 is NaN.

    >>> rates = FlipRates("a", count=10, old_wrong=4, new_wrong=5, positive=1, negative=2)
    >>> rates.negative_rate, rates.positive_rate, rates.negative_impact, round(rates.relative_negative_rate, 4)
    (0.2, 0.1, 0.4, 0.6667)
    """

    old: str
    count: int
    old_wrong: int
    new_wrong: int
    positive: int
    negative: int

    @property
    def old_error(self) -> float:
        """Share of images that the old model gets wrong."""
        return _share(self.old_wrong, self.count)

    @property
    def new_error(self) -> float:
        """Share of images that the new model gets wrong."""
        return _share(self.new_wrong, self.count)

    @property
    def positive_rate(self) -> float:
        """PFR: share of images that were wrong and are right. ``Acc_new - Acc_old = PFR - NFR``."""
        return _share(self.positive, self.count)

    @property
    def negative_rate(self) -> float:
        """NFR: share of images that were right and are wrong."""
        return _share(self.negative, self.count)

    @property
    def relative_negative_rate(self) -> float:
        """NFR over what it would be if the models erred independently (Yan et al., 2021, Eq. 11)."""
        return relative_negative_rate(self.negative_rate, self.old_error, self.new_error)

    @property
    def negative_impact(self) -> float:
        """NFI, ``NFR / ER_new``: share of the new model's errors that are flips (Cai et al., 2022)."""
        return _share(self.negative, self.new_wrong)

    def to_dict(self) -> dict[str, Any]:
        """Counts and rates; a rate that is not defined is ``None``."""
        counts = {
            name: getattr(self, name) for name in ("old", "count", "old_wrong", "new_wrong", "positive", "negative")
        }
        rates = {
            name: getattr(self, name)
            for name in ("positive_rate", "negative_rate", "relative_negative_rate", "negative_impact")
        }
        return {**counts, **{name: None if math.isnan(rate) else rate for name, rate in rates.items()}}


@dataclass(frozen=True, slots=True)
class Flips(Shown):
    """What :func:`flips` found: one row per old model; print it for a table.

    ``all_right`` is the row over only those images that all old models got right.
    """

    rates: tuple[FlipRates, ...]
    all_right: FlipRates

    @property
    def rows(self) -> tuple[FlipRates, ...]:
        """All rows; with one old model, the one over all images says everything."""
        return self.rates if len(self.rates) == 1 else (*self.rates, self.all_right)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rates": [rates.to_dict() for rates in self.rates], "all_right": self.all_right.to_dict()}

    def __str__(self) -> str:
        return "\n".join(_table(self))


def relative_negative_rate(negative_rate: float, old_error: float, new_error: float) -> float:
    """``NFR / ((1 - ER_old) ER_new)``: 1 where errors are independent, 0 without flips, NaN where none can be.

    >>> round(relative_negative_rate(0.0644, 0.3024, 0.3029), 4)
    0.3048
    """
    expected = (1 - old_error) * new_error
    return negative_rate / expected if expected else math.nan


def flips(
    old: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module], new: nn.Module, data: Data, *, progress: bool = True
) -> Flips:
    """Count the images whose answer turns wrong, or right, when ``new`` takes the place of ``old``.

    Args:
        old: One model or several, such as the sources of a merge; a mapping names them.
        new: The model that takes their place.
        data: Labelled batches, read once; see :mod:`vfsurgery.data.batches`.
        progress: Show a bar when it takes over a second.

    Raises:
        OptionError: there is no old model, or a model returns no logits.
        DataError: the data is empty, unlabeled, of the wrong shape, or has labels outside a model's classes.

    >>> old, new = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> old.weight.data, new.weight.data = torch.eye(2), -torch.eye(2)
    >>> found = flips(old, new, (torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])))
    >>> found.rates[0].negative_rate, found.rates[0].positive_rate
    (0.5, 0.5)
    """
    named = _named(old)
    models = [*named.values(), new]
    home = device_of(new)
    right: list[Tensor] = []
    strays = torch.zeros(len(models), dtype=torch.int64, device=home)
    batches = Batches(data, device=home)
    with eval_mode(*models):
        for images, labels in progress_bar(batches.labeled(), "flips", batches.length(), progress):
            outputs = [logits_of(model, images.to(device_of(model))).to(home) for model in models]
            right.append(torch.stack([logits.argmax(1) == labels for logits in outputs]))
            strays += torch.stack([((labels < 0) | (labels >= logits.shape[1])).sum() for logits in outputs])
    _refuse_strays(strays.tolist(), models)  # read once, so that no device is kept waiting between batches
    *olds, new_right = torch.cat(right, dim=1).cpu()
    everywhere = torch.stack(olds).all(0)
    rates = tuple(_rates(name, right, new_right) for name, right in zip(named, olds, strict=True))
    return Flips(rates, _rates(ALL_RIGHT, everywhere[everywhere], new_right[everywhere]))


def _named(old: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    if isinstance(old, nn.Module):
        return {"old": old}
    if not isinstance(old, Mapping):
        old = {f"source {number}": model for number, model in enumerate(old)}
    if not old:
        raise OptionError(explain("there is no old model to compare with", remedy="pass a model, or a list of them"))
    return old


def _refuse_strays(counts: Sequence[int], models: Sequence[nn.Module]) -> None:
    for count, model in zip(counts, models, strict=True):
        if count:
            raise DataError(
                explain(
                    f"{count} labels are outside the classes of {type(model).__name__}",
                    remedy="use the labels that the models were trained with",
                )
            )


def _rates(name: str, old_right: Tensor, new_right: Tensor) -> FlipRates:
    negative, positive = old_right & ~new_right, ~old_right & new_right
    wrong = (~old_right).sum(), (~new_right).sum()
    return FlipRates(name, len(old_right), *(int(count) for count in (*wrong, positive.sum(), negative.sum())))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _table(found: Flips) -> Iterator[str]:
    width = max(len(rates.old) for rates in found.rows)
    yield f"  {'':<{width}}  images  negative  positive  relative negative  share of new errors"
    for rates in found.rows:
        yield (
            f"  {rates.old:<{width}}{rates.count:>8}{rates.negative_rate:>10.2%}{rates.positive_rate:>10.2%}"
            f"{rates.relative_negative_rate:>19.3f}{rates.negative_impact:>21.2%}"
        )

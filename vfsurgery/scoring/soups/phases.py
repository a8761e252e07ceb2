"""Sparse model soups in phases: prune, retrain several copies with the mask fixed, average them, and prune on.

Zimmer et al., "Sparse Model Soups" (ICLR 2024), Algorithm 1. Of the weights that remain, each of ``T`` phases prunes a
share ``p = 1 - (1 - s)^(1/T)``, so that ``1 - (1 - p)^t`` of all are pruned after phase ``t`` and ``s`` at the end. All
copies of a phase have one mask, and so has their average. With a single copy it is iterative magnitude pruning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from vfsurgery.data.batches import BATCH_SIZE, Data
from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.mask import check_zeros
from vfsurgery.pruning import Masks, Pruner, prune
from vfsurgery.pruning.layers import prunable
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.scoring.soups.averaging import soup
from vfsurgery.tracing.copies import copied
from vfsurgery.training import train

CALIBRATION = 0.2
"""Share of the training data, from its start, that BatchNorm layers of a soup are recalibrated on."""
SEEDS = 100
"""Seeds of one phase are so far from those of the next."""


@dataclass(frozen=True)
class Retraining:
    """How every copy is retrained in a phase; options of :func:`vfsurgery.training.train`.

    Copies differ in their seed, which orders the images. With several values of ``weight_decay``, one per copy, they
    differ in that alone.
    """

    epochs: int = 10
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float | tuple[float, ...] = 5e-4
    shape: Literal["cycle", "linear"] = "linear"
    augment: bool = False

    def of_copy(self, number: int) -> dict[str, Any]:
        """Arguments for the copy of this number; ``seed`` counts from that of its phase."""
        options = dataclasses.asdict(self)
        if isinstance(self.weight_decay, Sequence):
            return {**options, "weight_decay": self.weight_decay[number], "seed": 0}
        return {**options, "seed": number}


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase: sparsity reached, and accuracies (0 to 1) on the validation data.

    ``pruned`` is that of the last soup as it comes from the pruner, ``copies`` those of the retrained copies, ``plain``
    that of a single copy in a chain of its own, where that was asked for.
    """

    sparsity: float
    pruned: float
    copies: tuple[float, ...]
    soup: float
    plain: float | None = None


@dataclass(frozen=True)
class SparseSoup:
    """What :func:`sparse_soup` made: the last soup, its mask, and a table per phase; print it for that.

    ``dense`` is the accuracy of the model that all began with; ``plain`` the model that a single copy led to.
    """

    model: nn.Module
    masks: Masks
    dense: float
    phases: tuple[Phase, ...]
    plain: nn.Module | None
    seconds: float

    @property
    def rows(self) -> dict[str, float]:
        """The accuracies of all phases by labels as :func:`rows_of` has them; NaN where nothing was measured."""
        found: dict[str, float] = {}
        for number, phase in enumerate(self.phases, start=1):
            found |= {f"phase {number} pruned": phase.pruned, f"phase {number} soup": phase.soup}
            found |= {f"phase {number} copy {copy}": accuracy for copy, accuracy in enumerate(phase.copies)}
            found[f"phase {number} one copy"] = math.nan if phase.plain is None else phase.plain
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but models and masks, as plain JSON values."""
        phases = [dataclasses.asdict(phase) for phase in self.phases]
        return json.loads(json.dumps({"dense": self.dense, "phases": phases, "seconds": self.seconds}))

    def __str__(self) -> str:
        copies = max(len(phase.copies) for phase in self.phases)
        header = f"{'sparsity':>10}{'pruned':>10}"
        header += "".join(f"{f'copy {number}':>10}" for number in range(copies)) + f"{'soup':>10}"
        header += f"{'one copy':>10}" if self.plain is not None else ""
        lines = [
            f"dense {self.dense:.2%}; accuracy in each of {len(self.phases)} phases, {self.seconds:.0f} s",
            header,
        ]
        for phase in self.phases:
            accuracies = [phase.pruned, *phase.copies, phase.soup, *([] if phase.plain is None else [phase.plain])]
            lines.append("".join(f"{share:>10.2%}" for share in (phase.sparsity, *accuracies)))
        return "\n".join(lines)


def rows_of(phases: int, copies: int) -> list[str]:
    """Labels of all accuracies that :func:`sparse_soup` measures.

    >>> rows_of(1, 2)
    ['phase 1 pruned', 'phase 1 copy 0', 'phase 1 copy 1', 'phase 1 soup', 'phase 1 one copy']
    """
    each = ("pruned", *(f"copy {number}" for number in range(copies)), "soup", "one copy")
    return [f"phase {number} {name}" for number in range(1, phases + 1) for name in each]


def sparse_soup(
    model: nn.Module,
    train_data: Dataset[Any],
    data: Data,
    *,
    sparsity: float,
    phases: int = 3,
    copies: int = 3,
    retraining: Retraining | None = None,
    method: str | Pruner = "magnitude",
    scope: Literal["global", "layer", "row"] = "global",
    exclude: str | Sequence[str] = (),
    greedy: bool = False,
    calibration: Data | None = None,
    plain: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> SparseSoup:
    """Prune a trained model in phases, each of which retrains several copies with one mask and averages them.

    Args:
        model: A trained classifier, trained on where it is; left as it was.
        train_data: Yields (image, label), for retraining.
        data: Labelled validation images, for the table and for greedy soups.
        sparsity: Share of the prunable weights that is zero at the end, in [0, 1).
        phases: How often to prune; every phase prunes the same share of what remains.
        copies: Models that are retrained in each phase; 1 is iterative magnitude pruning.
        retraining: Epochs, learning rate and so on, and what the copies differ in. The learning rate has to be so low
            that copies stay in one basin: if the soup is far below its copies, it is too high.
        method: As for :func:`~vfsurgery.prune`, a pruner that needs no data.
        scope: As for :func:`~vfsurgery.prune`; ``"layer"`` gives all layers one sparsity.
        exclude: Layers to leave dense, as for :func:`~vfsurgery.prune`.
        greedy: Whether copies have to earn their place in the soup, by their accuracy on ``data``.
        calibration: Images to recalibrate BatchNorm layers of soups on; by default the first fifth of ``train_data``.
        plain: Whether to prune with a single copy as well, to compare with; it trains ``1 / copies`` as much.
        seed: All seeds of retraining follow from it.
        progress: Show a bar when it takes over a second.

    Returns:
        The last soup, a module of the model's class, with one table for all phases.

    Raises:
        OptionError: an argument is not acceptable.
        DataError: data is missing, empty or without labels.

    >>> from vfsurgery.data import digits
    >>> from vfsurgery.networks.demo import TinyConvNet
    >>> splits = digits()
    >>> brief = Retraining(epochs=1)
    >>> options = {"phases": 2, "copies": 2, "retraining": brief, "plain": False, "progress": False}
    >>> found = sparse_soup(TinyConvNet(width=2), splits.train, splits.calibration, sparsity=0.75, **options)
    >>> [round(phase.sparsity, 2) for phase in found.phases]
    [0.5, 0.75]
    """
    started = time.perf_counter()
    retraining = retraining or Retraining()
    _check(sparsity, phases, copies, retraining)
    images = _first_part(train_data) if calibration is None else calibration
    pruning = {"method": method, "scope": scope, "exclude": exclude}
    run = _Run(train_data, data, images, retraining, pruning, greedy, seed, progress)
    mixed = chain = model
    done: list[Phase] = []
    for number in range(1, phases + 1):
        reached = 1 - (1 - sparsity) ** (number / phases)
        pruned, retrained = run.phase(mixed, number, reached, copies)
        if plain:  # the first copy of the first phase is where a single one would be
            chain = retrained[0] if number == 1 else run.phase(chain, number, reached, 1)[1][0]
        mixed = run.mix(pruned, retrained)
        accuracies = [run.accuracy(one) for one in (pruned, *retrained, mixed, *([chain] if plain else []))]
        own = accuracies[1 : copies + 1]
        share = Masks.of(mixed, exclude).sparsity
        done.append(Phase(share, accuracies[0], tuple(own), accuracies[copies + 1], accuracies[-1] if plain else None))
    dense, seconds = run.accuracy(model), time.perf_counter() - started
    return SparseSoup(mixed, Masks.of(mixed, exclude), dense, tuple(done), chain if plain else None, seconds)


@dataclass(frozen=True)
class _Run:
    """What all phases have in common."""

    train_data: Dataset[Any]
    data: Data
    calibration: Data
    retraining: Retraining
    pruning: dict[str, Any]
    greedy: bool
    seed: int
    progress: bool

    def phase(self, model: nn.Module, number: int, sparsity: float, copies: int) -> tuple[nn.Module, list[nn.Module]]:
        """The model pruned further, and copies of that retrained with its mask."""
        pruned = prune(model, sparsity, seed=self.seed, progress=self.progress, **self.pruning)
        masks = Masks.of(pruned, self.pruning["exclude"])
        retrained: list[nn.Module] = []
        for one in range(copies):
            options = self.retraining.of_copy(one)
            options["seed"] += self.seed + SEEDS * number
            label = f"phase {number}, copy {one}"
            retrained.append(
                train(copied(pruned), self.train_data, masks=masks, label=label, progress=self.progress, **options)
            )
        return pruned, retrained

    def mix(self, pruned: nn.Module, retrained: Sequence[nn.Module]) -> nn.Module:
        """The soup of retrained copies; a single one is its own.

        Plain averaging (``"union"``): where one copy happens to come to an exact zero, the others decide.
        """
        if len(retrained) == 1:
            return retrained[0]
        options: dict[str, Any] = {"mask": "union", "calibration": self.calibration, "progress": self.progress}
        mixed = soup(retrained, data=self.data if self.greedy else None, greedy=self.greedy, **options)
        zeros = {name: weight == 0 for name, weight in prunable(pruned, self.pruning["exclude"]).items()}
        check_zeros(prunable(mixed), zeros, "the soup")
        return mixed

    def accuracy(self, model: nn.Module) -> float:
        """On the validation data, 0 to 1."""
        return evaluate(model, self.data, progress=False).accuracy


def _first_part(train_data: Dataset[Any]) -> DataLoader[Any]:
    """The first images of the training data, in their order; a last batch of few would have poor statistics."""
    count = len(cast("Sized", train_data))
    part = max(1, round(CALIBRATION * count))
    return DataLoader(Subset(train_data, range(part)), BATCH_SIZE, drop_last=part > BATCH_SIZE)


def _check(sparsity: float, phases: int, copies: int, retraining: Retraining) -> None:
    if not 0 <= sparsity < 1:
        raise OptionError(explain(f"sparsity must lie in [0, 1) but is {sparsity}", remedy="0.9 prunes 90 %"))
    for name, count in (("phases", phases), ("copies", copies), ("epochs", retraining.epochs)):
        if count < 1:
            raise OptionError(explain(f"{name} must be at least 1, got {count}"))
    decays = retraining.weight_decay
    if isinstance(decays, Sequence) and len(decays) != copies:
        raise OptionError(
            explain(
                f"{len(decays)} values of weight_decay were given for {copies} copies",
                remedy="one value for all copies, or one for each",
            )
        )

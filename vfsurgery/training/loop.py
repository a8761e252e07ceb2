"""A seeded training loop that can be cut off and goes on: two calls with two seeds give a pair to merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vfsurgery.data.augmentation import crop_and_flip
from vfsurgery.data.batches import check_labels, row_major
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import DataError, OptionError, did_you_mean, explain
from vfsurgery.pruning import Masks
from vfsurgery.training.resuming import Progress

OptimizerName: TypeAlias = Literal["sgd", "adamw"]
"""SGD with momentum, or AdamW, which transformers need."""

Shape: TypeAlias = Literal["cycle", "linear"]
RISE = 0.1
"""Share of the steps in which a linear learning rate rises."""
WARMUP_START = 1e-6
"""Learning rate of the first step of a warm-up, as in the paper's trainings."""


def from_seed(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model whose random initialization depends on ``seed`` alone; torch's random state is left as it was.

    >>> a, b = from_seed(lambda: nn.Linear(2, 2), 7), from_seed(lambda: nn.Linear(2, 2), 7)
    >>> torch.equal(a.weight, b.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return factory()


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = True,
    milestones: Sequence[int] | None = None,
    warmup: int = 0,
    shape: Shape = "cycle",
    masks: Masks | None = None,
    augment: bool = False,
    checkpoint: str | Path | None = None,
    label: str = "training",
    progress: bool = True,
) -> nn.Module:
    """Train a classifier in place on the cross-entropy: SGD or AdamW, one cycle of the learning rate, a ramp, or steps.

    Args:
        model: Maps images (N, ...) to logits (N, classes); trained where its parameters are.
        dataset: Yields (image, label).
        epochs: Passes over the data.
        lr: Highest learning rate. In a cycle, the default, it is reached after 30% of the steps.
        seed: Decides the order of the images; the same seed gives the same weights on the same machine.
        batch_size: Images per step.
        optimizer: What takes the steps.
        momentum: Of SGD; of AdamW the first beta, the second is 0.999.
        weight_decay: Of either optimizer.
        nesterov: Whether the momentum of SGD is Nesterov's.
        milestones: Steps after which the learning rate falls to a tenth, in place of the cycle; none keep it constant.
        warmup: Epochs in which it first rises from 1e-6 to ``lr``, with ``milestones`` only.
        shape: Of the learning rate without ``milestones``: one ``"cycle"``, or ``"linear"``, which rises over the first
            tenth of the steps and falls to zero, as for retraining pruned networks.
        masks: What of a pruned model stays zero, whatever its gradients, momentum and weight decay are: it is set to
            zero before the first step and after each one.
        augment: Whether images are shifted and mirrored at random, see
            :func:`~vfsurgery.data.augmentation.crop_and_flip`.
        checkpoint: A file that keeps the state of the training after every epoch. Where it exists, the training goes
            on from there, to the weights that it would have come to without a break.
        label: Stands before the progress bar.
        progress: Whether to show one.

    Returns:
        ``model``, in evaluation mode.

    Raises:
        DataError: The data set is empty, or has labels that are no class of the model.
        IncompatibleModelsError: The masks are of another architecture.
        OptionError: There is no such ``shape``, or pruning hooks compute a masked weight.
        CheckpointError: ``checkpoint`` is damaged, belongs to another training, or cannot be written.
    """
    if not len(cast("Sized", dataset)):
        raise DataError(explain("the training data is empty"))
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=order)
    setting = f"{seed=} {epochs=} {lr=} {batch_size=} {momentum=} {weight_decay=} {nesterov=} {milestones=} {warmup=} "
    setting += f"{augment=}, {len(loader)} batches" + f", {optimizer=}" * (optimizer != "sgd")
    setting += f", {shape=}" * (shape != "cycle")
    setting += "" if masks is None else f", {masks.sparsity:.6f} pruned"
    if optimizer == "adamw":
        steps = torch.optim.AdamW(model.parameters(), lr, (momentum, 0.999), weight_decay=weight_decay)
    else:
        steps = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=nesterov)
    schedule = _schedule(steps, lr, epochs * len(loader), milestones, warmup * len(loader), shape)
    parts = {"model": model, "optimizer": steps, "schedule": schedule}
    state = Progress(parts, order, setting)
    done = 0 if checkpoint is None else state.load(Path(checkpoint))
    first = next(model.parameters())

    def epoch_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(done, epochs):
            yield from loader
            if checkpoint is not None:
                state.save(Path(checkpoint), epoch + 1)

    hold = (lambda: None) if masks is None else masks.holder(model)
    hold()
    model.train()
    for images, labels in progress_bar(epoch_batches(), label, (epochs - done) * len(loader), progress):
        steps.zero_grad()
        images = crop_and_flip(images, order) if augment else images
        logits = model(row_major(images.to(first.device, first.dtype)))
        check_labels(labels, logits)
        F.cross_entropy(logits, labels.to(first.device)).backward()
        steps.step()
        hold()
        schedule.step()
    return model.eval()


def _schedule(
    optimizer: torch.optim.Optimizer,
    lr: float,
    steps: int,
    milestones: Sequence[int] | None,
    warmup: int,
    shape: Shape = "cycle",
) -> torch.optim.lr_scheduler.LRScheduler:
    """One cycle or a ramp over all steps, or a linear rise over ``warmup`` steps and a tenth after every milestone."""
    if shape not in get_args(Shape):
        raise OptionError(explain(f"shape={shape!r} is unknown", remedy=did_you_mean(str(shape), get_args(Shape))))
    if milestones is None and shape == "linear":
        peak = max(1, round(RISE * steps))
        ramp = lambda step: min((step + 1) / peak, (steps - step) / max(1, steps - peak))  # noqa: E731
        return torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    if milestones is None:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)

    def factor(step: int) -> float:
        start = WARMUP_START / lr
        rise = start + (1 - start) * step / warmup if step < warmup else 1.0
        return rise * 0.1 ** sum(step >= milestone for milestone in milestones)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

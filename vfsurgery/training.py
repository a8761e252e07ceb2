"""A small seeded training loop, for demonstrations and tests: two calls with two seeds give a pair to merge."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vfsurgery.batches import progress as progress_bar
from vfsurgery.errors import DataError, explain


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
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label: str = "training",
    progress: bool = True,
) -> nn.Module:
    """Train a classifier in place: SGD with Nesterov momentum, one learning-rate cycle, cross-entropy.

    Args:
        model: Maps images (N, ...) to logits (N, classes); trained where its parameters are.
        dataset: Yields (image, label).
        epochs: Passes over the data.
        lr: Highest learning rate, reached after 30% of the steps.
        seed: Decides the order of the images; the same seed gives the same weights on the same machine.
        batch_size: Images per step.
        momentum: Of SGD.
        weight_decay: Of SGD.
        label: Stands before the progress bar.
        progress: Whether to show one.

    Returns:
        ``model``, in evaluation mode.

    Raises:
        DataError: The data set is empty.
    """
    if not len(cast("Sized", dataset)):
        raise DataError(explain("the training data is empty"))
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=True)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    device = next(model.parameters()).device
    model.train()
    epoch_batches = (batch for _ in range(epochs) for batch in loader)
    for images, labels in progress_bar(epoch_batches, label, total=steps, enabled=progress):
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()

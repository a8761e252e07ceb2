"""Backward passes see images with the strides of a new tensor, whatever those of the user's images are.

Of others torch's oneDNN convolutions write outside their memory on some CPUs; the test looks at strides alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from vfsurgery.pruning.gradients import Gradients
from vfsurgery.training.loop import train


class Witness(nn.Module):
    """Keeps the strides of what it is shown, ahead of a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels * 16, 2)
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(images.stride())
        return self.fc(images.flatten(1))


@pytest.fixture(params=[1, 3], ids=["gray", "colour"])
def photographs(request) -> tuple[Tensor, Tensor]:
    """Images as pictures lie in memory, channels last, turned to (N, C, H, W) by a view."""
    return torch.rand(8, 4, 4, request.param).permute(0, 3, 1, 2), torch.arange(8) % 2


@pytest.mark.parametrize("augment", [False, True])
def test_training(photographs, augment):
    images, labels = photographs
    model = Witness(images.shape[1])
    train(model, TensorDataset(images, labels), epochs=1, lr=0.1, seed=0, batch_size=4, augment=augment, progress=False)
    assert model.seen == {torch.empty(images.shape).stride()}


def test_gradients_of_scores(photographs):
    images, labels = photographs
    model = Witness(images.shape[1])
    list(Gradients(model, [(images, labels)], samples=2, batch=4).each(["fc.weight"]))
    assert model.seen == {torch.empty(images.shape).stride()}


def test_images_as_they_come_have_other_strides(photographs):
    images, _ = photographs
    assert images.stride() != torch.empty(images.shape).stride()

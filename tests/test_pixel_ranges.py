"""Which range of pixels a network was trained on, told by its BatchNorm layers where no configuration says it."""

from __future__ import annotations

import pytest
import torch
from tiny_nets import images, net, state_of
from torch import Tensor, nn

from vfsurgery.data.procedural import Leaves, Pixels
from vfsurgery.stats.imagined.ranges import RANGES, trained_range

STANDARD = Pixels.standard(3)
X = images(2)


def photographs(low: float, high: float) -> Tensor:
    """Stand-ins for them: another family of leaves in a range."""
    shapes = Leaves(shapes=60, smallest=0.1, largest=0.4)
    drawn = shapes.draw(64, (3, 12, 12), torch.Generator().manual_seed(7), STANDARD)
    return ((drawn / 5 + 0.5) * (high - low) + low).clamp(low, high)


def trained_on(pixels: Tensor) -> nn.Module:
    """A network whose BatchNorm layers have the statistics of these pixels."""
    model = net("residual", 1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()(pixels)
    return model.eval()


@pytest.mark.parametrize("name", RANGES)
def test_common_ranges_are_told(name: str) -> None:
    low, high = RANGES[name]
    model = trained_on(photographs(low, high))
    before = state_of(model)
    pixels, reason = trained_range(model, X, STANDARD)
    assert pixels.low == (low,) * 3 and pixels.high == (high,) * 3
    assert reason.startswith(f"pixels from {name}: ")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_standardized_images_are_the_rule() -> None:
    assert trained_range(trained_on(2.5 * photographs(-1, 1)), X, STANDARD) == (STANDARD, "")
    assert trained_range(net("grouped", 1), X, STANDARD) == (STANDARD, "")  # nothing remembers anything


def test_a_configuration_is_believed() -> None:
    model = trained_on(photographs(0, 255))
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[assignment]
    assert trained_range(model, X, STANDARD) == (STANDARD, "")


def test_what_layers_do_not_remember_tells_nothing() -> None:
    model = trained_on(photographs(0, 255))
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.fill_(1.0)
    pixels, _ = trained_range(model, X, STANDARD)
    assert pixels.high != (255.0,) * 3

"""The groups of well-known architectures: as text under goldens/groups, and proven by numbers for many more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import (
    TOLERANCE,
    keep_signals_alive,
    outputs_of,
    randomize,
    relative_error,
)
from vfsurgery.groups import permute_tensor, random_permutations
from vfsurgery.tracing.sources import canonical_state

PRINTED = [
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "squeezenet1_1", "mobilenet_v3_small",
    "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "vit_b_16", "swin_t",
]  # fmt: skip
PROVEN = [
    "vgg11", "resnet18", "resnext50_32x4d", "densenet121", "squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small",
    "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "regnet_x_400mf",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
]  # fmt: skip
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in WITH_AUXILIARY_HEADS else {}
    return getattr(torchvision.models, name)(weights=None, **options)


def without_memory(name: str) -> nn.Module:
    """The model on the meta device; torchvision's RegNets compute sizes with tensors and need the real one first."""
    if name.startswith("regnet"):
        return build(name).to("meta")
    with torch.device("meta"):
        return build(name)


@pytest.mark.parametrize("name", PRINTED)
def test_groups_are_as_reviewed(name: str, golden: Callable[[str, str], None]) -> None:
    groups = surgery.find_groups(without_memory(name), torch.empty(2, 3, 224, 224, device="meta"), strict=True)
    golden(f"groups/{name}.txt", f"{groups.listing()}\n")


@pytest.mark.zoo
@pytest.mark.parametrize("name", PROVEN)
def test_reordering_all_groups_changes_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = build(name).double().eval()
    side = 96 if name == "inception_v3" else 64
    inputs = (torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64),)
    randomize(model, generator)
    keep_signals_alive(model, inputs, generator)
    groups = surgery.find_groups(model, inputs, strict=True)
    state = canonical_state(model)
    expected = outputs_of(model, state, inputs)
    orders = random_permutations(groups, generator)
    permuted = {key: permute_tensor(key, tensor, groups, orders) for key, tensor in state.items()}
    error = relative_error(outputs_of(model, permuted, inputs), expected)
    assert error <= TOLERANCE[torch.float64]
    first = groups.groups[0].members[0].parameter
    control = relative_error(outputs_of(model, {**permuted, first: state[first]}, inputs), expected)
    assert control > 1e-6

"""The groups of well-known architectures: as text under goldens, and proven by numbers for many more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

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
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}


class Encoder(nn.Module):
    """torch's own transformer, norms first, on patches of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Conv2d(3, 24, 8, stride=8), nn.Linear(24, 5)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(24), enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(images).flatten(2).mT).mean(1))


SYMMETRIC: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(timm.create_model, "vit_tiny_patch16_224", **SIZES),
    "deit": partial(timm.create_model, "deit_tiny_distilled_patch16_224", **SIZES),
    "deit3": partial(timm.create_model, "deit3_small_patch16_224", **SIZES),
    "beit": partial(timm.create_model, "beit_base_patch16_224", **SIZES),
    "cait": partial(timm.create_model, "cait_xxs24_224", **SIZES),
    "xcit": partial(timm.create_model, "xcit_nano_12_p8_224", **SIZES),
    "eva02_rope": partial(timm.create_model, "eva02_tiny_patch14_224", **SIZES),
    "vit_rms_norm": partial(timm.create_model, "vit_tiny_patch16_224", norm_layer=nn.RMSNorm, **SIZES),
    "vit_qk_norm": partial(timm.create_model, "vit_tiny_patch16_224", qk_norm=True, **SIZES),
    "vit_clip": partial(timm.create_model, "vit_base_patch16_clip_224", **SIZES),
    "swin": partial(
        timm.create_model, "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=12,
        depths=(1, 1), num_heads=(1, 2), num_classes=5,
    ),
    "convnext": partial(
        timm.create_model, "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=5,
    ),
    "encoder": Encoder,
}  # fmt: skip
"""Small nets of the kinds whose units can be mapped by more than orders, and a ConvNeXt, whose cannot."""
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


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetries_are_as_reviewed_and_proven(name: str, golden: Callable[[str, str], None]) -> None:
    model, images = SYMMETRIC[name]().eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    groups = surgery.find_groups(model, images, strict=True)
    golden(f"symmetries/{name}.txt", f"{groups.listing()}\n")
    found = surgery.verify(model, groups, images)
    assert found and found.continuous == sum(group.symmetry.is_continuous for group in groups), str(found)


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

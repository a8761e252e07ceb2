"""The canonical form: scales folded, writers centred, dead biases dropped, and nothing changed in what is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.passes import canonicalize

ALL = ["fold-norm-scales", "fold-layer-scales", "centre-writers", "drop-dead-biases"]
TOLERANCE = 1e-9
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


class Encoder(nn.Module):
    """torch's own encoder layers between two linear layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        norm = nn.LayerNorm(16) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


def timm_net(name: str, **given: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **{**TINY, **given})


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
NETS: dict[str, Callable[[], nn.Module]] = {
    "vit": timm_net("vit_tiny_patch16_224"),
    "without qkv biases": timm_net("vit_tiny_patch16_224", qkv_bias=False),
    "with layer scales": timm_net("deit3_small_patch16_224", init_values=0.1),
    "norms of queries and keys": timm_net("vit_tiny_patch16_224", qk_norm=True),
    "rms norms": timm_net("vit_tiny_patch16_224", norm_layer=nn.RMSNorm),
    "beit": timm_net("beit_base_patch16_224", init_values=0.1),
    "swin": partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=5, drop_path_rate=0.0, **SWIN),
    "cait": timm_net("cait_xxs24_224", init_values=0.1),
    "rotary": timm_net("eva02_tiny_patch14_224"),
    "convnext": partial(timm.create_model, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
    "norm first": partial(Encoder, True),
    "norm last": partial(Encoder, False),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with random norms, biases and buffers in float64, and what goes in."""
    torch.manual_seed(seed)
    model = NETS[name]().double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    shape = (2, 7, 6) if isinstance(model, Encoder) else (2, 3, 32, 32)
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest relative difference of the outputs in both modes."""
    worst = 0.0
    for training in (False, True):
        with torch.no_grad():
            ours, theirs = model.train(training)(x), other.train(training)(x)
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max()))
    return worst


def run(model: nn.Module, x: Tensor, *passes: str) -> nn.Module:
    return surgery.run_passes(model, list(passes), example_inputs=x, progress=False)


def notes(model: nn.Module) -> str:
    return str(surgery.report_of(model))


@pytest.mark.parametrize("name", NETS)
def test_nothing_changes_in_what_is_computed_and_the_class_takes_the_weights(name):
    model, x = made(name)
    result = run(model, x, *ALL)
    assert error(model, result, x) < TOLERANCE
    print(notes(result))
    fresh = NETS[name]().double()
    fresh.load_state_dict(result.state_dict(), strict=True)
    assert error(model, fresh, x) < TOLERANCE


class Behind(nn.Module):
    """A norm over channels and a layer that reads it, with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], reader: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.reader = nn.Linear(3, 8), nn.LayerNorm(8), reader
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.norm(self.stem(x))))


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


UNEVEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "a factor": (lambda x: x * 0.5, lambda: nn.Linear(8, 4)),
    "a factor for each place": (lambda x: x * torch.linspace(0, 1, 6, dtype=x.dtype)[:, None], lambda: nn.Linear(8, 4)),
    "a sum": (lambda x: x.sum(1), lambda: nn.Linear(8, 4)),
    "padding": (lambda x: nn.functional.pad(x, (0, 0, 1, 1)), lambda: nn.Linear(8, 4)),
    "a padded average": (lambda x: nn.functional.avg_pool2d(channels_first(x), 3, 1, 1), lambda: nn.Conv2d(8, 4, 1)),
    "a padded convolution": (channels_first, lambda: nn.Conv2d(8, 4, 3, padding=1)),
    "a transposed convolution": (channels_first, lambda: nn.ConvTranspose2d(8, 4, 3, stride=2)),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_a_shift_that_does_not_arrive_alike_everywhere_stays_in_its_norm(name):
    between, reader = UNEVEN[name]
    model = Behind(between, reader()).double().eval()
    randomize(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 6, 3, dtype=torch.float64)
    folded = run(model, x, "fold-norm-scales")
    assert "1 norm scales folded, shifts stay in 1" in notes(folded)
    assert error(model, folded, x) < TOLERANCE
    wrong = run(model, x, "fold-norm-scales")
    weight = wrong.reader.weight.detach()
    columns = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    columns = columns.T if name == "a transposed convolution" else columns
    wrong.reader.bias.data += columns @ wrong.norm.bias.data  # as if the shift arrived as it is
    wrong.norm.bias.data.zero_()
    assert error(model, wrong, x) > 1e-3


def test_a_shift_goes_through_what_moves_places_and_takes_means():
    model = Behind(lambda x: channels_first(x.roll(1, 1))[:, :, 1:].mean((2, 3)), nn.Linear(8, 4)).double().eval()
    randomize(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 6, 3, dtype=torch.float64)
    folded = run(model, x, "fold-norm-scales")
    assert not folded.norm.bias.any() and error(model, folded, x) < TOLERANCE

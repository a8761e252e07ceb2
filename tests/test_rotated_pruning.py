"""Pruning by rotation: principal directions of a stream are removed, and the network keeps its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import timm
import torch
from tiny_nets import NETS as CONVOLUTIONS
from tiny_nets import SIDE, lively, same_state, state_of
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.discovery.roles import READS
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import CertificateError, DataError, OptionError
from vfsurgery.groups import Member, PermutationGroup, Symmetry
from vfsurgery.groups.symmetries import complement_of_ones
from vfsurgery.pruning.units import UnitPruneReport
from vfsurgery.pruning.units.rotation import Rotation, Stream
from vfsurgery.tracing.sources import Source, canonical_state

EXACT = 1e-9
"""Relative error in float64."""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


def vit(**given: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, "vit_tiny_patch16_224", **{**TINY, **given})


class Encoder(nn.Module):
    """torch's own encoder layer between two linear layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(3 * 32, 16), nn.Linear(16, 5)
        norm = nn.LayerNorm(16) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, 1, norm, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x.transpose(1, 2).flatten(2))).mean(1))


class Block(nn.Module):
    """One block of a transformer; the numbers of heads and of dims in them are constants."""

    def __init__(self, norm: type[nn.LayerNorm | nn.RMSNorm] = nn.LayerNorm, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(3 * 32, 24), nn.Parameter(torch.randn(1, 32, 24))
        self.norm, self.qkv, self.proj = norm(24), nn.Linear(24, 3 * 8, bias=bias), nn.Linear(8, 24)
        self.last, self.up, self.down = norm(24), nn.Linear(24, 16), nn.Linear(16, 24)
        self.end, self.head = norm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(1, 2).flatten(2)) + self.places
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.last(x))))
        return self.head(self.end(x.mean(1)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "without qkv biases": partial(Block, bias=False),
    "rms norms": partial(Block, nn.RMSNorm),
    "vit": vit(),
    "with layer scales": partial(timm.create_model, "deit3_small_patch16_224", init_values=0.1, **TINY),
    "swin": partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=5, drop_path_rate=0.0, **SWIN),
    "norm first": partial(Encoder, True),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """A network with random norms, biases and buffers in float64."""
    torch.manual_seed(seed)
    model = NETS[name]().double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


@cache
def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rotation_of(model: nn.Module, data: bool = True) -> Rotation:
    graph_module = surgery.trace(model, images(2))
    groups = surgery.find_groups(graph_module)
    return Rotation.find(Source.of(model, graph_module), groups, (lambda label: iter([images()])) if data else None)


def masks(rotation: Rotation, share: float) -> dict[str, np.ndarray]:
    return {
        name: np.arange(stream.group.size) >= round(share * stream.group.size)
        for name, stream in rotation.streams.items()
    }


def error(found: nn.Module, expected: nn.Module) -> float:
    with torch.no_grad():
        theirs = expected(images())
        return float((found(images()) - theirs).abs().max() / theirs.abs().max())


def report(model: nn.Module) -> UnitPruneReport:
    found = surgery.report_of(model)
    assert isinstance(found, UnitPruneReport)
    return found


def pruned(model: nn.Module, fraction: float = 0.5, **options: object) -> nn.Module:
    given = {"data": [images()], "renormalize": None, "progress": False, "rotate": True, **options}
    return surgery.prune_units(model, fraction, **given)


def others(model: nn.Module) -> list[str]:
    """All groups but streams, by name."""
    groups = surgery.find_groups(model, images(2))
    return [group.name for group in groups if group.outer or group.symmetry not in (1, 2)]


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("name", NETS)
def test_a_rotation_changes_nothing(name: str, share: float) -> None:
    model = made(name)
    rotation = rotation_of(model)
    turned = rotation.turned(masks(rotation, share)).model
    assert error(turned, model) < EXACT
    same = same_state(canonical_state(turned), canonical_state(model))
    assert not same and rotation.streams


def test_a_rotation_that_moves_ones_does_not_hold_under_layer_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Stream.turn

    def plain(stream: Stream, kept: np.ndarray) -> Tensor:
        group = replace(stream.group, symmetry=Symmetry.ORTHOGONAL)
        drawn = Symmetry.ORTHOGONAL.random(group.size, torch.Generator().manual_seed(0))
        return turn(Stream(group, drawn, stream.energies), kept)

    monkeypatch.setattr(Stream, "turn", plain)
    model = made("rms norms")
    rotation = rotation_of(model)
    assert error(rotation.turned(masks(rotation, 0.0)).model, model) < EXACT, "RMSNorms look at the length alone"
    model = made("block")
    rotation = rotation_of(model)
    assert error(rotation.turned(masks(rotation, 0.0)).model, model) > 1e-3
    with pytest.raises(CertificateError, match="rotated network computes something else"):
        pruned(model)


@pytest.mark.parametrize("size", [2, 5, 9])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_what_is_kept_is_orthonormal_and_keeps_the_mean(size: int, count: int) -> None:
    kept = np.random.default_rng(0).permutation(size) < min(count, size)
    second = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = PermutationGroup("g0", size, (Member("w", 0, size),), symmetry=Symmetry.ORTHOGONAL_FIXING_ONES)
    stream = Stream.of(group, second @ second.T)
    turn, narrow = stream.turn(kept), stream.narrow(kept)
    ones, eye = torch.ones(size).double(), torch.eye(size).double()
    assert torch.allclose(turn @ turn.T, eye) and torch.allclose(turn @ ones, ones)
    whole = (narrow @ turn)[kept]
    assert torch.allclose(whole @ whole.T, torch.eye(len(whole)).double())
    assert torch.allclose(whole @ ones, ones[kept] * (size / len(whole)) ** 0.5)
    assert not (narrow @ turn)[~kept].any()
    assert torch.allclose(whole @ stream.directions[:, len(whole) - 1 :], torch.zeros(1).double(), atol=1e-9)


def low_rank(name: str, rank: int) -> nn.Module:
    """A network whose stream holds ``rank`` directions and, under LayerNorms, a mean."""
    model = made(name)
    groups = surgery.find_groups(model, images(2))
    (group,) = (group for group in groups if not group.outer and group.symmetry in (1, 2))
    basis = torch.eye(group.size).double()
    if group.symmetry is Symmetry.ORTHOGONAL_FIXING_ONES:
        basis = complement_of_ones(group.size)
    drawn = basis @ torch.linalg.qr(torch.randn(basis.shape[1], rank).double())[0]
    keep = drawn @ drawn.T + (1 / group.size if group.symmetry is Symmetry.ORTHOGONAL_FIXING_ONES else 0)
    state = canonical_state(model)
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)}
    for member in group.members:
        if member.role != READS and member.parameter.rpartition(".")[0] not in norms:
            tensor = state[member.parameter]
            tensor.copy_((tensor.movedim(member.dim, -1) @ keep).movedim(-1, member.dim))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.eps = 1e-30
    return model


@pytest.mark.parametrize("removed", ["drop", "fold"])
@pytest.mark.parametrize(("name", "rank", "units"), [("block", 11, 12), ("rms norms", 12, 12)])
def test_directions_without_energy_go_without_a_trace(name: str, rank: int, units: int, removed: str) -> None:
    model = low_rank(name, rank)
    smaller = pruned(model, 0.5, exclude=others(model), removed=removed)
    assert error(smaller, model) < (EXACT if removed == "drop" else 1e-6), "the ridge weighs against rounding"
    assert [group.after for group in report(smaller).groups] == [units]
    single = pruned(model, 0.5, exclude=others(model), rotate=False)
    assert report(single).after.parameters == report(smaller).after.parameters and error(single, model) > 0.1
    more = low_rank(name, rank + 1)
    assert error(pruned(more, 0.5, exclude=others(more), removed=removed), more) > 1e-3


def test_the_scales_of_norms_make_up_for_fewer_units(monkeypatch: pytest.MonkeyPatch) -> None:
    model = low_rank("block", 11)
    monkeypatch.setattr(Rotation, "_norms", lambda self: iter(()))
    assert error(pruned(model, 0.5, exclude=others(model)), model) > 0.1


@pytest.mark.parametrize("removed", ["drop", "fold"])
@pytest.mark.parametrize("name", ["block", "rms norms", "vit", "swin"])
def test_a_smaller_model_of_the_same_class_is_left(name: str, removed: str) -> None:
    model = made(name)
    before = state_of(model)
    smaller = pruned(model, removed=removed)
    found = report(smaller)
    assert found.certificate.error < EXACT < found.certificate.effect and not found.certificate.random_weights
    assert type(smaller) is type(model) and same_state(state_of(model), before)
    rotated = {group for group, _ in found.rotated}
    assert rotated and all(0 < share < 1 for _, share in found.rotated)
    assert all(group.after == group.before // 2 for group in found.groups if group.group in rotated)
    assert any(group.group not in rotated for group in found.groups), "other groups lose units as ever"
    assert smaller(images(3)).shape == (3, 5) and "principal directions went" in str(found)
    plain = report(pruned(model, rotate=False))
    assert found.after.parameters == plain.after.parameters and not plain.rotated


def test_what_stays_stands_in_for_what_goes() -> None:
    model = made("block")
    left = others(model)
    errors = [error(pruned(model, 0.3, exclude=left, removed=removed), model) for removed in ("drop", "fold")]
    assert errors[1] < errors[0]


def test_without_data_weights_tell_the_directions() -> None:
    model = low_rank("block", 11)
    smaller = pruned(model, data=None, example_inputs=images(2), exclude=others(model))
    assert error(smaller, model) < EXACT
    with pytest.raises(DataError, match="removed='fold' needs data"):
        pruned(model, data=None, example_inputs=images(2), removed="fold")


def test_repair_and_other_scopes_come_along() -> None:
    model = made("block")
    smaller = pruned(model, scope="global", saliency="activation", renormalize="auto", multiple_of=4)
    found = report(smaller)
    assert found.rotated and found.renormalize and next(iter(found.groups)).after % 4 == 0


def test_streams_that_the_forward_cannot_lose_units_of_stay_whole() -> None:
    model = made("norm first")
    found = report(pruned(model, 0.4))
    assert not found.rotated and "g0" in {group.group for group in found.left_whole}


def with_a_faint_scale(model: nn.Module) -> nn.Module:
    model.get_parameter("norm.weight").data[0] = 1e-12
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lively(CONVOLUTIONS["chain"](), 0).double(), "finds no stream.*groups"),
        (lambda: Encoder(norm_first=False).double(), "finds no stream.*groups"),
        (lambda: Block().half(), "half precision.*float"),
        (lambda: surgery.prune(made("block"), 0.5, progress=False), "would fill zeros"),
        (lambda: with_a_faint_scale(made("without qkv biases")), "g0.*near zero"),
    ],
    ids=["convolutions", "norm last", "half", "sparse", "faint scale"],
)
def test_networks_that_cannot_be_rotated_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    model = make()
    side = SIDE if "finds" in words and not isinstance(model, Encoder) else 32
    x = torch.randn(2, 3, side, side).to(next(model.parameters()).dtype)
    with pytest.raises(OptionError, match=f"(?s){words}"):
        pruned(model, data=None, example_inputs=x)

"""The canonical form: scales folded, writers centred, dead biases dropped, and nothing changed in what is computed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.canonical import fold, needed, obstacles
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import OptionError
from vfsurgery.passes import build_pass
from vfsurgery.testing import check_pass
from vfsurgery.tracing.sources import canonical_state

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


DONE = {
    "vit": (5, 0, 0, 12, 2, 2),
    "without qkv biases": (5, 2, 0, 12, 0, 0),
    "with layer scales": (5, 0, 4, 12, 2, 2),
    "norms of queries and keys": (5, 0, 0, 12, 0, 2),
    "rms norms": (5, 0, 0, 0, 2, 2),
    "beit": (5, 2, 4, 11, 0, 2),
    "swin": (10, 5, 0, 9, 4, 4),
    "cait": (9, 0, 8, 20, 2, 2),
    "rotary": (5, 2, 0, 12, 0, 2),
    "convnext": (8, 0, 4, 0, 0, 0),
    "norm first": (5, 0, 0, 10, 2, 2),
    "norm last": (1, 0, 0, 0, 2, 2),
}
"""Norm scales folded, norms with shifts left, layer scales folded, weights centred, biases of keys and of values."""


def counts(model: nn.Module) -> tuple[int, ...]:
    """What a report says was done."""
    text = notes(model)
    patterns = (r"(\d+) norm scales", r"shifts stay in (\d+)", r"(\d+) layer scales", r"(\d+) weights that write into")
    lists = (r"of keys (.*)", r"output projections, (.*)")
    numbers = [sum(map(int, re.findall(pattern, text))) for pattern in patterns]
    return (*numbers, *(re.findall(pattern, text)[0].count("bias") for pattern in lists))


@pytest.mark.parametrize("name", NETS)
def test_nothing_changes_in_what_is_computed_and_the_class_takes_the_weights(name):
    model, x = made(name)
    result = run(model, x, *ALL)
    assert counts(result) == DONE[name], notes(result)
    assert error(model, result, x) < TOLERANCE
    fresh = NETS[name]().double()
    fresh.load_state_dict(result.state_dict(), strict=True)
    assert error(model, fresh, x) < TOLERANCE
    groups, state = surgery.find_groups(model, x), result.state_dict()
    for folding in groups.foldings:
        assert (state[folding.scale.parameter] == 1).all()
        if folding.shift is not None and all(reader.bias is not None for reader in folding.readers):
            assert not state[folding.shift.parameter].any()
    for centring in groups.centrings:
        for member in centring.writers:
            assert state[member.parameter].mean(member.dim).abs().max() < 1e-15


@pytest.mark.parametrize("step", ["fold-norm-scales", "fold-layer-scales", "drop-dead-biases"])
def test_each_pass_works_alone_and_leaves_nothing_to_do(step):
    model, x = made("with layer scales")
    once = run(model, x, step)
    twice = run(once, x, step)
    before, after, again = (each.state_dict().values() for each in (model, once, twice))
    assert error(model, once, x) < TOLERANCE
    assert not all(map(torch.equal, before, after)) and all(map(torch.equal, after, again))


def test_layer_scales_have_to_be_folded_before_writers_are_centred():
    model, x = made("with layer scales")
    assert "multiplies single units (run fold-layer-scales before)" in notes(run(model, x, "centre-writers"))
    with pytest.raises(OptionError, match="'centre-writers' must run after 'fold-layer-scales'"):
        run(model, x, "centre-writers", "fold-layer-scales")


class Stream(nn.Module):
    """Units that a linear layer writes, and what ``read`` makes of them, with a LayerNorm, an RMSNorm and two heads."""

    def __init__(self, read: Callable[[Stream, Tensor], object]) -> None:
        super().__init__()
        self.stem, self.inner, self.head, self.other = (
            nn.Linear(3, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
            nn.Linear(8, 4),
        )
        self.norm, self.rms, self.read = nn.LayerNorm(8), nn.RMSNorm(8), read
        self.table, self.wide = nn.Parameter(torch.randn(5, 8)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        return self.read(self, x + self.inner(self.norm(x)))


def stream(read: Callable[[Stream, Tensor], object]) -> tuple[Stream, Tensor]:
    torch.manual_seed(0)
    model = Stream(read).double().eval()
    randomize(model, torch.Generator().manual_seed(0))
    return model, torch.randn(2, 5, 3, dtype=torch.float64)


SEEN: dict[str, tuple[Callable[[Stream, Tensor], Tensor], str]] = {
    "a head without a norm": (lambda m, x: m.head(m.norm(x)) + m.other(x), "other reads these units without a Layer"),
    "an RMSNorm": (lambda m, x: m.head(m.norm(x)) + m.other(m.rms(x)), "rms sees the mean over these units"),
    "a product": (lambda m, x: m.head(m.norm(x)) + (x @ x.mT).sum(), "they are multiplied by themselves"),
    "a table": (
        lambda m, x: m.head(nn.functional.layer_norm(x + m.table, (8,))) + (x @ m.table.T)[..., :4],
        ".* a weight both writes and reads them",
    ),
    "a wider norm": (
        lambda m, x: m.wide(nn.functional.layer_norm(torch.cat([x, 2 * x], -1), (16,))),
        "layer_norm .* takes its mean over more than these units",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_units_whose_mean_is_seen_are_not_centred(name):
    read, reason = SEEN[name]
    model, x = stream(read)
    result = run(model, x, "centre-writers")
    assert re.search(f"units, orthogonal fixing ones.* is left as it is, {reason}", notes(result)), notes(result)
    centred = copy.deepcopy(model)
    centred.stem.weight.data -= centred.stem.weight.data.mean(0)
    assert error(model, centred, x) > 1e-3


def test_units_that_a_layer_norm_alone_reads_are_centred():
    model, x = stream(lambda m, x: m.head(m.norm(x)))
    result = run(model, x, "centre-writers")
    assert "4 weights that write into" in notes(result) and error(model, result, x) < TOLERANCE
    assert result.stem.weight.mean(0).abs().max() < 1e-15 < 1e-3 < model.stem.weight.mean(0).abs().max()


def test_zeros_of_pruned_weights_are_not_filled():
    model, x = stream(lambda m, x: m.head(m.norm(x)))
    model.inner.weight.data[::2, 1] = 0
    assert "inner.weight is sparse, and its zeros would be filled" in notes(run(model, x, "centre-writers"))
    model.inner.weight.data.zero_()  # a layer that begins with nothing stays so
    assert "4 weights that write into" in notes(run(model, x, "centre-writers"))


def test_centring_behind_rms_norms_changes_the_function():
    model, x = made("rms norms")
    centred = copy.deepcopy(model)
    centred.patch_embed.proj.weight.data -= centred.patch_embed.proj.weight.data.mean(0)
    assert error(model, centred, x) > 1e-3


class Returned(Stream):
    def forward(self, x: Tensor) -> object:
        normed = self.norm(self.stem(x))
        return self.head(normed), normed


def test_a_norm_whose_output_is_returned_is_not_folded():
    model, x = Returned(None).double().eval(), torch.randn(2, 3, dtype=torch.float64)
    randomize(model, torch.Generator().manual_seed(0))
    result = run(model, x, "fold-norm-scales")
    assert "0 norm scales folded" in notes(result)
    assert torch.equal(result.norm.weight, model.norm.weight)


def test_a_layer_that_runs_twice_behind_one_norm_is_changed_once():
    model, x = stream(lambda m, x: m.head(m.norm(x + m.inner(m.norm(x)))))
    result = run(model, x, "fold-norm-scales")
    assert "1 norm scales folded" in notes(result) and error(model, result, x) < TOLERANCE


def test_a_layer_behind_two_norms_keeps_their_scales():
    model, x = stream(lambda m, x: m.head(m.norm(x)) + m.head(m.rms(x)))
    result = run(model, x, "fold-norm-scales")
    assert "0 norm scales folded" in notes(result) and error(model, result, x) == 0


def near_zero() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    randomize(model, torch.Generator().manual_seed(0))
    model[1].weight.data[3] = 1e-9
    return model.double().eval(), torch.randn(5, 4, dtype=torch.float64)


def test_a_shift_is_not_divided_by_nearly_nothing():
    model, x = near_zero()
    result = run(model, x, "fold-norm-scales")
    assert re.search("left as it is: 1.weight is near zero, and 1.bias over it .* 2.weight has no bias", notes(result))
    assert torch.equal(result[1].weight, model[1].weight)
    model[1].bias.data[3] = 0  # nothing is left to divide
    assert "1 norm scales folded" in notes(run(model, x, "fold-norm-scales"))
    model[1].bias.data[3] = 1
    model[2].bias = nn.Parameter(torch.zeros(6).double())  # multiplying by it is stable
    folded = run(model, x, "fold-norm-scales")
    assert "1 norm scales folded" in notes(folded) and error(model, folded, x) < TOLERANCE


def test_a_state_is_folded_in_place_and_what_stands_in_the_way_is_said():
    model, x = near_zero()
    groups = surgery.find_groups(model, x)
    reason = "1.weight is near zero, and 1.bias over it would be"
    assert obstacles(canonical_state(model), groups)["g0"].startswith(reason)
    assert needed(groups.only_ordered(["g0"])) == []
    model[1].weight.data[3] = 1
    assert obstacles(canonical_state(model), groups) == {}

    model, x = made("with layer scales")
    expected = copy.deepcopy(model)
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    groups = surgery.find_groups(model, x)
    assert obstacles(canonical_state(model), groups) == {}
    for folding in needed(groups):
        fold(canonical_state(model), folding)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert [name for name, each in after.items() if not each.requires_grad] == ["blocks.0.mlp.fc1.weight"]
    assert (model.blocks[1].ls1.gamma == 1).all() and error(expected, model, x) < TOLERANCE


def test_a_state_of_half_precision_stands_in_the_way():
    model, x = made("vit")
    groups = surgery.find_groups(model, x)
    found = obstacles(canonical_state(model.bfloat16()), groups)
    assert found["g0"].endswith("is in half precision, which would round what is mapped")


def test_half_precision_stays_and_is_rounded_once():
    model, x = made("vit")
    low = copy.deepcopy(model).bfloat16()
    result = run(low, x.bfloat16(), *ALL)
    assert {each.dtype for each in result.parameters()} == {torch.bfloat16}
    before, after = low.blocks[0], result.blocks[0]
    exact = before.attn.qkv.weight.double() * before.norm1.weight.double()
    assert torch.equal(after.attn.qkv.weight, exact.bfloat16())


class Attention(nn.Module):
    """Attention of two heads, written out or by torch; ``kind`` says how."""

    def __init__(self, kind: Callable[[Attention, Tensor, Tensor, Tensor], Tensor], **given: bool) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=given.get("bias", True))
        self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind, self.token = kind, nn.Parameter(torch.randn(2, 2, 1, 4))
        self.mask = nn.Parameter(torch.randn(2, 5, 5))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.kind(self, *(self.heads(each(x)) for each in (self.q, self.k, self.v)))
        return self.proj(z.transpose(1, 2).flatten(2))


def written_out(
    module: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    before: Callable[[Attention, Tensor], Tensor] = lambda module, logits: logits,
    after: Callable[[Attention, Tensor], Tensor] = lambda module, weights: weights,
) -> Tensor:
    logits = before(module, (q / 2) @ k.transpose(-2, -1))
    return after(module, logits.softmax(-1)) @ v


fused = nn.functional.scaled_dot_product_attention
ATTENTION: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "fused": (lambda m, q, k, v: fused(q, k, v), True, True),
    "fused with a mask": (lambda m, q, k, v: fused(q, k, v, m.mask), True, True),
    "fused with a mask of queries": (lambda m, q, k, v: fused(q, k, v, q @ q.mT > 0), True, False),
    "fewer heads of keys": (
        lambda m, q, k, v: fused(q, k[:, :1], v[:, :1], enable_gqa=True),
        True,
        True,
    ),
    "written out": (written_out, True, True),
    "with a mask": (partial(written_out, before=lambda m, x: x * 0.3 + m.mask), True, True),
    "masked by the input": (partial(written_out, before=lambda m, x: x.masked_fill(x.detach() > 0, -5)), False, False),
    "a sink": (partial(written_out, before=lambda m, x: torch.cat([x, x[..., :1] * 0], -1),
               after=lambda m, x: x[..., :-1]), False, False),
    "sigmoids": (lambda m, q, k, v: (q @ k.mT).sigmoid() @ v, False, False),
    "a softmax over queries": (lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v, False, False),
    "talking heads": (partial(written_out, after=lambda m, x: x + x.flip(1)), True, False),
    "scales of keys": (partial(written_out, before=lambda m, x: x * m.mask), False, False),
    "norms of keys": (lambda m, q, k, v: fused(q, nn.functional.normalize(k, dim=-1), v), False, True),
    "another key": (lambda m, q, k, v: fused(q, torch.cat([m.token, k], 2), torch.cat([m.token, v], 2)), False, False),
    "keys as values": (lambda m, q, k, v: fused(q, k, k), False, False),
    "keys as queries": (lambda m, q, k, v: fused(k, k, v), False, True),
    "values looked at": (lambda m, q, k, v: fused(q, k, v) + v, True, False),
}  # fmt: skip
"""How attention is computed, and whether biases of keys and values are dead."""
NOT_FOLLOWED = ("masked by the input", "scales of keys", "keys as values", "fused with a mask of queries")
"""Where the bias of values could move, or there is none."""


@pytest.mark.parametrize("name", ATTENTION)
def test_biases_that_softmax_attention_does_not_need_are_dropped_and_no_others(name):
    kind, keys, values = ATTENTION[name]
    torch.manual_seed(0)
    model, x = Attention(kind).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    randomize(model, torch.Generator().manual_seed(0))
    result = run(model, x, "drop-dead-biases")
    assert error(model, result, x) < TOLERANCE
    part = slice(0, 4) if name == "fewer heads of keys" else slice(None)
    assert (not result.k.bias[part].any(), not result.v.bias[part].any()) == (keys, values), notes(result)
    if not keys:
        without = copy.deepcopy(model)
        without.k.bias.data.zero_()
        assert error(model, without, x) > 1e-6
    if not values and name not in NOT_FOLLOWED:
        moved = copy.deepcopy(model)
        moved.proj.bias.data += moved.proj.weight @ moved.v.bias
        moved.v.bias.data.zero_()
        assert error(model, moved, x) > 1e-6


def test_values_keep_their_bias_where_the_projection_has_none():
    model, x = Attention(lambda m, q, k, v: fused(q, k, v), bias=False).double().eval(), torch.randn(2, 5, 8).double()
    result = run(model, x, "drop-dead-biases")
    assert not result.k.bias.any() and torch.equal(result.v.bias, model.v.bias)


class Multihead(nn.Module):
    def __init__(self, **given: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **given)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("given", "drops"),
    [({}, True), ({"kdim": 8}, True), ({"add_bias_kv": True}, False), ({"add_zero_attn": True}, False)],
)
def test_biases_of_torch_attention(given, drops):
    model, x = Multihead(**given).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    randomize(model, torch.Generator().manual_seed(0))
    result = run(model, x, "drop-dead-biases")
    bias = result.attention.in_proj_bias
    assert error(model, result, x) < TOLERANCE
    assert bias[:8].all() and (not bias[8:].any()) == drops
    if not drops:
        without = copy.deepcopy(model)
        without.attention.in_proj_bias.data[8:16] = 0
        assert error(model, without, x) > 1e-6


@pytest.mark.parametrize("name", ALL)
def test_the_passes_keep_to_what_is_expected_of_passes(name):
    check_pass(build_pass(name), nets=["layer-norm"], dtypes=[torch.float32])


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

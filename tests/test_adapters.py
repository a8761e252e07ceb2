"""LoRA adapters as sources: folding what peft writes, KnOTS, and writing adapters that peft reads."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vfsurgery.checkpoints import save_state_dict
from vfsurgery.combining import combine_states, fold_adapter, read_adapter, save_adapter
from vfsurgery.combining.adapters import check_same_base
from vfsurgery.combining.arithmetic import TaskArithmetic
from vfsurgery.combining.base import InMemory, Kind, Trait
from vfsurgery.combining.knots import Knots
from vfsurgery.combining.running import Combination, Listing
from vfsurgery.combining.ties import Ties
from vfsurgery.combining.traits import traits_of_states
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, OptionError, SurgeryWarning


class Net(nn.Module):
    """One of each module that an adapter may attach to, or may not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(7, 8)
        self.norm, self.fc, self.head = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.token = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = self.grouped(self.point(self.conv(x))).flatten(2).transpose(1, 2) + self.table(kind)[:, None] + self.token
        return self.head(self.fc(self.norm(self.attn(x, x, x)[0])).mean(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder as peft writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["fc"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_state_dict(
        {f"base_model.model.{name}": each for name, each in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": draw(*down, seed=1), f"{module}.lora_B.weight": draw(*up, seed=2)}


FC = factors("fc", (2, 8), (6, 2))


def plain(folder: Path, **config: Any) -> Path:
    return write(folder, FC, **config)


def changed(base: Mapping[str, Tensor], folded: Mapping[str, Tensor]) -> set[str]:
    return {name for name in base if not torch.equal(base[name], folded[name])}


SCALES = [
    ({}, 3.0),
    ({"use_rslora": True}, 6 / math.sqrt(2)),
    ({"alpha_pattern": {"fc": 5}}, 2.5),
    ({"alpha_pattern": {"^f.": 5, "fc": 7}}, 2.5),
    ({"alpha_pattern": {"c": 5}}, 3.0),
    ({"r": 4, "rank_pattern": {"fc": 2}}, 3.0),
    ({"lora_alpha": 0.5}, 0.25),
]


@pytest.mark.parametrize(("config", "scale"), SCALES)
def test_a_product_is_added_with_its_scale(tmp_path, config, scale):
    base = {name: tensor.double() for name, tensor in net().state_dict().items()}
    folded = fold_adapter(base, plain(tmp_path, **config))
    product = FC["fc.lora_B.weight"].double() @ FC["fc.lora_A.weight"].double()
    torch.testing.assert_close(folded["fc.weight"], base["fc.weight"] + scale * product, rtol=0, atol=1e-12)
    assert changed(base, folded) == {"fc.weight"}
    assert not torch.allclose(folded["fc.weight"], base["fc.weight"] + scale**2 * product)  # scaled once


def test_a_folded_convolution_computes_what_the_adapter_beside_it_does(tmp_path):
    model = net().double()
    own = factors("conv", (2, 3, 3, 3), (8, 2, 1, 1)) | factors("point", (2, 8, 1, 1), (8, 2, 1, 1))
    folded = fold_adapter(model, write(tmp_path, own))
    for name, padding in (("conv", 1), ("point", 0)):
        layer = model.get_submodule(name)
        x = draw(2, layer.in_channels, 5, 5, seed=3).double()
        inner = functional.conv2d(x, own[f"{name}.lora_A.weight"].double(), padding=padding)
        beside = layer(x) + 3 * functional.conv2d(inner, own[f"{name}.lora_B.weight"].double())
        layer.load_state_dict({"weight": folded[f"{name}.weight"], "bias": folded[f"{name}.bias"]})
        torch.testing.assert_close(layer(x), beside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_dora_gives_every_output_its_magnitude(tmp_path, suffix):
    base = net().state_dict()
    own = FC | factors("conv", (2, 3, 3, 3), (8, 2, 1, 1))
    own[f"fc.lora_magnitude_vector{suffix}"] = torch.arange(1.0, 7)
    own[f"conv.lora_magnitude_vector{suffix}"] = torch.arange(1.0, 9).reshape(1, 8, 1, 1)
    folded = fold_adapter(base, write(tmp_path / "dora", own, use_dora=True))
    torch.testing.assert_close(folded["fc.weight"].norm(dim=1), torch.arange(1.0, 7))
    torch.testing.assert_close(folded["conv.weight"].flatten(1).norm(dim=1), torch.arange(1.0, 9))
    without = fold_adapter(
        base, write(tmp_path / "plain", {name: each for name, each in own.items() if "mag" not in name})
    )
    cosines = functional.cosine_similarity(folded["fc.weight"], without["fc.weight"])
    torch.testing.assert_close(cosines, torch.ones(6))
    assert not torch.allclose(folded["fc.weight"], without["fc.weight"])


@pytest.mark.parametrize("turned", [True, False])
def test_a_square_weight_is_turned_where_the_folder_says_so(tmp_path, turned):
    base = {"fc.weight": torch.zeros(4, 4)}
    own = factors("fc", (2, 4), (4, 2))
    folded = fold_adapter(base, write(tmp_path, own, fan_in_fan_out=turned, lora_alpha=2))["fc.weight"]
    product = own["fc.lora_B.weight"] @ own["fc.lora_A.weight"]
    torch.testing.assert_close(folded, product.T if turned else product)


def test_a_weight_that_is_not_square_says_itself_how_it_lies(tmp_path):
    """peft keeps one flag for layers of both kinds: the last that it met decides."""
    own = factors("fc", (2, 4), (3, 2))
    product = own["fc.lora_B.weight"] @ own["fc.lora_A.weight"]
    for shape, expected in (((3, 4), product), ((4, 3), product.T)):
        for flag in (True, False):
            folder = write(tmp_path, own, fan_in_fan_out=flag, lora_alpha=2)
            torch.testing.assert_close(fold_adapter({"fc.weight": torch.zeros(shape)}, folder)["fc.weight"], expected)


def test_biases_heads_and_norms_come_along(tmp_path):
    base = net().state_dict()
    own = FC | {"fc.lora_B.bias": torch.ones(6), "head.weight": draw(5, 6), "head.bias": draw(5)}
    own |= {"norm.weight": torch.full((8,), 2.0), "attn.base_layer.in_proj_bias": torch.ones(24)}
    folded = fold_adapter(base, write(tmp_path, own, modules_to_save=["head", "norm"]))
    torch.testing.assert_close(folded["fc.bias"], base["fc.bias"] + 3)
    assert folded["head.weight"].shape == (5, 6)
    assert torch.equal(folded["norm.weight"], torch.full((8,), 2.0))
    assert torch.equal(folded["attn.in_proj_bias"], torch.ones(24))


def test_tables_are_folded_turned(tmp_path):
    base = net().state_dict()
    own = {"table.lora_embedding_A": draw(2, 7, seed=1), "table.lora_embedding_B": draw(8, 2, seed=2)}
    product = own["table.lora_embedding_B"] @ own["table.lora_embedding_A"]
    folded = fold_adapter(base, write(tmp_path, own))
    torch.testing.assert_close(folded["table.weight"], base["table.weight"] + 3 * product.T)


def attention(folder: Path) -> Path:
    inner = factors("attn", (2, 8), (24, 2)) | factors("attn.base_layer.out_proj", (2, 8), (8, 2))
    return write(folder, inner)


def test_attention_is_folded_into_its_packed_projection(tmp_path):
    base = net().state_dict()
    with pytest.warns(SurgeryWarning, match=r"out_proj peft adds the product twice"):
        folded = fold_adapter(base, attention(tmp_path))
    assert changed(base, folded) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    product = draw(8, 2, seed=2) @ draw(2, 8, seed=1)
    torch.testing.assert_close(folded["attn.out_proj.weight"], base["attn.out_proj.weight"] + 6 * product)


def test_half_precision_stays_what_it_is_and_task_vectors_are_not_rounded(tmp_path):
    base = {name: tensor.bfloat16() for name, tensor in net().state_dict().items()}
    folder = plain(tmp_path, lora_alpha=1e-4)
    assert fold_adapter(base, folder)["fc.weight"].dtype == torch.bfloat16
    folded = read_adapter(folder).onto(InMemory(base), {name: tuple(each.shape) for name, each in base.items()})
    own = folded.read("fc.weight", 0, 48).reshape(6, 8) - base["fc.weight"].float()
    product = FC["fc.lora_B.weight"] @ FC["fc.lora_A.weight"] * 5e-5
    torch.testing.assert_close(own, product, rtol=0.05, atol=1e-6)
    assert not own.bfloat16().equal(fold_adapter(base, folder)["fc.weight"] - base["fc.weight"])


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_store_gives_what_the_folded_state_has(tmp_path, ending):
    base = net().state_dict()
    folder = write(tmp_path, FC | factors("conv", (2, 3, 3, 3), (8, 2, 1, 1)))
    if ending == "bin":
        tensors = {
            f"base_model.model.{name}": each
            for name, each in (FC | factors("conv", (2, 3, 3, 3), (8, 2, 1, 1))).items()
        }
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    state = fold_adapter(base, folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    stores = [read_adapter(folder).onto(InMemory(base), shapes)] * 2
    listing = Listing(shapes, {name: each.dtype for name, each in base.items()}, traits_of_states([base]))
    streamed = Combination(listing, stores, InMemory(base), Ties(), (1.0, 1.0))
    whole = combine_states([state, state], Ties(), base=base)
    for name, start, part in streamed.parts():
        assert torch.equal(whole[name].reshape(-1)[start : start + part.numel()], part)


FAULTS = {
    "is no folder": (lambda folder: folder / "absent", CheckpointError, "there is no such folder"),
    "no config": (lambda folder: bare(folder), CheckpointError, r"has no adapter_config\.json"),
    "no weights": (lambda folder: without_weights(folder), CheckpointError, "has no weights"),
    "no JSON": (lambda folder: text(folder, "{"), CheckpointError, r"adapter_config\.json is damaged"),
    "a list": (lambda folder: text(folder, "[]"), CheckpointError, "it holds no mapping"),
    "another type": (lambda folder: plain(folder, peft_type="IA3"), CheckpointError, "peft_type is 'IA3'"),
    "no type": (lambda folder: plain(folder, peft_type=None), CheckpointError, "peft_type is None"),
    "PiSSA": (lambda folder: plain(folder, init_lora_weights="pissa_niter_4"), CheckpointError, "base was changed"),
    "tokens": (lambda folder: plain(folder, alora_invocation_tokens=[1]), CheckpointError, "some tokens alone"),
    "rank": (lambda folder: plain(folder, r=4), CheckpointError, "another rank than"),
    "rank of zero": (lambda folder: plain(folder, r=0), CheckpointError, "r is 0, less than 1"),
    "alpha": (lambda folder: plain(folder, lora_alpha="x"), CheckpointError, "lora_alpha is 'x'"),
    "pattern": (lambda folder: plain(folder, alpha_pattern={"(": 1}), CheckpointError, "is no pattern"),
    "half": (lambda folder: write(folder, {"fc.lora_A.weight": draw(2, 8)}), CheckpointError, "one factor of two"),
    "inner": (lambda folder: write(folder, factors("fc", (2, 8), (6, 3))), CheckpointError, "do not fit each other"),
    "unknown": (lambda folder: write(folder, FC | {"fc.lora_E": draw(2)}), CheckpointError, "nothing that a LoRA has"),
    "NaN": (lambda folder: write(folder, {**FC, "head.bias": torch.full((3,), math.nan)}), CheckpointError, "NaN"),
    "target": (
        lambda folder: write(folder, factors("fcc", (2, 8), (6, 2))),
        IncompatibleModelsError,
        r"fcc\.weight\n.*\n.*|did you mean 'fc\.weight'",
    ),
    "shape": (lambda folder: write(folder, factors("fc", (2, 9), (6, 2))), IncompatibleModelsError, r"\(6, 9\) in the"),
    "head": (lambda folder: write(folder, {"top.weight": draw(2)}), IncompatibleModelsError, "does not have"),
    "groups": (
        lambda folder: write(folder, factors("grouped", (4, 8, 3, 3), (8, 1, 1, 1)), r=4),
        IncompatibleModelsError,
        "attaches to a grouped convolution",
    ),
}  # fmt: skip


def bare(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def without_weights(folder: Path) -> Path:
    (plain(folder) / "adapter_model.safetensors").unlink()
    return folder


def text(folder: Path, content: str) -> Path:
    (plain(folder) / "adapter_config.json").write_text(content)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_folded_is_refused(tmp_path, fault):
    make, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        fold_adapter(net(), make(tmp_path / "adapter"))
    fold_adapter(net(), plain(tmp_path / "good"))


def test_a_folder_must_name_its_base_only_where_none_is_given(tmp_path):
    adapter = read_adapter(plain(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="does not say which base"):
        adapter.named_base()
    named = read_adapter(plain(tmp_path / "b", base_model_name_or_path="vit"))
    assert named.named_base() == "vit"
    check_same_base([adapter, named, named])
    with pytest.raises(IncompatibleModelsError, match="different bases"):
        check_same_base([named, read_adapter(plain(tmp_path / "c", base_model_name_or_path="swin"))])


def test_running_statistics_that_are_missing_are_told(tmp_path):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 6))
    model.add_module("bn", nn.BatchNorm1d(6))
    with pytest.warns(SurgeryWarning, match=r"no running statistics for 1 of 1"):
        fold_adapter(model, plain(tmp_path / "without"))
    own = {f"bn.{name}": each for name, each in model.bn.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_adapter(model, write(tmp_path / "with", FC | own, modules_to_save=["bn"]))


def test_targets_that_training_never_reached_are_told(tmp_path):
    own = {"attn.out_proj.lora_A.weight": draw(2, 8), "attn.out_proj.lora_B.weight": torch.zeros(8, 2)}
    with pytest.warns(SurgeryWarning, match=r"1 targets that training never reached.*attn\.out_proj"):
        fold_adapter(net(), write(tmp_path, own))


def test_targets_of_the_fast_path_are_told(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(SurgeryWarning, match="leaves adapters out in eval mode"):
        folded = fold_adapter(layer, write(tmp_path, factors("linear1", (2, 8), (16, 2))))
    x = draw(1, 3, 8)
    before = layer.eval()(x)
    layer.load_state_dict(folded)
    assert not torch.allclose(before, layer(x))  # folded, they count


@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"dilation": 2}])
def test_convolutions_that_peft_does_not_copy_are_told(tmp_path, options):
    folder = write(tmp_path, factors("0", (2, 3, 3, 3), (8, 2, 1, 1)))
    with pytest.warns(SurgeryWarning, match="neither the padding mode nor the dilation"):
        fold_adapter(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, **options)), folder)
    fold_adapter(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), folder)


def test_the_base_stays_as_it_is(tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    fold_adapter(model, plain(tmp_path))
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


# KnOTS


def experts(count: int = 3, rank: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and models that differ from it by products of low rank and by biases."""
    base = {
        "conv.weight": draw(6, 3, 3, 3, seed=1),
        "fc.weight": draw(5, 12, seed=2),
        "fc.bias": draw(5, seed=3),
        "tall.weight": draw(40, 4, seed=4),
    }
    base = {name: tensor.double() for name, tensor in base.items()}
    found: list[dict[str, Tensor]] = []
    for number in range(count):
        state = {}
        for place, (name, tensor) in enumerate(base.items()):
            seed = 100 * number + 10 * place
            wide = tensor[0].numel() if tensor.ndim > 1 else 1
            product = draw(len(tensor), rank, seed=seed + 5).double() @ draw(rank, wide, seed=seed + 6).double()
            state[name] = tensor + 0.1 * product.reshape(tensor.shape)
        found.append(state)
    return base, found


def knots_by_svd(base: Mapping[str, Tensor], states: list[dict[str, Tensor]], density: float) -> dict[str, Tensor]:
    """The formula as it is written, for matrices: the mean of agreeing numbers."""
    names = [name for name in base if base[name].ndim > 1]
    parts = {}
    for name in names:
        matrices = [(state[name] - base[name]).flatten(1) for state in states]
        u, s, v = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
        kept = s > 1e-5 * s[0]
        parts[name] = u[:, kept], (s[kept, None] * v[kept]).reshape(int(kept.sum()), len(states), -1).transpose(0, 1)
    flat = torch.cat([own.flatten(1) for _, own in parts.values()], 1)
    for row in flat:
        row[row.abs() < row.abs().topk(int(density * flat.shape[1])).values[-1]] = 0
    elected = flat.sum(0).sign()
    agrees = (flat * elected > 0).double()
    merged = (flat * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    result, start = {}, 0
    for name in names:
        basis, own = parts[name]
        size = own[0].numel()
        result[name] = basis @ merged[start : start + size].reshape(own[0].shape)
        start += size
    return result


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots_is_its_formula(density):
    base, states = experts()
    found = combine_states(states, Knots(density=density, scale=1.0), base=base)
    expected = knots_by_svd(base, states, density)
    for name, own in expected.items():
        torch.testing.assert_close(found[name], base[name] + own.reshape(base[name].shape), rtol=0, atol=1e-10)
    assert difference(found, combine_states(states, Ties(density=density), base=base)) > 1e-3


def test_knots_with_a_sum_is_task_arithmetic():
    base, states = experts()
    only = {name: trait for name, trait in traits_of_states([base]).items() if trait.kind is Kind.MATRIX}
    weights = (1.0, 0.5, -2.0)
    found = combine_states(states, Knots(merge="sum", scale=0.3), base=base, traits=only, weights=weights)
    expected = combine_states(states, TaskArithmetic(scale=0.3), base=base, traits=only, weights=weights)
    assert difference(found, expected) < 1e-10
    assert difference(found, combine_states(states, Knots(density=1.0, scale=0.3), base=base, traits=only)) > 1e-3


def test_knots_of_one_source_is_that_source():
    base, states = experts(1)
    assert difference(combine_states(states, Knots(density=1.0, scale=1.0), base=base), states[0]) < 1e-10


def test_knots_does_not_depend_on_the_order_of_sources():
    base, states = experts()
    found = [combine_states([*order], Knots(), base=base) for order in itertools.permutations(states)]
    assert max(difference(found[0], each) for each in found[1:]) < 1e-10


def test_knots_scales_with_task_vectors_and_leaves_zeros():
    base, states = experts()
    grown = [{name: base[name] + 3 * (each - base[name]) for name, each in state.items()} for state in states]
    one, three = (combine_states(each, Knots(), base=base) for each in (states, grown))
    assert difference({n: 3 * (one[n] - base[n]) for n in one}, {n: three[n] - base[n] for n in one}) < 1e-10
    assert difference(combine_states([base, base], Knots(), base=base), base) == 0


def test_knots_says_what_it_did_to_the_rest():
    base, states = experts()
    notes: list[str] = []
    found = combine_states(states, Knots(scale=1.0), base=base, notes=notes)
    assert len(notes) == 1 and "of 1 other tensors" in notes[0]
    torch.testing.assert_close(found["fc.bias"], sum(state["fc.bias"] for state in states) / 3)


def test_knots_with_little_memory_gives_the_same(monkeypatch):
    base, states = experts()
    found = combine_states(states, Knots(), base=base)
    monkeypatch.setattr("vfsurgery.combining.knots.KEPT", 0)
    assert difference(found, combine_states(states, Knots(), base=base)) == 0


def test_knots_takes_small_and_empty_tensors():
    base = {"a.weight": torch.zeros(1, 1), "b.weight": torch.zeros(0, 3), "scale": torch.tensor(1.0)}
    state = {"a.weight": torch.ones(1, 1), "b.weight": torch.zeros(0, 3), "scale": torch.tensor(2.0)}
    traits = {name: Trait(Kind.MATRIX if "weight" in name else Kind.REST) for name in base}
    found = combine_states([state], Knots(scale=1.0), base=base, traits=traits)
    assert (float(found["a.weight"]), float(found["scale"])) == (1.0, 2.0)


@pytest.mark.parametrize("options", [{"merge": "tise"}, {"aggregate": "max"}, {"density": 0.0}])
def test_wrong_options_of_knots_are_refused(options):
    with pytest.raises(OptionError, match=r"unknown|density"):
        Knots(**options)


# writing


def tuned(model: nn.Module, rank: int = 2) -> nn.Module:
    """A copy with changes of low rank to the weights, and some to all else."""
    other = copy.deepcopy(model)
    for place, tensor in enumerate(other.state_dict().values()):
        if not tensor.is_floating_point():
            continue
        change = draw(*tensor.shape, seed=place)
        if tensor.ndim > 1:
            change = draw(len(tensor), rank, seed=place) @ draw(rank, tensor[0].numel(), seed=place + 50)
        tensor.add_(0.1 * change.reshape(tensor.shape))
    return other


def test_an_adapter_that_is_written_is_read_again(tmp_path):
    base = net()
    model = tuned(base)
    saved = save_adapter(model, base, tmp_path)
    assert dict(saved.ranks) == {f"{name}.weight": 2 for name in ("conv", "fc", "head", "point")}
    assert set(saved.whole) == {"attn", "grouped", "norm", "table"}
    assert saved.kept == pytest.approx(1)
    assert "4 weights of rank 2 to 2" in str(saved)
    assert difference(fold_adapter(base, tmp_path), model.state_dict()) < 1e-6


def test_a_smaller_rank_is_the_nearest_there_is(tmp_path):
    base = net().double()
    model = tuned(base)
    saved = save_adapter(model, base, tmp_path, rank=1)
    folded, state, origin = fold_adapter(base, tmp_path), model.state_dict(), base.state_dict()
    left = total = 0.0
    for name in saved.ranks:
        tail = torch.linalg.svdvals((state[name] - origin[name]).flatten(1))[1:].norm()
        torch.testing.assert_close((folded[name] - state[name]).norm(), tail)
        left, total = left + float(tail) ** 2, total + float((state[name] - origin[name]).norm()) ** 2
    assert saved.kept == pytest.approx(1 - left / total)
    assert left > 0


def test_ranks_differ_where_changes_do(tmp_path):
    base = net()
    state = {name: each.clone() for name, each in base.state_dict().items()}
    state["fc.weight"] += draw(6, 3) @ draw(3, 8)
    state["conv.weight"][0] += 1.0
    saved = save_adapter(state, base, tmp_path)
    assert dict(saved.ranks) == {"conv.weight": 1, "fc.weight": 3}
    folded = fold_adapter(base, tmp_path)
    assert difference(folded, state) < 1e-5
    assert changed(base.state_dict(), folded) == {"conv.weight", "fc.weight"}


@pytest.mark.parametrize("rank", [0, True, 1.5])
def test_a_rank_that_is_none_is_refused(tmp_path, rank):
    with pytest.raises(OptionError, match="rank is no whole number"):
        save_adapter(net(), net(), tmp_path, rank=rank)


def test_an_adapter_of_another_architecture_is_not_written(tmp_path):
    with pytest.raises(IncompatibleModelsError, match=r"0\.weight"):
        save_adapter(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 2)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# beside peft


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


LAYERS = ["fc", "conv", "point"]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["fc"]},
    "convolutions": {"target_modules": LAYERS, "lora_alpha": 5},
    "patterns": {
        "target_modules": LAYERS,
        "rank_pattern": {"conv": 4, "fc": 3},
        "alpha_pattern": {"fc": 7, "po.*": 1},
        "modules_to_save": ["head"],
    },
    "rsLoRA": {"target_modules": LAYERS, "use_rslora": True},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "lora_bias": {"target_modules": LAYERS, "lora_bias": True},
    "biases": {"target_modules": LAYERS, "bias": "all"},
    "attention": {"target_modules": ["attn", "fc"]},
    "table": {"target_modules": ["table"], "modules_to_save": ["norm"]},
    "table, DoRA": {"target_modules": ["table"], "use_dora": True},
    "turned": {"target_modules": ["square", "wide"], "fan_in_fan_out": True},
    "turned, DoRA": {"target_modules": ["square", "wide"], "fan_in_fan_out": True, "use_dora": True},
}


def turned() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("square", Conv1D(8, 8))
    model.add_module("wide", Conv1D(12, 8))
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_folded_is_what_peft_merges(tmp_path, peft, case):
    model = turned() if case.startswith("turned") else net()
    base = copy.deepcopy(model.state_dict())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **CASES[case]))
    with torch.no_grad():
        for place, parameter in enumerate(wrapped.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * draw(*parameter.shape, seed=place))
    wrapped.save_pretrained(tmp_path)
    folded = fold_adapter(base, tmp_path)
    expected = wrapped.merge_and_unload().state_dict()
    assert folded.keys() == expected.keys()
    assert difference(folded, expected) < 1e-6
    assert difference(base, expected) > 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_is_written(tmp_path, peft):
    base = net()
    model = tuned(base)
    x, kind = draw(2, 3, 4, 4), torch.tensor([1, 2])
    for rank, close in ((None, True), (1, False)):
        folder = tmp_path / str(rank)
        save_adapter(model, base, folder, rank=rank)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with torch.no_grad():
            assert torch.allclose(wrapped(x, kind), model(x, kind), atol=1e-5) is close
        assert difference(wrapped.merge_and_unload().state_dict(), fold_adapter(base, folder)) < 1e-6

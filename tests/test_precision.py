"""Half precision, casts in the forward, and complex weights: in groups, proofs, certificates, matching and merging."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import IncompatibleModelsError, InvalidWeightsError
from vfsurgery.groups import GroupSet, Permutation, permute_tensor, random_permutations
from vfsurgery.stats.precision import accepted_dtype, image_dtype
from vfsurgery.tracing.precision import Precise, in_precision
from vfsurgery.tracing.sources import canonical_state

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)).to(dtype)


def planted(model: nn.Module, groups: GroupSet) -> nn.Module:
    orders = random_permutations(groups, torch.Generator().manual_seed(1))
    result = copy.deepcopy(model)
    state = {name: permute_tensor(name, tensor, groups, orders) for name, tensor in canonical_state(model).items()}
    result.load_state_dict(state)
    return result


class Blurred(nn.Module):
    """A fixed filter in a buffer that is not saved, another in a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.register_buffer("blur", torch.full((8, 1, 2, 2), 0.25), persistent=False)
        self.shift = torch.full((1,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = nn.functional.conv2d(x, self.blur[:1].expand(8, 1, 2, 2), groups=8) + self.shift.to(x)
        return self.head(x.mean((2, 3)))


class Casting(nn.Module):
    """Low precision where the weights are, written as ``spelling`` says; float32 in the norm and at the end."""

    def __init__(self, low: torch.dtype, spelling: str) -> None:
        super().__init__()
        self.low, self.spelling = low, spelling
        self.first, self.norm = nn.Conv2d(3, 8, 3).to(low), nn.LayerNorm(8)
        self.inner, self.head = nn.Linear(8, 8).to(low), nn.Linear(8, 4)

    def down(self, x: Tensor) -> Tensor:
        if self.spelling == "method":
            return x.half() if self.low == torch.float16 else x.bfloat16()
        if self.spelling == "type":
            return x.type("torch.HalfTensor" if self.low == torch.float16 else "torch.BFloat16Tensor")
        if self.spelling == "other":
            return x.to(torch.empty(0, dtype=self.low))
        return x.to(self.low) if self.spelling == "to" else x.to(dtype=self.low)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.down(x)).mean((2, 3)).float()
        return self.head(self.inner(self.down(self.norm(x))).relu().float())


class Autocast(nn.Module):
    """A forward that turns autocast on by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.second(self.first(x.mean((2, 3))).relu()).relu()
        return self.head(x.float())


CASTING = [(low, spelling) for low in LOW for spelling in ("method", "type", "other", "to", "keyword")]


@pytest.mark.parametrize("low", LOW)
def test_half_precision_with_constants_is_certified_in_float32(low):
    torch.manual_seed(0)
    model = Blurred()
    randomize(model, torch.Generator().manual_seed(0))
    model = model.to(LOW[low]).eval()
    model.shift = model.shift.to(LOW[low])
    x = images(4, LOW[low])
    other = planted(model, surgery.find_groups(model, x))
    merged = surgery.merge(model, other, example_inputs=x, renormalize=None, progress=False)
    (certificate,) = surgery.report_of(merged).certificates
    assert certificate
    assert certificate.dtype == "float32"
    assert certificate.error < 1e-5
    assert model.blur.dtype == model.shift.dtype == merged.blur.dtype == LOW[low]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(merged.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("low", "spelling"), CASTING)
def test_forwards_that_cast_are_proven_and_merged(low, spelling):
    torch.manual_seed(0)
    model = Casting(LOW[low], spelling).eval()
    x = images(4)
    groups = surgery.find_groups(model, x)
    assert len(groups) == 2
    proof = surgery.verify(model, groups, x)
    assert proof, str(proof)
    assert proof.error < 1e-12  # in double precision throughout
    other = planted(model, groups)
    for options in ({"example_inputs": x, "matching": "weights"}, {"data": images(160), "matching": "activations"}):
        merged = surgery.merge(model, other, renormalize=None, progress=False, **options)
        assert all(map(torch.equal, merged.parameters(), model.parameters()))
    with_data: dict[str, Any] = {"data": images(160), "progress": False}
    stranger = Casting(LOW[low], spelling).eval()
    merged = surgery.merge(model, stranger, **with_data)
    assert merged(x).isfinite().all()
    assert [p.dtype for p in merged.parameters()] == [p.dtype for p in model.parameters()]
    assert surgery.prune_units(model, 0.25, example_inputs=x, renormalize=None)(x).isfinite().all()


def test_a_wrong_group_of_a_casting_network_is_found():
    """The negative control: rounding to eight bits does not hide it."""
    torch.manual_seed(0)
    model = Casting(torch.bfloat16, "method").eval()
    groups = surgery.find_groups(model, images(4))
    broken = GroupSet(tuple(replace(group, members=group.members[1:]) for group in groups))
    assert not surgery.verify(model, broken, images(4))


def test_autocast_in_a_forward_is_switched_off():
    torch.manual_seed(0)
    model = Autocast().eval()
    x = images(4)
    groups = surgery.find_groups(model, x)
    other = planted(model, groups)
    merged = surgery.merge(model, other, example_inputs=x, renormalize=None, progress=False)
    assert surgery.report_of(merged).certificates[0].error < 1e-6
    with Precise(torch.float64), torch.no_grad():
        exact = in_precision(copy.deepcopy(model), torch.float64)(x.double())
    with Precise(torch.float32), torch.no_grad():
        assert torch.allclose(model(x).double(), exact, atol=1e-5)
    assert not torch.allclose(model(x).double(), exact, atol=1e-5)
    assert not torch.is_autocast_enabled("cpu")


def test_precise_gives_all_spellings_of_casts():
    x = torch.ones(2, dtype=torch.float64)
    with Precise(torch.float64):
        low = [x.half(), x.bfloat16(), x.float(), x.to(torch.float16), x.to("cpu", torch.float32), x.type(torch.half)]
        low += [x.to(dtype=torch.bfloat16), x.type("torch.FloatTensor"), x.type(torch.FloatTensor)]
        low += [torch.zeros(2, dtype=torch.float32)]
        assert x.to(torch.int32).dtype == torch.int32
        assert torch.ones(1, dtype=torch.complex64).dtype == torch.complex128
        assert x.type() == "torch.DoubleTensor"
    assert {tensor.dtype for tensor in low} == {torch.float64}
    with Precise(torch.float32):
        assert x.half().dtype == torch.float32
        assert x.to(torch.float64).dtype == torch.float64


def test_images_keep_their_dtype_where_a_network_has_several():
    assert image_dtype(nn.Linear(2, 2).double()) == torch.float64
    assert image_dtype(Casting(torch.float16, "to")) is None
    assert accepted_dtype(Casting(torch.float16, "to"), images(1)) == torch.float32
    taking_half = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4)).eval()
    assert accepted_dtype(taking_half, images(1)) == torch.float16


@pytest.mark.parametrize("low", LOW)
def test_sources_of_different_precisions_are_refused(low):
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    with pytest.raises(IncompatibleModelsError, match=rf"different precisions(.|\n)*float32, {low}(.|\n)*\.to\("):
        surgery.merge(models[0], models[1].to(LOW[low]), example_inputs=torch.randn(2, 3))


class Spectral(nn.Module):
    """One layer of a Fourier neural operator: complex weights on the lowest frequencies."""

    def __init__(self, width: int = 6, modes: int = 3) -> None:
        super().__init__()
        self.modes, self.up, self.down = modes, nn.Conv2d(3, width, 1), nn.Conv2d(7, 4, 1)
        self.weight = nn.Parameter(torch.randn(width, 7, modes, modes, dtype=torch.cfloat) / width)
        self.phase = nn.Parameter(torch.randn(7, dtype=torch.cfloat))
        self.skip = nn.Conv2d(width, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, m = self.up(x), self.modes
        low = torch.fft.rfft2(x)[:, :, :m, :m]
        mixed = torch.einsum("bixy,ioxy->boxy", low, self.weight) * self.phase[:, None, None]
        pad = (0, x.shape[-1] // 2 + 1 - m, 0, x.shape[-2] - m)
        y = torch.fft.irfft2(nn.functional.pad(mixed, pad), s=x.shape[-2:])
        return self.down(nn.functional.gelu(y + self.skip(x)))


def spectral(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Spectral()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def test_complex_weights_are_proven_in_double_precision():
    model, x = spectral(0), images(2)
    groups = surgery.find_groups(model, x)
    assert any(member.parameter == "weight" for group in groups for member in group.members)
    proof = surgery.verify(model, groups, x)
    assert proof
    assert proof.error < 1e-12
    broken = [replace(g, members=tuple(m for m in g.members if m.parameter != "weight")) for g in groups]
    assert not surgery.verify(model, GroupSet(tuple(broken)), x)


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("double", [False, True])
def test_planted_orders_of_complex_units_are_found(matching, double):
    model, x = spectral(0), images(4)
    model, x = (in_precision(model, torch.float64), x.double()) if double else (model, x)
    other = planted(model, surgery.find_groups(model, x))
    options: dict[str, Any] = {"example_inputs": x} if matching == "weights" else {"data": images(160).to(x.dtype)}
    merged = surgery.merge(model, other, matching=matching, renormalize=None, progress=False, **options)
    assert torch.allclose(merged(x), model(x), rtol=1e-4, atol=1e-5)
    assert merged.weight.dtype == model.weight.dtype
    assert torch.allclose(merged.weight, model.weight)


def test_both_parts_of_complex_weights_count():
    """Units that agree in their real parts alone: matching must look at the imaginary ones."""

    class Rotating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(3, 4, dtype=torch.cfloat))
            self.b = nn.Parameter(torch.ones(4, 2, dtype=torch.cfloat))
            self.a.data.imag.copy_(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return ((x.to(torch.cfloat) @ self.a).cos() @ self.b).real

    torch.manual_seed(0)
    model, x = Rotating(), torch.randn(2, 3)
    (group,) = groups = surgery.find_groups(model, x)
    order = Permutation((2, 0, 3, 1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in canonical_state(other).items():
            tensor.copy_(permute_tensor(name, tensor.clone(), groups, {group.name: order}))
    found = surgery.match(model, other, example_inputs=x, matching="weights", progress=False)[group.name]
    assert [order.order[unit] for unit in found.order] == [0, 1, 2, 3]


def test_averages_and_soups_of_complex_weights():
    models = [spectral(seed) for seed in range(2)]
    mean = (models[0].weight + models[1].weight) / 2
    merged = surgery.merge(*models, example_inputs=images(2), matching="identity", renormalize=None, progress=False)
    mixed = surgery.soup(models, greedy=False, progress=False)
    assert torch.allclose(merged.weight, mean)
    assert torch.allclose(mixed.weight, mean)
    repaired = surgery.merge(*models, data=images(160), progress=False)
    assert repaired(images(2)).isfinite().all()
    smaller = surgery.prune_units(models[0], 0.3, renormalize=None, example_inputs=images(2))
    assert smaller.weight.numel() < models[0].weight.numel()
    assert "weight" in str(surgery.diff(models[0], models[1], example_inputs=images(2)))


@pytest.mark.parametrize("bad", [complex(float("nan"), 0), complex(0, float("inf"))])
def test_complex_weights_that_are_not_finite_are_named(bad):
    models = [spectral(seed) for seed in range(2)]
    models[1].weight.data[0, 0, 0, 0] = bad
    with pytest.raises(InvalidWeightsError, match=r"source 1 holds NaN(.|\n)*parameter +weight(.|\n)*count +1"):
        surgery.merge(*models, example_inputs=images(2))

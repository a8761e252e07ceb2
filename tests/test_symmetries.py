"""Symmetries beyond orders: found from the graph, proven by random members, and used to align and merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.canonical import canonical, drawn_map
from vfsurgery.discovery.maps import UnitMap, map_tensor
from vfsurgery.discovery.verification import outputs_of, randomize, relative_error
from vfsurgery.groups import GroupSet, PermutationGroup, Symmetry
from vfsurgery.matching import WeightMatching
from vfsurgery.merging.aligned import certify_sources, match_sources
from vfsurgery.merging.prepared import group_units, trace_sources
from vfsurgery.merging.surveyed import Way, plan_survey
from vfsurgery.records.results import merge_report_of, report_of

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
P, ONES, TURNS, GL = Symmetry
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(**{**TINY, **options}).eval()


def swin() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.models.SwinTransformer(**sizes, num_classes=5).eval()


def beit() -> nn.Module:
    return timm.models.beit.Beit(**TINY, use_rel_pos_bias=True, init_values=0.1).eval()


def rotary() -> nn.Module:
    return timm.models.eva.Eva(**TINY, use_rot_pos_emb=True).eval()


def convnext() -> nn.Module:
    return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=5).eval()


def cait() -> nn.Module:
    return timm.models.cait.Cait(**TINY).eval()


class Encoder(nn.Module):
    """torch's own transformer on tokens of 8 numbers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(12), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
KINDS: list[tuple[str, Callable[[], nn.Module], Tensor, dict[str, set[Symmetry]]]] = [
    (
        "vit",
        vit,
        IMAGES,
        {"pos_embed": {ONES}, "blocks.0.attn.qkv.weight": {ONES, P, GL}, "blocks.0.mlp.fc1.bias": {P}},
    ),
    ("deit 3", lambda: vit(init_values=0.1), IMAGES, {"pos_embed": {ONES}, "blocks.0.ls1.gamma": {ONES}}),
    ("no qkv bias", lambda: vit(qkv_bias=False), IMAGES, {"pos_embed": {ONES}}),
    ("qk-norm", lambda: vit(qk_norm=True), IMAGES, {"blocks.0.attn.q_norm.weight": {P}, "pos_embed": {ONES}}),
    ("rms", lambda: vit(norm_layer=nn.RMSNorm), IMAGES, {"pos_embed": {TURNS}}),
    ("norm inside", lambda: vit(scale_attn_norm=True), IMAGES, {"blocks.0.attn.norm.weight": {P, ONES}}),
    ("beit", beit, IMAGES, {"blocks.0.attn.q_bias": {P, GL}, "cls_token": {ONES}}),
    ("rotary", rotary, IMAGES, {"pos_embed": {ONES}, "blocks.0.attn.q_bias": {P}, "blocks.0.attn.v_bias": {P, GL}}),
    ("cait", cait, IMAGES, {"pos_embed": {ONES}}),
    ("swin", swin, IMAGES, {"patch_embed.proj.weight": {P}, "layers.1.downsample.reduction.weight": {P, ONES}}),
    ("convnext", convnext, torch.randn(2, 3, 32, 32), {"stem.0.weight": {P}, "head.fc.weight": {P}}),
    ("encoder", lambda: Encoder(True), TOKENS, {"embed.weight": {ONES}, "head.weight": {ONES}}),
    ("post-norm", lambda: Encoder(False), TOKENS, {"embed.weight": {P}}),
]


@pytest.mark.parametrize(("kind", "make", "inputs", "expected"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_symmetries_are_found_and_proven(
    kind: str, make: Callable[[], nn.Module], inputs: Tensor, expected: dict[str, set[Symmetry]]
) -> None:
    del kind
    model = make()
    groups = surgery.find_groups(model, inputs)
    for name, wanted in expected.items():
        assert {group.symmetry for group, _ in groups.by_parameter[name]} == wanted, name
    found = surgery.verify(model, groups, inputs)
    assert found, str(found)
    assert found.continuous == sum(group.symmetry.is_continuous for group in groups)
    assert found.error < 1e-9


def stream_of(groups: GroupSet) -> PermutationGroup:
    return next(group for group in groups if group.symmetry.is_continuous and not group.outer)


def under(model: nn.Module, groups: GroupSet, matrix: Tensor) -> float:
    """How far a map of the stream takes what a network with random weights computes, in float64."""
    model = copy.deepcopy(model).double().eval()
    randomize(model, torch.Generator().manual_seed(0))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    orders = {stream_of(groups).name: UnitMap(matrix, torch.linalg.inv(matrix))}
    mapped = {k: map_tensor(k, each, groups, orders) for k, each in canonical(state, groups).state.items()}
    inputs = (IMAGES.double(),)
    return relative_error(outputs_of(model, mapped, inputs), outputs_of(model, state, inputs))


@pytest.mark.parametrize(
    ("norm", "symmetry", "error"),
    [(nn.LayerNorm, ONES, 0.0), (nn.LayerNorm, TURNS, 0.01), (nn.RMSNorm, TURNS, 0.0), (nn.RMSNorm, GL, 0.01)],
)
def test_a_norm_leaves_what_it_looks_at_and_no_more(norm: type[nn.Module], symmetry: Symmetry, error: float) -> None:
    model = vit(norm_layer=norm)
    groups = surgery.find_groups(model, IMAGES)
    found = under(model, groups, symmetry.random(24, torch.Generator().manual_seed(2)))
    assert found > error if error else found < 1e-9


def test_signs_are_free_under_rms_norm_alone() -> None:
    order = Symmetry.PERMUTATION.random(24, torch.Generator().manual_seed(3))
    signs = torch.ones(24, dtype=torch.float64)
    signs[::2] = -1
    for norm, holds in ((nn.LayerNorm, False), (nn.RMSNorm, True)):
        model = vit(norm_layer=norm)
        assert (under(model, surgery.find_groups(model, IMAGES), order * signs) < 1e-9) is holds


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale, self.between = nn.Parameter(torch.rand(6) + 0.5), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Scaled(Between):
    """The same with a factor for each unit, which may also be used elsewhere."""

    def __init__(self, again: bool) -> None:
        super().__init__(lambda x: x)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        units = self.first(x) * self.scale
        return self.last(units * self.scale.exp() if self.again else units)


@pytest.mark.parametrize(
    ("between", "symmetry"),
    [
        (lambda x: x, GL),
        (lambda x: 2 * x - x / 3, GL),
        (lambda x: x + 1, P),
        (lambda x: 1 / x, P),
        (lambda x: torch.relu_(x), P),
        (lambda x: nn.functional.normalize(x, dim=-1), TURNS),
        (lambda x: x - x.mean(-1, keepdim=True), P),
        (lambda x: nn.functional.pad(x[:, None, None], (0, 0, 1, 1))[:, 0, 1], GL),
    ],
)
def test_an_op_lets_through_what_it_commutes_with(between: Callable[[Tensor], Tensor], symmetry: Symmetry) -> None:
    model, inputs = Between(between), torch.randn(3, 4)
    groups = surgery.find_groups(model, inputs)
    assert groups.groups[0].symmetry is symmetry
    assert surgery.verify(model, groups, inputs)


@pytest.mark.parametrize(("again", "symmetry"), [(False, GL), (True, P)])
def test_a_factor_counts_unless_it_can_be_folded(again: bool, symmetry: Symmetry) -> None:
    model, inputs = Scaled(again), torch.randn(3, 4)
    groups = surgery.find_groups(model, inputs)
    assert groups.groups[0].symmetry is symmetry
    assert surgery.verify(model, groups, inputs)


class ScaledMaps(nn.Module):
    """Two 1 x 1 convolutions with a factor for each channel between them, in a shape that ``shaped`` gives it."""

    def __init__(self, shaped: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
        self.scale, self.shaped, self.again = nn.Parameter(torch.rand(6) + 0.5), shaped, again

    def forward(self, x: Tensor) -> Tensor:
        shaped = self.shaped(self.scale)
        return self.again(shaped) * self.last(self.first(x) * shaped)


@pytest.mark.parametrize(
    ("shaped", "again", "symmetry"),
    [
        (lambda scale: scale.reshape(1, -1, 1, 1), lambda shaped: 1, GL),
        (lambda scale: scale.unsqueeze(-1).unsqueeze(-1), lambda shaped: 1, GL),
        (lambda scale: scale[:, None, None], lambda shaped: 1, GL),
        (lambda scale: scale[None].exp()[..., None, None], lambda shaped: 1, P),
        (lambda scale: scale.reshape(1, -1, 1, 1), lambda shaped: shaped.square().sum(), P),
    ],
)
def test_a_factor_in_another_shape_is_folded_as_itself(
    shaped: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor], symmetry: Symmetry
) -> None:
    model, inputs = ScaledMaps(shaped, again), torch.randn(3, 4, 2, 2)
    groups = surgery.find_groups(model, inputs)
    assert groups.groups[0].symmetry is symmetry
    assert [folding.scale.parameter for folding in groups.foldings] == ["scale"] * (symmetry is GL)
    found = surgery.verify(model, groups, inputs)
    assert found and found.continuous == (symmetry is GL)


def test_units_of_a_weight_that_is_read_again_are_their_own_dual() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T @ self.weight

    groups = surgery.find_groups(Tied(), torch.randn(3, 4))
    assert groups.groups[0].symmetry is TURNS
    assert surgery.verify(Tied(), groups, torch.randn(3, 4))


def test_a_module_that_writes_into_its_input_is_not_taken_for_its_input() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    groups = surgery.find_groups(model, torch.randn(3, 4))
    assert groups.groups[0].symmetry is P
    assert surgery.verify(model, groups, torch.randn(3, 4))


def planted(model: nn.Module, groups: GroupSet, seed: int) -> nn.Module:
    """The same function in other weights: random members of all symmetries, orders elsewhere."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    found = canonical({name: tensor.detach().double() for name, tensor in model.state_dict().items()}, groups)
    orders = {
        group.name: drawn_map(group, generator) if found.maps(group) else group.random(generator) for group in groups
    }
    other.load_state_dict({name: map_tensor(name, each, groups, orders) for name, each in found.state.items()})
    return other


OPTIONS: dict[str, Any] = {"renormalize": None, "imagine": False, "progress": False, "example_inputs": IMAGES}


@pytest.mark.parametrize("make", [vit, lambda: vit(init_values=0.5), lambda: vit(norm_layer=nn.RMSNorm), swin])
@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_planted_symmetries_are_found_again(make: Callable[[], nn.Module], matching: str) -> None:
    torch.manual_seed(0)
    model = make()
    randomize(model, torch.Generator().manual_seed(1))
    groups = surgery.find_groups(model, IMAGES)
    other = planted(model, groups, seed=2)
    expected = model(IMAGES)
    assert relative_error((other(IMAGES),), (expected,)) < 1e-4
    data = torch.randn(200, 3, 16, 16) if matching == "activations" else None
    merged = surgery.merge(model, other, matching=matching, data=data, **OPTIONS)
    tolerance = 1e-4 if matching == "weights" else 1e-2  # correlations are summed in float32
    assert relative_error((merged(IMAGES),), (expected,)) < tolerance
    ordered = surgery.merge(model, other, matching=matching, data=data, symmetries="permutations", **OPTIONS)
    assert relative_error((ordered(IMAGES),), (expected,)) > 0.05
    fresh = make()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(IMAGES), merged(IMAGES))


def pair() -> tuple[VisionTransformer, VisionTransformer]:
    torch.manual_seed(4)
    models = vit(), vit()
    for model in models:
        randomize(model, torch.Generator().manual_seed(5))
    return models


def test_the_report_says_what_was_done_and_sources_stay() -> None:
    a, b = pair()
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    report = report_of(surgery.merge(a, b, matching="weights", **OPTIONS))
    assert "brought to a canonical form" in str(report)
    assert {certificate.source for certificate in report.certificates} == {0, 1}
    for model, old in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_exact_maps_count_as_certified_and_others_do_not() -> None:
    exact = merge_report_of(surgery.merge(*pair(), matching="weights", **OPTIONS))
    assert [certificate.mapped for certificate in exact.certificates] == [0, 0]
    grouped = group_units(trace_sources(pair(), given=IMAGES, progress=False), maps=True)
    surveyed = plan_survey(grouped, [Way(WeightMatching(), ())])
    with surveyed.grouped.running():
        matched = match_sources(surveyed, WeightMatching())
        assert matched.mapped > 0
        assert certify_sources(surveyed, matched).mapped == 0


def test_in_place_and_with_shares_of_one_source_the_function_stays() -> None:
    a, b = pair()
    expected = a(IMAGES), b(IMAGES)
    for alpha, wanted in zip((0.0, 1.0), expected, strict=True):
        merged = surgery.merge(a, b, matching="weights", alpha=alpha, **OPTIONS)
        assert relative_error((merged(IMAGES),), (wanted,)) < 1e-4
    mean = surgery.merge(a, b, matching="weights", **OPTIONS)(IMAGES)
    merged = surgery.merge(a, b, matching="weights", inplace=True, **OPTIONS)
    assert merged is a
    torch.testing.assert_close(a(IMAGES), mean)


def test_a_network_merged_with_itself_is_that_network() -> None:
    a, _ = pair()
    for model in (a, vit(init_values=1e-3), vit(qkv_bias=False), swin()):
        merged = surgery.merge(model, copy.deepcopy(model), matching="weights", **OPTIONS)
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_auto_keeps_is_what_asking_for_it_gives() -> None:
    a, b = pair()
    options = {**OPTIONS, "data": torch.randn(120, 3, 16, 16, generator=torch.Generator().manual_seed(9))}
    auto = surgery.merge(a, b, **{**options, "renormalize": "repair"})
    kept = merge_report_of(auto)
    assert [trial.matching for trial in kept.trials][:2] == ["activations", "activations, orders only"]
    assert kept.matching == "activations"
    asked = {"matching": "activations", "renormalize": "repair"}
    direct = surgery.merge(a, b, **{**options, **asked})
    for name, tensor in direct.state_dict().items():
        torch.testing.assert_close(auto.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_orders_found_once_serve_again() -> None:
    a, b = pair()
    orders = surgery.match(a, b, matching="weights", imagine=False, progress=False, example_inputs=IMAGES)
    assert any(isinstance(order, UnitMap) for order in orders.values())  # pyright: ignore[reportAttributeAccessIssue]
    again = surgery.merge(a, b, matching=surgery.matching.Given(orders), **OPTIONS)
    torch.testing.assert_close(again(IMAGES), surgery.merge(a, b, matching="weights", **OPTIONS)(IMAGES))


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_three_sources_of_one_function_are_merged_to_it(matching: str) -> None:
    model = vit()
    randomize(model, torch.Generator().manual_seed(1))
    groups = surgery.find_groups(model, IMAGES)
    sources = [model, *(planted(model, groups, seed) for seed in (6, 7))]
    data = torch.randn(200, 3, 16, 16) if matching == "activations" else None
    merged = surgery.merge(sources, matching=matching, data=data, **OPTIONS)
    tolerance = 1e-4 if matching == "weights" else 1e-2  # correlations are summed in float32
    assert relative_error((merged(IMAGES),), (model(IMAGES),)) < tolerance


def similarity_of_all(sources: list[VisionTransformer], found: Any, groups: GroupSet) -> float:
    """Mean cosine of all matrices of all pairs of sources, aligned."""
    states = [canonical(dict(model.state_dict()), groups).state for model in sources]
    orders = [{}, *found]
    cosines: list[Tensor] = []
    for name in groups.by_parameter:
        if states[0][name].ndim > 1:
            each = [map_tensor(name, state[name], groups, own) for state, own in zip(states, orders, strict=True)]
            cosines += [torch.cosine_similarity(x.flatten(), y.flatten(), 0) for x, y in combinations(each, 2)]
    return float(torch.stack(cosines).mean())


def test_matching_all_to_all_is_no_worse_than_to_the_first() -> None:
    torch.manual_seed(10)
    sources = [vit() for _ in range(3)]
    groups = surgery.find_groups(sources[0], IMAGES)
    options = {"imagine": False, "progress": False, "example_inputs": IMAGES}
    first, everyone = (
        similarity_of_all(sources, surgery.match(sources, matching=WeightMatching(scheme=scheme), **options), groups)
        for scheme in ("reference", "iterative")
    )
    assert everyone > first > 0.05


def test_sparse_sources_are_only_reordered() -> None:
    a, b = pair()
    for model in (a, b):
        for block in model.blocks:
            block.mlp.fc1.weight.data[:, ::2] = 0  # pyright: ignore
    merged = surgery.merge(a, b, matching="weights", masks="union", **OPTIONS)
    assert "only reordered" in str(report_of(merged))


def test_a_scale_near_zero_whose_shift_nobody_takes_is_left() -> None:
    a, b = vit(qkv_bias=False), vit(qkv_bias=False)
    for model in (a, b):
        randomize(model, torch.Generator().manual_seed(8))
    found = canonical(dict(a.state_dict()), surgery.find_groups(a, IMAGES))
    assert not found.left
    with torch.no_grad():
        a.blocks[0].norm1.weight[3] = 1e-9  # pyright: ignore
    report = report_of(surgery.merge(a, b, matching="weights", **OPTIONS))
    assert "norm1.weight is near zero" in str(report)
    assert "only reordered, not mapped" in str(report)


def test_half_precision_is_aligned_too() -> None:
    a, b = (model.bfloat16() for model in pair())
    merged = surgery.merge(a, b, matching="weights", **{**OPTIONS, "example_inputs": IMAGES.bfloat16()})
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.state_dict().values())


def test_unknown_choices_are_refused() -> None:
    a, b = pair()
    with pytest.raises(surgery.SurgeryError, match="unknown symmetries 'al'"):
        surgery.merge(a, b, symmetries="al", **OPTIONS)


def test_a_forgotten_twist_would_be_seen() -> None:
    """Were keys mapped like queries, the proof would fail."""
    model = vit()
    groups = surgery.find_groups(model, IMAGES)
    straight = tuple(
        replace(group, members=tuple(replace(member, dual=False) for member in group.members)) for group in groups
    )
    assert not surgery.verify(model, replace(groups, groups=straight), IMAGES)

"""Structured pruning: smaller models that compute what the original computes without the removed units."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_nets import CLASSES, NETS, SIDE, LayerNormed, groups_of, images, lively, net, same_state, state_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

import vfsurgery as surgery
from vfsurgery.discovery.recording import record
from vfsurgery.errors import CertificateError, DataError, InvalidWeightsError, OptionError, TraceError
from vfsurgery.groups import GroupSet, Member, PermutationGroup
from vfsurgery.pruning.units import UnitPruneReport
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.quota import Quota
from vfsurgery.pruning.units.reference import certify_cut
from vfsurgery.pruning.units.rehearsal import largest_working
from vfsurgery.pruning.units.resize import Resizer
from vfsurgery.tracing.sources import canonical_state

EXACT = 1e-9
"""Relative error in float64."""


class Attention(nn.Module):
    """One block of a transformer: the numbers of heads and of dims in them are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Linear(3, 10), nn.LayerNorm(10), nn.Linear(10, 3 * 8)
        self.proj, self.last = nn.Linear(8, 10), nn.LayerNorm(10)
        self.up, self.down, self.head = nn.Linear(10, 16), nn.Linear(16, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.last(x))))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """A bidirectional LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3 * SIDE, 6, batch_first=True, bidirectional=True), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0].mean(1))


class Tied(nn.Module):
    """One linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(3 * SIDE * SIDE, 8), nn.Linear(8, 8)
        self.again, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.middle(torch.tanh(self.first(x.flatten(1))))))))


class Halved(nn.Module):
    """Takes the first four of eight channels apart from the rest: a constant in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        x = torch.cat([x[:, :4].sigmoid(), x[:, 4:].exp()], 1)
        return self.fc(torch.relu(self.after(x)).mean((2, 3)))


class Centred(nn.Module):
    """Takes the mean over all channels away, which changes when some are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.fc(torch.relu(self.after(x - x.mean(1, keepdim=True))).mean((2, 3)))


ALL: dict[str, Callable[[], nn.Module]] = {
    **NETS, "layer-normed": LayerNormed, "attention": Attention, "recurrent": Recurrent, "tied": Tied,
}  # fmt: skip


def double(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return lively(make(), seed).double()


def report(model: nn.Module) -> UnitPruneReport:
    found = surgery.report_of(model)
    assert isinstance(found, UnitPruneReport)
    return found


def mse(found: nn.Module, expected: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((found.eval()(x) - expected.eval()(x)).square().mean())


@pytest.mark.parametrize(
    ("name", "scope"), [*((name, "group") for name in ALL), *((name, "global") for name in ("residual", "grouped"))]
)
def test_a_smaller_model_computes_what_the_original_does_without_the_removed_units(name: str, scope: str) -> None:
    model = double(ALL[name])
    before = state_of(model)
    smaller = surgery.prune_units(model, 0.4, scope=scope, example_inputs=images(4, dtype=torch.float64))
    found = report(smaller)
    assert found.certificate.error < EXACT < found.certificate.effect and not found.certificate.random_weights
    assert type(smaller) is type(model) and same_state(state_of(model), before)
    assert found.after.parameters == sum(p.numel() for p in smaller.parameters()) < found.before.parameters
    assert smaller(images(3, dtype=torch.float64)).shape == (3, CLASSES), "another batch size"
    assert all(group.after == len(group.kept) < group.before for group in found.groups) and found.groups
    again = copy.deepcopy(smaller)
    again.load_state_dict(state_of(smaller))
    assert not {p.data_ptr() for p in smaller.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_removed_units_are_columns_of_zeros_in_what_reads_them() -> None:
    model = double(NETS["chain"])
    smaller = surgery.prune_units(model, 0.5, example_inputs=images(2, dtype=torch.float64), exclude=["2", "4", "8"])
    kept = report(smaller).groups[0].kept
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent[2].weight[:, [unit for unit in range(8) if unit not in kept]] = 0
    assert len(kept) == 4 and mse(smaller, silent, images(8, dtype=torch.float64)) < EXACT**2
    assert mse(smaller, model, images(8, dtype=torch.float64)) > 1e-6


def graph_and_cut(model: nn.Module, name: str, lost: list[int]) -> tuple[object, GroupSet, Cut]:
    graph_module = record(model, (images(2, dtype=torch.float64),))
    groups = groups_of(model)
    mask = np.ones(groups[name].units, dtype=bool)
    mask[lost] = False
    return graph_module, groups, Cut(groups, {name: mask})


@pytest.mark.parametrize("lost", [[0, 1], [2, 5]])
def test_the_certificate_fails_where_one_layer_reads_other_units(lost: list[int]) -> None:
    model = double(NETS["residual"])
    graph_module, _, cut = graph_and_cut(model, "g0", lost)
    state, inputs = canonical_state(model), (images(4, dtype=torch.float64),)
    smaller = Resizer.of(model, graph_module).shrink(cut, state)
    assert certify_cut(model, graph_module, cut, state, smaller, inputs, torch.float64)
    with torch.no_grad():
        smaller.fc.weight.copy_(smaller.fc.weight.flip(1))
    assert certify_cut(model, graph_module, cut, state, smaller, inputs, torch.float64).error > 1e-3
    smaller = Resizer.of(model, graph_module).shrink(cut, state)
    weight = smaller.block1.conv1.weight
    with torch.no_grad():  # as if this one layer had kept the first units
        weight.copy_(model.block1.conv1.weight[:, : weight.shape[1]])
    assert bool(certify_cut(model, graph_module, cut, state, smaller, inputs, torch.float64)) == (lost == [4, 5])


def test_a_member_that_is_left_out_is_noticed() -> None:
    model = double(NETS["residual"])
    graph_module, groups, cut = graph_and_cut(model, "g0", [1])
    group = groups["g0"]
    without = tuple(member for member in group.members if member.parameter != "block1.conv1.weight")
    forgetful = GroupSet(tuple(PermutationGroup(
        g.name, g.size, without if g.name == "g0" else g.members, g.activations) for g in groups))  # fmt: skip
    wrong = Cut(forgetful, cut.kept)
    state = canonical_state(model)
    smaller = Resizer.of(model, graph_module).shrink(wrong, state)
    found = certify_cut(model, graph_module, wrong, state, smaller, (images(2, dtype=torch.float64),), torch.float64)
    assert not found and "block1.conv1" in found.failure


@pytest.mark.parametrize(("make", "left"), [(Halved, 6), (Centred, 8)])
def test_units_whose_removal_would_be_silently_wrong_stay(make: Callable[[], nn.Module], left: int) -> None:
    model = double(make)
    smaller = surgery.prune_units(model, 0.5, example_inputs=images(2, dtype=torch.float64))
    found = report(smaller)
    assert [group.label for group in found.left_whole] == ["conv"]
    assert "would compute something else, relative error" in found.left_whole[0].reason
    assert smaller.conv.out_channels == left, "beyond the constant place, units may go"
    assert smaller.after.out_channels == 3 and found.certificate.error < EXACT


def test_what_a_forward_holds_as_a_constant_stays_and_the_rest_goes() -> None:
    found = report(surgery.prune_units(double(Attention), 0.5, example_inputs=images(2, dtype=torch.float64)))
    assert [(group.label, group.after) for group in found.groups] == [("embed", 5), ("up", 8)]
    assert {group.label for group in found.left_whole} == {"qkv"}
    assert all("unflatten" in group.reason for group in found.left_whole)
    assert set(found.certificate.norms) == {"norm", "last"} and "2 norm layers are now of kept units" in str(found)


def test_modules_know_their_new_sizes() -> None:
    smaller = surgery.prune_units(net("grouped"), 0.5, example_inputs=images(2))
    grouped, depthwise = smaller.grouped, smaller.depthwise
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (4, 6, 2)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert (smaller.fc.in_features, smaller.fc.out_features) == (4, CLASSES)
    lstm = surgery.prune_units(double(Recurrent), 0.5, example_inputs=images(2, dtype=torch.float64)).lstm
    assert lstm.hidden_size == 3 and lstm.weight_hh_l0.shape == (12, 3)
    assert smaller.conv.weight.is_contiguous() and smaller.conv.weight.requires_grad


def test_norms_without_parameters_learn_their_sizes_from_what_goes_in() -> None:
    graph = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.GroupNorm(2, 8, affine=False),
        nn.ConvTranspose2d(8, 6, 2), nn.InstanceNorm2d(6), nn.PReLU(6), nn.Conv2d(6, CLASSES, 3),
    )  # fmt: skip
    smaller = surgery.prune_units(double(lambda: graph), 0.5, example_inputs=images(2, dtype=torch.float64))
    sizes = [(smaller[1].num_groups, smaller[1].num_channels), (smaller[4].num_groups, smaller[4].num_channels)]
    assert sizes == [(2, 6), (2, 4)]
    assert (smaller[5].in_channels, smaller[5].out_channels) == (4, 3)
    assert (smaller[6].num_features, smaller[7].num_parameters) == (3, 3)
    assert report(smaller).certificate.error < EXACT


def test_tied_weights_stay_tied() -> None:
    smaller = surgery.prune_units(double(Tied), 0.5, example_inputs=images(2, dtype=torch.float64))
    assert smaller.again.weight is smaller.middle.weight and smaller.again.weight.shape == (4, 4)


def with_copies(model: nn.Sequential, scales: Mapping[int, float]) -> nn.Sequential:
    """Units of the first layer that are so many times its unit 0."""
    with torch.no_grad():
        for unit, scale in scales.items():
            model[0].weight[unit] = scale * model[0].weight[0]
            model[0].bias[unit] = scale * model[0].bias[0]
    return model


def test_folding_a_copy_of_a_unit_changes_nothing() -> None:
    model = with_copies(double(NETS["chain"]), {3: 1.0, 5: 0.25})
    data = [images(32, dtype=torch.float64)]

    def copies_first(group: PermutationGroup, state: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([float(unit not in (3, 5)) for unit in range(group.units)])

    options = {"saliency": copies_first, "data": data, "renormalize": None, "exclude": ["2", "4", "8"]}
    merged = surgery.prune_units(model, 0.25, removed="fold", **options)
    dropped = surgery.prune_units(model, 0.25, **options)
    x = images(16, seed=9, dtype=torch.float64)
    assert report(merged).groups[0].kept == (0, 1, 2, 4, 6, 7) and report(merged).certificate.error < EXACT
    assert mse(merged, model, x) < EXACT**2 < 1e-6 < mse(dropped, model, x)


def test_folding_through_a_batch_norm_a_residual_stream_and_a_depthwise_convolution() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.depthwise, self.point = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1, bias=False)
            self.fc = nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.depthwise(torch.relu(self.norm(self.conv(x)))))
            return self.fc(torch.relu(self.point(x)).mean((2, 3)))

    model = double(Deep)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith(("conv", "norm", "depthwise")) and tensor.ndim:
                tensor[4] = tensor[2]
    saliency = lambda group, state: 1.0 - torch.eye(group.units)[4]  # noqa: E731
    data = [images(32, dtype=torch.float64)]
    options = {"saliency": saliency, "data": data, "renormalize": None, "exclude": "point"}
    merged = surgery.prune_units(model, 1 / 6, removed="fold", **options)
    x = images(16, seed=9, dtype=torch.float64)
    assert mse(merged, model, x) < EXACT**2 < 1e-8 < mse(surgery.prune_units(model, 1 / 6, **options), model, x)
    assert report(merged).not_folded == ()


def test_a_constant_unit_folds_into_the_bias() -> None:
    model = double(NETS["chain"])
    with torch.no_grad():
        model[8].weight[2] = 0  # a linear layer: no border is padded with zeros
        model[8].bias[2] = 3.0
    saliency = lambda group, state: 1.0 - torch.eye(group.units)[2]  # noqa: E731
    options = {"saliency": saliency, "data": [images(32, dtype=torch.float64)], "renormalize": None}
    merged = surgery.prune_units(model, 1 / 12, removed="fold", exclude=["0", "2", "4"], **options)
    assert mse(merged, model, images(16, seed=9, dtype=torch.float64)) < EXACT**2


def test_folding_is_closer_than_dropping_on_units_that_resemble_each_other() -> None:
    data = [images(64), images(64, seed=2)]
    errors = {
        removed: mse(surgery.prune_units(net("chain"), 0.3, removed=removed, data=data, renormalize=None),
                     net("chain"), images(64, seed=3))
        for removed in ("drop", "fold")
    }  # fmt: skip
    assert errors["fold"] < 0.7 * errors["drop"]


def test_readers_that_cannot_be_folded_into_are_named() -> None:
    model = net("grouped")
    found = report(surgery.prune_units(model, 0.5, removed="fold", data=[images(32)]))
    labels = [group.partition(" ")[2] for group in found.not_folded]
    assert labels == ["conv"] and "so dropped there and not folded: g" in str(found)


def test_magnitude_is_that_of_all_rows_that_write_a_unit() -> None:
    model = net("residual")
    with torch.no_grad():
        model.block1.conv1.weight[3] *= 1e-3
        model.stem.weight[1] *= 1e-3  # a stream with two writers
        model.stem.weight[4] *= 1e-3
        model.block1.conv2.weight[4] *= 1e-3
    kept = {g.label: g.kept for g in report(surgery.prune_units(model, 0.2, example_inputs=images(2))).groups}
    assert kept["block1.conv1"] == (0, 1, 2, 4, 5) and kept["stem"] == (0, 1, 2, 3, 5)


def test_activations_on_data_show_dead_units() -> None:
    model = net("chain")
    with torch.no_grad():
        model[0].bias[6] = -100.0
    smaller = surgery.prune_units(model, 0.125, saliency="activation", data=[images(32)], renormalize=None)
    assert report(smaller).groups[0].kept == (0, 1, 2, 3, 4, 5, 7)
    by_weight = surgery.prune_units(model, 0.125, data=[images(32)], renormalize=None)
    assert report(by_weight).saliency == "magnitude"


def one_group(size: int, blocks: int = 1, name: str = "g0") -> PermutationGroup:
    return PermutationGroup(name, size, (Member("w", 0, size),), blocks=blocks)


def test_every_block_of_a_nested_group_loses_its_own_least_salient_units() -> None:
    mask = Quota(0.5).masks([one_group(4, blocks=2)], {"g0": np.array([1.0, 2, 3, 4, 9, 8, 7, 6])})["g0"]
    assert mask.tolist() == [False, False, True, True, True, True, False, False]


def test_one_ranking_takes_from_groups_that_have_much_to_spare_and_leaves_a_floor() -> None:
    groups = [one_group(10, name="a"), one_group(10, name="b")]
    scores = {"a": np.array([0.0] * 9 + [10.0]), "b": np.ones(10)}
    masks = Quota(0.4, scope="global", floor=0.2).masks(groups, scores)
    assert masks["a"].sum() == 2 and "b" not in masks, "8 of 20, all from one group"
    assert Quota(0.45, scope="global", floor=0.2).masks(groups, scores)["b"].sum() == 9
    scaled = {"a": scores["a"] * 1e6, "b": scores["b"]}
    assert (Quota(0.4, scope="global", floor=0.2).masks(groups, scaled)["a"] == masks["a"]).all()


def test_what_stays_is_rounded_up_to_a_multiple_and_never_nothing() -> None:
    scores = {"g0": np.arange(12.0)}
    assert Quota(0.5, multiple_of=4).masks([one_group(12)], scores)["g0"].sum() == 8
    assert Quota(0.99).masks([one_group(12)], scores)["g0"].sum() == 1
    assert Quota(0.04).masks([one_group(12)], scores) == {}


def test_a_search_by_halves_finds_culprits_and_keeps_what_works_only_in_company() -> None:
    tries: list[int] = []

    def failure(names: object) -> str | None:
        tries.append(1)
        found = set(names)  # type: ignore[arg-type]
        if "q" in found:
            return "q fails"
        return "x and y are at odds" if {"x", "y"} <= found else None

    works, failed = largest_working([*"abcdefghqxyz"], failure)
    assert works == [*"abcdefghxz"] and failed == {
        "q": "q fails", "y": "not together with others: x and y are at odds"
    }  # fmt: skip
    assert len(tries) < 20


def test_running_statistics_are_those_of_the_smaller_model() -> None:
    data = [images(48), images(48, seed=2)]
    smaller = surgery.prune_units(net("residual"), 0.4, data=data)
    stale = surgery.prune_units(net("residual"), 0.4, data=data, renormalize=None)
    x = torch.cat(data)
    for model, fits in ((smaller, True), (stale, False)):
        with torch.no_grad():
            inner = model.block1.conv1(torch.relu(model.norm(model.stem(x))))
        near = torch.allclose(model.block1.bn1.running_mean, inner.mean((0, 2, 3)), atol=0.05)
        assert near == fits
    assert report(smaller).renormalize == ("reset",) and report(stale).renormalize == ()


def first_three(model: nn.Module, data: list[Tensor]) -> Tensor:
    """Deviations of the units that the second convolution of a chain writes."""
    return nn.Sequential(*list(model)[:3])(torch.cat(data)).std((0, 2, 3))


@pytest.mark.parametrize("renormalize", ["repair", "rescale"])
def test_units_that_are_left_get_the_deviation_that_they_had(renormalize: str) -> None:
    model, data = net("chain"), [images(64), images(64, seed=2)]
    smaller = surgery.prune_units(model, 0.4, data=data, renormalize=renormalize)
    kept = list(report(smaller).groups[1].kept)
    with torch.no_grad():
        wanted, found = (first_three(each, data) for each in (model, smaller))
        stale = first_three(surgery.prune_units(model, 0.4, data=data, renormalize=None), data)
    assert torch.allclose(found, wanted[kept], rtol=0.005) and not torch.allclose(stale, wanted[kept], rtol=0.05)


def test_the_result_exports_trains_and_keeps_its_modes() -> None:
    model = net("residual").train()
    model.block1.eval()
    smaller = surgery.prune_units(model, 0.3, example_inputs=images(2))
    assert smaller.training and not smaller.block1.bn1.training
    assert [m.training for m in smaller.modules()] == [m.training for m in model.modules()]
    smaller(images(4)).sum().backward()
    assert smaller.stem.weight.grad is not None
    smaller.eval()
    exported = torch.export.export(smaller, (images(4),)).module()
    assert torch.allclose(exported(images(4)), smaller(images(4)), atol=1e-5)


def test_half_precision_stays_half_and_is_proven_in_single() -> None:
    model = net("chain").bfloat16()
    smaller = surgery.prune_units(model, 0.5, example_inputs=images(2, dtype=torch.bfloat16))
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert report(smaller).certificate.dtype == "float32" and report(smaller).certificate


def test_where_outputs_show_nothing_the_proof_is_on_random_weights() -> None:
    model = net("chain")
    nn.init.zeros_(model[-1].weight)
    found = report(surgery.prune_units(model, 0.5, example_inputs=images(2)))
    assert found.certificate.random_weights and found.certificate.effect > 1e-3 and found.certificate.error < EXACT
    assert "shown on random weights" in str(found)


def test_nothing_removed_is_the_same_model() -> None:
    model = net("dense")
    smaller = surgery.prune_units(model, 0.0, example_inputs=images(2))
    assert same_state(state_of(smaller), state_of(model)) and report(smaller).groups == ()
    assert report(smaller).to_dict()["left_whole"][0]["reason"] == "too few units to lose one"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 1.0}, OptionError, r"fraction must lie in \[0, 1\) but is 1.0"),
        ({"fraction": -0.1}, OptionError, r"fraction must lie in \[0, 1\) but is -0.1"),
        ({"fraction": float("nan")}, OptionError, r"fraction must lie in \[0, 1\) but is nan"),
        ({"floor": 1.5}, OptionError, r"floor must lie in \[0, 1\) but is 1.5"),
        ({"multiple_of": 0}, OptionError, "multiple_of must be at least 1 but is 0"),
        ({"saliency": "magnitud"}, OptionError, "saliency='magnitud' is not known\n.*did you mean 'magnitude'"),
        ({"scope": "layer"}, OptionError, "scope='layer' is not known\n.*accepted: global, group"),
        ({"removed": "folded"}, OptionError, "removed='folded' is not known\n.*did you mean 'fold'"),
        ({"exclude": "convs"}, OptionError, "exclude='convs' matches nothing that writes units of a group"),
        ({"saliency": "activation"}, DataError, "saliency='activation' needs data"),
        ({"removed": "fold"}, DataError, "removed='fold' needs data"),
        ({"renormalize": "rescale"}, DataError, "renormalize='rescale' needs data"),
        ({"renormalize": "bias-calibration"}, OptionError, "'bias-calibration' is for merged models"),
        ({"saliency": lambda group, state: torch.ones(3)}, OptionError, "is not one finite number per unit"),
        ({"saliency": lambda group, state: torch.full((group.units,), float("nan"))}, OptionError, "not one finite"),
    ],
)
def test_what_is_not_acceptable_is_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    fraction = options.pop("fraction", 0.3)
    with pytest.raises(error, match=message):
        surgery.prune_units(net("chain"), fraction, example_inputs=images(2), **options)


def test_nan_weights_and_pruning_hooks_are_refused() -> None:
    model = net("chain")
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidWeightsError, match="NaN"):
        surgery.prune_units(model, 0.3, example_inputs=images(2))
    model = net("chain")
    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(OptionError, match=r"(?s)2.weight cannot be written\n.*pruning hooks.*prune.remove"):
        surgery.prune_units(model, 0.3, example_inputs=images(2))


def test_a_forward_that_only_export_records_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(12, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x) if x.sum() > 0 else self.fc(-x))

    with pytest.raises(TraceError, match="units can be removed only from what fx can record"):
        surgery.prune_units(Branching(), 0.3, example_inputs=torch.ones(2, 12))


def test_a_forward_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(1))

    model = Noisy(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CertificateError, match="gives different outputs each time it runs; nothing was removed"):
        surgery.prune_units(model, 0.3, example_inputs=images(2))


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("test_resnet", "test_vit") else pytest.mark.thorough)
        for name in timm.list_models("test_*")
    ],
)
def test_small_models_of_timm_get_smaller(name: str) -> None:
    model = timm.create_model(name).eval()
    smaller = surgery.prune_units(model, 0.3)
    found = report(smaller)
    size = model.pretrained_cfg["input_size"]
    assert found.certificate and found.certificate.effect > found.certificate.tolerance
    assert smaller(torch.randn(3, *size)).shape == (3, 1000)
    assert found.after.parameters < 0.95 * found.before.parameters, found


@pytest.mark.pairs
@pytest.mark.slow
def test_folding_a_trained_network_keeps_more_than_dropping(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "docs" / "benchmarks")
    pairs = importlib.import_module("pairs")
    model, _ = pairs.load_pair(shared, "vgg11_half")
    found = pairs.load_images(shared, pairs.ROOT / "out" / "cache", calibration=500, test=1000)
    dropped, folded = (
        surgery.evaluate(surgery.prune_units(model, 0.3, removed=removed, data=found.calibration), found.test).accuracy
        for removed in ("drop", "fold")
    )
    assert folded > dropped + 0.04 and folded > 0.7

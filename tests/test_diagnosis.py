"""A diagnosis is exact on linear networks, ratio 1 for a model and itself, and falls where features vanish."""

from __future__ import annotations

import copy
import json
import math
import re
from itertools import combinations

import pytest
import tiny_nets
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import vfsurgery as surgery
from vfsurgery.errors import DataError, IncompatibleModelsError, OptionError
from vfsurgery.scoring.diagnosis import DEPTHS, Diagnosis, LayerDiagnosis
from vfsurgery.stats.layers import LayerStatistics, Reading

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class LinearNet(nn.Module):
    """Linear layers without activations; with ``skip``, each one's input is added to its output."""

    def __init__(self, depth: int = 5, width: int = 6, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.skip = skip
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x if self.skip else layer(x)
        return x


def linear_nets(skip: bool = False) -> tuple[LinearNet, LinearNet, LinearNet]:
    """Two networks and their average."""
    a, b = LinearNet(skip=skip), LinearNet(skip=skip)
    merged = copy.deepcopy(a)
    merged.load_state_dict({name: (value + b.state_dict()[name]) / 2 for name, value in a.state_dict().items()})
    return a, b, merged


def inputs(count: int = 40) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64)


def rms(rows: Tensor) -> float:
    return (rows.norm(dim=1) / rows.shape[1] ** 0.5).mean().item()


def product(matrices: list[Tensor]) -> Tensor:
    """``W_n ... W_1``, the later ones on the left."""
    result = torch.eye(6, dtype=torch.float64)
    for matrix in matrices:
        result = matrix @ result
    return result


def symmetric(order: int, matrices: list[Tensor]) -> Tensor:
    """``e_k``: the sum over all choices of ``k`` matrices of their product in order."""
    return sum((product(list(chosen)) for chosen in combinations(matrices, order)), torch.zeros(6, 6).double())


def affine(net: LinearNet, layer: int) -> tuple[Tensor, Tensor]:
    """Matrix and offset of the layer's output by the formulas of Qu & Horvath, 2025, section 4."""
    weights = [module.weight.detach() for module in net.layers][: layer + 1]
    biases = [module.bias.detach() for module in net.layers][: layer + 1]
    if not net.skip:
        offset = sum(product(weights[j + 1 :]) @ bias for j, bias in enumerate(biases))
        return product(weights), offset
    # the output of the last module comes before its own skip is added: its input is the stream so far
    stream = sum(symmetric(k, weights[:-1]) for k in range(len(weights)))
    offset = sum(
        symmetric(k, weights[j + 1 : -1]) @ bias
        for j, bias in enumerate(biases[:-1])
        for k in range(len(weights) - j - 1)
    )
    return weights[-1] @ stream, weights[-1] @ (offset + torch.zeros(6).double()) + biases[-1]


@pytest.mark.parametrize("skip", [False, True], ids=["chain", "residual"])
def test_feature_and_offset_of_linear_nets_follow_the_decomposition(skip):
    a, b, merged = linear_nets(skip)
    x = inputs()
    found = surgery.diagnose(merged, [a, b], x.split(16))
    for number, layer in enumerate(found.layers):
        for net, measured in zip((merged, a, b), (layer.model, *layer.sources), strict=True):
            matrix, offset = affine(net, number)
            assert measured.feature == pytest.approx(rms(x @ matrix.T), rel=1e-10)
            assert measured.offset == pytest.approx(rms(offset[None]), rel=1e-10)
        assert layer.ratio == pytest.approx(
            layer.model.feature / ((layer.sources[0].feature + layer.sources[1].feature) / 2), rel=1e-12
        )


def test_the_feature_of_a_linear_net_is_its_forward_without_biases():
    a, b, merged = linear_nets()
    x = inputs()
    found = surgery.diagnose(merged, [a, b], x)
    unbiased = copy.deepcopy(merged)
    for layer in unbiased.layers:
        nn.init.zeros_(layer.bias)
    assert found.layers[-1].model.feature == pytest.approx(rms(unbiased(x).detach()), rel=1e-10)
    assert rms(merged(x).detach()) != pytest.approx(found.layers[-1].model.feature, rel=1e-3)


def test_a_model_beside_itself_has_ratio_one_everywhere():
    model = tiny_nets.net("residual")
    found = surgery.diagnose(model, [model, copy.deepcopy(model)], tiny_nets.images())
    assert len(found.layers) == 13
    assert found.ratios == found.bound == (1.0,) * 13
    assert {layer.variance_ratio for layer in found.layers} == {1.0}
    assert found.verdict.startswith("Nothing vanishes")
    assert found.unpaired == ()


def test_the_naive_average_of_a_chain_falls_layer_by_layer_and_the_aligned_one_of_a_copy_does_not():
    a, b = tiny_nets.net("chain", 0, width=32), tiny_nets.net("chain", 1, width=32)
    found = surgery.diagnose(average(a, b), [a, b], tiny_nets.images())
    ratios = found.ratios
    assert ratios[-1] < 0.5 * ratios[0]
    assert ratios[-1] < 0.5
    assert "RESCALE" in found.verdict
    copied = tiny_nets.planted(a, tiny_nets.groups_of(a))
    merged = surgery.merge(a, copied, example_inputs=tiny_nets.images(2), matching="weights", renormalize=None)
    assert surgery.diagnose(merged, [a, copied], tiny_nets.images()).ratios == pytest.approx([1] * 5, rel=1e-4)


def average(a: nn.Module, b: nn.Module) -> nn.Module:
    return surgery.merge(a, b, example_inputs=tiny_nets.images(2), matching="identity", renormalize=None)


def test_batches_of_any_size_give_the_mean_over_all_images():
    model, source = tiny_nets.net("chain", 0), tiny_nets.net("chain", 1)
    x = tiny_nets.images(50)
    whole, uneven = (surgery.diagnose(model, source, data) for data in ([x], x.split([1, 32, 17])))
    for one, other in zip(whole.layers, uneven.layers, strict=True):
        assert one.model.feature == pytest.approx(other.model.feature, rel=1e-5)
        assert one.model.variance == pytest.approx(other.model.variance, rel=1e-4)
    halves = [surgery.diagnose(model, source, [part]).layers[-1].model.feature for part in x.split([1, 49])]
    assert sum(halves) / 2 != pytest.approx(whole.layers[-1].model.feature, rel=1e-4)


def test_each_network_is_read_in_one_pass_over_the_data():
    class Counted(list[Tensor]):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    model = tiny_nets.net("chain")
    assert surgery.diagnose(model, [model, model], Counted(tiny_nets.images().split(32))).images == 96
    assert Counted.passes == 1


def test_variance_is_over_images_and_positions_and_averaged_over_units():
    model = tiny_nets.net("residual")
    x = tiny_nets.images()
    found = {layer.name: layer.model for layer in surgery.diagnose(model, model, x.split(40)).layers}
    stem = model.stem(x).detach()
    assert found["stem"].variance == pytest.approx(stem.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)
    assert found["norm"].variance == pytest.approx(
        model.norm(stem).var((0, 2, 3), correction=0).mean().item(), rel=1e-4
    )
    assert found["fc"].variance == pytest.approx(model(x).detach().var(0, correction=0).mean().item(), rel=1e-4)


def diagnosis(ratios: list[float], entries: int | None = None, kind: str = "conv") -> Diagnosis:
    """A diagnosis with given ratios at the first positions."""
    one = LayerStatistics(kind, 1.0, 1.0, 1.0)
    count = entries or len(ratios)
    layers = [
        LayerDiagnosis(f"l{i}", kind, i, i / max(count - 1, 1), LayerStatistics(kind, ratio, 1.0, ratio), (one,))
        for i, ratio in enumerate(ratios)
    ]
    return Diagnosis("Net", 8, count, tuple(layers))


def test_the_tight_bound_is_the_largest_ratio_from_a_layer_on():
    assert diagnosis([0.2, 0.9, 0.1, 0.3]).bound == (0.9, 0.9, 0.3, 0.3)


def test_the_smoothed_bound_follows_its_recursion_with_both_distances():
    # from the last layer back, L = 4: d is 1, 2, 3, 4 in the paper and one more in the code
    paper = [0.3 * 1.2 * (1 + 0.4 / 3) * 1.1, 0.3 * 1.2 * (1 + 0.4 / 3), 0.3 * 1.2, 0.3]
    assert diagnosis([0.1, 0.2, 0.1, 0.3]).smoothed() == pytest.approx(paper)
    code = [0.3 * (1 + 0.4 / 3) * 1.1 * 1.08, 0.3 * (1 + 0.4 / 3) * 1.1, 0.3 * (1 + 0.4 / 3), 0.3]
    assert diagnosis([0.1, 0.2, 0.1, 0.3]).smoothed(distance="code") == pytest.approx(code)
    assert diagnosis([0.1, 0.9, 0.1, 0.3]).smoothed(gamma=1) == diagnosis([0.1, 0.9, 0.1, 0.3]).bound
    assert diagnosis([0.1, 0.9, 0.1, 0.3]).smoothed()[1] == 0.9


def test_layers_that_are_missing_or_without_a_feature_do_not_raise_the_bound():
    found = diagnosis([0.5, math.nan, 0.25])
    assert found.bound == (0.5, 0.25, 0.25)
    assert found.smoothed()[0] == max(0.5, 0.25 * 1.2 * (1 + 0.4 / 3))
    gap = Diagnosis("Net", 8, 3, (found.layers[0], found.layers[2]))
    assert gap.smoothed() == (found.smoothed()[0], found.smoothed()[2])


def test_curves_are_interpolated_at_twenty_depths():
    found = diagnosis([1.0, 0.5, 0.0])
    assert len(DEPTHS) == 20
    assert found.at_depths(found.ratios) == pytest.approx([1 - depth for depth in DEPTHS])
    assert diagnosis([0.7]).at_depths((0.7,)) == (0.7,) * 20


VERDICTS = {
    "vanish": (
        [1.0, 0.4, 0.05, 0.01],
        "conv",
        r"Features vanish: from l2 \(67% of the depth\) on.* 0.01 times.*RESCALE",
    ),
    "batch norm": ([1.0, 0.01], "batch norm", r"Features vanish: from l1 \(100% of the depth\) on.*RESET"),
    "layer norm": ([1.0, 0.01], "norm", r"Features vanish.*REPAIR \(renormalize\(model, reference="),
    "fade": ([1.0, 0.05, 0.3], "conv", r"Features fade but do not vanish.* 0.3 times.*RESCALE"),
    "fine": (
        [0.6, 0.9],
        "conv",
        r"Nothing vanishes: .* at least 0.6 times .*, as at l0 \(0% of the depth\); it is 0.9 times",
    ),
    "grown": (
        [0.8, 40.0, 2.0],
        "conv",
        r"Nothing vanishes, but features have grown: at l1 \(50% of the depth\) .* 40 times",
    ),
    "broken": ([1.0, math.inf, math.nan], "conv", r"The model's values are not finite from l1 \(50% of the depth\) on"),
}


@pytest.mark.parametrize(("ratios", "kind", "words"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict_says_where_features_vanish_and_what_to_do(ratios, kind, words):
    verdict = diagnosis(ratios, kind=kind).verdict
    assert re.match(words, verdict)
    assert ("Recommended" in verdict) == verdict.startswith("Features")


class Functional(nn.Module):
    """Calls its layers' functions itself, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.inner.weight, self.inner.bias)
        x = functional.layer_norm(self.inner(x), (4,), self.norm.weight)
        return functional.linear(x, self.own)


def test_layers_are_found_where_their_functions_are_called():
    model = Functional()
    found = surgery.diagnose(model, surgery.trace(copy.deepcopy(model), torch.randn(2, 4)), torch.randn(20, 4))
    expected = [("inner", "linear"), ("inner (call 2)", "linear"), ("norm", "norm"), ("own", "linear")]
    assert [(layer.name, layer.kind) for layer in found.layers] == expected
    assert found.unpaired == ()
    assert found.ratios == pytest.approx([1] * 4, rel=1e-5)


def test_a_norm_with_an_activation_is_read_before_it():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    reading = Reading(NormAct(3).eval())
    x = tiny_nets.images()
    with torch.no_grad():
        reading.update(x)
    assert reading.finalize()["(model)"].feature == pytest.approx(rms(x.flatten(1)), rel=1e-4)
    assert reading.finalize()["(model)"].feature != pytest.approx(rms(x.relu().flatten(1)), rel=1e-2)


def test_pruned_networks_and_graph_modules_pair_with_their_source_by_path():
    dense = tiny_nets.net("chain")
    pruned = copy.deepcopy(dense)
    for layer in pruned:
        if hasattr(layer, "weight"):
            prune.l1_unstructured(layer, "weight", 0.9)
    bare = copy.deepcopy(dense)  # the same weights, without the hooks that torch prunes with
    for layer, sparse in zip(bare, pruned, strict=True):
        if hasattr(layer, "weight"):
            layer.weight.data = sparse.weight.detach()
    graph = surgery.trace(bare, tiny_nets.images(2))
    found, traced = (surgery.diagnose(model, dense, tiny_nets.images()) for model in (pruned, graph))
    assert found.ratios == pytest.approx(traced.ratios, rel=1e-5)
    assert [layer.name for layer in found.layers] == ["0", "2", "4", "8", "10"]
    assert found.ratios[-1] < 0.2


def test_what_has_no_partner_is_listed_and_leaves_its_place_empty():
    source = tiny_nets.net("chain")
    model = copy.deepcopy(source)
    model[2] = nn.Sequential(model[2])  # now under the path 2.0
    found = surgery.diagnose(model, [source, source], tiny_nets.images())
    assert [(layer.name, layer.depth) for layer in found.layers] == [("0", 0), ("4", 0.5), ("8", 0.75), ("10", 1)]
    assert [str(layer) for layer in found.unpaired] == [
        "2: source 0 has it, the model has not",
        "2.0: the model has it, source 0 has not",
    ]
    assert found.ratios == (1.0,) * 4


def test_outputs_that_are_not_one_block_per_image_are_listed():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.reshape(-1, 2, 4).transpose(0, 1)).mean(0))

    net = SequenceFirst()
    found = surgery.diagnose(net, net, torch.randn(10, 8))
    assert [layer.name for layer in found.layers] == ["last"]
    assert str(found.unpaired[0]) == "first: its outputs are not one block per image"


def test_diagnosis_leaves_modes_hooks_weights_and_random_state_as_they_were():
    model, source = tiny_nets.net("residual", 0).train(), tiny_nets.net("residual", 1)
    model.norm.eval()
    before = [tiny_nets.state_of(net) for net in (model, source)]
    random = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(tiny_nets.images(), batch_size=32, shuffle=True)
    surgery.diagnose(model, source, loader)
    with pytest.raises(DataError):
        surgery.diagnose(model, source, tiny_nets.images(8, channels=5))
    assert [module.training for module in (model, model.norm, model.stem, source)] == [True, False, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert tiny_nets.same_state(model.state_dict(), before[0])
    assert tiny_nets.same_state(source.state_dict(), before[1])
    assert torch.equal(torch.get_rng_state(), random)


def test_there_must_be_a_source_data_and_a_layer_in_common():
    model = tiny_nets.net("chain")
    with pytest.raises(OptionError, match=r"there is no source to compare with\n  remedy  sources=\[a, b\]"):
        surgery.diagnose(model, [], tiny_nets.images())
    with pytest.raises(DataError, match="the data is empty"):
        surgery.diagnose(model, model, [])
    with pytest.raises(
        IncompatibleModelsError, match=r"no layer in common\n  model    0, 2, 4, 8, \.\.\.\n  sources  stem"
    ):
        surgery.diagnose(model, tiny_nets.net("residual"), tiny_nets.images())
    with pytest.raises(
        DataError, match=r"Chain cannot take these images\n  images  \(8, 5, 12, 12\)\n  cause .*channels"
    ):
        surgery.diagnose(model, model, torch.randn(8, 5, 12, 12))


def test_a_diagnosis_prints_a_table_and_is_plain_json():
    source = tiny_nets.net("chain")
    model = copy.deepcopy(source)
    nn.init.zeros_(model[10].weight)
    found = surgery.diagnose(model, source, tiny_nets.images())
    lines = str(found).splitlines()
    assert lines[0] == "Chain beside 1 source, 96 images"
    assert lines[1].strip().startswith("Features vanish: from 10 (100% of the depth) on")
    assert lines[-1].split()[:6] == ["10", "linear", "100%", "0", "0", "0"]
    plain = json.loads(found.to_json())
    assert plain["layers"][0]["ratio"] == 1
    assert plain["layers"][-1]["bound"] == 0
    assert plain["recommended"] == "rescale"
    assert len(plain["curves"]["smoothed_bound"]) == len(plain["depths"]) == 20
    dead = surgery.diagnose(source, model, tiny_nets.images())
    assert json.loads(dead.to_json())["layers"][-1]["ratio"] is None
    assert math.isnan(dead.ratios[-1])


def test_a_diagnosis_is_drawn(tmp_path):
    model = tiny_nets.net("chain")
    path = surgery.diagnose(model, model, tiny_nets.images()).plot(tmp_path / "deep" / "diagnosis.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("ratios", [[0.0, 0.0], [math.nan, math.nan], [1.0, math.inf], [1e9, 1e-9], [0.5]])
def test_any_values_are_drawn_printed_and_said(tmp_path, ratios):
    found = diagnosis(ratios)
    assert found.plot(tmp_path / "diagnosis.svg").exists()
    assert found.page(tmp_path / "page.html", before=found).exists()
    assert found.verdict in str(found)
    assert json.loads(found.to_json())["state"] == found.state

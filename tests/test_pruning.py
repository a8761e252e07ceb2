"""surgery.prune: what it changes, what it leaves alone, what it says, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_nets import NETS, Chain, Residual, images, net, same_state, state_of
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import vfsurgery as surgery
from vfsurgery.errors import DataError, InvalidWeightsError, OptionError
from vfsurgery.pruning import PRUNERS, Masks, Pruner, Pruning, prune_each
from vfsurgery.pruning.layers import prunable
from vfsurgery.pruning.selection import kept_count

METHODS = sorted(PRUNERS)
DATA = images(32)


def pruned(model: nn.Module, *args: object, **options: object) -> nn.Module:
    """Prune; methods that count gradients take as few as there are images."""
    method = options.get("method", "magnitude")
    if isinstance(method, str) and "samples" in inspect.signature(PRUNERS[method]).parameters:
        options["method"] = PRUNERS[method](samples=16)
    return surgery.prune(model, *args, data=DATA, progress=False, **options)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_sparsity_asked_for_and_leaves_the_model_alone(method: str, kind: str) -> None:
    model = net(kind).train()
    before, mode = state_of(model), torch.get_rng_state()
    sparse = pruned(model, 0.6, method=method, scope="layer")
    assert same_state(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), mode)
    assert type(sparse) is type(model)
    assert all(module.training for module in (*model.modules(), *sparse.modules()))
    for name, tensor in sparse.state_dict().items():
        if name in prunable(model):
            assert int(tensor.count_nonzero()) == kept_count(tensor.numel(), 0.6)
        else:
            assert torch.equal(tensor, before[name])


class Counting(Pruner):
    """Another pruner, and how often it has scored."""

    name = "counting"

    def __init__(self, pruner: Pruner) -> None:
        self.pruner, self.rechooses, self.scorings = pruner, pruner.rechooses, 0  # type: ignore[misc]

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        self.scorings += 1
        return self.pruner.score(work)

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        return self.pruner.update(work, masks)


@pytest.mark.parametrize("memory", [2.0, 1e-4])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_sparsities_that_share_saliencies_give_what_each_gives_alone(method: str, scope: str, memory: float) -> None:
    model, sparsities = net("residual").train(), (0.3, 0.6, 0.8)
    samples = {"samples": 16} if "samples" in inspect.signature(PRUNERS[method]).parameters else {}
    options = {"scope": scope, "data": DATA, "memory": memory, "seed": 3, "allow_empty": True, "progress": False}
    counted = Counting(PRUNERS[method](**samples))
    together = list(prune_each(model, sparsities, method=counted, **options))
    alone = [surgery.prune(model, sparsity, method=counted.pruner, **options) for sparsity in sparsities]
    assert counted.scorings == 1
    for shared, own in zip(together, alone, strict=True):
        assert same_state(shared.state_dict(), own.state_dict())
        assert all(module.training for module in shared.modules())
        assert surgery.report_of(shared).layers == surgery.report_of(own).layers
        assert surgery.report_of(shared).requested == surgery.report_of(own).requested
    assert not same_state(together[0].state_dict(), alone[1].state_dict())


def test_several_sparsities_draw_the_same_numbers_in_the_step_too() -> None:
    class Noisy(Pruner):
        name = "noisy"

        def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
            for name, weight in work.weights.items():
                yield name, torch.rand(weight.shape, generator=work.generator)
            work.notes.append("scored")

        def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
            for name, weight in work.weights.items():
                yield name, torch.rand(weight.shape, generator=work.generator).masked_fill(~masks[name], 0)
            work.notes.append("updated")

    model = net("chain")
    together = list(prune_each(model, (0.3, 0.6), method=Noisy()))
    for shared, sparsity in zip(together, (0.3, 0.6), strict=True):
        assert same_state(shared.state_dict(), surgery.prune(model, sparsity, method=Noisy()).state_dict())
        assert surgery.report_of(shared).notes == ("scored", "updated")


@pytest.mark.parametrize("sparsity", [0, {"*": 0.5}, 1.0])
def test_several_sparsities_are_numbers_between_zero_and_one(sparsity: object) -> None:
    message = r"must be a number in \[0, 1\)" if sparsity == 1.0 else "takes sparsities that are numbers above 0"
    with pytest.raises(OptionError, match=message):
        prune_each(net("chain"), [0.5, sparsity])  # type: ignore[list-item]
    assert list(prune_each(net("chain"), [])) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_two_of_four_inputs(method: str) -> None:
    sparse = pruned(net("chain"), pattern="2:4", method=method)
    for name, weight in prunable(sparse).items():
        if weight.shape[1] % 4 == 0:
            fours = weight.count_nonzero() * 2 == weight.numel()
            groups = (weight != 0).unflatten(1, (-1, 4)).sum(2)
            assert bool(fours)
            assert bool((groups == 2).all()), name
        else:
            assert bool(weight.all())
    report = surgery.report_of(sparse)
    assert "0.weight" in str(report)
    assert "a unit reads 3 inputs, no multiple of 4" in str(report)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_zeros_stay_zero_and_count_as_pruned(method: str, scope: str) -> None:
    once = pruned(net("grouped"), 0.5, method="random")
    again = pruned(once, 0.5, method=method, scope=scope, allow_empty=True)
    assert Masks.of(again) & Masks.of(once) == Masks.of(again)
    if scope == "layer":
        assert Masks.of(again) == Masks.of(once)  # half of each layer is zero already
    more = pruned(once, 0.8, method=method, scope="layer")
    assert Masks.of(more) & Masks.of(once) == Masks.of(more)
    assert Masks.of(more).sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_prunes_alike(method: str) -> None:
    model = net("residual")
    twice = [pruned(model, 0.5, method=method, seed=3).state_dict() for _ in range(2)]
    assert same_state(*twice)


def test_another_seed_prunes_other_weights_at_random() -> None:
    model = net("residual")
    a, b = (Masks.of(pruned(model, 0.5, method="random", seed=seed)) for seed in (0, 1))
    assert a != b


def test_magnitude_is_one_threshold_over_all_layers_or_one_for_each() -> None:
    model = net("chain")
    everywhere = pruned(model, 0.7)
    kept = torch.cat([weight[weight != 0].abs() for weight in prunable(everywhere).values()])
    dropped = [weight[prunable(everywhere)[name] == 0].abs() for name, weight in prunable(model).items()]
    assert torch.cat(dropped).max() <= kept.min()
    total = sum(weight.numel() for weight in prunable(model).values())
    assert len(kept) == kept_count(total, 0.7)
    assert Masks.of(everywhere) != Masks.of(pruned(model, 0.7, scope="layer"))


def test_magnitude_agrees_with_torch() -> None:
    model, other = net("chain"), net("chain")
    layers = [(module, "weight") for module in other.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    total = sum(weight.numel() for weight in prunable(model).values())
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=total - kept_count(total, 0.7))
    assert Masks.of(pruned(model, 0.7)) == Masks.of(other)


def test_a_schedule_is_read_from_the_top() -> None:
    model = net("residual")
    sparse = pruned(model, {"stem": 0, "block1.conv1": 0.25, "block1": 0.9, "block2.*": 0.5}, scope="layer")
    sparsities = {layer.name: layer for layer in surgery.report_of(sparse).layers}
    assert sparsities["block1.conv1.weight"].sparsity == pytest.approx(0.25)
    assert sparsities["block1.conv2.weight"].sparsity == pytest.approx(0.9, abs=0.01)
    assert sparsities["block2.down.0.weight"].sparsity == pytest.approx(0.5)
    assert sparsities["stem.weight"].dense == "its sparsity is 0"
    assert sparsities["fc.weight"].dense == "no pattern of sparsity= matches it"
    assert torch.equal(sparse.fc.weight, model.fc.weight)


def test_with_several_sparsities_global_means_within_one_pattern() -> None:
    sparse = pruned(net("residual"), {"block1": 0.9, "*": 0.2})
    masks = Masks.of(sparse)
    for inside, sparsity in ((True, 0.9), (False, 0.2)):
        part = [mask for name, mask in masks.items() if name.startswith("block1") == inside]
        total = sum(mask.numel() for mask in part)
        assert sum(int(mask.sum()) for mask in part) == kept_count(total, sparsity)


def test_inplace_writes_into_the_tensors_that_the_model_has() -> None:
    model = net("chain").train()
    expected = pruned(model, 0.5).state_dict()
    where = [parameter.data_ptr() for parameter in model.parameters()]
    assert pruned(model, 0.5, inplace=True) is model
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    assert same_state(model.state_dict(), expected)
    assert model.training
    assert surgery.report_of(model).sparsity == Masks.of(model).sparsity


def test_excluded_layers_stay_dense_and_are_not_reported() -> None:
    model = net("residual")
    sparse = pruned(model, 0.5, exclude=("stem", "fc"))
    assert torch.equal(sparse.stem.weight, model.stem.weight)
    report = surgery.report_of(sparse)
    assert not {"stem.weight", "fc.weight"} & {layer.name for layer in report.layers}
    assert report.sparsity == pytest.approx(0.5, abs=0.001)
    with pytest.raises(OptionError, match="exclude='head' matches no"):
        pruned(model, 0.5, exclude="head")


def test_the_report_counts_what_is_zero() -> None:
    sparse = pruned(net("chain"), 0.75, scope="layer")
    report = surgery.report_of(sparse)
    zeros = sum(int((weight == 0).sum()) for weight in prunable(sparse).values())
    parameters = sum(parameter.numel() for parameter in sparse.parameters())
    assert report.of_parameters == zeros / parameters
    plain = json.loads(report.to_json())
    assert plain["of_parameters"] == report.of_parameters
    assert plain["layers"][0] == {
        "name": "0.weight", "entries": 216, "zeros": 162, "dense": "", "sparsity": 0.75,
    }  # fmt: skip
    assert str(report).startswith(f"Chain pruned: {report.sparsity:.2%} of ")


def test_sparsity_zero_is_the_model_itself() -> None:
    model = net("chain")
    sparse = pruned(model, 0, method="sparsegpt")
    assert same_state(sparse.state_dict(), model.state_dict())
    assert surgery.report_of(sparse).sparsity == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes_are_pruned_in_their_own(method: str, dtype: torch.dtype) -> None:
    sparse = pruned(net("chain").to(dtype), 0.5, method=method, scope="layer")
    for weight in prunable(sparse).values():
        assert weight.dtype == dtype
        assert int(weight.count_nonzero()) == kept_count(weight.numel(), 0.5)


def test_tied_weights_are_pruned_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    sparse = surgery.prune(model, 0.5, method="wanda", data=torch.randn(8, 6))
    assert sparse[2].weight is sparse[0].weight
    assert [layer.name for layer in surgery.report_of(sparse).layers] == ["0.weight"]


def test_frozen_parameters_are_pruned_and_stay_frozen() -> None:
    model = net("chain").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in pruned(model, 0.5).parameters())


def test_a_layer_without_any_weight_left_is_refused_by_name_or_allowed_by_word() -> None:
    model = net("chain")
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
    with pytest.raises(OptionError, match=r"4.weight would lose all of its weights\n  because .*'global'.*\n  remedy"):
        pruned(model, 0.9)
    report = surgery.report_of(pruned(model, 0.9, allow_empty=True))
    assert report.notes == ("without any weight left: 4.weight",)
    assert surgery.report_of(pruned(model, 0.999, scope="layer")).notes == ()  # one weight is left in each


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), True, "0.5"])
def test_a_sparsity_is_a_number_from_zero_to_below_one(value: object) -> None:
    with pytest.raises(OptionError, match=r"sparsity must be a number in \[0, 1\) but is"):
        pruned(Chain(), value)
    with pytest.raises(OptionError, match=r"sparsity for 'fc' must be a number in \[0, 1\) but is"):
        pruned(Residual(), {"fc": value})


def test_a_sparsity_or_a_pattern_must_be_given_and_percentages_are_told() -> None:
    with pytest.raises(OptionError, match="neither a sparsity nor a pattern is given"):
        pruned(Chain())
    with pytest.raises(OptionError, match=r"must be a number.*but is 80\n  remedy  it is a share .*: 80 % is 0.8"):
        pruned(Chain(), 80)


def test_a_pattern_of_the_schedule_must_decide_about_something() -> None:
    with pytest.raises(OptionError, match=r"sparsity\['heat'\] matches no .*\n  remedy +accepted"):
        pruned(Residual(), {"heat": 0.5})
    with pytest.raises(OptionError, match=r"sparsity\['fc'\] decides about no layer\n.* '\*' stands before it"):
        pruned(Residual(), {"*": 0.5, "fc": 0.2})


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "2/4", "2", 24])
def test_a_pattern_is_n_of_m(pattern: object) -> None:
    with pytest.raises(OptionError, match="is not N:M with N from 1 to M - 1"):
        pruned(Chain(), pattern=pattern)


def test_a_pattern_decides_alone() -> None:
    sparse = pruned(net("chain"), 0.9, pattern="1:2")
    assert prunable(sparse)["2.weight"].count_nonzero() * 2 == sparse[2].weight.numel()
    assert "the pattern 1:2 decides alone: sparsity=0.9 was not used" in str(surgery.report_of(sparse))
    with pytest.raises(OptionError, match="scope='row' and pattern='1:2' exclude each other"):
        pruned(Chain(), pattern="1:2", scope="row")
    with pytest.raises(OptionError, match=r"no layer can be pruned 1:7\n  layers  0.weight: a unit reads 3 inputs"):
        pruned(nn.Sequential(nn.Conv2d(3, 4, 1)), pattern="1:7")


def test_hooks_of_torch_prune_must_go_first_or_the_layer_stay_out() -> None:
    model = net("chain")
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(OptionError, match=r"0.weight cannot be written\n.*pruning hooks.*\n  remedy +torch.nn.utils"):
        pruned(model, 0.5)
    model(DATA)  # leaves a computed weight behind, which torch cannot copy
    sparse = pruned(model, 0.5, exclude="0")
    assert torch.equal(sparse[0].weight_orig, model[0].weight_orig)
    torch_prune.remove(model[0], "weight")
    assert Masks.of(pruned(model, 0.8)).sparsity == pytest.approx(0.8, abs=0.001)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = Chain()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidWeightsError, match=r"2.weight holds NaN or infinite values\n  count +1"):
        pruned(model, 0.5)
    assert Masks.of(pruned(model, 0.5, exclude="2")).by_layer["2.weight"] == 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_data_must_be_there_and_fit(method: str) -> None:
    with pytest.raises(DataError, match=f"method '{method}' needs data"):
        surgery.prune(Chain(), 0.5, method=method)
    with pytest.raises(DataError, match="the data is empty"):
        surgery.prune(Chain(), 0.5, method=method, data=[])
    with pytest.raises(DataError, match="Chain cannot take these images"):
        surgery.prune(Chain(), 0.5, method=method, data=images(2, channels=4))


def test_what_is_no_pruner_and_what_is_nothing_to_prune() -> None:
    with pytest.raises(OptionError, match=r"unknown pruning method 'magnitud'\n  remedy +did you mean 'magnitude'"):
        pruned(Chain(), 0.5, method="magnitud")
    with pytest.raises(OptionError, match="method must be a name or a Pruner but is 3"):
        pruned(Chain(), 0.5, method=3)
    with pytest.raises(OptionError, match="unknown scope 'rows'"):
        pruned(Chain(), 0.5, scope="rows")
    with pytest.raises(OptionError, match=r"nothing to prune in this Sequential\n.*that is not excluded"):
        pruned(nn.Sequential(nn.Linear(2, 2)), 0.5, exclude="*")


@dataclass(frozen=True)
class Mine(Pruner):
    """Drops the last entries of a weight; ``fault`` says which part of the protocol it breaks."""

    name: ClassVar[str] = "mine"
    fault: str = ""

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        for name, weight in work.weights.items():
            saliency = -torch.arange(weight.numel()).view(weight.shape).float()
            if self.fault == "nan":
                saliency[0] = torch.nan
            if self.fault == "shape":
                saliency = saliency.flatten()
            if self.fault == "silent" or (self.fault == "skips" and name == "0.weight"):
                continue
            yield ("other" if self.fault == "name" else name), saliency

    def update(self, work: Pruning, masks: Masks) -> Iterator[tuple[str, Tensor]]:
        for name in masks:
            if self.fault == "outside":
                yield name, torch.ones_like(work.weights[name])
            elif self.fault == "infinite":
                yield name, masks[name] * torch.inf
            elif self.fault == "doubles":
                yield name, 2 * work.weights[name] * masks[name]


def test_a_pruner_of_ones_own_scores_and_updates() -> None:
    model = net("chain")
    masks = Masks.of(pruned(model, 0.5, method=Mine()))
    assert bool(masks["0.weight"].flatten()[:108].all())
    assert not bool(masks["0.weight"].flatten()[108:].any())
    doubled = pruned(model, 0.5, method=Mine("doubles"))
    assert Masks.of(doubled) == masks
    assert torch.equal(doubled[0].weight, 2 * model[0].weight * masks["0.weight"])


def test_what_a_pruner_does_not_score_stays_dense_and_is_named() -> None:
    sparse = pruned(net("chain"), 0.5, method=Mine("skips"))
    layer = surgery.report_of(sparse).layers[0]
    assert (layer.name, layer.sparsity, layer.dense) == ("0.weight", 0, "mine cannot judge it")


FAULTS = {
    "nan": "a saliency of 0.weight is NaN",
    "shape": r"the saliencies of 0.weight are \(216,\)",
    "name": "scored 'other', which it was not asked for",
    "silent": "mine can judge no layer of this model",
    "outside": "Mine wrote to entries of 0.weight that its mask does not keep",
    "infinite": "Mine made 0.weight NaN or infinite",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pruner_that_breaks_the_protocol_is_named(fault: str) -> None:
    model = net("chain")
    before = state_of(model)
    with pytest.raises(OptionError, match=FAULTS[fault]):
        pruned(model, 0.5, method=Mine(fault), inplace=True)
    assert same_state(model.state_dict(), before)


def test_a_pruner_that_chooses_again_is_held_to_the_counts_of_its_masks() -> None:
    class Greedy(Mine):
        rechooses: ClassVar[bool] = True

    with pytest.raises(OptionError, match=r"Greedy kept more entries of 0.weight"):
        pruned(net("chain"), 0.5, method=Greedy("outside"))


def test_images_are_drawn_evenly_from_all_batches() -> None:
    batches = surgery.data.batches.Batches([torch.full((10, 1, 1, 1), float(i)) for i in range(4)])
    work = Pruning(Chain(), {}, {}, data=batches, progress=False)
    assert [len(images) for images in work.images("", 6)] == [2, 2, 2]
    assert [len(images) for images in work.images("", 8)] == [2, 2, 2, 2]
    assert sum(len(images) for images in work.images("")) == 40


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_prunes_as_the_cpu_does(method: str) -> None:
    model = net("grouped")
    masks = [Masks.of(pruned(copy.deepcopy(model).to(device), 0.5, method=method)) for device in ("cpu", "cuda")]
    assert all(mask.device.type == "cuda" for mask in masks[1].values())
    same = [float((mask == masks[1][name].cpu()).double().mean()) for name, mask in masks[0].items()]
    assert min(same) > 0.95  # sums in another order tell saliencies that are nearly equal apart otherwise

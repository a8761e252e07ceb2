"""What of an expert is its head: several signs, since any one alone misses some."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from tiny_nets import Chain, Residual, lively
from torch import fx, nn

import vfsurgery as surgery
from vfsurgery.merging.multitask.heads import BEGUN, CONFIGURED, LAST, RECREATED, SHAPES, find_heads, skeleton
from vfsurgery.merging.multitask.labels import labels_of
from vfsurgery.tracing.sources import canonical_state

RESET = {
    "levit_128s": (["head.bn", "head.linear", "head_dist.bn", "head_dist.linear"], {CONFIGURED, RECREATED}),
    "repvit_m0_9": (
        ["head.head.bn", "head.head.l", "head.head_dist.bn", "head.head_dist.l"], {CONFIGURED, RECREATED},
    ),
    "efficientvit_m0": (["head.bn", "head.linear"], {CONFIGURED, RECREATED}),
    "caformer_s18": (["head.fc.fc1", "head.fc.norm", "head.fc.fc2"], {CONFIGURED, RECREATED}),
    "deit_tiny_distilled_patch16_224": (["head", "head_dist"], {CONFIGURED}),
    "crossvit_9_240": (["head.0", "head.1"], {CONFIGURED}),
    "resnet18": (["fc"], {CONFIGURED}),
}  # fmt: skip
"""Families of timm whose heads are more than a layer of the same name, and one whose is not."""
UNREAD = fx.GraphModule(nn.Module(), fx.Graph())


def traced(model: nn.Module, *shape: int) -> fx.GraphModule:
    return surgery.trace(model, torch.randn(2, *shape, dtype=next(model.parameters()).dtype))


@pytest.mark.parametrize("name", RESET)
def test_heads_of_equal_shape_are_found_by_configuration_and_by_what_is_made_anew(name):
    models = [timm.create_model(name, num_classes=5) for _ in range(2)]
    random = torch.get_rng_state()
    before = [copy.deepcopy(model.state_dict()) for model in models[:1]]
    layers, signs = RESET[name]
    for head in find_heads(models, [UNREAD] * 2):
        assert head.layers == layers
        assert set(head.signs.values()) == signs
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[0][key]) for key, x in models[0].state_dict().items())


@pytest.mark.parametrize("name", ["levit_128s", "caformer_s18"])
def test_the_route_of_a_fine_tune_is_told_by_what_it_kept_of_the_base(name):
    base = timm.create_model(name, num_classes=9)
    kept, anew = (copy.deepcopy(base) for _ in range(2))
    anew.reset_classifier(5)
    layers = base.pretrained_cfg["classifier"]
    for path in [layers] if isinstance(layers, str) else layers:
        kept.set_submodule(path, nn.Linear(kept.get_submodule(path).in_features, 5))
    with torch.no_grad():  # untrained norms are alike in both
        for model in (base, kept):
            for key, tensor in model.state_dict().items():
                if ("head" in key and "norm" in key) or key.endswith("head.bn.weight"):
                    tensor.copy_(torch.linspace(-1, 1, len(tensor)))
    first, other = find_heads([kept, anew], [UNREAD] * 2, canonical_state(base))
    assert "create_model" in first.route
    assert "reset_classifier" in other.route


def test_without_any_sign_it_is_the_last_layer_and_what_comes_behind():
    models = [lively(Residual(classes=4), seed).double() for seed in range(2)]
    heads = find_heads(models, [traced(model, 3, 12, 12) for model in models])
    assert [head.layers for head in heads] == [["fc"]] * 2
    assert {sign for head in heads for sign in head.signs.values()} == {LAST}
    scaled = [nn.Sequential(*model, nn.BatchNorm1d(4)) for model in (Chain(classes=4), Chain(classes=4))]
    heads = find_heads(scaled, [traced(model.eval(), 3, 12, 12) for model in scaled])
    assert heads[0].layers == ["10", "11"]


def test_other_shapes_and_other_layers_are_of_the_head():
    models = [Residual(classes=count) for count in (3, 4)]
    assert [set(head.signs.values()) for head in find_heads(models, [UNREAD] * 2)] == [{SHAPES}] * 2
    models[1].fc = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    assert [head.layers for head in find_heads(models, [UNREAD] * 2)] == [["fc"], ["fc.0", "fc.2"]]


def test_a_layer_that_was_begun_anew_shows_in_its_angle_to_the_base():
    base = lively(Residual(classes=4), 1).double()
    tuned = [copy.deepcopy(base) for _ in range(2)]
    for seed, model in enumerate(tuned):
        torch.manual_seed(seed)
        nn.init.normal_(model.fc.weight)
    graphs = [traced(model, 3, 12, 12) for model in tuned]
    found = find_heads(tuned, graphs, canonical_state(base))
    assert [set(head.signs.values()) for head in found] == [{BEGUN}] * 2
    assert found[0].layers == ["fc"]


def test_auxiliary_classifiers_that_eval_mode_does_not_run_are_of_the_head_by_their_shapes():
    models = [torchvision.models.googlenet(num_classes=k, aux_logits=True, init_weights=False) for k in (3, 4)]
    head = find_heads(models, [UNREAD] * 2)[0]
    assert head.layers == ["aux1.fc2", "aux2.fc2", "fc"]


def test_a_named_head_is_taken_at_the_word():
    models = [lively(Chain(classes=4), seed).double() for seed in range(2)]
    assert find_heads(models, [UNREAD] * 2, named=["8", "10"])[0].layers == ["8", "10"]


def test_names_of_classes_come_from_the_configuration():
    model = nn.Linear(2, 3)
    assert labels_of(model, 3) is None
    model.config = type("Config", (), {"id2label": {0: "cat", 1: "dog", 2: "cow"}})()
    assert labels_of(model, 3) == ("cat", "dog", "cow")
    assert labels_of(model, 4) is None
    model.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
    assert labels_of(model, 3) is None


def test_a_skeleton_holds_no_values_and_keeps_tied_weights_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    empty = skeleton(model)
    assert all(x.is_meta for x in empty.state_dict().values())
    assert empty[0].weight is empty[1].weight

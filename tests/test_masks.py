"""Masks: read off a model, combined, saved, put on another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_nets import Chain, Residual
from torch import nn
from torch.nn.utils import parametrizations, prune

import vfsurgery as surgery
from vfsurgery.errors import IncompatibleModelsError, OptionError
from vfsurgery.groups import permute_tensor, random_permutations
from vfsurgery.pruning import Masks
from vfsurgery.pruning.layers import prunable


def sparse(seed: int = 0, share: float = 0.5) -> Chain:
    """A chain with about ``share`` of its weights, and a bias, at zero."""
    torch.manual_seed(seed)
    model = Chain()
    for weight in prunable(model).values():
        weight[torch.rand_like(weight) < share] = 0
    return model


def test_masks_are_the_zero_pattern() -> None:
    model = sparse()
    masks = Masks.of(model)
    assert list(masks) == [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert all(torch.equal(masks[name], model.get_parameter(name) != 0) for name in masks)
    assert 0.4 < masks.sparsity < 0.6


def test_sparsity_counts_entries_and_not_layers() -> None:
    masks = Masks({"a": torch.tensor([True, False]), "b": torch.ones(6, dtype=torch.bool)})
    assert masks.sparsity == 1 / 8
    assert masks.by_layer == {"a": 0.5, "b": 0.0}


def test_apply_zeroes_what_is_not_kept_and_nothing_else() -> None:
    masks, model = Masks.of(sparse()), Chain()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks.apply(model)
    for name, parameter in model.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(parameter, expected)
    assert Masks.of(model) == masks
    assert Masks.of(model) != Masks.of(sparse(seed=1))


def test_intersection_and_union_keep_what_both_or_either_keeps() -> None:
    a, b = Masks.of(sparse(0)), Masks.of(sparse(1))
    both, either = a & b, a | b
    assert all(torch.equal(both[name], a[name] & b[name]) for name in a)
    assert all(torch.equal(either[name], a[name] | b[name]) for name in a)
    assert both.sparsity > a.sparsity > either.sparsity


def test_masks_come_back_from_disk(tmp_path: Path) -> None:
    masks = Masks.of(sparse())
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks


def test_a_file_of_weights_is_no_file_of_masks(tmp_path: Path) -> None:
    surgery.checkpoints.save_state_dict(Chain().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(OptionError, match=r"the mask of 0.bias is torch.float32"):
        Masks.load(tmp_path / "weights.safetensors")


def test_permuted_masks_are_those_of_the_permuted_model() -> None:
    model = sparse()
    groups = surgery.find_groups(model, torch.randn(2, 3, 12, 12))
    orders = random_permutations(groups, torch.Generator().manual_seed(0))
    other = Chain()
    other.load_state_dict({name: permute_tensor(name, x, groups, orders) for name, x in model.state_dict().items()})
    assert Masks.of(model).permuted(groups, orders) == Masks.of(other)
    assert Masks.of(model) != Masks.of(other)


def test_hooks_of_torch_prune_count_before_and_after_a_forward() -> None:
    model = Chain()
    prune.random_unstructured(model[0], "weight", 0.5)
    masks = Masks.of(model)
    assert masks.by_layer["0.weight"] == 0.5
    with torch.no_grad():
        model[0].weight_orig.fill_(1)  # the attribute is only made anew by the next forward
    assert Masks.of(model) == masks
    with pytest.raises(OptionError, match=r"pruning hooks compute it\n  remedy +torch.nn.utils.prune.remove"):
        masks.apply(model)


def test_a_parametrized_weight_is_not_written_to() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(OptionError, match="a parametrization computes it"):
        Masks.of(model).apply(model)


def test_masks_of_another_architecture_are_refused_before_anything_is_written() -> None:
    masks, model = Masks.of(sparse()), Chain(classes=7)
    before = model[0].weight.detach().clone()
    with pytest.raises(IncompatibleModelsError, match=r"weight +10.weight\n  shapes +mask \(5, 12\), weight \(7, 12\)"):
        masks.apply(model)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(IncompatibleModelsError, match="different architectures"):
        _ = masks & Masks.of(Residual())


def test_tied_weights_have_one_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(Masks.of(model)) == ["0.weight"]


def test_attention_is_pruned_too_and_embeddings_and_norms_are_not() -> None:
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8), "embed": nn.Embedding(4, 8)}
    )
    assert list(prunable(model)) == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_an_exclusion_that_matches_nothing_is_named_with_the_nearest_layer() -> None:
    assert "8.weight" not in prunable(Chain(), exclude="8")
    with pytest.raises(OptionError, match=r"exclude='O' matches no convolution or linear layer\n  remedy +"):
        prunable(Chain(), exclude=("0", "O"))

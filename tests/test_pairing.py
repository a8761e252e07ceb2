"""Layers of a compressed network find their partners by name, then by position, and by nothing else."""

from __future__ import annotations

import copy
from itertools import combinations, product

import pytest
import torch
from tiny_nets import CLASSES, Chain, Residual, images, lively, net
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.pruning.renormalizing.pairing import Pairing, certain_pairs, find_others, find_stages, pair_stages


def paired(compressed: nn.Module, reference: nn.Module, **options) -> Pairing:
    stages = []
    for model in (compressed, reference):
        graph_module = surgery.trace(model, images(2))
        stages.append(find_stages(graph_module, surgery.find_groups(graph_module)))
    return pair_stages(*stages, **options)


def names(pairing: Pairing) -> dict[str, str]:
    return {pair.stage.name: pair.partner.name for pair in pairing.pairs}


def reasons(pairing: Pairing) -> dict[str, str]:
    return {entry.layer: entry.reason for entry in pairing.unpaired}


def plain_chain(*widths: int) -> nn.Sequential:
    """Convolutions of these widths with activations between them, as children 0, 2, 4, ..."""
    layers = [nn.Conv2d(before, width, 3, padding=1) for before, width in zip((3, *widths), widths, strict=False)]
    return lively(nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))))


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "dense"])
def test_a_copy_is_paired_with_itself_layer_by_layer(name):
    found = paired(net(name), net(name))
    assert all(pair.stage.name == pair.partner.name and pair.by == "name" for pair in found.pairs)
    assert found.coverage == 1
    assert not found.factors


def test_a_batch_norm_and_the_layer_before_it_are_one_stage():
    found = paired(net("residual"), net("residual"))
    assert [pair.stage.names for pair in found.pairs][:2] == [("norm", "stem"), ("block1.bn1", "block1.conv1")]


def test_a_convolution_that_has_swallowed_its_batch_norm_is_paired_with_the_norm():
    dense = net("residual")
    fused = copy.deepcopy(dense)
    fused.stem, fused.norm = fuse_conv_bn_eval(fused.stem, fused.norm), nn.Identity()
    pair = next(pair for pair in paired(fused, dense).pairs if pair.stage.name == "stem")
    assert pair.partner.end.path == "norm"


def test_of_two_factors_the_last_one_is_the_partner():
    dense = net("chain")
    factored = copy.deepcopy(dense)
    factored[2] = nn.Sequential(nn.Conv2d(8, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 10, 1))
    factored[8] = nn.Sequential(nn.Linear(54, 5, bias=False), nn.Linear(5, 12))
    found = paired(factored, dense)
    assert names(found) == {"0": "0", "2.1": "2", "4": "4", "8.1": "8", "10": "10"}
    assert [(factor.layer, factor.reason) for factor in found.factors] == [
        ("2.0", "a factor of 2, which 2.1 completes"),
        ("8.0", "a factor of 8, which 8.1 completes"),
    ]
    assert found.coverage == 1


def test_factors_before_a_batch_norm_are_paired_through_it():
    dense = net("residual")
    factored = copy.deepcopy(dense)
    factored.block1.conv1 = nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 6, 1))
    found = paired(factored, dense)
    assert found.coverage == 1
    assert [factor.layer for factor in found.factors] == ["block1.conv1.0"]


def test_renamed_layers_are_paired_by_their_place():
    dense = net("chain")
    renamed = nn.Sequential()
    renamed.body = nn.Sequential(*list(dense)[:8])
    renamed.tail = nn.ModuleDict({"hidden": dense[8]})["hidden"]
    renamed.act, renamed.out = nn.ReLU(), dense[10]
    found = paired(renamed, dense)
    assert names(found) == {"body.0": "0", "body.2": "2", "body.4": "4", "tail": "8", "out": "10"}
    assert {pair.by for pair in found.pairs} == {"position"}


def test_a_deleted_layer_shifts_names_and_weights_tell():
    dense = plain_chain(8, 8, 8, 6)
    cut = copy.deepcopy(dense)
    del cut[2:4]
    assert names(paired(cut, dense)) == {"0": "0", "2": "4", "4": "6"}


def test_a_deleted_layer_of_other_width_shifts_names_and_weights_tell():
    dense = plain_chain(8, 4, 8, 6)
    cut = copy.deepcopy(dense)
    del cut[2:4]
    cut[2] = nn.Conv2d(8, 8, 3)  # what read 4 units reads 8: nothing in it tells
    found = paired(cut, dense)
    assert names(found) == {"0": "0", "4": "6"}
    assert reasons(found) == {"2": "8 units where 2 of the reference has 4; keep= says which"}


def test_without_evidence_equal_places_are_not_guessed_between():
    dense, cut = plain_chain(8, 8, 8, 6), plain_chain(8, 8, 6)
    nn.init.zeros_(cut[2].weight)
    renamed = nn.Sequential()
    renamed.first, renamed.a, renamed.middle, renamed.b, renamed.last = dense[0], nn.ReLU(), cut[2], nn.ReLU(), dense[6]
    found = paired(renamed, dense)
    assert names(found) == {"first": "0", "last": "6"}
    assert reasons(found) == {"middle": "could be any of 2, 4"}


def test_networks_trained_apart_have_no_partners():
    found = paired(net("chain", seed=1), net("chain", seed=0))
    assert not found.pairs
    assert reasons(found)["0"] == "its weights have nothing in common with 0 of the reference"


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_of_a_pruned_layer_only_what_is_left_is_compared(share):
    pruned = net("chain")
    with torch.no_grad():
        for layer in pruned:
            if hasattr(layer, "weight"):
                layer.weight.mul_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < share)
    assert paired(pruned, net("chain")).coverage == 1


def test_a_layer_that_has_lost_units_is_paired_where_keep_says_which():
    dense, small = Chain(width=8), Chain(width=5)
    left = [0, 2, 3, 5, 7]
    found = paired(small, dense, keep={"0": left})
    first = found.pairs[0]
    assert first.kept is not None
    assert first.site.places is not None
    assert first.site.places.tolist() == [[index] for index in left]
    assert reasons(paired(small, dense))["0"] == "5 units where 0 of the reference has 8; keep= says which"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"zero": [0]}, "keep names no layer: 'zero'"),
        ({"0": [0, 1]}, "keep of 0 does not fit"),
        ({"0": [0, 1, 2, 3, 8]}, "keep of 0 does not fit"),
    ],
)
def test_keep_must_fit(keep, message):
    with pytest.raises(OptionError, match=message):
        paired(Chain(width=5), Chain(width=8), keep=keep)


def test_layers_that_no_scale_goes_into_are_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.fc(self.bare(self.conv(self.conv(x))).mean((2, 3)))

    graph_module = surgery.trace(Tied().eval(), images(2))
    others = find_others(graph_module, surgery.find_groups(graph_module))
    assert [entry.layer for entry in others] == ["conv", "conv", "bare.0"]
    assert "used in several places" in others[0].reason
    assert "no scale and shift" in others[-1].reason
    residual = surgery.trace(Residual().eval(), images(2))
    assert not find_others(residual, surgery.find_groups(residual))


def test_certain_pairs_are_those_of_every_longest_alignment():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        rows, columns = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        same = (torch.rand(rows, columns, generator=generator) < 0.5).tolist()
        assert set(certain_pairs(same)) == in_every_longest(same)


def in_every_longest(same: list[list[bool]]) -> set[tuple[int, int]]:
    """By trying all alignments."""
    rows, columns = len(same), len(same[0])
    for length in range(min(rows, columns), 0, -1):
        found = [
            set(zip(mine, theirs, strict=True))
            for mine, theirs in product(combinations(range(rows), length), combinations(range(columns), length))
            if all(same[i][j] for i, j in zip(mine, theirs, strict=True))
        ]
        if found:
            return set.intersection(*found)
    return set()

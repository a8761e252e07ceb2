"""What normalization does to a network with preserved prefixes: all of the merged part, nothing of the prefixes."""

from __future__ import annotations

import copy

import pytest
import torch
from prefix_nets import SAME, X, distance, merge, sources
from tiny_nets import Chain, groups_of, images, lively, permuted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.matching import Given
from vfsurgery.stats.collect import Observer, Watch


@pytest.mark.parametrize("boundary", [2, 4, "block1"])
def test_reset_leaves_the_statistics_of_preserved_norms_alone(boundary: int | str) -> None:
    models = sources("residual", 2)
    data = images(32, 4, dtype=torch.float64)
    options = {"matching": "identity", "data": data}
    raw = merge(models, boundary, "branches", **options)
    reset = merge(models, boundary, "branches", renormalize="reset", **options)
    for path, module in reset.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            same = torch.equal(module.running_var, raw.get_submodule(path).running_var)
            assert same == path.startswith("source_")
    own = reset.get_submodule("source_1.norm")
    assert torch.equal(own.running_mean, models[1].norm.running_mean)


def test_reset_gives_merged_norms_the_statistics_of_the_composite() -> None:
    data = images(64, 4, dtype=torch.float64)
    merged = merge(sources("residual", 2), 3, renormalize="reset", data=data)
    seen: list[Tensor] = []
    name = next(node.args[0].name for node in merged.graph.nodes if node.target == "block1.bn2")
    Observer(merged, Watch({name: seen.append})).run(data)
    norm = merged.get_submodule("block1.bn2")
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-6)
    assert torch.allclose(norm.running_var, seen[0].var((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("form", ["grouped", "branches"])
def test_repair_corrects_the_boundary_layer_and_what_follows_but_no_prefix(form: str) -> None:
    models, data = sources("chain", 2), images(64, 4, dtype=torch.float64)
    given = Given(surgery.match(models, matching="weights", example_inputs=X[:2], progress=False))
    raw, repaired = (merge(models, 3, form, renormalize=step, data=data, matching=given) for step in (None, "repair"))
    untouched = {name for name, tensor in raw.named_parameters() if torch.equal(tensor, repaired.get_parameter(name))}
    assert {name.removeprefix("source_0.").removeprefix("source_1.").split(".")[0] for name in untouched} == {
        *("0", "2"),  # the preserved prefix
        "10",  # the output layer
    }
    found: list[Tensor] = []
    node = next(node.name for node in repaired.graph.nodes if node.target == "4")
    Observer(repaired, Watch({node: lambda value: found.append(value.clone())})).run(data)
    goals: list[Tensor] = []
    for model in (models[0], permuted(models[1], groups_of(copy.deepcopy(models[1]).float()), given.permutations)):
        with torch.no_grad():
            goals.append(nn.Sequential(*list(model)[:5])(data.clone()).std((0, 2, 3), correction=0))
    assert torch.allclose(found[0].std((0, 2, 3), correction=0), (goals[0] + goals[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(("name", "step"), [("chain", "rescale"), ("residual", "reset"), ("vit", "auto")])
def test_where_all_is_preserved_nothing_is_corrected(name: str, step: str) -> None:
    models, depth = sources(name, 2), {"chain": 5, "residual": 6, "vit": 14}[name]
    merged = merge(models, depth, renormalize=step, data=images(32, dtype=torch.float64))
    assert distance(merged, (models[0](X) + models[1](X)) / 2) <= SAME
    assert any(": every" in note for note in surgery.report_of(merged).notes)


def test_bias_calibration_counts_preserved_layers() -> None:
    models = [lively(Chain(), seed).double() for seed in (1, 2)]
    merged = merge(models, 3, renormalize="bias-calibration", matching="identity")
    for path, depth in (("4", 3), ("8", 4), ("10", 5)):
        expected = sum(0.5**depth * model.get_parameter(f"{path}.bias") for model in models)
        assert torch.allclose(merged.get_parameter(f"{path}.bias"), expected)

"""Stages do what Python does, to the same weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from small import assert_same, small, staged

import vfsurgery as surgery
from vfsurgery.checkpoints import load_into, load_state_dict, save_state_dict
from vfsurgery.data import digits
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.pruning import Masks


def test_yaml_and_python_give_the_same_weights(ran):
    a, b = small(0), small(7)
    data = digits().calibration
    options = {"data": data, "matching": "activations", "renormalize": ["rescale"], "progress": False}
    expected = surgery.merge(a, b, alpha=0.4, **options)
    written = load_state_dict(ran.output / "small.safetensors")
    assert_same(written, expected.state_dict())
    other = surgery.merge(a, b, alpha=0.5, **options)
    assert not torch.equal(written["fc.weight"], other.state_dict()["fc.weight"])


@pytest.mark.parametrize("data", [{"name": "digits"}, None])
def test_merge_alone_is_the_one_line(tmp_path, data):
    recipe = surgery.Recipe.from_yaml(staged("merge", data=data))
    if data is None:
        recipe = surgery.Recipe.from_yaml(staged("merge", data=None), {"sources.0.input_size": [1, 8, 8]})
    recipe.run(tmp_path, progress=False)
    given = {"example_inputs": torch.randn(2, 1, 8, 8)} if data is None else {"data": digits().calibration}
    expected = surgery.merge(small(0, 0), small(7, 0), **given, progress=False)
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())


def test_shares_by_layer(tmp_path):
    shares = {"convs.0": 0.0, "convs.1": 1.0, "*": [0.2, 0.8]}
    stage = {"merge": {"matching": "identity", "alpha": shares, "renormalize": None}}
    surgery.Recipe.from_yaml(staged(stage)).run(tmp_path, progress=False)
    found = load_state_dict(tmp_path / "small.safetensors")
    a, b = small(0, 0).state_dict(), small(7, 0).state_dict()
    assert torch.equal(found["convs.0.weight"], a["convs.0.weight"])
    assert torch.equal(found["convs.1.weight"], b["convs.1.weight"])
    assert torch.allclose(found["fc.weight"], torch.lerp(a["fc.weight"], b["fc.weight"], 0.8))


def test_three_sources(tmp_path):
    sources = [{"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}}, {}, {"name": "third"}]
    merge = {"merge": {"matching": "weights", "weights": [0.5, 0.3, 0.2]}}
    run = surgery.Recipe.from_yaml(staged(merge, "evaluate", sources=sources)).run(tmp_path, progress=False)
    lines = run.findings[0].said("evaluate").lines[1:]
    assert [line.split()[0] for line in lines] == ["a", "b", "third", "ensemble", "merged"]
    expected = surgery.merge(
        [small(seed, 0) for seed in range(3)],
        weights=[0.5, 0.3, 0.2],
        matching="weights",
        data=digits().calibration,
        progress=False,
    )
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())


def test_pruned_networks_keep_their_zeros_through_training_and_merge(tmp_path):
    stages = (
        {"train": {"epochs": 1}},
        {"prune": {"sparsity": 0.6, "method": "random"}},
        {"train": {"epochs": 1}},
        {"export": "pruned.safetensors"},
        {"merge": {"masks": "keep"}},
        "diagnose",
        {"export": "small.safetensors"},
    )
    surgery.Recipe.from_yaml(staged(*stages)).run(tmp_path, progress=False)
    models = [TinyConvNet(width=4) for _ in range(3)]
    for model, file in zip(models, ("pruned_a", "pruned_b", "small"), strict=True):
        load_into(model, load_state_dict(tmp_path / f"{file}.safetensors"), file)
    masks = [Masks.of(model) for model in models]
    assert masks[0] == masks[1] == masks[2] and round(masks[0].sparsity, 2) == 0.6
    assert not torch.equal(models[0].fc.weight, models[1].fc.weight)


@pytest.mark.parametrize("kept", [True, False])
def test_zeros_stay_in_a_training_behind_the_merge(tmp_path, kept):
    first = [{"prune": {"sparsity": 0.6, "method": "random"}}] if kept else []
    merge = {"merge": {"matching": "identity"}}
    stages = *first, merge, {"train": {"epochs": 1}}, {"prune": {"sparsity": 0.7}}, "diagnose"
    run = surgery.Recipe.from_yaml(staged(*stages)).run(tmp_path, progress=False)
    net = run.findings[0].bench.networks["merged"]
    dense, pruned = net.origins[0], net.model
    assert round(Masks.of(dense).sparsity, 2) == (0.6 if kept else 0.0)
    assert round(Masks.of(pruned).sparsity, 2) == 0.7 and len(net.origins) == 1


def test_a_pruned_network_is_repaired_by_what_it_was(tmp_path):
    source = {"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}}
    stages = {"train": {"epochs": 2}}, {"prune": {"sparsity": 0.8}}, {"renormalize": "auto"}, "diagnose", "evaluate"
    surgery.Recipe.from_yaml(staged(*stages, sources=[source])).run(tmp_path, progress=False)
    dense = small(0)
    pruned = surgery.prune(dense, 0.8)
    expected = surgery.renormalize(pruned, reference=dense, data=digits().calibration, progress=False)
    assert_same(load_state_dict(tmp_path / "small.safetensors"), expected.state_dict())
    page = (tmp_path / "small.html").read_text()
    assert "<html" in page and "before" in page  # of what was pruned, and of what it became
    assert "(this network)" not in page  # its accuracy is measured after that


def test_the_page_begins_with_the_accuracy_of_its_own_network(tmp_path):
    surgery.Recipe.from_yaml(staged("merge", "evaluate", "diagnose")).run(tmp_path, progress=False)
    rows = re.findall(
        r"<tr( class=\"own\")?><td class=\"text\">([^<]*)</td><td style", (tmp_path / "small.html").read_text()
    )
    assert rows[0] == (' class="own"', "merged (this network)")
    assert {("", "a"), ("", "b")} <= {*rows[1:]} and not any(own for own, _ in rows[1:])


def test_passes_of_your_own_are_stages(tmp_path, shrink):
    source = {"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}}
    recipe = surgery.Recipe.from_yaml(staged({"shrink": {"factor": 0.25}}, {"apply": ["shrink"]}, sources=[source]))
    assert recipe.stages[0].name == "apply" and surgery.Recipe.from_yaml(recipe.to_yaml()) == recipe
    recipe.run(tmp_path, progress=False)
    found = load_state_dict(tmp_path / "small.safetensors")
    assert torch.equal(found["fc.weight"], small(0, 0).fc.weight * 0.125)


def test_preserved_layers_are_written_whole(tmp_path):
    text = staged({"merge": {"matching": "weights", "preserve": 3}})
    surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    program = torch.export.load(tmp_path / "small.pt2").module()
    expected = surgery.merge(
        small(0, 0), small(7, 0), matching="weights", preserve=3, data=digits().calibration, progress=False
    )
    images = torch.randn(4, 1, 8, 8)
    assert torch.allclose(program(images), expected(images), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_precision(tmp_path, dtype):
    text = staged({"merge": {"renormalize": ["repair"]}}, {"evaluate": {"flips": True}}, "diagnose", dtype=dtype)
    surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert load_state_dict(tmp_path / "small.safetensors")["fc.weight"].dtype == getattr(torch, dtype)


def test_sources_from_files(tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt")]
    save_state_dict(small(0, 0).state_dict(), paths[0])
    torch.save({"state_dict": small(1, 0).state_dict(), "state_dict_ema": small(2, 0).state_dict()}, paths[1])
    first = {"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}, "checkpoint": str(paths[0])}
    for ema, seed in ((True, 2), (False, 1)):
        sources = [first, {"checkpoint": str(paths[1]), "ema": ema}]
        merge = {"merge": {"matching": "identity", "alpha": 1.0, "renormalize": None}}
        surgery.Recipe.from_yaml(staged(merge, sources=sources)).run(tmp_path / "out", progress=False)
        assert_same(load_state_dict(tmp_path / "out/small.safetensors"), small(seed, 0).state_dict())


def test_text_among_sources_is_a_file_or_a_model():
    text = staged("merge", sources=["timm:resnet18", "b.safetensors", {"name": "c", "seed": 9}], data=None)
    sources = surgery.Recipe.from_yaml(text).sources
    assert [(each.name, each.model, each.checkpoint, each.seed) for each in sources] == [
        ("a", "timm:resnet18", None, 0),
        ("b", "timm:resnet18", "b.safetensors", 1),
        ("c", "timm:resnet18", None, 9),
    ]


def test_what_is_expected(tmp_path):
    evaluate = {"evaluate": {"expect": ["1 < merged", "merged < a"]}}
    run = surgery.Recipe.from_yaml(staged({"merge": {"alpha": 0.0}}, evaluate)).run(tmp_path, progress=False)
    assert [outcome.holds for outcome in run.findings[0].outcomes()] == [True, False]
    assert [failure.text for failure in run.failures] == ["merged < a"]


def test_the_report_has_every_step(ran):
    report = json.loads((ran.output / "report.json").read_text())
    steps = report["runs"][0]["steps"]
    assert [next(iter(step["stage"])) for step in steps] == ["train", "merge", "evaluate", "export"]
    assert steps[1]["result"]["certificates"] and set(steps[2]["result"]["scores"]) == {"a", "b", "ensemble", "merged"}

"""Merging sparse models: equal masks are kept, different ones need a choice, and nothing revives a pruned weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from test_merge import Everything
from tiny_nets import groups_of, images, net, planted
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import vfsurgery as surgery
from vfsurgery.__main__ import main
from vfsurgery.checkpoints import load_state_dict, save_state_dict
from vfsurgery.errors import InvalidWeightsError, OptionError, RecipeError, SurgeryError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.passes import Context, Pass
from vfsurgery.pruning import Masks
from vfsurgery.pruning.layers import prunable
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.training import from_seed

DATA = [part.contiguous() for part in images(120).split(40)]
FEW = DATA[:1]
"""Too few images to try several ways."""


def pruned(model: nn.Module, share: float = 0.5, seed: int = 0) -> nn.Module:
    """The model with a random share of its prunable weights at zero; the seed alone decides which."""
    generator = torch.Generator().manual_seed(seed)
    for weight in prunable(model).values():
        weight[torch.rand(weight.shape, generator=generator) < share] = 0
    return model


def sparse(name: str, seed: int, mask: int = 0, share: float = 0.5) -> nn.Module:
    return pruned(net(name, seed), share, mask)


def merge(*models: nn.Module, **options: object) -> nn.Module:
    return surgery.merge(list(models), **{"imagine": False, "progress": False, "example_inputs": images(2), **options})


def mean_of(*models: nn.Module) -> dict[str, Tensor]:
    """The plain average of the prunable weights."""
    weights = [prunable(model) for model in models]
    return {name: sum(own[name] for own in weights) / len(weights) for name in weights[0]}


# Equal masks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("chain", {"renormalize": way, "data": FEW}) for way in ("rescale", "repair", "reshift")),
        *(("chain", {"renormalize": way}) for way in (None, "auto", "bias-calibration")),
        ("chain", {"renormalize": ["rescale", "repair"], "data": FEW}),
        ("chain", {"renormalize": "closed-form-repair", "matching": surgery.Identity(), "data": FEW}),
        *(("residual", {"renormalize": way, "data": FEW}) for way in ("auto", ["reset", "repair"])),
        ("grouped", {"data": DATA}),
        ("dense", {"data": DATA}),
    ],
)
def test_the_mask_of_the_sources_is_that_of_the_result(name, options):
    models = [sparse(name, seed) for seed in (1, 2, 3)]
    everything = Everything(*models)
    merged = merge(*models, **options)
    assert Masks.of(merged) == Masks.of(models[0])
    assert everything.changes() == []
    record = surgery.report_of(merged).masks
    assert record.choice == "keep" and record.result == Masks.of(models[0]).sparsity > 0.45


def test_units_of_equal_masks_correspond_and_auto_does_not_match_them():
    report = surgery.report_of(merge(sparse("chain", 1), sparse("chain", 2), data=DATA))
    assert report.matching == "identity"
    assert "the sources' masks are equal, so their units correspond already" in str(report)
    assert "masks keep: sparsity 50.60%, 50.60% of the sources, 50.60% of the result" in str(report)
    assert report.to_dict()["masks"]["choice"] == "keep"
    assert surgery.match(sparse("chain", 1), sparse("chain", 2), example_inputs=images(2), progress=False) == {}
    dense = surgery.report_of(merge(net("chain", 1), net("chain", 2), renormalize=None))
    assert dense.matching == "weights" and dense.masks is None and dense.to_dict()["masks"] is None


def test_masks_that_are_equal_after_alignment_are_kept_and_before_it_refused():
    a = sparse("residual", 1)
    b = planted(a, groups_of(a))
    assert Masks.of(a) != Masks.of(b)
    with pytest.warns(surgery.SurgeryWarning, match="BatchNorm"):
        assert Masks.of(merge(a, b)) == Masks.of(a)
    assert Masks.of(merge(a, b, imagine=True)) == Masks.of(a)
    with pytest.raises(OptionError, match="the sources have different masks"):
        merge(a, b, matching="identity")


@dataclass(frozen=True)
class Whisper(Pass):
    """Gives one weight the smallest value there is."""

    name: ClassVar[str] = "whisper"
    weight: str

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        weight = graph_module.get_parameter(self.weight)
        weight.view(-1)[int((weight == 0).flatten().nonzero()[0])] = torch.finfo(weight.dtype).tiny
        return graph_module


@pytest.mark.parametrize("preserve", [0, 2])
def test_a_step_that_revives_one_weight_by_the_smallest_number_is_caught(preserve):
    models = sparse("chain", 1), sparse("chain", 2)
    everything = Everything(*models)
    with pytest.raises(SurgeryError, match=r"whisper does not keep the zeros of pruned weights\n  weight +8.weight\n"):
        merge(*models, renormalize=Whisper("8.weight"), preserve=preserve)
    assert everything.changes() == []
    merge(net("chain", 1), net("chain", 2), renormalize=None)  # dense sources promise no zeros


def test_a_regression_fills_zeros_so_it_is_refused_by_name_and_never_tried():
    models = sparse("chain", 1), sparse("chain", 2)
    for renormalize in ("regress", ["rescale", "regress"], surgery.Regress(ridge=1.0)):
        with pytest.raises(OptionError, match=r"'regress' gives values to pruned weights\n  sparsity +50.60%, 50.60%"):
            merge(*models, renormalize=renormalize, data=DATA)
    found = surgery.report_of(merge(*models, data=DATA))
    assert [trial.renormalize for trial in found.trials] == [("rescale",), ("repair",)]
    unequal = surgery.report_of(merge(models[0], sparse("chain", 2, mask=1), data=DATA, masks="union"))
    assert {trial.matching for trial in unequal.trials} == {"activations"}
    dense = surgery.report_of(merge(net("chain", 1), net("chain", 2), data=DATA))
    assert {"regress", "cca"} <= {step for trial in dense.trials for step in (trial.matching, *trial.renormalize)}


# Different masks


def test_different_masks_need_a_choice_and_the_error_has_the_densities():
    a, b = sparse("chain", 1, mask=0), sparse("chain", 2, mask=1)
    both, either = Masks.of(a) & Masks.of(b), Masks.of(a) | Masks.of(b)
    for options in ({}, {"masks": "keep"}):
        with pytest.raises(OptionError, match="the sources have different masks") as caught:
            merge(a, b, matching="identity", **options)
        text = str(caught.value)
        assert f"source 0 {1 - Masks.of(a).sparsity:.2%}, source 1 {1 - Masks.of(b).sparsity:.2%}" in text
        assert f"intersection {1 - both.sparsity:.2%}, union {1 - either.sparsity:.2%}" in text
        assert "'intersect' keeps what all" in text and "matching='identity'" not in text


@pytest.mark.parametrize("matching", ["weights", "zipit"])
def test_where_only_matching_makes_masks_differ_the_remedy_is_identity(matching):
    models = sparse("chain", 1), sparse("chain", 2)
    with pytest.raises(OptionError, match="matching makes the sources' masks different") as caught:
        merge(*models, matching=matching, data=FEW)
    assert "remedy     matching='identity', since the masks are equal as the sources come" in str(caught.value)


@pytest.mark.parametrize("count", [2, 3])
def test_intersection_union_and_repruned_average_are_what_they_say(count):
    models = [sparse("chain", seed, mask=seed, share=0.3 + 0.1 * seed) for seed in range(1, count + 1)]
    masks = [Masks.of(model) for model in models]
    mean = mean_of(*models)
    found = {
        choice: merge(*models, masks=choice, matching="identity", renormalize=None)
        for choice in ("intersect", "union", "reprune")
    }
    for name, average in mean.items():
        weights = {choice: prunable(model)[name] for choice, model in found.items()}
        kept = torch.stack([own[name] for own in masks])
        assert torch.allclose(weights["intersect"], average * kept.all(0))
        assert torch.equal(weights["intersect"] != 0, kept.all(0))
        assert torch.allclose(weights["union"], average)
        assert torch.equal(weights["union"] != 0, kept.any(0))
        chosen = weights["reprune"] != 0
        assert int(chosen.sum()) == round(float(kept.flatten(1).sum(1).double().mean()))
        assert torch.allclose(weights["reprune"], average * chosen)
        assert average[chosen].abs().min() >= average[~chosen].abs().max()
    shares = {choice: surgery.report_of(model).masks.result for choice, model in found.items()}
    assert shares["intersect"] > shares["reprune"] > shares["union"]
    assert "of the result: denser than each of them" in str(surgery.report_of(found["union"]))
    assert "denser" not in str(surgery.report_of(found["reprune"]))


def test_a_choice_leaves_equal_masks_as_they_are():
    models = sparse("chain", 1), sparse("chain", 2)
    kept = merge(*models, renormalize=None).state_dict()
    for choice in ("intersect", "union", "reprune"):
        state = merge(*models, masks=choice, renormalize=None).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_repruning_counts_every_source_by_its_share():
    a, b = sparse("chain", 1, share=0.2), sparse("chain", 2, mask=1, share=0.9)
    merged = merge(a, b, masks="reprune", alpha=0.25, renormalize=None)
    expected = 0.75 * Masks.of(a).sparsity + 0.25 * Masks.of(b).sparsity
    assert surgery.report_of(merged).masks.result == pytest.approx(expected, abs=2e-3)


def test_a_source_without_a_share_has_no_say():
    a, b = sparse("chain", 1), sparse("chain", 2, mask=1)
    assert Masks.of(merge(a, b, weights=[1.0, 0.0])) == Masks.of(a)
    with pytest.raises(OptionError, match="different masks"):
        merge(a, b, weights=[0.9, 0.1])


def test_renormalization_keeps_the_chosen_zeros_in_half_precision_too():
    a, b = (sparse("residual", seed, mask=seed).bfloat16() for seed in (1, 2))
    merged = merge(a, b, masks="reprune", matching="weights", data=[images(32)], renormalize=["reset", "repair"])
    record = surgery.report_of(merged).masks
    assert Masks.of(merged).sparsity == record.result == pytest.approx(record.sources[0], abs=0.02)


# What counts as sparse


@pytest.mark.parametrize(("share", "refused"), [(0.02, False), (0.08, True)])
def test_sources_count_as_sparse_from_a_twentieth_of_zeros_on(share, refused):
    models = sparse("chain", 1, mask=1, share=share), sparse("chain", 2, mask=2, share=share)
    if refused:
        with pytest.raises(OptionError, match="different masks"):
            merge(*models)
    else:
        assert surgery.report_of(merge(*models)).masks is None
        with pytest.raises(OptionError, match="different masks"):
            merge(*models, masks="keep")  # asked for, a single zero counts


def test_one_sparse_source_is_enough_to_ask():
    with pytest.raises(OptionError, match=r"source 0 49.40%, source 1 100.00%; intersection 49.40%, union 100.00%"):
        merge(sparse("chain", 1), net("chain", 2), matching="identity")


@pytest.mark.parametrize("masks", ["keep", "intersect", "union", "reprune"])
def test_sources_without_zeros_merge_as_ever(masks):
    models = net("chain", 1), net("chain", 2)
    merged, plain = merge(*models, masks=masks, data=FEW), merge(*models, data=FEW)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in merged.state_dict().items())
    assert surgery.report_of(merged).masks is None


# Preserved prefixes


def test_preserved_layers_keep_the_zeros_of_their_source():
    a, b = sparse("chain", 1, mask=1), sparse("chain", 2, mask=2)
    merged = merge(a, b, preserve=2, masks="intersect", matching="identity", renormalize="rescale", data=FEW)
    found, own = Masks.of(merged), [Masks.of(model) for model in (a, b)]
    for number, masks in enumerate(own):
        assert torch.equal(found[f"source_{number}.0.weight"], masks["0.weight"])
    assert torch.equal(found["2.weight"], torch.cat([masks["2.weight"] for masks in own], 1))
    for name in ("4.weight", "8.weight", "10.weight"):
        assert torch.equal(found[name], own[0][name] & own[1][name])


# Bad input


def test_an_unknown_choice_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match=r"masks='intersection' is unknown\n  remedy  did you mean 'intersect'\?"):
        merge(net("chain", 1), net("chain", 2), masks="intersection")


@pytest.mark.parametrize("function", [surgery.merge, surgery.match])
def test_pruning_hooks_are_refused_with_the_call_that_takes_them_off(function):
    a, b = net("chain", 1), net("chain", 2)
    prune.l1_unstructured(b[2], "weight", 0.5)
    with pytest.raises(OptionError, match=r"source 1 has pruning hooks on\n  weight  2.weight\n") as caught:
        function(a, b, example_inputs=images(2))
    assert "torch.nn.utils.prune.remove(model.2, 'weight')" in str(caught.value)
    prune.remove(b[2], "weight")
    options = {"masks": "union"} if function is surgery.merge else {}
    function(a, b, example_inputs=images(2), matching="identity", **options)


def test_weights_that_are_not_finite_come_before_masks():
    a, b = sparse("chain", 1), sparse("chain", 2, mask=1)
    b[2].weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidWeightsError, match="source 1 holds NaN"):
        merge(a, b)


def test_a_refused_merge_in_place_leaves_the_reference_alone():
    a, b = sparse("chain", 1), sparse("chain", 2, mask=1)
    everything = Everything(a, b)
    with pytest.raises(OptionError, match="different masks"):
        merge(a, b, inplace=True)
    assert everything.changes() == []
    assert Masks.of(merge(a, b, masks="intersect", matching="identity", inplace=True)).sparsity > 0.7


def test_tied_weights_have_one_mask():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        model[2].weight = model[0].weight
        models.append(pruned(model))
    merged = surgery.merge(models, example_inputs=torch.randn(2, 6), progress=False)
    assert Masks.of(merged) == Masks.of(models[0])
    assert merged[2].weight is merged[0].weight


# Other entrances


@pytest.fixture
def checkpoints(tmp_path):
    """Two sparse networks with masks of their own, as files."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_state_dict(pruned(from_seed(TinyConvNet, seed), 0.5, seed).state_dict(), path)
    return paths


def test_the_command_line_knows_masks(checkpoints, tmp_path):
    options = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8"]
    call = ["merge", *map(str, checkpoints), *options, "-o", str(tmp_path / "ab.safetensors")]
    refused = CliRunner().invoke(main, call)
    assert refused.exit_code != 0 and "the sources have different masks" in refused.stderr
    done = CliRunner().invoke(main, [*call, "--masks", "intersect"])
    assert done.exit_code == 0 and "masks intersect: sparsity" in done.output
    assert json.loads((tmp_path / "ab.report.json").read_text())["masks"]["choice"] == "intersect"
    merged = load_state_dict(tmp_path / "ab.safetensors")["convs.3.weight"]
    assert float((merged == 0).double().mean()) > 0.7


RECIPE = """
name: sparse
sources: [{model: "vfsurgery.networks.demo:TinyConvNet", checkpoint: A, input_size: [1, 8, 8]}, B]
stages:
  - merge: {matching: identity, renormalize: none, masks: reprune}
"""


def test_recipes_know_masks(checkpoints, tmp_path):
    text = RECIPE.replace("A", str(checkpoints[0])).replace("B", str(checkpoints[1]))
    recipe = Recipe.from_yaml(text)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    run = recipe.run(tmp_path / "out", progress=False)
    assert run.findings[0].said("merge").values["masks"]["choice"] == "reprune"
    with pytest.raises(RecipeError, match="unknown choice of masks 'unoin'; did you mean 'union'"):
        Recipe.from_yaml(text.replace("reprune", "unoin"))


def test_curves_take_masks_too():
    a, b = sparse("chain", 1), sparse("chain", 2, mask=1)
    labelled = [(images(8), torch.zeros(8, dtype=torch.long))]
    options = {"matching": "identity", "renormalize": None, "progress": False}
    for masks in (None, "union"):
        calls = (
            lambda masks=masks: surgery.barrier(a, b, labelled, alphas=3, masks=masks, **options),
            lambda masks=masks: surgery.preserve_curve(a, b, labelled, boundaries=[2], masks=masks, **options),
        )
        for call in calls:
            if masks is None:
                with pytest.raises(OptionError, match="different masks"):
                    call()
            else:
                call()

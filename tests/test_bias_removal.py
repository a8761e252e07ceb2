"""Bias removal, and the images that are held out for its choice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_normalizations import LOOSE, Counted
from test_passes import close, operate, pair
from tiny_nets import CLASSES, Chain, images, lively, net, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import EVERY, split
from vfsurgery.errors import DataError, OptionError
from vfsurgery.passes import Average, RemoveBiases

# Held-out images


def test_every_fifth_image_is_held_out_however_the_data_is_cut() -> None:
    x = images(23)
    for size in (1, 4, 23):
        rest, held_out = ([i for i, _ in part] for part in split(Batches(x.split(size))))
        assert torch.equal(torch.cat(held_out), x[EVERY - 1 :: EVERY])
        places = [place for place in range(23) if place % EVERY != EVERY - 1]
        assert torch.equal(torch.cat(rest), x[places])


def test_what_is_held_out_has_a_length_where_the_data_has_one() -> None:
    assert [part.length() for part in split(Batches(images(24).split(6)))] == [4, 4]
    assert [part.length() for part in split(Batches(Counted(images(24).split(6))))] == [None, None]


def test_too_little_data_to_hold_any_out_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"(?s)too small to hold images out.*images    4\n.*at least 5.*pass more images"
    ):
        list(split(Batches([images(4)]))[1])


# Bias removal

BIASED = ["0", "2", "4", "8", "10"]
"""Layers of a chain that have a bias, in graph order."""


@pytest.mark.parametrize("layers", range(len(BIASED) + 1))
def test_the_last_biases_are_zero_and_nothing_else_changes(layers: int) -> None:
    a, b, orders = pair("chain")
    merged, _, context = operate([Average(), RemoveBiases(layers=layers)], [a, b], None, orders=orders)
    averaged, _, _ = operate([Average()], [a, b], orders=orders)
    for path in BIASED[len(BIASED) - layers :]:
        assert averaged.get_submodule(path).bias.any()
        averaged.get_submodule(path).bias.detach().zero_()
    assert same_state(merged.state_dict(), averaged.state_dict())
    assert context.notes == [f"bias-removal: the last {layers} of 5 biases"]


def test_biases_that_a_batch_norm_subtracts_do_not_count() -> None:
    models = []
    for seed in (1, 2):
        convs = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        models.append(lively(nn.Sequential(*convs, nn.Linear(4, 5)), seed))
    merged, _, context = operate([Average(), RemoveBiases(layers=2)], models)
    assert [bool(merged[index].bias.any()) for index in (0, 1, 5)] == [True, False, False]
    assert context.notes == ["bias-removal: the last 2 of 2 biases"]


def agreement(merged: nn.Module, sources: Sequence[nn.Module], x: Tensor) -> float:
    with torch.no_grad():
        ensemble = sum(source(x).double() for source in sources)
        return float((merged(x).argmax(1) == ensemble.argmax(1)).double().mean())  # type: ignore[union-attr]


def vanishing(seed: int) -> nn.Module:
    """Six layers, their weights in part those of all seeds, with biases that are strong in the last two."""

    def draw(seed: int) -> nn.Module:
        layers = itertools.chain.from_iterable((nn.Linear(16, 16), nn.ReLU()) for _ in range(4))
        return lively(nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.ReLU(), *layers, nn.Linear(16, CLASSES)), seed)

    model, common = draw(seed), draw(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, shared in zip(model.parameters(), common.parameters(), strict=True):
            own.mul_(0.7**0.5).add_(shared, alpha=0.3**0.5)
        biases = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
        for bias in biases[:-2]:
            bias.mul_(0.3)
        for bias in biases[-2:]:
            bias.copy_(2 * torch.randn(bias.shape, generator=generator))
    return model


def chosen(merged: nn.Module) -> tuple[int, list[float]]:
    """How many biases were removed by the report, and the curve."""
    note = next(note for note in surgery.report_of(merged).notes if note.startswith("bias-removal"))
    return int(note.split()[3]), [float(share) for share in note.rstrip(")").rpartition(": ")[2].split()]


def test_the_number_of_biases_is_the_one_that_agrees_best_on_the_held_out_images() -> None:
    a, b = vanishing(1), vanishing(2)
    x = images(300)
    options = {"matching": "identity", "progress": False, "example_inputs": x[:2]}
    layers, curve = chosen(surgery.merge(a, b, data=x.split(50), renormalize="bias-removal", **options))
    merges = [surgery.merge(a, b, renormalize=RemoveBiases(layers=count), **options) for count in range(7)]
    expected = [agreement(merged, (a, b), x[EVERY - 1 :: EVERY]) for merged in merges]
    assert curve == pytest.approx(expected, abs=5e-4)
    assert layers == expected.index(max(expected)) == 1
    assert curve != pytest.approx([agreement(merged, (a, b), x) for merged in merges], abs=5e-4)


def test_the_choice_hangs_on_no_label_and_on_no_image_that_is_not_held_out() -> None:
    a, b = vanishing(1), vanishing(2)
    x = images(100)
    others = images(100, 7)
    others[EVERY - 1 :: EVERY] = x[EVERY - 1 :: EVERY]
    labels = torch.randint(5, (100,))
    data = {"plain": [x], "labels": [(x, labels)], "rest": [others], "held out": [images(100, 7)]}
    found = {
        name: chosen(surgery.merge(a, b, data=d, matching="identity", renormalize="bias-removal", progress=False))
        for name, d in data.items()
    }
    assert found["plain"] == found["labels"] == found["rest"] != found["held out"]


def test_no_statistic_sees_the_held_out_images() -> None:
    a, b = net("chain", 1), net("chain", 2)
    x = images(60)
    broken = x.clone()
    broken[EVERY - 1 :: EVERY] *= 50
    step = ["repair", "bias-removal"]
    merges = [surgery.merge(a, b, data=[d], renormalize=step, progress=False) for d in (x, broken)]
    assert "statistics of 48 images" in surgery.report_of(merges[0]).notes
    assert torch.equal(merges[0][4].weight, merges[1][4].weight)
    whole = surgery.merge(a, b, data=[broken], renormalize="repair", progress=False)
    assert "statistics of 60 images" in surgery.report_of(whole).notes
    assert not close(whole[4].weight, merges[0][4].weight, LOOSE)


def test_behind_removed_biases_the_feature_outweighs_the_offset() -> None:
    """Qu & Horvath's acceptance test: ``E |f(x) - f(0)| >= |f(0)|`` at the outputs (CPAL 2025, Fig. 12)."""
    a, b = vanishing(1), vanishing(2)
    x = images(100)
    share = []
    for step in (None, RemoveBiases(layers=1)):
        merged = surgery.merge(a, b, matching="identity", renormalize=step, example_inputs=x[:2], progress=False)
        with torch.no_grad():
            offset = merged(torch.zeros_like(x[:1]))
            share.append(float((merged(x) - offset).norm(dim=1).mean() / offset.norm()))
    assert share[0] < 1 <= share[1]


def test_choosing_a_number_of_biases_needs_data_and_saying_it_does_not() -> None:
    a, b = net("chain", 1), net("chain", 2)
    options = {"example_inputs": images(2), "imagine": False, "progress": False}
    with pytest.raises(DataError, match=r"(?s)a step chooses on held-out images.*remedy  pass data="):
        surgery.merge(a, b, renormalize="bias-removal", **options)
    merged = surgery.merge(a, b, renormalize=RemoveBiases(layers=1), **options)
    assert not merged[10].bias.any() and merged[8].bias.any()


def test_a_number_of_biases_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match=r"(?s)layers must be at least 0 but is -1.*0 removes nothing"):
        RemoveBiases(layers=-1)
    models = [net("chain", seed) for seed in (1, 2)]
    with pytest.raises(OptionError, match=r"(?s)bias-removal found 5 layers with a bias.*wanted  6"):
        operate([Average(), RemoveBiases(layers=6)], models)
    bare = [lively(Chain(bias=False), seed) for seed in (1, 2)]
    for model in bare:
        model[8].bias = model[10].bias = None
    with pytest.raises(OptionError, match=r"(?s)bias-removal found 0 layers with a bias.*wanted  at least 1"):
        operate([Average(), RemoveBiases()], bare)


def test_a_model_without_logits_is_told_to_say_the_number() -> None:
    models = [lively(Chain(classes=1), seed) for seed in (1, 2)]
    with pytest.raises(
        OptionError, match=r"(?s)returns no logits.*found     shape \(2, 1\).*RemoveBiases\(layers=\.\.\.\)"
    ):
        surgery.merge(*models, data=[images(10)], renormalize="bias-removal", progress=False)

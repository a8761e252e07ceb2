"""From saliencies to masks: exact counts, ties, scopes and patterns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_nets import Outputs
from torch import Tensor, nn

from vfsurgery.pruning import selection
from vfsurgery.pruning.selection import by_row, in_pattern, keep_most_salient, kept_count, largest
from vfsurgery.stats.inputs import Layout

LAYERS = {
    "linear": nn.Linear(8, 6),
    "conv": nn.Conv2d(8, 6, 3),
    "grouped": nn.Conv2d(16, 6, (1, 3), groups=2),
    "transposed": nn.ConvTranspose2d(8, 6, 3),
    "grouped transposed": nn.ConvTranspose1d(16, 6, 3, groups=2),
}


def expected(saliencies: Sequence[Tensor], count: int) -> list[Tensor]:
    """By sorting everything at once; Python's sort is stable, so that the first of equal ones are kept."""
    values = [float(x) for tensor in saliencies for x in tensor.flatten()]
    kept = set(sorted(range(len(values)), key=lambda i: -values[i])[:count])
    flat = torch.tensor([i in kept for i in range(len(values))])
    parts = flat.split([tensor.numel() for tensor in saliencies])
    return [part.view(tensor.shape) for part, tensor in zip(parts, saliencies, strict=True)]


@given(st.integers(1, 10_000), st.integers(0, 999))
def test_what_is_kept_is_the_ceiling_of_exact_arithmetic(entries: int, thousandths: int) -> None:
    assert kept_count(entries, thousandths / 1000) == math.ceil(entries * (1 - Fraction(thousandths, 1000)))


def test_binary_fractions_would_keep_one_too_many() -> None:
    assert kept_count(10, 0.7) == 3
    assert math.ceil(10 * (1 - 0.7)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_most_salient_are_those_that_sorting_finds(dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = st.sampled_from([-math.inf, -1e30, -2.5, -0.0, 0.0, 1e-38, 1.0, 1.0000001, 7.0, math.inf])
    lists = data.draw(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=4))
    saliencies = [torch.tensor(entries, dtype=dtype) for entries in lists]
    count = data.draw(st.integers(0, sum(map(len, lists))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", 7)
        masks = keep_most_salient(saliencies, count)
    assert all(torch.equal(mask, own) for mask, own in zip(masks, expected(saliencies, count), strict=True))


def test_float64_tells_apart_what_float32_cannot() -> None:
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert keep_most_salient([close], 1)[0].tolist() == [False, True]
    assert keep_most_salient([close.float()], 1)[0].tolist() == [True, False]
    assert [mask.tolist() for mask in keep_most_salient([close.float()[:1], close[1:]], 1)] == [[False], [True]]


def test_selecting_makes_nothing_of_the_size_of_a_layer_but_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHUNK", 1000)
    monkeypatch.setattr(selection, "DIGIT", 8)
    scores = torch.randn(100_000)
    with Outputs() as outputs:
        (mask,) = keep_most_salient([scores], 300)
    assert int(mask.sum()) == 300
    assert sorted(outputs.sizes)[-1] == len(scores)
    assert sorted(outputs.sizes)[-2] <= 1000


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_the_largest_of_each_row_may_differ_in_number(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHUNK", chunk)
    scores = torch.randint(4, (3, 5, 6)).float()
    counts = torch.randint(7, (3, 5))
    found = largest(scores, counts)
    for i, j in itertools.product(range(3), range(5)):
        assert torch.equal(found[i, j], expected([scores[i, j]], int(counts[i, j]))[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_the_entries_of_one_unit_and_come_back(kind: str) -> None:
    layer = LAYERS[kind]
    layout = Layout.of(nn.ModuleDict({"layer": layer}), "layer.weight")
    weight = layer.weight.detach()
    rows = layout.rows(weight)
    assert torch.equal(layout.weight(rows, weight.shape), weight)
    groups, units, columns = rows.shape
    assert groups * units == 6
    assert columns == weight.numel() // 6
    for group, unit in itertools.product(range(groups), range(units)):
        entries = rows[group, unit].sort()[0]
        if layout.transposed:
            inputs = len(weight) // groups
            own = weight[group * inputs : (group + 1) * inputs, unit]
        else:
            own = weight[group * units + unit]
        assert torch.equal(entries, own.flatten().sort()[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_by_row_keeps_equally_many_entries_of_each_unit(kind: str) -> None:
    layout = Layout.of(nn.ModuleDict({"layer": LAYERS[kind]}), "layer.weight")
    weight = LAYERS[kind].weight.detach().abs()
    rows, kept = layout.rows(weight), layout.rows(by_row(weight, layout, 0.7))
    assert set(kept.sum(2).flatten().tolist()) == {kept_count(rows.shape[2], 0.7)}
    smallest_kept = rows.masked_fill(~kept, math.inf).amin(2)
    assert bool((smallest_kept >= rows.masked_fill(kept, 0).amax(2)).all())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_pattern_keeps_n_of_every_m_inputs_at_each_position(kind: str) -> None:
    layer = LAYERS[kind]
    layout = Layout.of(nn.ModuleDict({"layer": layer}), "layer.weight")
    mask = in_pattern(layer.weight.detach().abs(), layout, (1, 4))
    inputs_first = mask if layout.transposed else mask.transpose(0, 1)
    assert inputs_first.shape[0] % 4 == 0
    for fours in inputs_first.split(4):
        assert bool((fours.sum(0) == 1).all())
        values = layer.weight.detach().abs()
    assert bool(values[mask].mean() > values[~mask].mean())

"""Equal conventions give equal numbers: our methods beside the functions of mergekit, where that is installed.

Where ours differ on purpose, the difference is a test, too; docs/fine_tuned.md has the table.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vfsurgery.combining import (
    Breadcrumbs,
    Combiner,
    Dare,
    Karcher,
    Mean,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
    combine_states,
)

pytest.importorskip("mergekit", reason="mergekit is not installed")
sparsify = pytest.importorskip("mergekit.sparsify")
methods = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
spheres = SimpleNamespace(
    slerp=pytest.importorskip("mergekit.merge_methods.slerp"),
    nuslerp=pytest.importorskip("mergekit.merge_methods.nuslerp"),
    karcher=pytest.importorskip("mergekit.merge_methods.karcher"),
    sce=pytest.importorskip("mergekit.merge_methods.sce"),
)

SHAPES = [(40,), (12, 10), (6, 4, 3, 3)]


def tensors(shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def ours(combiner: Combiner, base: Tensor | None, sources: list[Tensor], **options) -> Tensor:
    states = [{"w.weight": each} for each in sources]
    return combine_states(states, combiner, base=None if base is None else {"w.weight": base}, **options)["w.weight"]


def theirs(
    base: Tensor, sources: list[Tensor], weights: list[float], density: float, method: str, consensus: bool
) -> Tensor:
    """Sparsify, weigh, elect, divide by the signed sum of the weights that agree: its TIES and task arithmetic."""
    kind = sparsify.SparsificationMethod[method]
    options = {"gamma": 0.1} if method == "magnitude_outliers" else {}
    vectors = torch.stack([sparsify.sparsify(each - base, density, kind, **options) for each in sources])
    shares = torch.tensor(weights, dtype=base.dtype).reshape(-1, *[1] * base.ndim)
    vectors = vectors * shares
    if not consensus:
        return base + vectors.sum(0)
    mask = methods.get_mask(vectors, method="sum")
    divisor = (shares * mask).sum(0)
    divisor[divisor == 0] = 1
    return base + (vectors * mask).sum(0) / divisor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0]], ids=str)
def test_ties_trimmed_tensor_by_tensor(shape, weights):
    base, sources = tensors(shape)
    expected = theirs(base, sources, weights, 0.3, "magnitude", consensus=True)
    found = ours(Ties(density=0.3, scope="tensor"), base, sources, weights=weights)
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(ours(Ties(density=0.5, scope="tensor"), base, sources, weights=weights), expected)


def test_a_negative_weight_takes_away_here_and_adds_there():
    base, (source, *_) = tensors((12, 10))
    adds = theirs(base, [source], [-1.0], 1.0, "magnitude", consensus=True)
    assert torch.allclose(adds, source)
    assert torch.allclose(ours(Ties(density=1.0), base, [source], weights=[-1.0]), 2 * base - source)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_task_arithmetic(shape):
    base, sources = tensors(shape)
    expected = theirs(base, sources, [0.5, -1.0, 2.0], 1.0, "magnitude", consensus=False)
    assert torch.allclose(ours(TaskArithmetic(scale=1.0), base, sources, weights=[0.5, -1.0, 2.0]), expected)


def test_breadcrumbs_of_a_tensor_with_a_hundred_numbers():
    base, sources = tensors((10, 10))
    expected = theirs(base, sources, [1.0] * 3, 0.5, "magnitude_outliers", consensus=False)
    found = ours(Breadcrumbs(density=0.5, outliers=0.1, scale=1.0), base, sources)
    assert torch.allclose(found, expected, atol=1e-12)


def test_what_is_dropped_at_random_is_made_up_for_by_the_share_here_and_by_a_norm_there():
    """Of ten numbers, theirs have the L1 norm from before, whatever was drawn; ours are divided by the density."""
    base, (source, *_) = tensors((10,))
    torch.manual_seed(0)
    kind = sparsify.SparsificationMethod.random
    vector = sparsify.sparsify(source - base, 0.5, kind, rescale_norm=sparsify.RescaleNorm.l1)
    assert torch.allclose(vector.abs().sum(), (source - base).abs().sum())
    change = ours(Dare(density=0.5, scale=1.0), base, [source]) - base
    kept = change.abs() > 1e-12
    assert 0 < kept.sum() < 10 and torch.allclose(change[kept], 2 * (source - base)[kept])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spheres(shape):
    base, (a, b, c) = tensors(shape)
    flat = spheres.slerp.slerp(torch.tensor([0.3]), a.reshape(1, -1), (-b).reshape(1, -1)).reshape(shape)
    assert torch.allclose(ours(Slerp(), None, [a, -b], weights=[0.7, 0.3]), flat, atol=1e-9)
    nuslerp = base + spheres.nuslerp.nuslerp(2 / 3, a - base, b - base, flatten=True)
    assert torch.allclose(ours(NuSlerp(scale=1.0), base, [a, b], weights=[1.0, 2.0]), nuslerp, atol=1e-9)
    vectors = [each - base for each in (a, b, c)]
    karcher = spheres.karcher.karcher_merge_tensors(vectors, [1 / 3] * 3)
    assert torch.allclose(ours(Karcher(scale=1.0), base, [a, b, c]) - base, karcher, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sce(shape):
    base, sources = tensors(shape)
    vectors = torch.stack([each - base for each in sources])
    shares = spheres.sce.sce_weight(vectors).reshape(-1, *[1] * base.ndim)
    shares = shares * methods.get_mask(vectors, method="sum")
    expected = base + (vectors * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
    assert torch.allclose(ours(Sce(scale=1.0), base, sources), expected, atol=1e-9)


def test_the_mean_is_the_mean():
    _, sources = tensors((12, 10))
    assert torch.allclose(ours(Mean(), None, sources), torch.stack(sources).mean(0))


def test_model_stock_never_goes_beyond_its_sources():
    """The cosine is clamped here: opposed task vectors lead far away there."""
    base, (a, b, _) = tensors((12, 10))
    opposed = [a, base - (a - base) + 0.1 * (b - base)]
    found = ours(ModelStock(), base, opposed)
    assert torch.allclose(found, base)
    assert MultiSlerp.name == "multislerp"

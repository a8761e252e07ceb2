"""TSV-M, Iso and WUDI where it is known what they give, on matrices that are drawn and on real architectures."""

from __future__ import annotations

import pytest
import torch
from ancestry import EXACT, SMALL, assert_same, case, differ, of_matrices
from torch import Tensor

from vfsurgery.combining import IsoC, IsoCTS, TaskArithmetic, TsvM, Wudi
from vfsurgery.combining.base import Kind, as_matrix
from vfsurgery.combining.matrices import ForMatrices

SHAPES = [(24, 16), (16, 24), (20, 20), (7, 3), (49, 49)]


def drawn(shape: tuple[int, int], seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn((shape[0], rank), 2 * seed + 100) @ drawn((rank, shape[1]), 2 * seed + 101)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn((rows, columns), seed))[0]


def apart(shape: tuple[int, int], count: int, rank: int) -> list[Tensor]:
    """Matrices whose row spaces and column spaces are orthogonal to each other."""
    left, right = orthonormal(shape[0], count * rank, 0), orthonormal(shape[1], count * rank, 1)
    parts = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    return [left[:, part] @ drawn((rank, rank), i) @ right[:, part].T for i, part in enumerate(parts)]


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def merged(method: ForMatrices, *matrices: Tensor, notes: list[str] | None = None) -> Tensor:
    return of_matrices(*matrices).combine(method, len(matrices), notes=notes)["w"]


def values_of(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


# TSV-M


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_one_task_is_the_task(shape):
    delta = drawn(shape, 0)
    assert_same({"w": merged(TsvM(), delta)}, {"w": delta})


@pytest.mark.parametrize("method", [TsvM(), Wudi()])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_tasks_without_common_directions_add_up(method, shape):
    tasks = apart(shape, 4, 4)
    assert_same({"w": merged(method, *tasks)}, {"w": sum(tasks)})
    tasks[1] = tasks[1] + tasks[0]
    assert differ({"w": merged(method, *tasks)}, {"w": sum(tasks)})


@pytest.mark.parametrize("count", [2, 3, 5])
def test_tsv_of_equal_tasks_is_their_truncation_and_is_said_to_be_in_doubt(count):
    delta, notes = drawn((24, 16), 0), list[str]()
    assert_same({"w": merged(TsvM(), *[delta] * count, notes=notes)}, {"w": truncated(delta, 16 // count)})
    assert "1 matrices have nearly parallel directions of several sources (first: w)" in notes[1]
    assert differ({"w": truncated(delta, 16 // count + 1)}, {"w": truncated(delta, 16 // count)})


@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (64, 500)])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_different_tasks_are_not_in_doubt_and_runs_of_one_task_are(shape, count):
    notes, alike = list[str](), list[str]()
    tasks = [drawn(shape, seed, rank=6) + 0.05 * drawn(shape, seed) for seed in range(count)]
    merged(TsvM(), *tasks, notes=notes)
    merged(TsvM(), *[tasks[0] + 1e-3 * drawn(shape, seed) for seed in range(count)], notes=alike)
    assert len(notes) == 1 and len(alike) == 2


def test_ranks_are_divided_exactly():
    """49 tasks share 49 directions: one each. Floating point gives none."""
    assert int(49 * (1 / 49)) == 0
    tasks = apart((49, 49), 49, 1)
    assert_same({"w": merged(TsvM(), *tasks)}, {"w": sum(tasks)}, 1e-9)


def test_matrices_that_have_fewer_directions_than_tasks_get_the_mean():
    tasks = [drawn((2, 9), seed) for seed in range(3)]
    notes: list[str] = []
    assert_same({"w": merged(TsvM(), *tasks, notes=notes)}, {"w": sum(tasks) / 3})
    assert notes == [
        "tsv-m acts on 0 matrices, 0.0% of the trained numbers; the other 1 tensors get the mean of their task vectors"
    ]


def test_a_task_of_zero_takes_no_directions():
    tasks = [drawn((12, 12), 0), torch.zeros(12, 12, dtype=torch.float64)]
    assert_same({"w": merged(TsvM(), *tasks)}, {"w": truncated(tasks[0], 6)})


def test_a_tolerance_decides_what_counts_as_the_same_direction():
    delta = drawn((24, 16), 0)
    near = [delta + 1e-4 * drawn((24, 16), seed) for seed in (1, 2)]
    loose, tight = (merged(TsvM(tolerance=t), *near) for t in (0.1, 1e-6))
    assert not differ({"w": loose}, {"w": truncated(delta, 8)}, 1e-2)
    assert differ({"w": tight}, {"w": truncated(delta, 8)}, 0.1)


# Iso


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_makes_all_singular_values_the_mean_of_the_sum(shape):
    tasks = [drawn(shape, seed) for seed in range(3)]
    found, before = values_of(merged(IsoC(scale=1.0), *tasks)), values_of(sum(tasks))
    assert float(found.max() - found.min()) < EXACT * float(found.max())
    assert float(found.sum()) == pytest.approx(float(before.sum()), rel=EXACT)
    assert float(found.norm()) == pytest.approx(float(before.sum()) / min(shape) ** 0.5, rel=EXACT)
    assert float(before.max() - before.min()) > 0.1
    assert_same({"w": merged(IsoCTS(common=1.0, scale=1.0), *tasks)}, {"w": merged(IsoC(scale=1.0), *tasks)})
    assert differ({"w": merged(IsoCTS(common=0.5, scale=1.0), *tasks)}, {"w": merged(IsoC(scale=1.0), *tasks)}) or (
        min(shape) < 6
    )


@pytest.mark.parametrize("method", [IsoC(scale=1.0), IsoCTS(common=1.0, scale=1.0)])
def test_iso_leaves_orthogonal_matrices_and_zero_alone(method):
    turn = 2.5 * orthonormal(12, 12, 0)
    assert_same({"w": merged(method, turn)}, {"w": turn})
    zero = torch.zeros(12, 8, dtype=torch.float64)
    assert torch.equal(merged(method, zero, zero), zero)
    opposite = drawn((12, 8), 0)
    assert torch.equal(merged(IsoC(), opposite, -opposite), zero)
    assert torch.isfinite(merged(IsoCTS(), opposite, -opposite)).all()


def test_iso_spreads_a_single_direction_unless_rank_is_numerical():
    delta, notes = drawn((12, 12), 0, rank=1), list[str]()
    found = merged(IsoC(scale=1.0), delta, notes=notes)
    cosine = float((found * delta).sum() / found.norm() / delta.norm())
    assert cosine == pytest.approx(12**-0.5, rel=1e-9)
    assert "1 matrices have less than half of their full rank (first: w)" in notes[1]
    notes.clear()
    assert_same({"w": merged(IsoC("numerical", scale=1.0), delta, notes=notes)}, {"w": delta})
    assert_same({"w": merged(IsoCTS("numerical", scale=1.0), delta)}, {"w": delta})
    assert len(notes) == 1


@pytest.mark.parametrize(("full", "count", "common"), [(16, 3, 0.8), (16, 3, 0.01), (5, 7, 0.5), (20, 4, 0.8)])
def test_iso_cts_gives_every_direction_the_same_strength(full, count, common):
    found = values_of(merged(IsoCTS(common=common, scale=1.0), *[drawn((24, full), seed) for seed in range(count)]))
    assert len(found) == full and float(found.max() - found.min()) < EXACT * float(found.max())


def test_iso_cts_adds_what_the_sum_lacks():
    """Two strong tasks and a weak one on a direction of its own: common directions alone have none of it."""
    tasks = [size * task for size, task in zip((1.0, 1.0, 1e-5), apart((16, 16), 3, 4), strict=True)]
    weak = torch.linalg.svd(tasks[2])[0][:, :4]
    common, both = (
        float((weak.T @ merged(method, *tasks)).norm())
        for method in (IsoC("numerical", 1.0), IsoCTS("numerical", 1.0, common=0.5))
    )
    assert common < 1e-6 < 0.1 < both


# WUDI


def gradient(found: Tensor, tasks: list[Tensor]) -> float:
    slopes = [(found - task) @ task.T @ task / task.norm() ** 2 for task in tasks]
    return float(sum(slopes).norm() / sum(task.norm() for task in tasks))


@pytest.mark.parametrize("shape", [*SHAPES, (4, 90)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_wudi_is_where_the_gradient_is_zero(shape, count):
    tasks = [drawn(shape, seed) for seed in range(count)]
    found = merged(Wudi(), *tasks)
    if count == 1:
        assert_same({"w": found}, {"w": tasks[0]})
        return
    assert gradient(found, tasks) < 1e-9 < 1e-3 < gradient(sum(tasks), tasks)
    grams = [task.T @ task / task.norm() ** 2 for task in tasks]
    aims = sum(task @ gram for task, gram in zip(tasks, grams, strict=True))
    assert_same({"w": found}, {"w": aims @ torch.linalg.pinv(sum(grams), rtol=1e-10)}, 1e-9)


def test_wudi_of_equal_tasks_is_the_task_and_zeros_have_no_say():
    delta, zero = drawn((12, 8), 0), torch.zeros(12, 8, dtype=torch.float64)
    assert_same({"w": merged(Wudi(), delta, delta)}, {"w": delta})
    assert_same({"w": merged(Wudi(), delta, zero)}, {"w": delta})
    assert torch.equal(merged(Wudi(), zero, zero), zero)


# all


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("method", [TsvM(), IsoC(scale=1.0), IsoCTS(scale=1.0), Wudi()], ids=lambda m: m.name)
def test_weights_of_real_networks_are_taken_as_matrices_and_the_rest_averaged(method, net):
    net, notes = case(net), list[str]()
    found, mean = net.moved(method, notes=notes), net.moved(TaskArithmetic(scale=1 / 3))
    rest = [name for name in net.trained if net.traits[name].kind is Kind.REST]
    assert_same({name: found[name] for name in rest}, {name: mean[name] for name in rest})
    assert any(net.base[name].ndim == 4 for name in net.trained if net.traits[name].kind is Kind.MATRIX)
    for name in set(net.trained) - set(rest):
        as_one = [as_matrix(s[name] - net.base[name], net.traits[name]) for s in net.sources[:3]]
        assert_same({"w": as_matrix(found[name], net.traits[name])}, {"w": merged(method, *as_one)}, 1e-8)
    assert differ(
        {n: found[n] for n in net.trained if n not in rest}, {n: mean[n] for n in net.trained if n not in rest}
    )
    assert f"the other {len(rest)} tensors get the mean of their task vectors" in notes[0] or method.name == "tsv-m"


def test_weights_of_sources_count():
    tasks = [drawn((12, 8), seed) for seed in range(2)]
    for method in (TsvM(), IsoC(), IsoCTS(), Wudi()):
        weighed = of_matrices(*tasks).combine(method, weights=[2.0, -1.0])["w"]
        assert_same({"w": weighed}, {"w": merged(method, 2 * tasks[0], -tasks[1])})
        assert differ({"w": weighed}, {"w": merged(method, *tasks)})

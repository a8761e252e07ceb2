"""Diagonal Fisher and WoodFisher: the inverse, the saliency, the step, and the gradients that they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_nets import CLASSES, Chain, Residual, images, net, same_state, state_of
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.data.labels import draw_labels
from vfsurgery.errors import DataError, InvalidWeightsError, OptionError
from vfsurgery.pruning import DiagonalFisher, Masks, WoodFisher
from vfsurgery.pruning.base import Pruning
from vfsurgery.pruning.gradients import Gradients, Part, slabs
from vfsurgery.pruning.inverse_fisher import InverseFisher
from vfsurgery.pruning.layers import prunable
from vfsurgery.pruning.woodfisher import best_weights, even_blocks, summed_steps
from vfsurgery.stats.inputs import Layout

DAMP = 1e-3
EXACT = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fisher(rows: Tensor, damp: float = DAMP) -> Tensor:
    """F of blocks as it is defined, (..., B, B)."""
    return rows.mT @ rows / rows.shape[-2] + damp * torch.eye(rows.shape[-1], dtype=rows.dtype)


def recursion(rows: Tensor, damp: float = DAMP) -> Tensor:
    """The inverse of one block's F by the publication's recursion."""
    count, size = rows.shape
    inverse = torch.eye(size, dtype=rows.dtype) / damp
    for g in rows:
        moved = inverse @ g
        inverse = inverse - torch.outer(moved, moved) / (count + g @ moved)
    return inverse


def labels(count: int, seed: int = 3) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return images(count, dtype=dtype), labels(count)


def work(model: nn.Module, data: object, **options: object) -> Pruning:
    weights = {name: model.get_parameter(name) for name in prunable(model)}
    layouts = {name: Layout.of(model, name) for name in weights}
    batches = surgery.data.batches.Batches(data)  # type: ignore[arg-type]
    return Pruning(model, weights, layouts, batches, progress=False, **options)  # type: ignore[arg-type]


def per_sample(model: nn.Module, pixels: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """The gradient of every image's loss by torch.func, (N, *shape)."""
    names = list(prunable(model))
    state = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, state | weights, (image[None],))
        return functional.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return gradients({name: state[name] for name in names}, pixels, classes)


@pytest.mark.parametrize("count", [3, 12, 40], ids=["few gradients", "as many as weights", "many gradients"])
def test_both_forms_are_the_dense_inverse_and_the_recursion(count: int) -> None:
    rows = normal(5, count, 12)
    inverse, dense = InverseFisher.of(rows, DAMP), torch.linalg.inv(fisher(rows))
    assert inverse.is_dense == (count >= 12)
    scale = dense.abs().max()
    assert (inverse.diagonal() - dense.diagonal(dim1=-2, dim2=-1)).abs().max() < EXACT * scale
    columns = torch.stack([inverse.times(unit.expand(5, 12)) for unit in torch.eye(12, dtype=rows.dtype)], -1)
    assert (columns - dense).abs().max() < EXACT * scale
    assert (torch.stack([recursion(block) for block in rows]) - dense).abs().max() < EXACT * scale
    combined = (dense @ rows.mT @ normal(5, count, 1) / count).squeeze(-1)
    assert (inverse.combine(normal(5, count)) - combined).abs().max() < EXACT * scale
    other = torch.linalg.inv(fisher(rows, 2 * DAMP))
    assert (columns - other).abs().max() > 1e-3 * scale  # the damping is seen


def test_single_precision_is_good_to_four_digits_at_the_size_of_real_gradients() -> None:
    rows = 1e-3 * normal(3, 40, 100)
    exact, rounded = (InverseFisher.of(some, 1e-5).diagonal() for some in (rows, rows.float()))
    assert (exact / rounded.double() - 1).abs().max() < 1e-4


def test_the_diagonal_of_the_inverse_is_never_below_what_an_inverse_can_be() -> None:
    rows = 1e4 * normal(1, 4, 6).float()  # beside these the damping is lost in single precision
    diagonal = InverseFisher.of(rows, 1e-5).diagonal()
    assert (diagonal >= 1 / (rows.square().mean(-2) + 1e-5)).all()


def test_a_matrix_that_rounding_made_singular_is_refused() -> None:
    rows = torch.full((1, 4, 3), 1e12, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"not positive definite .*\n  gradients +4, of mean square 1e\+24\n  remedy"):
        InverseFisher.of(rows, 1e-5)


@pytest.mark.parametrize("count", [4, 30])
def test_removing_one_weight_costs_its_saliency_over_two_and_no_other_step_costs_less(count: int) -> None:
    rows, weight = normal(1, count, 8), normal(1, 8, seed=1)
    matrix = fisher(rows)[0]
    saliency = weight.square() / InverseFisher.of(rows, DAMP).diagonal()
    for removed in range(8):
        kept = torch.arange(8).expand(1, 8) != removed
        for compensate in (summed_steps, best_weights):
            step = (compensate(weight, kept, rows, DAMP) - weight)[0]
            assert step[removed] == -weight[0, removed]
            cost = float(step @ matrix @ step / 2)
            assert cost == pytest.approx(float(saliency[0, removed]) / 2, rel=1e-9)
            other = step + 1e-3 * normal(8, seed=2) * kept[0]
            assert other @ matrix @ other / 2 > cost
        alone = torch.where(kept, 0, -weight)[0]
        assert alone @ matrix @ alone / 2 > saliency[0, removed] / 2


def test_of_many_removed_weights_the_joint_step_is_the_minimum_and_the_sum_is_not() -> None:
    rows, weight = normal(3, 6, 10), normal(3, 10, seed=1)
    kept = torch.rand((3, 10), generator=torch.Generator().manual_seed(2)) < 0.5
    matrix = fisher(rows)

    def cost(new: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", new - weight, matrix, new - weight)

    best, summed = (solve(weight, kept, rows, DAMP) for solve in (best_weights, summed_steps))
    slope = torch.einsum("bij,bj->bi", matrix, best - weight)
    assert slope[kept].abs().max() < EXACT
    assert not best[~kept].any()
    assert not summed[~kept].any()
    assert (cost(summed) > cost(best)).all()
    assert (cost(weight * kept) > cost(best)).all()


def test_the_summed_step_is_the_sum_of_all_single_ones() -> None:
    rows, weight = normal(1, 6, 10), normal(1, 10, seed=1)
    kept = torch.arange(10).expand(1, 10) % 3 != 0
    inverse = torch.linalg.inv(fisher(rows)[0])
    step = -sum(weight[0, q] * inverse[:, q] / inverse[q, q] for q in (0, 3, 6, 9))
    assert torch.allclose(summed_steps(weight, kept, rows, DAMP)[0], (weight[0] + step) * kept[0])


def test_gradients_are_those_of_torch_func() -> None:
    model, (pixels, classes) = net("chain").double(), labelled(6, torch.float64)
    expected = per_sample(model, pixels, classes)
    for batch in (1, 2):
        gradients = Gradients(model, [(pixels[:1], classes[:1]), (pixels[1:], classes[1:])], 6 // batch, batch)
        found = gradients.rows([Part(name, 0, len(weight)) for name, weight in prunable(model).items()])
        for rows, (name, weight) in zip(found, prunable(model).items(), strict=True):
            mean = expected[name].unflatten(0, (-1, batch)).mean(1).flatten(2)  # (samples, rows, columns)
            assert rows.shape == (len(weight), 6 // batch, weight[0].numel())
            assert torch.allclose(rows.transpose(0, 1), mean, rtol=EXACT, atol=1e-12)
            assert not torch.allclose(rows.transpose(0, 1), mean.flip(0))


@pytest.mark.parametrize("name", ["chain", "residual", "grouped"])
def test_the_diagonal_is_the_mean_square_of_gradients_over_two(name: str) -> None:
    model, (pixels, classes) = net(name), labelled()
    gradients = per_sample(model, pixels, classes)
    for found, saliency in DiagonalFisher(samples=24).score(work(model, (pixels, classes))):
        expected = prunable(model)[found].square() * gradients[found].square().mean(0) / 2
        assert torch.allclose(saliency, expected, rtol=1e-3, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("name", ["chain", "residual", "grouped"])
def test_saliencies_of_woodfisher_are_those_of_its_blocks(name: str) -> None:
    model, (pixels, classes) = net(name).double(), labelled(dtype=torch.float64)
    gradients = per_sample(model, pixels, classes)
    for found, saliency in WoodFisher(samples=24, block=10, damp=DAMP).score(work(model, (pixels, classes))):
        weight = prunable(model)[found].flatten(1)
        rows = gradients[found].flatten(2).transpose(0, 1)  # (rows, samples, columns)
        parts = [torch.linalg.inv(fisher(rows[..., cut])) for cut in even_blocks(weight.shape[1], 10)]
        diagonal = torch.cat([part.diagonal(dim1=-2, dim2=-1) for part in parts], 1)
        assert torch.allclose(saliency.flatten(1), weight.square() / diagonal, rtol=1e-8, atol=1e-14)


def pruned(memory: float = 2.0, **options: object) -> nn.Module:
    pruner = WoodFisher(samples=24, **options)  # type: ignore[arg-type]
    model, data = net("chain").double(), labelled(dtype=torch.float64)
    return surgery.prune(model, 0.5, method=pruner, data=data, memory=memory, progress=False)


@pytest.mark.parametrize("compensate", ["sum", "joint"])
def test_slabs_change_nothing(compensate: str) -> None:
    tiny = 8 * 24 * 200 / 2**30  # room for the gradients of 150 weights
    assert len(list(slabs(prunable(Chain()), 150))) > 5
    found, whole = (pruned(memory, compensate=compensate).state_dict() for memory in (tiny, 2.0))
    assert all(torch.allclose(found[name], tensor, rtol=1e-9) for name, tensor in whole.items())


@pytest.mark.parametrize("compensate", ["sum", "joint"])
def test_the_step_moves_kept_weights_and_lowers_what_pruning_costs(compensate: str) -> None:
    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(functional.cross_entropy(model(pixels), classes))

    model = net("chain").double()
    pixels, classes = labelled(dtype=torch.float64)
    classes = model(pixels).argmax(1)  # a network that is right about its data, near a minimum
    results = {
        step: surgery.prune(
            model, 0.2, method=WoodFisher(samples=24, compensate=step), data=(pixels, classes), progress=False
        )
        for step in ("none", compensate)
    }
    assert Masks.of(results["none"]) == Masks.of(results[compensate])
    kept = results["none"].get_parameter("2.weight")
    assert not torch.equal(kept, results[compensate].get_parameter("2.weight"))
    assert abs(loss(results[compensate]) - loss(model)) < abs(loss(results["none"]) - loss(model))


def test_slabs_cover_every_row_once_and_hold_no_more_than_they_may() -> None:
    weights = prunable(Residual())
    found = list(slabs(weights, 100))
    assert all(len(slab) == 1 or sum(size(weights, part) for part in slab) <= 100 for slab in found)
    for name, weight in weights.items():
        ranges = [range(part.start, part.stop) for slab in found for part in slab if part.name == name]
        assert [row for rows in ranges for row in rows] == list(range(len(weight)))


def size(weights: dict[str, Tensor], part: Part) -> int:
    return (part.stop - part.start) * weights[part.name][0].numel()


def test_blocks_that_are_whole_rows_differ_from_blocks_of_single_weights() -> None:
    model, data = net("chain"), labelled()
    single, rows = (dict(WoodFisher(samples=24, block=block).score(work(model, data))) for block in (1, 1000))
    name = "2.weight"
    squares = per_sample(model, *data)[name].square().mean(0) + 1e-5
    assert torch.allclose(single[name], prunable(model)[name].square() * squares, rtol=1e-3)
    assert (rows[name] < 0.9 * single[name]).any()  # others can make up for it: it costs less


def test_blocks_are_consecutive_even_and_no_larger_than_asked() -> None:
    for entries, most in ((4608, 1000), (7, 10), (1, 1), (10, 3)):
        blocks = even_blocks(entries, most)
        assert [index for block in blocks for index in range(entries)[block]] == list(range(entries))
        sizes = {block.stop - block.start for block in blocks}
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


def test_zeros_that_were_there_are_no_part_of_the_fisher_matrix() -> None:
    model, data = net("chain"), labelled()
    sparse = surgery.prune(model, 0.5, progress=False)
    again = surgery.prune(sparse, 0.75, method=WoodFisher(samples=24), data=data, progress=False)
    assert (Masks.of(again) & Masks.of(sparse)) == Masks.of(again)
    assert Masks.of(again).sparsity == pytest.approx(0.75, abs=1e-3)
    sweep = work(sparse, data)
    _ = list(WoodFisher(samples=24).score(sweep))
    diagonal = sweep.cache["inverse diagonal"]["2.weight"]
    dead = sparse.get_parameter("2.weight") == 0
    assert torch.allclose(diagonal[dead], torch.tensor(1e5))
    assert (diagonal[~dead] < 0.99e5).any()


@pytest.mark.parametrize("method", ["diagonal-fisher", "woodfisher"])
def test_both_are_found_by_name_and_report_their_gradients(method: str) -> None:
    model = net("residual")
    before = state_of(model)
    result = surgery.prune(model, 0.5, method=method, data=labelled(402), progress=False)
    assert Masks.of(result).sparsity == pytest.approx(0.5, abs=0.01)
    report = surgery.report_of(result)
    assert f"{method}: 400 gradients of 1 images, labels given" in str(report)
    assert same_state(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in result.parameters())


def test_patterns_are_kept_by_the_step() -> None:
    model = net("chain", width=8)
    result = surgery.prune(model, pattern="2:4", method=WoodFisher(samples=24), data=labelled(), progress=False)
    kept = Masks.of(result)["2.weight"].movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert (kept == 2).all()


def test_labels_are_drawn_alike_from_one_seed_and_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]]).expand(4000, 3)
    first, again, other = (draw_labels(logits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.bincount(minlength=3) / 4000 - logits[0].softmax(0)).abs().max() < 0.03


def test_drawn_labels_are_those_of_one_seed_at_every_pass() -> None:
    model, pixels = net("chain"), images(24)
    found = [
        surgery.prune(model, 0.5, method=WoodFisher(samples=24), data=pixels, seed=seed, progress=False).state_dict()
        for seed in (0, 0, 1)
    ]
    assert same_state(found[0], found[1])
    assert not same_state(found[0], found[2])
    gradients = Gradients(model, [(pixels, None)], 24, labels="drawn")
    part = [Part("0.weight", 0, 8)]
    assert torch.equal(gradients.rows(part)[0], gradients.rows(part)[0])


def test_images_too_many_to_keep_are_read_again_at_each_pass() -> None:
    class Counted:
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return iter([labelled()])

    model, pruner = net("chain"), DiagonalFisher(samples=24)
    kept = dict(pruner.score(work(model, Counted())))
    assert Counted.passes == 1
    read = dict(pruner.score(work(model, Counted(), memory=1e-6)))
    assert Counted.passes == 3
    assert same_state(read, kept)


def refused(
    model: nn.Module, data: object, message: str, error: type[Exception] = DataError, **options: object
) -> None:
    with pytest.raises(error, match=message):
        pruner = DiagonalFisher(**({"samples": 24} | options))  # type: ignore[arg-type]
        surgery.prune(model, 0.5, method=pruner, data=data, progress=False)  # type: ignore[arg-type]


def test_given_labels_are_demanded_where_there_are_none() -> None:
    refused(net("chain"), images(24), r"needs? labels, and the data has none\n  remedy +pass", labels="given")


def test_too_few_images_are_counted() -> None:
    message = r"too few images: 24\n  expected +30: 15 gradients of 2\n  remedy +pass more images, or samples=12"
    refused(net("chain"), labelled(), message, samples=15, batch=2)


def test_a_last_small_batch_does_not_make_the_images_too_few() -> None:
    pixels, classes = labelled()
    data = [(pixels[:10], classes[:10]), (pixels[10:20], classes[10:20]), (pixels[20:], classes[20:])]
    surgery.prune(net("chain"), 0.5, method=DiagonalFisher(samples=24), data=data, progress=False)


class Headless(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = net("chain"), form

    def forward(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        logits = self.net(x)
        return {"pair": (logits, logits), "map": logits[..., None], "detached": logits.detach()}[self.form]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("pair", r"output is not logits\n  found +tuple\n  expected +a tensor \(1, classes\)"),
        ("map", r"output is not logits\n  found +shape \(1, 5, 1\)"),
        ("detached", r"output has no gradient by the weights\n  remedy +remove torch.no_grad"),
    ],
)
def test_what_is_no_classifier_is_refused(form: str, message: str) -> None:
    refused(Headless(form), labelled(), message)


def test_labels_that_are_no_classes_are_refused() -> None:
    pixels, classes = labelled()
    refused(net("chain"), [(pixels, classes + 1)], r"labels from \d to 5 do not fit 5 classes")
    refused(net("chain"), [(pixels, pixels.flatten(1)[:, :5])], r"labels of shape \(1, 5\) and torch.float32 are no")


def test_gradients_that_are_not_finite_name_their_weight() -> None:
    model = net("chain")
    with torch.no_grad():
        model.get_parameter("8.bias").fill_(1e38)
        model.get_parameter("10.weight").mul_(1e5)
    refused(model, labelled(), r"the gradient of the loss by \S+ is NaN or infinite", InvalidWeightsError)
    refused(model, images(24), r"the logits are NaN or infinite", InvalidWeightsError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 is not a count"),
        ({"batch": 0}, "batch=0 is not a count"),
        ({"block": 0}, "block=0 is not a count"),
        ({"damp": 0.0}, r"damp=0.0 leaves the Fisher matrix singular"),
        ({"labels": "drwan"}, r"unknown labels='drwan'\n  remedy +did you mean 'drawn'"),
        ({"compensate": "jiont"}, r"unknown compensate='jiont'\n  remedy +did you mean 'joint'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WoodFisher(**options)  # type: ignore[arg-type]
    if "damp" in options:
        with pytest.raises(OptionError, match=message):
            InverseFisher.of(normal(1, 2, 3), 0.0)

"""Networks that do not compute each image by itself are run on whole batches of the size of the example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import split
from vfsurgery.errors import DataError
from vfsurgery.passes.costs import cost_of
from vfsurgery.stats.together import images_together

GENERATOR = torch.Generator().manual_seed(0)
CLIP = torch.randn(8, 3, 7, 7, generator=GENERATOR)


class Shifting(nn.Module):
    """Folds frames into the batch, as video networks do."""

    def __init__(self, frames: int = 4) -> None:
        super().__init__()
        self.frames = frames
        self.a, self.bn, self.b, self.out = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        clips = x.view(x.shape[0] // self.frames, self.frames, *x.shape[1:])
        x = (clips + clips.roll(1, 1)).view(x.shape)
        return self.out(F.relu(self.b(x)).mean((2, 3))).view(-1, self.frames, 4).mean(1)


class OfTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.out = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.bn(self.a(x))).mean((2, 3)))


def batches(count: int, size: int) -> list[Tensor]:
    return [torch.randn(size, 3, 7, 7, generator=GENERATOR) for _ in range(count)]


def test_how_many_images_belong_together() -> None:
    assert images_together(Shifting().eval(), (CLIP,)) == 8
    assert images_together(OfTheBatch().eval(), (CLIP,)) == 8
    assert images_together(nn.Conv2d(3, 6, 3), (CLIP,)) == 1
    assert images_together(nn.Conv2d(5, 6, 3), (CLIP,)) == 1  # it does not run: tracing will say so
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).train()
    assert images_together(model, (CLIP,)) == 1 and model[1].num_batches_tracked == 0


def test_batches_are_cut_at_multiples_and_what_is_left_is_left_out() -> None:
    assert [len(images) for images, _ in Batches(torch.zeros(300, 2)).in_runs(48)] == [96, 96, 96]
    labelled = Batches([(torch.zeros(11, 2), torch.arange(11))]).in_runs(4)
    assert [(len(images), len(labels)) for images, labels in labelled if labels is not None] == [(8, 8)]
    with pytest.raises(DataError, match=r"no batch of the data has 16 images.*\n +remedy +pass batches of 16 images"):
        list(Batches(batches(3, 6)).in_runs(16))


def test_images_that_belong_together_are_held_out_together() -> None:
    images = torch.arange(40.0).view(40, 1)
    rest, held_out = split(Batches(images).in_runs(4))
    assert [x.flatten().tolist() for x, _ in held_out] == [[16.0, 17.0, 18.0, 19.0, 36.0, 37.0, 38.0, 39.0]]
    assert sum(len(x) for x, _ in rest) == 32
    rest, held_out = split(Batches(torch.zeros(12, 1)).in_runs(4))
    with pytest.raises(DataError, match="at least 20: one in 5 is held out, 4 together"):
        list(held_out)


@pytest.mark.parametrize("kind", [Shifting, OfTheBatch])
def test_merges_run_whole_batches_alone(kind: type[nn.Module]) -> None:
    seen: list[int] = []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor and not x.is_meta:
                seen.append(len(x))
            return super().forward(x)

    models = [Counting().eval() for _ in range(2)]
    merged = surgery.merge(*models, data=[*batches(8, 16), *batches(1, 5)], example_inputs=CLIP, progress=False)
    assert any("runs of 8" in note for note in surgery.report_of(merged).notes)
    assert {size % 8 for size in seen} <= {0, 7}  # 7: whether images belong together was tried, once
    assert seen.count(7) <= 1


def test_without_an_example_the_first_batch_is_the_example() -> None:
    models = [Shifting().eval() for _ in range(2)]
    merged = surgery.merge(*models, data=batches(8, 16), renormalize="reset", progress=False)
    assert any("runs of 16" in note for note in surgery.report_of(merged).notes)
    smaller = surgery.prune_units(models[0], 0.3, data=batches(4, 8), saliency="activation", progress=False)
    assert surgery.report_of(smaller).groups


def test_others_are_run_as_before() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval() for _ in range(2)]
    merged = surgery.merge(*models, data=batches(3, 5), progress=False)
    assert not any("runs of" in note for note in surgery.report_of(merged).notes)


def test_costs_of_one_image_come_from_the_whole_example() -> None:
    model = Shifting().eval()
    each = cost_of(nn.Sequential(model.a, model.b), CLIP)
    assert 0 < cost_of(model, CLIP).flops - each.flops < 0.1 * each.flops  # the linear layer


def test_regressions_and_diagnoses_do_not_tear_clips_apart() -> None:
    models = [Shifting().eval() for _ in range(2)]
    surgery.merge(*models, data=batches(1, 16), example_inputs=CLIP, renormalize="regress", progress=False)
    diagnosis = surgery.diagnose(models[0], sources=[models[1]], data=batches(2, 8))
    assert len(diagnosis.layers) >= 3

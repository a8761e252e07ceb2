"""Imagined images: nearer to what BatchNorm remembers, of untouched sources, reproducible, saved whole, or refused."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import tiny_nets
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.data.folders import Pictures
from vfsurgery.data.procedural import Leaves
from vfsurgery.errors import CheckpointError, DataError, ExampleInputError, InvalidWeightsError, OptionError
from vfsurgery.stats.imagined import standing_in, steering
from vfsurgery.stats.imagined.aims import Watched
from vfsurgery.stats.imagined.judging import count_duplicates
from vfsurgery.stats.imagined.pixels import pixels_of

SIDE = tiny_nets.SIDE
EXAMPLE = torch.zeros(2, 3, SIDE, SIDE)


def real_images(count: int = 300, seed: int = 9) -> Tensor:
    """Stripes of few colours: nothing that leaves look like."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(count, 1, 1, 1, generator=generator)
    waves = torch.sin(torch.arange(SIDE).view(1, 1, 1, -1) * 2.5 + phase) * torch.tensor([1.5, 0.2, -1.0]).view(3, 1, 1)
    return waves.expand(-1, -1, SIDE, -1) + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


def trained(seed: int = 0, model: nn.Module | None = None) -> nn.Module:
    """A network whose BatchNorm layers keep the statistics of those images, and whose outputs have been drawn."""
    model = tiny_nets.net("residual", seed) if model is None else model
    model.train()
    with torch.no_grad():
        for part in real_images().split(60) * 10:
            model(part.to(next(model.parameters()).dtype))
    return model.eval()


def distance(model: nn.Module, images: Tensor) -> float:
    """The mean of all layers, by hooks and in float64: nothing of what is tested."""
    model = copy.deepcopy(model).double().eval()
    found: list[Tensor] = []

    def see(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        units = args[0].movedim(1, 0).flatten(1)
        means = (units.mean(1) - norm.running_mean).square() / norm.running_var
        found.append((means + ((units.var(1) / norm.running_var).sqrt() - 1).square()).mean())

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        model(images.double())
    return float(torch.stack(found).mean())


def shuffled(model: nn.Module) -> nn.Module:
    """Every layer's statistics in a random order of units, and of their sizes."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            order = torch.randperm(len(module.running_mean), generator=generator)
            module.running_mean.copy_(module.running_mean[order])
            module.running_var.copy_(module.running_var[order])
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return trained(0), trained(1)


@pytest.fixture(scope="module")
def steered(pair) -> surgery.Imagined:
    return surgery.imagine(pair, 60, "statistics", example_inputs=EXAMPLE, seed=3, progress=False)


def test_images_come_nearer_to_what_all_sources_remember(pair, steered):
    leaves = surgery.imagine(pair, 60, "leaves", example_inputs=EXAMPLE, seed=3)
    for number, model in enumerate(pair):
        before, after = distance(model, leaves.images), distance(model, steered.images)
        assert after < 0.5 * before
        layers = [layer for layer in steered.report.layers if layer.source == number]
        assert len(layers) == 6
        assert sum(layer.before for layer in layers) / 6 == pytest.approx(before, rel=1e-3)
        assert sum(layer.after for layer in layers) / 6 == pytest.approx(after, rel=1e-3)


def test_shuffled_statistics_do_not_help(pair, steered):
    lost = [shuffled(model) for model in pair]
    astray = surgery.imagine(lost, 60, "statistics", example_inputs=EXAMPLE, seed=3)
    assert astray.report.after < astray.report.before  # they are met as well as they can be
    for model in pair:
        assert distance(model, astray.images) > 2 * distance(model, steered.images)


def test_merges_take_them_as_data(pair, steered):
    merged = surgery.merge(*pair, data=steered, progress=False)
    assert surgery.report_of(merged).matching == "activations"
    assert [len(images) for images, _ in Batches(steered)] == [60]
    assert torch.equal(steered[5][0], steered.images[5])


def test_a_seed_decides_and_torchs_own_is_left_alone(pair, steered):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    again = surgery.imagine(pair, 60, "statistics", example_inputs=EXAMPLE, seed=3)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(again.images, steered.images)
    other = surgery.imagine(pair, 60, "statistics", example_inputs=EXAMPLE, seed=4)
    assert not torch.equal(other.images, steered.images)


def snapshot(model: nn.Module) -> tuple:
    return (
        {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


def is_untouched(model: nn.Module, before: tuple) -> bool:
    (tensors, *others), (now, *others_now) = before, snapshot(model)
    same = all(now[name][0] == place and torch.equal(now[name][1], tensor) for name, (place, tensor) in tensors.items())
    return same and others == others_now


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, RuntimeError])
def test_sources_stay_as_they_are_however_it_ends(stop, monkeypatch):
    models = [trained(0).train(), trained(1)]
    models[0].fc.weight.requires_grad_(False)
    before = [snapshot(model) for model in models]
    if stop is not None:
        steps = iter(range(5))

        def pull(*arguments, own=steering.Steering._pull):
            if next(steps) == 3:
                raise stop
            return own(*arguments)

        monkeypatch.setattr(steering.Steering, "_pull", pull)
        with pytest.raises(stop):
            surgery.imagine(models, 8, "statistics", example_inputs=EXAMPLE)
    else:
        surgery.imagine(models, 8, "statistics", example_inputs=EXAMPLE)
    assert all(is_untouched(model, kept) for model, kept in zip(models, before, strict=True))
    models[0].norm.running_mean[0] += 1
    assert not is_untouched(models[0], before[0])


class Own(nn.Module):
    """Statistics in buffers of other names, and a call of ``functional.batch_norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.conv(x), self.centre, self.spread, None, None, self.training, 0.2)
        return x.relu().mean((2, 3))


class Twice(nn.Module):
    """One layer that is called twice, on inputs of other statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (self.norm(x) + self.norm(0.5 * x + 1).relu()).mean((2, 3))


def of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), *layers, nn.Flatten(), nn.LazyLinear(3))


KINDS = {
    "BatchNorm2d": (lambda: of(nn.BatchNorm2d(6)), ["1"]),
    "momentum None": (lambda: of(nn.BatchNorm2d(6, momentum=None)), ["1"]),
    "timm's with an activation": (lambda: of(BatchNormAct2d(6)), ["1"]),
    "SyncBatchNorm": (lambda: of(nn.SyncBatchNorm(6)), ["1"]),
    "timm's SyncBatchNorm": (lambda: convert_sync_batchnorm(of(BatchNormAct2d(6))), ["1"]),
    "functional": (Own, ["centre"]),
    "called twice": (Twice, ["norm"]),
    "of vectors": (lambda: of(nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4)), ["3"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_norm_counts(kind):
    make, names = KINDS[kind]
    torch.manual_seed(0)
    model = make().double()
    model(real_images(4).double())
    # as training would: SyncBatchNorm's own needs a process group
    plain = nn.SyncBatchNorm in map(type, model.modules()) or kind == "timm's SyncBatchNorm"
    with torch.no_grad():
        images = real_images(100).double()
        if plain:
            values = model[0](images)
            model[1].running_mean.copy_(values.mean((0, 2, 3))), model[1].running_var.copy_(values.var((0, 2, 3)))
        else:
            for _ in range(200):
                model.train()(images)
        watched = Watched(model, images[:2])
        distances, _ = watched.look(images)
        others, _ = watched.look(2 * images)
    assert [aim.name for aim in watched.aims.values()] == names
    assert len(distances) == 1 and float(distances[0]) < 1e-6 < 0.1 < float(others[0])


def test_constant_units_are_nothing_to_aim_at():
    model = trained()
    with torch.no_grad():
        model.stem.weight[2], model.norm.running_mean[2], model.norm.running_var[2] = 0, 0, 0
    found = surgery.imagine(model, 8, "statistics", example_inputs=EXAMPLE, steps=2)
    assert found.images.isfinite().all() and found.report.after < 100


def test_auto_says_why_there_is_nothing_to_aim_at(pair, monkeypatch):
    def notes(model: nn.Module, **options) -> str:
        report = surgery.imagine(model, 8, example_inputs=EXAMPLE, **options).report
        assert (report.how, report.steered, report.steps) == ("leaves", 0, 0)
        return " ".join(report.notes)

    assert "there is no BatchNorm layer" in notes(tiny_nets.net("chain"))
    assert "never been trained" in notes(tiny_nets.Residual())
    untracked = of(nn.BatchNorm2d(6, track_running_stats=False))
    untracked(EXAMPLE)
    assert "keep no running statistics" in notes(untracked)
    assert "memory=1e-06" in notes(pair[0], memory=1e-6)
    monkeypatch.setattr(surgery.stats.imagined.planning, "affordable_flops", lambda device: 1.0)
    assert "FLOPs" in notes(pair[0])
    assert surgery.imagine(pair[0], 8, "statistics", example_inputs=EXAMPLE, steps=1).report.steered == 8


def test_auto_moves_as_many_as_it_may(pair, monkeypatch):
    flops = surgery.imagine(pair[0], 40, "statistics", example_inputs=EXAMPLE, steps=1).report.flops / 40
    monkeypatch.setattr(surgery.stats.imagined.planning, "affordable_flops", lambda device: 2 * 35.5 * flops)
    assert surgery.imagine(pair[0], 50, example_inputs=EXAMPLE, steps=2).report.steered == 35


BAD: dict[str, tuple[object, dict, type[Exception], str]] = {
    "no size": (nn.Linear(3, 2), {"example_inputs": None}, ExampleInputError, "does not say what input it takes"),
    "two inputs": (nn.Bilinear(3, 3, 2), {"example_inputs": [EXAMPLE, EXAMPLE]}, DataError, "takes 2 inputs"),
    "vectors": (nn.Linear(3, 2), {"example_inputs": torch.zeros(2, 3)}, DataError, "takes no images"),
    "tokens": (nn.Embedding(9, 2), {"example_inputs": torch.ones(2, 5).long()}, DataError, "takes no images"),
    "no such size": (nn.Conv2d(4, 2, 3), {}, DataError, r"does not run on images of \(3, 12, 12\)"),
    "no images": (None, {"images": 0}, OptionError, "images must be a whole number of at least 1"),
    "half an image": (None, {"images": 2.5}, OptionError, "images must be a whole number"),
    "no steps": (None, {"steps": 0}, OptionError, "steps must be a whole number of at least 1"),
    "steps of leaves": (None, {"how": "leaves", "steps": 3}, OptionError, "leaves are drawn in no steps"),
    "unknown way": (None, {"how": "leafs"}, OptionError, "did you mean 'leaves'"),
    "no memory": (None, {"memory": 0}, OptionError, "memory must be"),
    "no norms": (tiny_nets.Chain(), {"how": "statistics"}, OptionError, "how='leaves' needs none"),
    "no network": ([], {}, OptionError, "no network"),
    "no module": ([3], {}, OptionError, "source 0"),
    "meta": (tiny_nets.Chain().to("meta"), {}, InvalidWeightsError, "meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, monkeypatch):
    model, options, error, message = BAD[case]
    monkeypatch.setattr(steering.Steering, "steer", lambda *_: pytest.fail("work has begun"))
    options = {"example_inputs": EXAMPLE, **options}
    with pytest.raises(error, match=message):
        surgery.imagine(tiny_nets.Residual() if model is None else model, **options)


def test_too_little_memory_is_refused(pair):
    with pytest.raises(OptionError, match=r"two images take 0\.\d+ GiB .*\n.*give more memory="):
        surgery.imagine(pair, 8, "statistics", example_inputs=EXAMPLE, memory=1e-6)


def test_nan_is_refused():
    model = tiny_nets.net("residual")
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(InvalidWeightsError, match="source 0 holds NaN"):
        surgery.imagine(model, example_inputs=EXAMPLE)


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 6, 9), (12, 8, 8), (3, 1, 1)], ids=str)
def test_any_number_of_channels_and_one_pixel(size):
    model = nn.Sequential(nn.Conv2d(size[0], 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model(torch.randn(50, *size))
    found = surgery.imagine(model, 20, "statistics", example_inputs=torch.zeros(1, *size), steps=5)
    assert found.images.shape == (20, *size) and found.report.after < found.report.before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = trained().to(dtype)
    before = snapshot(model)
    found = surgery.imagine(model, 20, "statistics", example_inputs=EXAMPLE, steps=8)
    assert found.images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.report.after < 0.8 * found.report.before
    assert is_untouched(model, before)


def test_features_instead_of_logits():
    model = trained(model=nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    report = surgery.imagine(model, 20, "statistics", example_inputs=EXAMPLE, steps=8).report
    assert report.after < report.before
    assert (report.looks.agreement, report.looks.classes, report.looks.within) == (None, None, None)


def test_networks_that_compute_images_together_get_leaves():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            clips = self.norm(self.conv(x)).mean((2, 3)).unflatten(0, (-1, 4))
            return clips - clips.mean(1, keepdim=True)

    model = Frames()
    model(real_images(40))
    report = surgery.imagine(model, 16, example_inputs=torch.zeros(4, 3, SIDE, SIDE)).report
    assert report.notes == ("not moved: the network does not compute each image by itself",)


def test_smaller_batches_come_nearer_too(pair):
    whole, parts = (
        surgery.imagine(pair, 20, "statistics", example_inputs=EXAMPLE, memory=memory).report for memory in (4, 1.2e-3)
    )
    assert parts.after < 0.7 * parts.before
    assert parts.after != whole.after


def test_pixels_are_those_of_the_configuration():
    model = timm.create_model("resnet18", num_classes=3)
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    pixels = pixels_of(model, 3)
    assert torch.allclose(torch.tensor(pixels.low), (0 - mean) / std)
    assert torch.allclose(torch.tensor(pixels.high), (1 - mean) / std)
    assert torch.allclose(torch.tensor(pixels.std), torch.tensor((0.229, 0.224, 0.225)) / std)
    assert pixels_of(torchvision.models.resnet18(), 3) == pixels
    halves = timm.create_model("mobilenetv3_small_050", in_chans=1)
    halves.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert pixels_of(halves, 1).low == (-1.0,) and pixels_of(halves, 1).high == (1.0,)
    assert pixels_of(halves, 12).std == pytest.approx((0.452,) * 12, abs=1e-3)
    assert pixels_of(nn.Conv2d(2, 1, 1), 2).high == (2.5, 2.5)


def test_images_stay_in_the_pixels_range(steered):
    low, high = steered.pixels.low[0], steered.pixels.high[0]
    assert steered.images.min() >= low - 1e-5 and steered.images.max() <= high + 1e-5
    assert steered.images.max() > 0.9 * high


def test_the_size_is_that_of_the_configuration_and_few_large_images_are_drawn():
    made = surgery.imagine(timm.create_model("test_resnet", num_classes=3), 2, "leaves")
    assert made.images.shape == (2, 3, 160, 160)


def summing(side: int) -> nn.Module:
    """A network that was trained on leaves of a size, on whose sums over all pixels it depends; configured for 128."""

    class Sums(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum((2, 3))

    model = Sums(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), Unpooled(6))
    model.default_cfg = {"input_size": (3, 128, 128)}
    images = Leaves().draw(60, (3, side, side), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(50):
            model(images)
    return model.eval()


class Unpooled(nn.Module):
    """A norm of sums over all pixels, spread over the map again."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(units)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(x.sum((2, 3)))[..., None, None]


@pytest.mark.parametrize(("trained_on", "found"), [(32, 32), (96, 96), (128, 128)])
def test_statistics_tell_the_size_that_a_network_was_trained_on(trained_on, found):
    made = surgery.imagine(summing(trained_on), 2, "leaves")
    assert made.images.shape == (2, 3, found, found)
    assert len(made.report.notes) == (found < 128) and all("configured 128 x 128" in note for note in made.report.notes)
    asked = surgery.imagine(summing(trained_on), 2, "leaves", example_inputs=torch.zeros(1, 3, 64, 64))
    assert asked.images.shape == (2, 3, 64, 64) and asked.report.notes == ()


def test_unasked_images_have_the_size_that_statistics_tell(monkeypatch):
    monkeypatch.setattr(standing_in, "MOST", 40)
    made = standing_in.stand_in([summing(32), summing(32)], None, unasked=True)
    assert made.images.shape == (40, 3, 32, 32)
    assert "of 32 x 32 pixels" in str(made.report)


def test_near_duplicates_are_counted():
    images = Leaves().draw(6, (3, 20, 20), torch.Generator().manual_seed(0))
    assert count_duplicates(images) == 0
    assert count_duplicates(torch.cat([images, 1.5 * images[:2] + 0.01 * torch.randn(2, 3, 20, 20)])) == 2


def test_reports_are_text_json_and_html(steered, pair):
    report = steered.report
    assert "60 imagined images of 3x12x12, seed 3; no real image was used" in str(report)
    assert json.loads(report.to_json())["real_images"] == 0
    assert report.images == 60 and report.steered == 60 and report.looks.images == 60
    assert 0 <= report.looks.agreement <= 1 <= report.looks.classes <= 5 and 0 < report.looks.within <= 1
    assert report.flops > 0 and report.seconds > 0
    assert "block2.down.1" in steered._repr_html_() and "<img" not in steered._repr_html_()
    assert repr(steered) == "Imagined(60 images of 3x12x12, statistics, seed 3)"


def test_tensors_are_saved_with_their_report(steered, tmp_path):
    path = steered.save(tmp_path / "new" / "images.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("images"), steered.images)
        assert json.loads(file.metadata()["report"])["seed"] == 3


def test_pictures_are_saved_so_that_folders_of_images_read_them(steered, tmp_path):
    path = steered.save(tmp_path / "pictures")
    steered.save(path)  # again, over its own
    read = Pictures(path, lambda image: torchvision.transforms.functional.pil_to_tensor(image))
    assert len(read) == 60 and [entry.name for entry in tmp_path.iterdir()] == ["pictures"]
    low, high = (torch.tensor(values).view(3, 1, 1) for values in (steered.pixels.low, steered.pixels.high))
    assert torch.allclose(read[7][0] / 255 * (high - low) + low, steered.images[7], atol=5 / 255)


def test_nothing_else_is_overwritten_and_nothing_half_written(steered, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="something else of this name"):
        steered.save(tmp_path / "mine")
    written = iter(range(9))

    def save(self, path, own=Image.Image.save):
        if next(written) == 5:
            raise OSError("no space left")
        own(self, path)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(CheckpointError, match="no space left"):
        steered.save(tmp_path / "pictures")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_four_channels_are_no_pngs(tmp_path):
    made = surgery.imagine(nn.Conv2d(4, 2, 1), 2, example_inputs=torch.zeros(1, 4, 5, 5))
    with pytest.raises(CheckpointError, match="images of 4 channels are no PNGs"):
        made.save(tmp_path / "pictures")
    assert made.plot(tmp_path / "grid").stat().st_size > 500


def test_a_grid_is_drawn(steered, tmp_path):
    with Image.open(steered.plot(tmp_path / "grid.png")) as drawn:
        assert drawn.width > drawn.height / 2 > 300

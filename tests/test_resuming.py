"""A training that was cut off comes to the weights of one that was not, and a file of another training is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from vfsurgery.data.augmentation import crop_and_flip
from vfsurgery.errors import CheckpointError
from vfsurgery.networks.demo import TinyResNet
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.training.loop import WARMUP_START, _schedule, from_seed, train
from vfsurgery.training.resuming import Progress

IMAGES = TensorDataset(torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10)
STEPS = {"milestones": (3, 7), "warmup": 1, "nesterov": False}


class CutOff(Exception):
    """Stands for a machine that goes away."""


def trained(checkpoint=None, seed: int = 0, **options) -> nn.Module:
    model = from_seed(lambda: TinyResNet(4), seed)
    settings = {"epochs": 4, "lr": 0.1, "batch_size": 16, "augment": True, **options}
    return train(model, IMAGES, seed=seed, checkpoint=checkpoint, progress=False, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def cut_off_after(epochs: int, monkeypatch, path, **options) -> None:
    """Train until ``epochs`` are kept, then break in the middle of the next one."""
    save = Progress.save

    def save_and_break(self, file, epoch):
        save(self, file, epoch)
        if epoch == epochs:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", save_and_break)
        with pytest.raises(CutOff):
            trained(path, **options)


@pytest.mark.parametrize(
    "options",
    [{}, STEPS, {"augment": False}, {"optimizer": "adamw", "lr": 0.01}],
    ids=["cycle", "steps", "plain", "adamw"],
)
def test_resumed_training_equals_uninterrupted_bit_for_bit(options, tmp_path, monkeypatch):
    path = tmp_path / "kept" / "net.pt"
    cut_off_after(2, monkeypatch, path, **options)
    whole = trained(**options)
    assert same(trained(path, **options), whole)
    assert not same(trained(**{**options, "epochs": 3}), whole)
    assert [file.name for file in path.parent.iterdir()] == ["net.pt"]


def test_finished_training_is_not_run_again(tmp_path, monkeypatch):
    first = trained(tmp_path / "net.pt")
    monkeypatch.setattr("torch.optim.SGD.step", lambda *args: pytest.fail("trained"))
    again = trained(tmp_path / "net.pt")
    assert same(first, again) and not again.training


def test_file_of_another_training_is_refused(tmp_path):
    trained(tmp_path / "net.pt", epochs=1)
    with pytest.raises(
        CheckpointError, match=r"net\.pt is of another training\n  found .*lr=0\.1,? .*\n  expected .*lr=0.2"
    ):
        trained(tmp_path / "net.pt", epochs=1, lr=0.2)


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.pt is damaged\n  cause .*\n  remedy  delete it"):
        trained(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {"x": torch.zeros(1)}},
        {"epoch": "x"},
        {"generator": torch.zeros(2)},
        {"optimizer": 3},
    ],
    ids=str,
)
def test_a_file_without_a_part_is_refused(tmp_path, changes):
    trained(tmp_path / "net.pt")
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save(content, tmp_path / "net.pt")
    trained(tmp_path / "net.pt")  # written again, it is as good
    torch.save(content | changes, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"net\.pt is damaged\n  cause .*\n  remedy  delete it"):
        trained(tmp_path / "net.pt")


def test_learning_rate_rises_then_falls_to_a_tenth():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    schedule = _schedule(optimizer, 0.1, 100, (6, 8), 4)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(WARMUP_START)
    assert rates[:5] == sorted(rates[:5]) and rates[2] == pytest.approx(0.05, rel=1e-4)
    assert rates[4:] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_augmented_images_are_shifted_and_mirrored_copies():
    images = torch.arange(1.0, 1 + 64 * 2 * 36).view(64, 2, 6, 6)
    changed = crop_and_flip(images, torch.Generator().manual_seed(0), padding=1)
    padded = nn.functional.pad(images, [1] * 4)
    found = set()
    for image, source in zip(changed, padded, strict=True):
        crops = {(y, x): source[:, y : y + 6, x : x + 6] for y in range(3) for x in range(3)}
        matches = [(*at, False) for at, crop in crops.items() if torch.equal(image, crop)]
        matches += [(*at, True) for at, crop in crops.items() if torch.equal(image, crop.flip(2))]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) > 12  # of 18


def test_recipes_that_train_the_same_network_share_it(tmp_path, monkeypatch):
    text = f"""\
name: one
resume: {tmp_path / "kept"}
threads: 1
data: {{}}
sources: [{{model: "vfsurgery.networks.demo:TinyResNet", options: {{width: 2}}}}, {{}}]
stages:
  - train: {{epochs: 1}}
  - merge: {{matching: identity, renormalize: none}}
  - evaluate
"""
    first = Recipe.from_yaml(text).run(tmp_path / "one", progress=False)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    monkeypatch.setattr("torch.optim.SGD.step", lambda *args: pytest.fail("trained"))
    other = text.replace("name: one", "name: two").replace("identity", "weights").replace(", {}]", ", {name: other}]")
    second = Recipe.from_yaml(other, {"data.calibration": None}).run(tmp_path / "two", progress=False)
    scores = [run.findings[0].said("evaluate").scores for run in (first, second)]
    assert scores[0]["a"] == scores[1]["a"] and scores[0]["b"] == scores[1]["other"]
    for old, new in (("epochs: 1", "epochs: 1, lr: 0.01"), ("width: 2", "width: 3"), ("{}]", "{seed: 5}]")):
        with pytest.raises(pytest.fail.Exception, match="trained"):
            Recipe.from_yaml(text.replace(old, new)).run(tmp_path / "three", progress=False)

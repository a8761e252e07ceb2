"""CIFAR is read from both layouts, standardised as the paper does, and where it is missing the way out is said."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from vfsurgery.data.cifar import MEAN, STD, cifar
from vfsurgery.errors import DataError


@pytest.fixture
def folders(tmp_path):
    """Two classes of six training and two test images each; the red channel counts them."""
    for part, count in (("train", 12), ("test", 4)):
        for index in range(count):
            folder = tmp_path / part / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (index, 100, 200)).save(folder / f"{index:02}.png")
    return tmp_path


def reds(part) -> list[int]:
    """The number of each image."""
    return [round(((image[0, 0, 0] * STD[0] + MEAN[0]) * 255).item()) for image in part.tensors[0]]


def test_folders_of_images(folders):
    splits = cifar("cifar10", folders, calibration=5)
    images, labels = splits.train.tensors
    assert images.shape == (12, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert [number % 2 for number in reds(splits.train)] == labels.tolist()
    expected = [(value / 255 - mean) / std for value, mean, std in zip((100, 200), MEAN[1:], STD[1:], strict=True)]
    assert images[3, 1:, 7, 9].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(splits.calibration) == 5 and set(reds(splits.calibration)) <= set(reds(splits.train))
    assert sorted(reds(splits.test)) == [0, 1, 2, 3]


def test_drawn_images_depend_on_the_seed_alone(folders):
    drawn = [reds(cifar("cifar10", folders, train=6, test=2, seed=seed).train) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 6


def test_layout_of_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for index, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels = np.full((2, 3 * 32 * 32), index, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [index, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(number) for number in range(10)]}))
    with pytest.raises(DataError, match=r"cifar-10-batches-py is damaged\n  cause  .*\n  remedy  delete"):
        cifar("cifar10", tmp_path)  # checksums are of the true files
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)
    splits = cifar("cifar10", tmp_path)
    assert splits.train.tensors[1].tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert reds(splits.train) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert reds(splits.test) == [5, 5]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_data_says_where_and_how_to_get_it(name, tmp_path):
    with pytest.raises(
        DataError, match=rf"there is no {name} in .*\n.*\n  expected  cifar-10.*\n  remedy    torchvision\.d"
    ):
        cifar(name, tmp_path)


def test_empty_class_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images in .*train\n  cause .*\n  remedy  lay them out as CLASS"):
        cifar("cifar10", tmp_path)


def test_images_of_another_size(folders):
    Image.new("RGB", (20, 32)).save(folders / "train" / "cat" / "odd.png")
    with pytest.raises(DataError, match=r"odd\.png is no CIFAR image\n  found     \(32, 20\)\n  expected  32 x 32"):
        cifar("cifar10", folders)

"""Data sets by name: folders, torchvision's, your own; and how they are divided."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets

from vfsurgery.data import Splits
from vfsurgery.data.datasets import DATA, divided, load_data
from vfsurgery.errors import DataError, OptionError
from vfsurgery.networks.architectures import build_model
from vfsurgery.recipes.sections import Images


def write_images(folder, classes=("cat", "dog"), count=6, start=0):
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20, 16, 3), 20 * place + number + start, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def shade(tensor):
    return round(float(tensor.mean()) * 255)


def plain(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_a_divided_folder_keeps_its_parts(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", start=100)
    splits = load_data("imagefolder", {"path": str(tmp_path), "calibration": 5}, plain)
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (12, 5, 12)
    assert all(shade(image) < 100 for image, _ in splits.train)
    assert all(shade(image) < 100 for image, _ in splits.calibration)
    assert all(shade(image) >= 100 for image, _ in splits.test)


def test_an_undivided_folder_is_divided_without_overlap(tmp_path):
    write_images(tmp_path, count=10)
    splits = load_data("imagefolder", {"path": str(tmp_path), "test": 6, "seed": 1}, plain)
    train, test = ({shade(image) for image, _ in part} for part in (splits.train, splits.test))
    assert len(test) == 6 and len(train) == 14 and not train & test
    other = load_data("imagefolder", {"path": str(tmp_path), "test": 6, "seed": 2}, plain)
    assert {shade(image) for image, _ in other.test} != test


def test_parts_with_other_classes_are_refused(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", classes=("cat", "fox"))
    with pytest.raises(DataError, match=r"test has other classes than the images for training\n  unknown  fox"):
        load_data("imagefolder", {"path": str(tmp_path)}, plain)


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_images_is_refused(tmp_path, made):
    if made:
        (tmp_path / "none" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no image"):
        load_data("imagefolder", {"path": str(tmp_path / "none")}, plain)


class Letters(Dataset):
    """Stands for a data set of torchvision, which would have to be there."""

    def __init__(self, root, train=True, transform=None, download=False, case="lower"):
        if root == "nowhere":
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.items = [Image.fromarray(np.full((8, 8, 3), case == "upper", dtype=np.uint8))] * (30 if train else 10)
        self.transform = transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.transform(self.items[index]), index


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(datasets, "Letters", Letters, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Letters"))


def test_data_of_torchvision(letters):
    splits = load_data("torchvision:Letters", {"path": "here", "calibration": 7, "case": "upper"}, plain)
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (30, 7, 10)
    assert shade(splits.test[0][0]) == 1


def test_data_of_torchvision_that_comes_in_one_part_is_divided():
    splits = load_data("torchvision:FakeData", {"path": "unused", "test": 3}, lambda image: torch.zeros(1))
    assert len(splits.test) == 3


def test_data_of_torchvision_that_is_not_there(letters):
    with pytest.raises(DataError, match=r"cannot read Letters from nowhere\n  cause   Dataset not found"):
        load_data("torchvision:Letters", {"path": "nowhere"}, plain)
    with pytest.raises(OptionError, match="no option 'cased'\n  remedy  did you mean 'case'"):
        load_data("torchvision:Letters", {"path": "here", "cased": "upper"}, plain)
    with pytest.raises(OptionError, match="torchvision has no data set 'Leters'\n  remedy  did you mean 'Letters'"):
        load_data("torchvision:Leters", {"path": "here"}, plain)


def test_data_of_your_own(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def whole(*, count=10):\n"
        "    return TensorDataset(torch.arange(count).float(), torch.zeros(count))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    splits = load_data("mydata:whole", {"count": 20, "calibration": 4})
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (16, 4, 4)
    for name, options, message in (
        ("mydata:whole", {"cout": 3}, "cannot be loaded so"),
        ("mydata:hole", {}, "mydata has no data factory 'hole'\n  remedy  did you mean 'whole'"),
        ("mydata:wrong", {}, "is a int"),
        ("yourdata:whole", {}, "cannot import the data yourdata:whole"),
    ):
        with pytest.raises((OptionError, DataError), match=message):
            load_data(name, options)
    sys.modules.pop("mydata")


def test_registered_data(monkeypatch):
    monkeypatch.setattr(DATA, "_entries", dict(DATA._entries))

    @DATA.register("noise")
    def noise(*, seed: int, size: int = 4) -> Splits:
        part = TensorDataset(torch.full((3, 1, size, size), float(seed)), torch.zeros(3, dtype=torch.int64))
        return Splits(part, part, part)

    splits = Images(name="noise", size=6, seed=2).load("timm:resnet18", nn.Identity)
    assert splits.train[0][0].shape == (1, 6, 6) and splits.train[0][0].mean() == 2
    with pytest.raises(ValueError, match="noise has no path; accepted: name, seed, size"):
        Images(name="noise", path="here")


def test_pictures_become_what_the_model_expects(tmp_path):
    write_images(tmp_path)
    from vfsurgery.networks.architectures import build_model

    section = Images(name="imagefolder", path=str(tmp_path), test=2, size=32)
    splits = section.load("timm:resnet18", lambda: build_model("timm:resnet18"))
    assert splits.test[0][0].shape == (3, 32, 32)
    with pytest.raises(DataError, match="no preprocessing is known for mine:net"):
        section.load("mine:net", nn.Identity)


def test_what_is_calibrated_on_is_never_tested_on():
    splits = divided(TensorDataset(torch.arange(50)), calibration=20, train=30)
    tested = {int(value) for (value,) in splits.test}
    assert len(tested) == 10 and not tested & {int(value) for (value,) in splits.calibration}
    assert {int(value) for (value,) in splits.calibration} <= {int(value) for (value,) in splits.train}
    with pytest.raises(DataError, match="50 of 50 images cannot be for the test"):
        divided(TensorDataset(torch.arange(50)), test=50)


@pytest.mark.parametrize("name", [":x", "..up:x", "a b:x", "../x:y"])
def test_what_is_no_import_path_is_said_so(name):
    for load in (load_data, build_model):
        with pytest.raises(OptionError, match=r"is no import path|does not name a model"):
            load(name, {}) if load is load_data else load(name)
    assert len(load_data("vfsurgery.data:digits", {}).test) == 500


def test_options_that_torchvision_needs_are_asked_for(tmp_path):
    with pytest.raises(OptionError, match="torchvision's CocoDetection needs the option 'annFile'"):
        load_data("torchvision:CocoDetection", {"path": str(tmp_path)}, plain)
    with pytest.raises(OptionError, match="CocoDetection has no option 'anFile'"):
        load_data("torchvision:CocoDetection", {"path": str(tmp_path), "anFile": "x"}, plain)

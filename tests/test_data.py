"""Data comes in a fixed order, preprocessed as its model expects, or is refused with the way out."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from vfsurgery.data import digits, image_folder, loader, preprocessing, subset
from vfsurgery.errors import DataError
from vfsurgery.networks.architectures import build_model

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def photos(tmp_path):
    """Twelve one-coloured images, 20x10, in two classes; the red channel counts them."""
    for index in range(12):
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (index, 100, 200)).save(folder / f"{index:02}.png")
    return tmp_path / "photos"


def reds(batches) -> list[int]:
    """The number of each image, read off its red channel."""
    return [round(image[0, 0, 0].item() * 255) for images, _ in batches for image in images]


def unscaled(size: int):
    return preprocessing("x:y", nn.Identity(), size=size, mean=(0, 0, 0), std=(1, 1, 1))


def test_digits_are_disjoint_and_complete():
    splits = digits(seed=0)
    images = torch.cat([part.tensors[0] for part in (splits.train, splits.calibration, splits.test)])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    whole = torch.cat(
        [part.tensors[0] for part in (digits(seed=1).train, digits(seed=1).calibration, digits(seed=1).test)]
    )
    # scaled by each seed's own training images, so compare what scaling keeps: which pixels are brightest, per image
    patterns = [sorted((image == image.max()).flatten().tolist() for image in part) for part in (images, whole)]
    assert patterns[0] == patterns[1]


def test_digits_are_standardised_on_the_training_images():
    splits = digits(seed=3)
    assert splits.train.tensors[0].mean().abs() < 1e-5
    assert (splits.train.tensors[0].std() - 1).abs() < 1e-5
    assert splits.test.tensors[0].mean().abs() > 1e-5


def test_digits_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = digits(seed=0)
    torch.manual_seed(2)
    again, other = digits(seed=0), digits(seed=1)
    assert torch.equal(first.test.tensors[0], again.test.tensors[0])
    assert not torch.equal(first.test.tensors[1], other.test.tensors[1])
    assert sorted(set(first.train.tensors[1].tolist())) == list(range(10))


def test_folder_is_read_whole_in_the_same_order_twice(photos):
    batches = image_folder(photos, unscaled(8), batch_size=5)
    assert sorted(reds(batches)) == list(range(12))
    assert reds(batches) == reds(batches)
    images, labels = next(iter(batches))
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.float32
    assert labels.tolist() == [0] * 5


def test_limit_draws_by_seed_from_all_classes(photos):
    drawn = reds(image_folder(photos, unscaled(8), limit=6, seed=0))
    assert drawn == reds(image_folder(photos, unscaled(8), limit=6, seed=0))
    assert drawn != reds(image_folder(photos, unscaled(8), limit=6, seed=1))
    assert len(set(drawn)) == 6
    assert {number % 2 for number in drawn} == {0, 1}


def test_limit_beyond_the_end_is_all():
    dataset = TensorDataset(torch.arange(4))
    assert subset(dataset, 4) is dataset
    assert subset(dataset, 9) is dataset
    assert subset(dataset, None) is dataset


@pytest.mark.parametrize(("option", "value"), [("limit", 0), ("limit", -3), ("batch_size", 0)])
def test_counts_below_one(option, value):
    with pytest.raises(DataError, match=f"{option} must be at least 1, got {value}"):
        loader(TensorDataset(torch.zeros(3, 1)), **{option: value})


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"there is no image folder .*nowhere\n  folder  "):
        image_folder(tmp_path / "nowhere", unscaled(8))


@pytest.mark.parametrize("inside", [(), ("cat",), ("readme.txt",)])
def test_folder_without_images(tmp_path, inside):
    for name in inside:
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"no images in .*\n  cause   .*\n  remedy  lay them out as CLASS/NAME\.jpg"):
        image_folder(tmp_path, unscaled(8))


def test_own_preprocessing_scales_and_standardises():
    transform = preprocessing("mynets:small", nn.Identity(), size=8, mean=MEAN, std=STD)
    image = transform(Image.new("RGB", (20, 10), (255, 0, 51)))
    assert image.shape == (3, 8, 8)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(image[:, 4, 4], expected, atol=1e-6)


def test_timm_model_says_its_own():
    model = build_model("timm:test_resnet")
    config = model.pretrained_cfg
    image = preprocessing("timm:test_resnet", model)(Image.new("RGB", (200, 220), (255, 255, 255)))
    assert tuple(image.shape) == config["input_size"]
    expected = (1 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    assert torch.allclose(image[:, 0, 0], expected, atol=1e-5)


def test_given_values_replace_those_of_timm():
    transform = preprocessing("timm:test_resnet", build_model("timm:test_resnet"), size=32, mean=(0, 0, 0))
    image = transform(Image.new("RGB", (40, 40), (255, 255, 255)))
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image[:, 0, 0], 1 / torch.tensor(build_model("timm:test_resnet").pretrained_cfg["std"]))


def test_torchvision_preset():
    image = preprocessing("torchvision:resnet18", nn.Identity())(Image.new("RGB", (300, 260), (255, 255, 255)))
    assert image.shape == (3, 224, 224)
    assert torch.allclose(
        image[:, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


def test_given_values_replace_those_of_torchvision():
    transform = preprocessing("torchvision:resnet18", nn.Identity(), size=32, std=(1, 1, 1))
    image = transform(Image.new("RGB", (40, 40), (255, 255, 255)))
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image[:, 0, 0], 1 - torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize("spec", ["mynets:small", "torchvision:fcn_resnet50"])
def test_unknown_preprocessing_names_what_is_missing(spec):
    message = rf"no preprocessing is known for {spec}\n  missing  mean, std\n  remedy   give them .* --mean and --std"
    with pytest.raises(DataError, match=message):
        preprocessing(spec, nn.Identity(), size=8)

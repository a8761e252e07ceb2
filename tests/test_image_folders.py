"""Folders of images as people have them: recipes and the command line read the same pixels of them."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import vfsurgery as surgery
from vfsurgery.cli.options import load_images
from vfsurgery.data import image_folder
from vfsurgery.data.datasets import load_data
from vfsurgery.data.folders import Pictures, parts_of, read_image
from vfsurgery.errors import DataError
from vfsurgery.recipes.sections import Images

MODEL, SIZE = "vfsurgery.networks.demo:TinyConvNet", 8
SCALING = {"size": SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.2, 0.3)}


def write(folder, count=4, shade=0, classes=("cat", "dog")):
    """Images of one shade each, all different."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            value = shade + 20 * place + number
            Image.new("RGB", (12, 10), (value, 255 - value, 7)).save(folder / name / f"{number}.png")


def of_command(folder, limit=5000, seed=0):
    options = {"data": f"imagefolder:{folder}", "limit": limit, "batch_size": 3, "input_size": (3, SIZE, SIZE)}
    batches = load_images(MODEL, nn.Identity(), **options, mean=SCALING["mean"], std=SCALING["std"], seed=seed)
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def of_recipe(folder, limit=5000, seed=0):
    section = Images(name="imagefolder", path=str(folder), calibration=limit, seed=seed, **SCALING)
    return next(iter(DataLoader(section.load(MODEL, nn.Identity).calibration, 1000)))


def with_parts(folder):
    write(folder / "train")
    write(folder / "val", shade=100)


def as_classes(folder):
    write(folder, count=10)


def of_other_names(folder):
    write(folder / "Training")
    write(folder / "validation", shade=100)


def train_alone(folder):
    write(folder / "train")


def nested_in_classes(folder):
    write(folder / "cat", count=2, classes=("indoors", "outdoors"))
    write(folder / "dog", count=2, shade=100, classes=("indoors",))


def classes_named_as_parts(folder):
    write(folder, classes=("bus", "test", "train"))


def with_an_empty_class(folder):
    write(folder / "train", classes=("cat", "dog", "eel"))
    write(folder / "val", shade=100, classes=("cat",))
    (folder / "train" / "cow").mkdir()


def with_stray_files(folder):
    write(folder / "train")
    write(folder / "test", shade=100)
    write(folder / "train" / ".cache", shade=50)
    write(folder / "__MACOSX", shade=60)
    for name in (".DS_Store", "Thumbs.db", "labels.csv", "cat/notes.txt", "cat/._0.png", "dog/Thumbs.db"):
        (folder / "train" / name).write_bytes(b"\x00\x01no image")


def upper_case(folder):
    write(folder)
    for file in list(folder.glob("*/*.png")):
        file.rename(file.with_suffix(".PNG"))


LAYOUTS = {
    with_parts: 8,
    as_classes: 16,
    of_other_names: 8,
    train_alone: 6,
    nested_in_classes: 5,
    classes_named_as_parts: 10,
    with_an_empty_class: 12,
    with_stray_files: 8,
    upper_case: 6,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [5000, 3])
@pytest.mark.parametrize("seed", [0, 4])
def test_command_line_and_recipes_read_the_same_tensors(tmp_path, layout, limit, seed):
    layout(tmp_path / "photos")
    images, labels = of_command(tmp_path / "photos", limit, seed)
    expected, classes = of_recipe(tmp_path / "photos", limit, seed)
    assert torch.equal(images, expected) and torch.equal(labels, classes)
    assert len(images) == min(LAYOUTS[layout], limit)
    assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize("layout", [with_parts, of_other_names, with_stray_files])
def test_images_of_the_test_are_not_for_calibration(tmp_path, layout):
    layout(tmp_path)
    images, _ = of_command(tmp_path)
    dark = images[:, 0].amax() * SCALING["std"][0] + SCALING["mean"][0]  # undoes the standardising
    assert dark < 40 / 255


@pytest.mark.parametrize("given", ["photos", "photos/train"])
def test_a_divided_folder_may_be_named_by_its_part_for_training(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with_parts(tmp_path / "photos")
    found = load_data("imagefolder", {"path": given}, np.array)
    assert [len(part) for part in (found.train, found.calibration, found.test)] == [8, 8, 8]
    assert {int(image[0, 0, 0]) >= 100 for image, _ in found.test} == {True}
    write(tmp_path / "other" / "train")
    write(tmp_path / "other" / "val", classes=("fox",))  # a neighbour of other classes is none of its parts
    assert len(load_data("imagefolder", {"path": "other/train"}, np.array).test) == 2


def test_a_class_without_images_keeps_its_number(tmp_path):
    with_an_empty_class(tmp_path)
    found = load_data("imagefolder", {"path": tmp_path}, np.array)
    assert {label for _, label in found.train} == {0, 2, 3}
    assert {label for _, label in found.test} == {0}


def test_a_folder_of_the_test_alone_is_refused(tmp_path):
    write(tmp_path / "val")
    with pytest.raises(DataError, match=r"holds val and no train\n  remedy  name .*val, if those"):
        parts_of(tmp_path)


def test_classes_are_not_read_from_the_names_of_parts(tmp_path):
    with_parts(tmp_path)
    with pytest.raises(DataError, match=r"holds the parts train, val, and no classes\n  remedy  name one of them"):
        image_folder(tmp_path, np.array)
    assert len(image_folder(tmp_path / "train", lambda image: torch.zeros(1)).dataset) == 8


def ramp(bits):
    return (np.arange(256, dtype=np.uint32).reshape(16, 16) << (bits - 8)).astype(f"uint{bits}")


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("gray.png", Image.fromarray(ramp(8)), {}, ramp(8)),
        ("deep.png", Image.fromarray(ramp(16)), {}, ramp(8)),
        ("deep.tif", Image.fromarray(ramp(16)), {}, ramp(8)),
        ("bit.png", Image.fromarray(ramp(8) > 127), {}, np.where(ramp(8) > 127, 255, 0)),
        ("alpha.png", Image.merge("LA", [Image.fromarray(ramp(8))] * 2), {}, ramp(8)),
        ("palette.png", Image.fromarray(ramp(8)).convert("P"), {"transparency": bytes(range(256))}, ramp(8)),
        ("palette.bmp", Image.fromarray(ramp(8)).convert("P"), {}, ramp(8)),
    ],
)
def test_pixels_of_every_kind_come_in_rgb_of_8_bits(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    found = np.asarray(read_image(tmp_path / name))
    assert found.shape == (16, 16, 3) and (found == np.asarray(expected)[..., None]).all()


def test_a_print_is_read_in_rgb_and_what_a_camera_noted_is_not_applied(tmp_path):
    Image.new("CMYK", (6, 4), (255, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert read_image(tmp_path / "print.jpg").getpixel((2, 2)) == (0, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (6, 4)  # as torchvision and timm train


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def page(path):
    path.write_text("<!doctype html><p>not found</p>")


def floats(path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(path, format="tiff")


@pytest.mark.parametrize("damage", [cut, page, floats, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_refused_by_name(tmp_path, damage, workers):
    write(tmp_path / "train")
    bad = tmp_path / "train" / "dog" / "2.png"
    Image.effect_noise((64, 64), 90).save(bad)
    damage(bad)
    images = Pictures(tmp_path / "train", lambda image: torch.zeros(3, 4, 4))
    with pytest.raises(DataError, match=r"cannot read the image .*2\.png\n  cause "):
        list(DataLoader(images, 2, num_workers=workers))


def test_data_that_yields_pictures_is_told_how_to_make_tensors_of_them(tmp_path):
    write(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    pictures = Pictures(tmp_path, lambda image: image)
    for data in (pictures, DataLoader(pictures, 3), DataLoader(pictures, 3, num_workers=1)):
        with pytest.raises(DataError, match=r"items that are no tensors(.|\n)*remedy  give the data set a transform"):
            surgery.evaluate(model, data)
    with pytest.raises(DataError, match="holds its images as Image"):
        surgery.evaluate(model, [pictures[0][0]])
    unequal = Pictures(tmp_path, lambda image: torch.zeros(3, 5, 5 + image.getpixel((0, 0))[0]))
    with pytest.raises(DataError, match=r"of several sizes(.|\n)*remedy  bring them to one size"):
        surgery.evaluate(model, unequal)


def as_other_kind(folder, name):
    Image.new("RGB", (12, 10)).save(folder / name, format="GIF")


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path):
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = image_folder(tmp_path, np.asarray)
    as_other_kind(tmp_path / "dog", "7.GIF")
    with pytest.warns(
        surgery.SurgeryWarning, match=r"^1 image of a kind that is not read \(\.gif\), \S+7\.GIF, is in \S+ left out"
    ):
        image_folder(tmp_path, np.asarray)
    for name in ("8.heic", "9.avif"):
        as_other_kind(tmp_path / "cat", name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.gif").write_text("nothing to see")
    with pytest.warns(
        surgery.SurgeryWarning, match=r"^3 images of kinds that are not read \(\.avif, \.gif, \.heic\), as \S+8\.heic"
    ):
        after = image_folder(tmp_path, np.asarray)
    assert len(after.dataset) == len(before.dataset) == 8


def test_a_folder_of_other_kinds_alone_says_which(tmp_path):
    (tmp_path / "cat").mkdir()
    as_other_kind(tmp_path / "cat", "1.gif")
    with pytest.raises(
        DataError, match=r"no images in .*\n +cause +1 image of a kind that is not read \(\.gif\), \S+1\.gif, is all"
    ):
        image_folder(tmp_path, np.asarray)

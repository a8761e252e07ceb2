"""Folders of images: which files count, which parts a folder has, and how pixels are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vfsurgery.errors import DataError, explain, warn

if TYPE_CHECKING:
    from PIL import Image as images

Transform = Callable[[Any], Tensor]
"""From a PIL image to a float tensor of shape (channels, height, width)."""

TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing", "eval")
"""Names of the parts that a folder may be divided into, in any case; the first that is there counts."""

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that are images, in any case: torchvision's."""

OTHER_ENDINGS = (
    ".apng",
    ".avif",
    ".cr2",
    ".dng",
    ".gif",
    ".heic",
    ".heif",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jxl",
    ".nef",
    ".tga",
)
"""Of images that are not read; a folder that has some says so."""


class Pictures(Dataset[tuple[Any, int]]):
    """Images of a folder with one subfolder per class, and the class index of each.

    As in torchvision's ``ImageFolder``, classes are numbered by their sorted names, images may lie in folders of any
    depth, and rotations that a camera noted (EXIF) are not made. Unlike there, what is hidden is left out, as folders
    of caches and macOS' ``._photo.jpg`` are; a class may have no image (its number stays its own); and images of 16
    bits, which Pillow would turn white, keep their upper 8. Images of other kinds, as GIF and HEIC, are left out as
    there, but a warning counts them.

    Args:
        path: The folder that holds the class folders.
        transform: Applied to each image, which comes in RGB.
        classes: Number the classes as in this list, of which some may be missing; all that are there by default.

    Raises:
        DataError: There is no such folder, no image in it, or a class that ``classes`` has not. On reading: an image is
            damaged, which names the file.
    """

    def __init__(self, path: str | Path, transform: Callable[[Any], Any], classes: Sequence[str] | None = None) -> None:
        self.root, self.transform = Path(path), transform
        if not self.root.is_dir():
            raise DataError(explain(f"there is no image folder {path}", folder=self.root.parent.resolve()))
        found = [folder.name for folder in subfolders(self.root)]
        self.classes = list(found if classes is None else classes)
        if unknown := sorted({*found} - {*self.classes}):
            raise DataError(
                explain(f"{path} has other classes than the images for training", unknown=", ".join(unknown[:4]))
            )
        files = [(file, index) for index, name in enumerate(self.classes) for file in _images_below(self.root / name)]
        self.samples = [(file, index) for file, index in files if file.lower().endswith(ENDINGS)]
        others = [file for file, _ in files if not file.lower().endswith(ENDINGS)]
        if others and self.samples:
            warn(f"{_counted(others)} in {path} left out: convert them, as to .png, if they are to be used")
        if not self.samples:
            cause = f"the class folders {', '.join(found[:4])} hold none" if found else "there is no class folder"
            cause = f"{_counted(others)} all there is" if others else cause
            remedy = f"lay them out as CLASS/NAME.jpg, a folder a class; endings: {', '.join(ENDINGS)}"
            raise DataError(explain(f"no images in {path}", cause=cause, remedy=remedy))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def read_image(path: str | Path) -> images.Image:
    """Read one image in RGB, with pixels of 8 bits.

    Raises:
        DataError: The file is damaged, no image, or has pixels of no known range.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _in_rgb(image)
    except Exception as error:  # damage makes Pillow's readers raise nearly anything
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            explain(f"cannot read the image {path}", cause=cause, remedy="replace the file, or move it elsewhere")
        ) from error


def _in_rgb(image: Any) -> Any:
    from PIL.Image import fromarray

    if image.mode == "F":
        raise ValueError("its pixels are floats of no known range")
    if image.mode.startswith("I"):  # convert() would make all above 255 white
        pixels = np.asarray(image)
        deep = image.mode != "I" or pixels.max() > 255
        image = fromarray((pixels >> 8 if deep else pixels).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def subfolders(path: Path) -> list[Path]:
    """The folders in a folder by their names, without those that are hidden."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(explain(f"cannot read the folder {path}", cause=error)) from error


def _images_below(path: Path) -> list[str]:
    """Images of all kinds, those that are not read too."""
    return [
        os.path.join(folder, name)
        for folder, _, names in sorted(os.walk(path, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith((*ENDINGS, *OTHER_ENDINGS)) and not name.startswith(".")
    ]


def _counted(files: Sequence[str]) -> str:
    """How many images there are of kinds that are not read, of which kinds, and one of them, as a subject.

    >>> _counted(["cat/1.gif", "cat/2.HEIC"])
    '2 images of kinds that are not read (.gif, .heic), as cat/1.gif, are'
    """
    kinds = ", ".join(sorted({os.path.splitext(file)[1].lower() for file in files}))
    return (
        f"1 image of a kind that is not read ({kinds}), {files[0]}, is"
        if len(files) == 1
        else f"{len(files)} images of kinds that are not read ({kinds}), as {files[0]}, are"
    )


def parts_of(path: str | Path) -> tuple[Path, Path | None]:
    """The folders of the images for training and for the test, each with a folder per class.

    Divided is a folder that holds one of :data:`TRAIN` and one of :data:`TEST`, or the first alone; one may name it, or
    its part for training. Else the folder itself is for training.

    Raises:
        DataError: There is a part for the test alone.

    >>> parts_of("photos")
    (PosixPath('photos'), None)
    """
    root = Path(path)
    if not root.is_dir():
        return root, None
    inside = subfolders(root)
    train, test = _part(inside, TRAIN), _part(inside, TEST)
    only_parts = all(folder.name.lower() in (*TRAIN, *TEST) for folder in inside)
    if train is not None and (test is not None or only_parts):
        return train, test
    if test is not None and only_parts:
        raise DataError(
            explain(
                f"{path} holds {test.name} and no {TRAIN[0]}", remedy=f"name {test}, if those are the images to use"
            )
        )
    if root.absolute().name.lower() in TRAIN:
        beside = _part(subfolders(root.absolute().parent), TEST)
        if beside is not None and {each.name for each in subfolders(beside)} <= {each.name for each in inside}:
            return root, beside
    return root, None


def _part(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of these names that is a folder of folders: images alone make a folder a class."""
    by_name = {folder.name.lower(): folder for folder in folders if subfolders(folder)}
    return next((by_name[name] for name in names if name in by_name), None)

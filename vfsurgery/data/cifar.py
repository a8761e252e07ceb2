"""CIFAR-10 and CIFAR-100 from a folder of yours, as torchvision lays them out or as folders of images; no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from vfsurgery.data.folders import Pictures
from vfsurgery.data.images import Splits
from vfsurgery.errors import DataError, explain

Name = Literal["cifar10", "cifar100"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of the pixels in [0, 1], per channel, as the paper and its public code have them, for both data sets."""

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""Where torchvision unpacks each."""


def cifar(
    name: Name,
    path: str | Path,
    *,
    train: int | None = None,
    calibration: int = 5000,
    test: int | None = None,
    seed: int = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Splits:
    """Read CIFAR-10 or CIFAR-100 into memory, standardised: float32 images (N, 3, 32, 32) and int64 labels.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        path: A folder that holds ``cifar-10-batches-py`` (``cifar-100-python``) as torchvision unpacks it, or the
            folders ``train`` and ``test`` with one folder of images per class.
        train: So many training images, drawn at random; all by default.
        calibration: So many of *those* are for calibration, too: calibration looks at no labels, and the paper takes
            the whole training set.
        test: So many test images, drawn at random; all by default.
        seed: Decides which images are drawn.
        mean: Of the pixels in [0, 1], per channel, that the network was trained with.
        std: Likewise.

    Raises:
        DataError: The data is not there, is damaged, or is not 32 pixels wide and high.
    """
    for option, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise DataError(explain(f"{option} has {len(values)} numbers", accepted="three, one per colour"))
    generator = torch.Generator().manual_seed(seed)
    images, labels = _drawn(*_read(name, Path(path), "train"), train, generator, mean, std)
    picked = torch.randperm(len(images), generator=generator)[:calibration]
    tested = _drawn(*_read(name, Path(path), "test"), test, generator, mean, std)
    return Splits(
        train=TensorDataset(images, labels),
        calibration=TensorDataset(images[picked], labels[picked]),
        test=TensorDataset(*tested),
    )


def _drawn(
    pixels: Tensor,
    labels: Tensor,
    count: int | None,
    generator: torch.Generator,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """``count`` images, or all in their order, standardised."""
    if count is not None:
        index = torch.randperm(len(pixels), generator=generator)[:count]
        pixels, labels = pixels[index], labels[index]
    centre, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - centre) / spread, labels


def _read(name: Name, path: Path, part: str) -> tuple[Tensor, Tensor]:
    """Bytes (N, 3, 32, 32) and labels (N,) of one part, from whichever layout is there."""
    if (path / FOLDERS[name]).is_dir():
        pixels, labels = _from_torchvision(name, path, part)
    elif (path / part).is_dir():
        pixels, labels = _from_folders(path / part)
    else:
        raise DataError(
            explain(
                f"there is no {name} in {path}",
                folder=path.resolve(),
                expected=f"{FOLDERS[name]}/ as torchvision unpacks it, or train/CLASS/NAME.png and test/CLASS/NAME.png",
                remedy=f"torchvision.datasets.{name.upper()}({str(path)!r}, download=True) puts it there",
            )
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels, dtype=torch.int64)


def _from_torchvision(name: Name, path: Path, part: str) -> tuple[Any, list[int]]:
    from torchvision import datasets

    try:
        found = getattr(datasets, name.upper())(str(path), train=part == "train", download=False)
    except RuntimeError as error:  # a file is missing, or its checksum is wrong
        cause = str(error).partition(".")[0]
        remedy = f"delete {path / FOLDERS[name]} and unpack it again"
        raise DataError(explain(f"{path / FOLDERS[name]} is damaged", cause=cause, remedy=remedy)) from error
    return found.data, found.targets


def _from_folders(path: Path) -> tuple[Any, list[int]]:
    found = Pictures(path, lambda image: np.array(image, dtype=np.uint8))
    pairs = [found[index] for index in range(len(found))]
    for (pixels, _), (file, _) in zip(pairs, found.samples, strict=True):
        if pixels.shape != (32, 32, 3):
            raise DataError(explain(f"{file} is no CIFAR image", found=pixels.shape[:2], expected="32 x 32 pixels"))
    return np.stack([pixels for pixels, _ in pairs]), [label for _, label in pairs]

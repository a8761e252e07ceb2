"""Data for calibration and evaluation: scikit-learn's digits, folders of images, and what models expect of images."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from vfsurgery.data.folders import Pictures, Transform, parts_of
from vfsurgery.errors import DataError, explain


@dataclass(frozen=True)
class Splits:
    """Parts of one data set, each yielding (image, label); no image of the test is in another part."""

    train: Dataset[Any]
    calibration: Dataset[Any]
    test: Dataset[Any]


def digits(*, seed: int = 0, size: int | None = None) -> Splits:
    """Return scikit-learn's 1,797 handwritten digits; they come with the package, nothing is downloaded.

    Images are float32 of shape (1, 8, 8), standardised with the mean and deviation of the training images' pixels;
    labels are int64, 0 to 9.

    Args:
        seed: Decides which images are for training (the first 1,000 of a random order), for calibration (the next
            297) and for the test (the last 500).
        size: Height and width that the images are enlarged to, bilinearly; for networks that halve the map too often.

    >>> splits = digits(seed=0)
    >>> len(splits.train), len(splits.calibration), len(splits.test)
    (1000, 297, 500)
    """
    from sklearn.datasets import load_digits

    pixels, labels = cast("tuple[Any, Any]", load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    targets = torch.tensor(labels, dtype=torch.int64)[order]
    images = (images - images[:1000].mean()) / images[:1000].std()
    if size not in (None, 8):
        images = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    parts = [TensorDataset(images[part], targets[part]) for part in (slice(1000), slice(1000, 1297), slice(1297, None))]
    return Splits(*parts)


def image_folder(
    path: str | Path,
    transform: Transform,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[Any]:
    """Read a folder with one subfolder of images per class; see :class:`~vfsurgery.data.folders.Pictures` for how.

    Args:
        path: The folder that holds the class folders.
        transform: Applied to each image; :func:`preprocessing` gives the one a model expects.
        batch_size: Images per batch.
        limit: At most so many images, drawn at random; all by default.
        seed: Decides which images are drawn.
        workers: Processes that decode images beside the main one.

    Returns:
        Batches of (images, labels), the same ones in the same order every time it is iterated.

    Raises:
        DataError: The folder is missing, holds no class folder with images, or is divided into parts.
    """
    train, test = parts_of(path)
    if train != Path(path):
        raise DataError(
            explain(
                f"{path} holds the parts {', '.join(part.name for part in (train, test) if part)}, and no classes",
                remedy=f"name one of them, as in {train}",
            )
        )
    images = Pictures(path, transform)
    return loader(images, batch_size=batch_size, limit=limit, seed=seed, workers=workers)


def loader(
    dataset: Dataset[Any], *, batch_size: int = 64, limit: int | None = None, seed: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """Load ``dataset`` in batches, in a fixed order; with ``limit``, a seeded random subset of it.

    Raises:
        DataError: ``limit`` or ``batch_size`` is below 1.

    >>> [len(labels) for _, labels in loader(digits().test, batch_size=200, limit=300)]
    [200, 100]
    """
    for name, count in (("batch_size", batch_size), ("limit", limit)):
        if count is not None and count < 1:
            raise DataError(explain(f"{name} must be at least 1, got {count}"))
    return DataLoader(subset(dataset, limit, seed=seed), batch_size=batch_size, num_workers=workers)


def subset(dataset: Dataset[Any], limit: int | None, *, seed: int = 0) -> Dataset[Any]:
    """Draw ``limit`` entries at random, or hand the whole data set back where that is all of it."""
    size = len(cast("Sized", dataset))
    if limit is None or limit >= size:
        return dataset
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:limit].tolist())


def preprocessing(
    spec: str,
    model: nn.Module,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """Return the transform from a PIL image to what ``model`` was trained on.

    With ``size``, ``mean`` and ``std`` given, just those. Else a timm model's own data configuration, or the transforms
    of a torchvision model's default weights; what is given of the three replaces theirs.

    Args:
        spec: The name that :func:`vfsurgery.networks.architectures.build_model` built the model from.
        model: The model.
        size: Height and width of the images.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].

    Raises:
        DataError: Something is not given and the model's source does not tell it.
    """
    options: dict[str, Any] = {"size": size, "mean": mean, "std": std}
    given = {option: value for option, value in options.items() if value is not None}
    source, _, name = spec.partition(":")
    if source == "timm" and len(given) < 3:
        return _timm_transform(model, given)
    if source == "torchvision" and len(given) < 3:
        preset = _torchvision_preset(name)
        if not given:
            return preset
        given = _preset_options(preset) | given
    if missing := options.keys() - given.keys():
        raise DataError(
            explain(
                f"no preprocessing is known for {spec}",
                missing=", ".join(sorted(missing)),
                remedy="give them as in the model's training: size, mean and std under data: in a recipe, else "
                "--input-size, --mean and --std",
            )
        )
    return _plain_transform(**given)


def _plain_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(list(mean), list(std))])


def _timm_transform(model: nn.Module, given: dict[str, Any]) -> Transform:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    if "size" in given:
        config["input_size"] = (config["input_size"][0], given["size"], given["size"])
    config.update({option: tuple(given[option]) for option in ("mean", "std") if option in given})
    return cast("Transform", create_transform(**config, is_training=False))


def _torchvision_preset(name: str) -> Any:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name)
    return weights.DEFAULT.transforms()


def _preset_options(preset: Any) -> dict[str, Any]:
    """What a classification preset says; those of other tasks are laid out otherwise and give nothing."""
    if not hasattr(preset, "crop_size"):
        return {}
    return {"size": preset.crop_size[0], "mean": preset.mean, "std": preset.std}

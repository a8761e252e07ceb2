"""The one place where user data becomes tensors: batches of images, with labels or without, checked and moved.

Accepted as data are a ``DataLoader`` or any other iterable of batches, a map-style ``Dataset``, one tensor of images,
and one pair of tensors (images, labels); the last three are cut into batches here. A batch is a tensor of images, a
tuple or list ``(images,)`` or ``(images, labels)``, or a mapping with an ``image`` and perhaps a ``label`` key.

Numbers of tokens, int64 or int32 of shape ``(N, length)``, are accepted in place of images and stay integers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Self, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from vfsurgery.errors import DataError, explain

Data: TypeAlias = Iterable[Any] | Dataset[Any]
"""What users may pass as data; the module's docstring lists the kinds."""

BATCH_SIZE = 128
"""Images per batch where the data comes uncut."""

IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels")


class Batches:
    """Data as batches ``(images, labels | None)`` on one device, readable as often as needed.

    Each pass leaves torch's random state as it found it, though a shuffling loader draws from it; so a loader without
    a generator of its own gives every pass the same order.

    Args:
        source: The data; see the module's docstring for what is accepted.
        device: Where images and labels are moved; ``None`` leaves them where they are.
        dtype: What images are converted to; ``None`` leaves them as they are.
        shape: Expected shape of one image, as ``(C, H, W)``. The number of dims and the channels must agree; the rest
            may differ, for networks that take any image size.
        together: How many images in a row belong together, as the frames of a clip do. Batches are cut so that none is
            torn apart; what a batch has more is left out.
        alone: Whether none shares a batch with others.

    Raises:
        DataError: From the constructor, ``source`` is no iterable or can be read only once. While reading, there is no
            batch at all, or a batch holds no tensor, has the wrong shape, integer pixels, NaN or infinite values.

    >>> batches = Batches(torch.zeros(200, 3, 8, 8), shape=(3, 8, 8))
    >>> [tuple(images.shape) for images, labels in batches]
    [(128, 3, 8, 8), (72, 3, 8, 8)]
    """

    def __init__(
        self,
        source: Data,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        shape: Sequence[int] | None = None,
        together: int = 1,
        alone: bool = False,
    ) -> None:
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.shape = None if shape is None else tuple(shape)
        self.together, self.alone = together, alone
        self._source = source
        self._batches = _as_batches(source, max(BATCH_SIZE // together, 1) * together)

    def in_runs(self, together: int, alone: bool = False) -> Self:
        """The same data with so many images together, in batches of exactly so many if they are to be ``alone``.

        >>> [len(images) for images, _ in Batches([torch.zeros(16, 1), torch.zeros(9, 1)]).in_runs(8)]
        [16, 8]
        >>> [len(images) for images, _ in Batches([torch.zeros(16, 1), torch.zeros(9, 1)]).in_runs(8, alone=True)]
        [8, 8, 8]
        """
        cut = functools.partial(type(self), together=together, alone=alone)
        return cut(self._source, device=self.device, dtype=self.dtype, shape=self.shape)

    def read_as(self, other: Batches) -> Self:
        """The same data on the device, in the precision and in the runs of other data.

        >>> half = Batches(torch.zeros(1, 1), dtype=torch.float16).in_runs(2)
        >>> [(len(images), images.dtype) for images, _ in Batches([torch.zeros(5, 1)]).read_as(half)]
        [(4, torch.float16)]
        """
        cut = functools.partial(type(self), together=other.together, alone=other.alone)
        return cut(self._source, device=other.device, dtype=other.dtype, shape=other.shape)

    def like(self, images: Iterable[Any]) -> Batches:
        """Some of these images, those that belong together still together."""
        return Batches(images, together=self.together, alone=self.alone)

    def length(self) -> int | None:
        """Return the number of batches in one pass, or ``None`` where the data does not say."""
        try:
            return len(self._batches) if isinstance(self._batches, Sized) and not self.alone else None
        except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
            return None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One pass; labels that are no tensor come as ``None``, because no statistic looks at them."""
        for images, labels, _ in self._read():
            yield images, labels.to(self.device) if isinstance(labels, Tensor) else None

    def labeled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over data that must have labels: images, and class indices as int64, shape ``(N,)``.

        Raises:
            DataError: A batch comes without labels, or with labels that are not one class index per image.
        """
        for images, labels, index in self._read():
            yield images, _class_indices(labels, len(images), index).to(self.device, torch.int64)

    def _read(self) -> Iterator[tuple[Tensor, object, int]]:
        """Images checked and moved, labels as they come, and the batch's index."""
        unread: list[tuple[Tensor, int]] = []
        index, found = -1, False
        gpu = [self.device] if self.device is not None and self.device.type == "cuda" else []
        with torch.random.fork_rng(gpu):
            for index, batch in enumerate(_collated(self._batches)):
                images, labels = _split(batch, index)
                _check_images(images, self.shape, index)
                unread.append((images.isfinite().all(), index))
                if images.device.type == "cpu":  # elsewhere, reading the verdict would stall the device once per batch
                    _check_finite(unread)
                whole = len(images) // self.together * self.together
                size = self.together if self.alone else max(whole, 1)
                dtype = None if are_tokens(images) else self.dtype
                for start in range(0, whole, size):
                    found, part = True, slice(start, start + size)
                    few = labels[part] if isinstance(labels, Tensor | list | tuple) else labels
                    yield images[part].to(self.device, dtype, non_blocking=bool(gpu)), few, index
        _check_finite(unread)
        if index < 0:
            raise _error("the data is empty", remedy="pass at least one batch of images")
        if not found:
            raise _error(
                f"no batch of the data has {self.together} images, which the model computes together",
                remedy=f"pass batches of {self.together} images, or example_inputs= of the smallest that it takes",
            )


def _as_batches(source: object, size: int) -> Iterable[Any]:
    """Cut whole data into batches of ``size``, and refuse what cannot be read again."""
    if isinstance(source, Tensor):
        return _cut(size, source)
    if isinstance(source, TensorDataset):
        return _cut(size, *source.tensors)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return DataLoader(cast("Dataset[Any]", source), size)
    if isinstance(source, Iterator):
        raise _error(
            f"the data is a {type(cast('object', source)).__name__}, which can be read only once",
            remedy="pass something that starts afresh on each pass: a DataLoader, or list(data)",
        )
    if not isinstance(source, Iterable):
        raise _error(
            f"data of type {type(source).__name__} cannot be iterated over",
            remedy="pass a DataLoader, a Dataset, a list of batches, or a tensor of images",
        )
    batches = cast("Iterable[Any]", source)
    images, labels = (*_items(batches), None, None)[:2]
    # No batch of images is a vector of integers, so this can only be one pair and not two batches.
    if isinstance(images, Tensor) and _is_integer_vector(labels):
        return _cut(size, images, _class_indices(labels, len(images), 0))
    return batches


def _collated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; where torch cannot stack the items of a data set, that is said in words."""
    reading = iter(batches)
    while True:
        try:
            batch = next(reading)
        except StopIteration:
            return
        except TypeError as error:
            if "default_collate" not in str(error):
                raise
            found = str(error).rstrip().rpartition("found ")[2] or None
            raise _error(
                "the data set has items that are no tensors",
                found=found,
                remedy="give the data set a transform that makes tensors, as torchvision.transforms.ToTensor()",
            ) from error
        except RuntimeError as error:
            if "stack expects each tensor to be equal size" not in str(error):
                raise
            cause = str(error).rstrip().rpartition("\n")[2]
            raise _error(
                "the data set has images of several sizes",
                cause=cause,
                remedy="bring them to one size, as torchvision.transforms.Resize((224, 224)) does",
            ) from error
        yield batch


def _cut(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of equal length along their first dim."""
    starts = range(0, len(tensors[0]), size)
    return [tuple(tensor[start : start + size] for tensor in tensors) for start in starts]


def _split(batch: object, index: int) -> tuple[Tensor, object]:
    """Take one batch apart into its images and its labels, ``None`` where it has none."""
    images, labels = (*(_items(batch) or (batch,)), None)[:2]
    if isinstance(batch, Mapping):
        entries = cast("Mapping[object, object]", batch)
        images = next((entries[key] for key in IMAGE_KEYS if key in entries), entries)
        labels = next((entries[key] for key in LABEL_KEYS if key in entries), None)
    if isinstance(images, Tensor):
        return images, labels
    raise _error(
        f"batch {index} holds its images as {_describe(images)}, not as a tensor",
        accepted=f"a tensor, (images, labels), or a mapping with one of the keys {', '.join(IMAGE_KEYS)}",
        remedy="convert it first: torchvision.transforms.ToTensor(), torch.from_numpy(), or a collate_fn",
    )


def _items(value: object) -> Sequence[object]:
    """Return the items of a tuple or list of one or two, else nothing."""
    if isinstance(value, tuple | list):
        items = cast("Sequence[object]", value)
        return items if len(items) <= 2 else ()
    return ()


def _is_integer_vector(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()


def _describe(value: object) -> str:
    """Name the type of what was found, with the keys or the length that make it recognisable."""
    if isinstance(value, Mapping):
        return f"a mapping with keys {sorted(map(str, cast('Mapping[object, object]', value)))}"
    if isinstance(value, tuple | list):
        items = cast("Sequence[object]", value)
        return f"a {type(items).__name__} of length {len(items)}"
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{type(value).__name__}{shape}"


def row_major(images: Tensor) -> Tensor:
    """A copy with the strides of a new tensor, which ``contiguous()`` does not give where a side has length 1.

    Before a backward pass, because there oneDNN writes outside its memory for some narrow convolutions of images whose
    channels come last (torch 2.14.1 on a CPU without AVX-512).

    >>> images = torch.zeros(2, 8, 8, 1).permute(0, 3, 1, 2)
    >>> images.contiguous().stride(), row_major(images).stride()
    ((64, 1, 8, 1), (64, 64, 8, 1))
    """
    return images.clone(memory_format=torch.contiguous_format)


def are_tokens(images: Tensor) -> bool:
    """Whether a batch is of numbers of tokens, as an embedding looks them up, and not of images.

    >>> are_tokens(torch.tensor([[3, 1, 4]])), are_tokens(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    (True, False)
    """
    return images.ndim == 2 and images.dtype in (torch.int64, torch.int32)


def _check_images(images: Tensor, shape: tuple[int, ...] | None, index: int) -> None:
    found, expected = tuple(images.shape), ("N", *(shape or ("C", "H", "W")))
    if images.ndim < 2 or not len(images) or (shape is not None and images.ndim != len(expected)):
        raise _error(
            f"batch {index} is not a batch of images",
            found=found,
            expected=f"({', '.join(map(str, expected))}) with N > 0",
            remedy="stack single images into batches, for example with a DataLoader",
        )
    if shape is not None and found[1] != shape[0] and not are_tokens(images):  # whose length may vary
        raise _error(
            f"batch {index} has {found[1]} channels, the model takes {shape[0]}",
            found=found,
            expected=f"({', '.join(map(str, expected))})",
            remedy="convert the images, or pass the example_inputs that the model was made for",
        )
    if not images.is_floating_point() and not are_tokens(images):
        raise _error(
            f"batch {index} holds {images.dtype} values",
            found=found,
            accepted="floating-point images, or numbers of tokens: int64 or int32 of shape (N, length)",
            remedy="scale and normalize images as in training: (images.float() / 255 - mean) / std",
        )


def _check_finite(unread: list[tuple[Tensor, int]]) -> None:
    """Read the verdicts gathered so far."""
    for finite, index in unread:
        if not finite:
            raise _error(f"batch {index} holds NaN or infinite values", remedy="clean the data, or mend its transform")
    unread.clear()


def _class_indices(labels: object, count: int, index: int) -> Tensor:
    """Return ``labels`` if they are one class index per image, else say what they are."""
    if _is_integer_vector(labels) and len(labels) == count:
        return labels
    if labels is None:
        raise _error(f"batch {index} has no labels", remedy="pass (images, labels): accuracy and loss need them")
    raise _error(
        f"the labels of batch {index} are not one class index per image",
        found=_describe(labels),
        expected=f"an integer tensor of shape ({count},)",
    )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are no class of a model; on CUDA they would abort the whole process.

    Raises:
        DataError: says which labels there are, and how many classes.
    """
    classes = logits.shape[1]
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        fact = f"labels of shape {tuple(labels.shape)} and {labels.dtype} are no class indices"
    elif int(labels.min()) < 0 or int(labels.max()) >= classes:
        fact = f"labels from {int(labels.min())} to {int(labels.max())} do not fit {classes} classes"
    else:
        return
    raise _error(fact, expected=f"integers of shape ({len(logits)},), 0 to {classes - 1}")


def _error(fact: str, **details: object) -> DataError:
    return DataError(explain(fact, **details))

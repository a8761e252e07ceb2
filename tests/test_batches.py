"""User data becomes checked tensors: what is accepted, what is refused and how, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from vfsurgery.data.batches import BATCH_SIZE, Batches
from vfsurgery.data.progress import progress
from vfsurgery.errors import DataError

IMAGES = torch.randn(300, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(300) % 10


class Folder(Dataset):
    """Images and labels one by one, as torchvision's ``ImageFolder`` gives them."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index], int(LABELS[index])


class Stream(IterableDataset):
    """Single images of unknown number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(IMAGES)


LABELED = {
    "DataLoader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=70),
    "TensorDataset": TensorDataset(IMAGES, LABELS),
    "Dataset": Folder(),
    "pair": (IMAGES, LABELS),
    "pair in a list": [IMAGES, LABELS.to(torch.int32)],
    "list of lists": [[IMAGES[:200], LABELS[:200]], [IMAGES[200:], LABELS[200:]]],
    "mappings": [{"image": IMAGES[:9], "label": LABELS[:9]}, {"labels": LABELS[9:], "pixel_values": IMAGES[9:]}],
}
UNLABELED = {
    "tensor": IMAGES,
    "list of two batches": [IMAGES[:150], IMAGES[150:]],
    "1-tuples": [(IMAGES[:10],), (IMAGES[10:],)],
    "mapping without labels": [{"images": IMAGES}],
    "DataLoader over a stream": DataLoader(Stream(), batch_size=64),
}


@pytest.mark.parametrize("source", LABELED.values(), ids=LABELED.keys())
def test_every_labeled_kind_gives_all_images_and_labels_on_every_pass(source: object) -> None:
    batches = Batches(source)
    for _ in range(2):
        images, labels = (torch.cat(column) for column in zip(*batches.labeled(), strict=True))
        assert torch.equal(images, IMAGES)
        assert torch.equal(labels, LABELS)
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("source", UNLABELED.values(), ids=UNLABELED.keys())
def test_every_unlabeled_kind_gives_all_images_and_no_labels(source: object) -> None:
    images, labels = zip(*Batches(source), strict=True)
    assert torch.equal(torch.cat(images), IMAGES)
    assert set(labels) == {None}


@pytest.mark.parametrize("source", [LABELED["pair"], LABELED["Dataset"], UNLABELED["tensor"]])
def test_uncut_data_comes_in_batches_of_bounded_size(source: object) -> None:
    assert [len(images) for images, _ in Batches(source)] == [BATCH_SIZE, BATCH_SIZE, 300 - 2 * BATCH_SIZE]


def test_images_are_converted_and_labels_keep_their_dtype() -> None:
    for images, labels in Batches((IMAGES, LABELS), device="cpu", dtype=torch.float64):
        assert images.dtype == torch.float64
        assert labels is not None
        assert labels.dtype == torch.int64


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_and_labels_are_moved_to_the_gpu_and_its_random_state_is_kept() -> None:
    state = torch.cuda.get_rng_state()
    for images, labels in Batches((IMAGES, LABELS), device="cuda").labeled():
        torch.rand(1, device="cuda")
        assert images.is_cuda
        assert labels.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nan_on_the_gpu_is_reported_when_the_pass_is_over() -> None:
    with pytest.raises(DataError, match="batch 0 holds NaN"):
        list(Batches((IMAGES / 0).cuda()))


@pytest.mark.parametrize(
    ("source", "length"),
    [(LABELED["DataLoader"], 5), (IMAGES, 3), (UNLABELED["list of two batches"], 2), (DataLoader(Stream()), None)],
)
def test_length_is_the_number_of_batches_or_unknown(source: object, length: int | None) -> None:
    assert Batches(source).length() == length


def test_a_pass_that_draws_random_numbers_leaves_the_random_state_and_repeats_its_order() -> None:
    batches = Batches(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=70, shuffle=True))
    state = torch.get_rng_state()
    first, second = (torch.cat([labels for _, labels in batches.labeled()]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, LABELS)


def test_a_pass_left_early_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    for _ in Batches(DataLoader(Folder(), batch_size=70, shuffle=True)):
        break
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_that_statistics_do_not_need_may_be_anything() -> None:
    ((images, labels),) = Batches([(IMAGES, ["boxes", "masks"])])
    assert torch.equal(images, IMAGES)
    assert labels is None


NAN = IMAGES.clone()
NAN[250, 1, 2, 3] = float("nan")
REFUSED = {
    "empty list": ([], "the data is empty"),
    "empty tensor": (IMAGES[:0], "the data is empty"),
    "number": (3, "data of type int cannot be iterated over"),
    "arrays": ([IMAGES.numpy()], "batch 0 holds its images as ndarray, not as a tensor"),
    "text": (["a.png", "b.png"], "batch 0 holds its images as str"),
    "triple": ([(IMAGES, LABELS, LABELS)], "batch 0 holds its images as a tuple of length 3"),
    "keys": ([{"x": IMAGES}], r"batch 0 holds its images as a mapping with keys \['x'\]"),
    "nested": ([[[IMAGES]]], "batch 0 holds its images as a list of length 1"),
    "single images": (Stream(), r"batch 0 is not a batch of images\n  found +\(3, 4, 4\)\n  expected  \(N, 3, 8, 8\)"),
    "vectors": ([LABELS], r"batch 0 is not a batch of images\n  found +\(300,\)"),
    "empty batch": ([IMAGES[:0]], r"batch 0 is not a batch of images\n  found +\(0, 3, 4, 4\)"),
    "channels": (
        [IMAGES, IMAGES[:, :1]],
        r"batch 1 has 1 channels, the model takes 3\n.*\(300, 1, 4, 4\)\n.*\(N, 3, 8",
    ),
    "pixels": ([IMAGES.to(torch.uint8)], r"(?s)batch 0 holds torch.uint8 values\n.*remedy +scale and normalize images"),
    "NaN": (NAN, "batch 1 holds NaN or infinite values"),
    "infinity": ([IMAGES, IMAGES / 0], "batch 1 holds NaN or infinite values"),
    "pair of unequal lengths": ((IMAGES, LABELS[:9]), r"not one class index per image\n.*\(9,\)\n.*shape \(300,\)"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_images_is_refused_by_name(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches(source, shape=(3, 8, 8)))


ONE_SHOT = {"generator": (batch for batch in [IMAGES]), "map": map(torch.abs, [IMAGES]), "iterator": iter([IMAGES])}


@pytest.mark.parametrize("source", ONE_SHOT.values(), ids=ONE_SHOT.keys())
def test_what_can_be_read_once_is_refused_before_it_is_read(source: Iterator[Tensor]) -> None:
    with pytest.raises(DataError, match=r"which can be read only once\n  remedy  pass something that starts afresh"):
        Batches(source)
    assert next(source) is not None


MISLABELED = {
    "none": (IMAGES, r"batch 0 has no labels\n  remedy  pass \(images, labels\)"),
    "text": ([(IMAGES, ["cat"] * 300)], r"of batch 0 are not one class index per image\n  found +a list of length 300"),
    "one-hot": ([(IMAGES, torch.eye(10)[LABELS])], r"found +Tensor of shape \(300, 10\)\n.*an integer tensor of shape"),
    "floats": ([(IMAGES, LABELS.float())], r"not one class index per image\n  found +Tensor of shape \(300,\)"),
    "too few": ([(IMAGES, LABELS), (IMAGES, LABELS[:7])], r"labels of batch 1 .*\n.*\(7,\)\n.*\(300,\)"),
}


@pytest.mark.parametrize(("source", "message"), MISLABELED.values(), ids=MISLABELED.keys())
def test_labels_that_are_no_class_indices_are_refused_where_labels_are_needed(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches(source).labeled())


class Clock:
    """A clock for progress bars that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "shown"), [(0.01, False), (5.0, True)])
def test_a_bar_appears_on_stderr_only_when_work_lasts(
    seconds: float, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    for _ in progress(range(3), "counting", 3):
        clock.now += seconds
    captured = capsys.readouterr()
    assert ("counting" in captured.err) is shown
    assert captured.out == ""


def test_a_disabled_bar_never_appears(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    for _ in progress(range(3), "counting", 3, enabled=False):
        clock.now += 5
    assert capsys.readouterr().err == ""

"""Files of torch that would run code, unpack without end, or hold what is no weight: each is refused."""

from __future__ import annotations

import builtins
import copy
import importlib
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import load_into, load_state_dict
from vfsurgery.errors import CheckpointError
from vfsurgery.pruning import Masks

STATE = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.zeros(3)}


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.function, self.arguments


PAYLOADS: dict[str, Callable[[str], Calls]] = {
    "os.system": lambda canary: Calls(os.system, f"touch {canary}"),
    "eval": lambda canary: Calls(builtins.eval, f"open({canary!r}, 'w').close()"),
    "exec": lambda canary: Calls(builtins.exec, f"open({canary!r}, 'w').close()"),
    "open": lambda canary: Calls(open, canary, "w"),
    "Popen": lambda canary: Calls(subprocess.check_call, ["touch", canary]),
    "mkdir": lambda canary: Calls(os.mkdir, canary),
    "getattr": lambda canary: Calls(getattr, Calls(importlib.import_module, "os"), "system"),
    "nested": lambda canary: Calls(list, [Calls(os.system, f"touch {canary}")]),
    "save": lambda canary: Calls(torch.save, {}, canary),
}
CONTAINERS: dict[str, Callable[[Calls], object]] = {
    "alone": lambda evil: evil,
    "as a tensor": lambda evil: {**STATE, "extra": evil},
    "beside a state dict": lambda evil: {"state_dict": STATE, "args": evil},
    "inside of a moving average": lambda evil: {"model_ema": {"module": [evil]}, "model": STATE},
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("suffix", "zipped"), [(".pt", True), (".bin", False)])
def test_pickled_calls_do_not_run(tmp_path: Path, payload: str, container: str, suffix: str, zipped: bool) -> None:
    canary = tmp_path / "canary"
    content = CONTAINERS[container](PAYLOADS[payload](str(canary)))
    path = tmp_path / f"evil{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="holds more than tensors, and reading that would run code"):
        load_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("payload", sorted(set(PAYLOADS) - {"getattr", "open"}))
def test_the_same_calls_run_where_they_are_trusted(tmp_path: Path, payload: str) -> None:
    torch.save(PAYLOADS[payload](str(tmp_path / "canary")), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # so the tests above had something to prevent


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickles_do_not_run(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(PAYLOADS["os.system"](str(tmp_path / "canary")), protocol))
    with pytest.raises(CheckpointError, match=r"holds more than tensors|is damaged or no checkpoint"):
        load_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()


def test_the_oldest_format_of_torch_does_not_run(tmp_path: Path) -> None:
    content = pickle.dumps(PAYLOADS["os.system"](str(tmp_path / "canary")))
    with tarfile.open(tmp_path / "evil.pt", "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint|holds more than tensors"):
        load_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()


def test_masks_do_not_run_code(tmp_path: Path) -> None:
    torch.save({"weight": PAYLOADS["os.system"](str(tmp_path / "canary"))}, tmp_path / "masks.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        Masks.load(tmp_path / "masks.pt")
    assert not (tmp_path / "canary").exists()


def test_a_pickle_under_another_ending_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    torch.save(PAYLOADS["os.system"](str(tmp_path / "canary")), path)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load_state_dict(path)
    assert not (tmp_path / "canary").exists()


def archive_of(tmp_path: Path, change: Callable[[zipfile.ZipFile], None], packed: bool = False) -> Path:
    """A file of torch.save, written again entry by entry, with something changed about it."""
    torch.save(STATE, tmp_path / "good.pt")
    path = tmp_path / "bomb.pt"
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(path, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        change(new)
    return path


def zeros(archive: zipfile.ZipFile) -> None:
    archive.writestr("good/data/9", bytes(50_000_000))


def overlapping(archive: zipfile.ZipFile) -> None:
    entry = archive.filelist[-1]
    for number in range(3000):
        twin = copy.copy(entry)
        twin.filename = f"good/data/{number + 10}"
        twin.file_size = twin.compress_size = 4096
        archive.filelist.append(twin)


def lying(archive: zipfile.ZipFile) -> None:
    archive.filelist[-1].file_size = 2**40


@pytest.mark.parametrize("change", [zeros, overlapping, lying])
def test_zip_bombs_are_refused_by_what_they_declare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[zipfile.ZipFile], None]
) -> None:
    path = archive_of(tmp_path, change, packed=True)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read before it was refused"))
    with pytest.raises(CheckpointError, match=r"bomb\.pt unpacks to more than itself\n  found .* bytes in a file of"):
        load_state_dict(path)


def test_an_archive_written_again_without_a_bomb_is_read(tmp_path: Path) -> None:
    state = load_state_dict(archive_of(tmp_path, lambda archive: None))
    assert torch.equal(state["weight"], STATE["weight"])


NO_WEIGHTS: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "meta": (lambda: torch.empty(3, 2, device="meta"), "on the meta device, without values"),
    "endless": (lambda: torch.zeros(1).expand(2**20, 2**20), r"\(1048576, 1048576\), more than the"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized as qint8"),
    "wide": (lambda: torch.zeros(8).as_strided((2**30,), (0,)), "more than the"),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:.*quantize:DeprecationWarning", "ignore:.*quantize:UserWarning"
)
@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str, wrapped: bool) -> None:
    make, found = NO_WEIGHTS[kind]
    state = {**STATE, "odd": make()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt holds a tensor that is no weight\n  key     odd\n.*{found}"):
        load_state_dict(tmp_path / "odd.pt")


ODD: dict[str, object] = {
    "number": 3,
    "text": "weights",
    "nothing": None,
    "huge key": {2**2000: STATE["bias"]},
    "tuple key": {("a", "b"): STATE["bias"]},
    "escape": {"\x1b[2J\x1b]0;owned\x07": 3},
    "long key": {"k" * 10**6: 3},
    "many keys": dict.fromkeys(map(str, range(10**4)), 0),
    "empty inner": {"state_dict": {}},
    "wrapped twice": {"state_dict": {"state_dict": {"state_dict": 0}}},
    "list of states": [STATE, STATE],
    "not a number": {"weight": float("nan")},
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("zipped", [True, False])
def test_content_that_is_no_state_is_described_in_short_plain_words(
    tmp_path: Path, content: object, zipped: bool
) -> None:
    torch.save(content, tmp_path / "odd.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"odd\.pt holds no state dict\n  found ") as caught:
        load_state_dict(tmp_path / "odd.pt")
    assert len(str(caught.value)) < 800
    assert str(caught.value).replace("\n", "").isprintable()


def test_deep_nesting_ends(tmp_path: Path) -> None:
    content = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    (tmp_path / "deep.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint|holds more than tensors|holds no state"):
        load_state_dict(tmp_path / "deep.pt")


def lengths() -> dict[str, bytes]:
    """Pickles whose strings and numbers claim to be longer than any memory."""
    return {
        "bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
        "text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
        "number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"abc.",
        "negative": b"\x80\x02\x8b" + (2**32 - 1).to_bytes(4, "little") + b"abc.",
        "memo": b"\x80\x02N" + b"r" + (2**32 - 1).to_bytes(4, "little") + b".",
        "no end": b"\x80\x02" + b"(" * 1000,
        "no start": b"." * 1000,
        "frame": b"\x80\x04\x95" + (2**63).to_bytes(8, "little") + b"N.",
    }


@pytest.mark.parametrize("kind", lengths())
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_lie_about_lengths(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / "odd.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("odd/data.pkl", lengths()[kind])
            archive.writestr("odd/byteorder", "little")
            archive.writestr("odd/version", "3\n")
    else:
        path.write_bytes(lengths()[kind])
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint|holds more than tensors|holds no state"):
        load_state_dict(path)


def damaged(path: Path, content: bytes) -> dict[str, Tensor] | None:
    """What is read from damaged content: the law is that it is refused by us, or a state dict all the same."""
    path.write_bytes(content)
    try:
        state = load_state_dict(path)
        load_into(nn.Linear(2, 3), state, path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return None
    return state


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_cut_off(tmp_path: Path, share: float, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "good.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "good.pt").read_bytes()
    assert damaged(tmp_path / "cut.pt", content[: int(len(content) * share)]) is None
    assert damaged(tmp_path / "whole.pt", content) is not None


@pytest.mark.parametrize("number", range(24))
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_with_a_flipped_bit(tmp_path: Path, number: int, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "good.pt", _use_new_zipfile_serialization=zipped)
    content = bytearray((tmp_path / "good.pt").read_bytes())
    content[number * len(content) // 24] ^= 1 << number % 8
    damaged(tmp_path / "flipped.pt", bytes(content))

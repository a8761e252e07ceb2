"""Damaged and crafted safetensors, and indices of shards that point where they must not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vfsurgery.checkpoints import file_hash, load_into, load_state_dict, save_sharded, save_state_dict, shards
from vfsurgery.errors import CheckpointError

STATE = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.zeros(3)}
DATA = 36
"""Bytes of its values."""

DAMAGED = "is damaged or no checkpoint"


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    save_state_dict(STATE, tmp_path / "good.safetensors", {"note": "hostile"})
    return (tmp_path / "good.safetensors").read_bytes()


def crafted(header: object, data: int = DATA, length: int | None = None) -> bytes:
    """A file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (3, 2), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BIAS = entry(shape=(3,), offsets=(24, 36))


def test_a_well_formed_header_made_here_is_read(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(crafted({"weight": entry(), "bias": BIAS}))
    assert load_state_dict(tmp_path / "net.safetensors")["weight"].shape == (3, 2)


HEADERS: dict[str, bytes] = {
    "length of zero": crafted(b"", length=0),
    "length beyond the file": crafted({"weight": entry(), "bias": BIAS}, length=10**6),
    "length of 2^63": crafted({"weight": entry()}, length=2**63),
    "length of 2^64-1": crafted({"weight": entry()}, length=2**64 - 1),
    "length of 100 MB": crafted({"weight": entry()}, length=100_000_001),
    "length too short": crafted({"weight": entry(), "bias": BIAS}, length=5),
    "seven bytes": b"\x05\x00\x00\x00\x00\x00\x00",
    "no JSON": crafted(b"weights, honestly"),
    "no text": crafted(b"\xff\xfe{}\x00"),
    "a list": crafted([entry()]),
    "a number": crafted(3),
    "nothing": crafted(None),
    "nested deep": crafted(b"[" * 50_000 + b"]" * 50_000),
    "nested deep in a value": crafted(b'{"weight":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001),
    "overlapping": crafted({"weight": entry(), "bias": entry(shape=(3,), offsets=(12, 24))}, 24),
    "the same place": crafted({"weight": entry(), "bias": entry()}, 24),
    "a gap": crafted({"weight": entry(), "bias": entry(shape=(3,), offsets=(28, 40))}, 40),
    "backwards": crafted({"weight": entry(offsets=(24, 0)), "bias": BIAS}),
    "beyond the end": crafted({"weight": entry(), "bias": entry(shape=(3,), offsets=(24, 999))}),
    "data left over": crafted({"weight": entry()}),
    "no data": crafted({"weight": entry(), "bias": BIAS}, 0),
    "negative offsets": crafted({"weight": entry(offsets=(-24, 0)), "bias": BIAS}),
    "offsets of 2^64": crafted({"weight": entry(offsets=(0, 2**64)), "bias": BIAS}),
    "three offsets": crafted({"weight": entry(offsets=(0, 24, 36))}),
    "offsets as text": crafted({"weight": entry(offsets=("0", "24"))}),
    "negative shape": crafted({"weight": entry(shape=(-3, -2)), "bias": BIAS}),
    "broken shape": crafted({"weight": entry(shape=(3.5, 2)), "bias": BIAS}),
    "shape of text": crafted({"weight": entry(shape="32"), "bias": BIAS}),
    "shape that overflows": crafted({"weight": entry(shape=(2**62, 2**62)), "bias": BIAS}),
    "shape of 2^64": crafted({"weight": entry(shape=(2**64,)), "bias": BIAS}),
    "shape larger than its data": crafted({"weight": entry(shape=(3000, 2)), "bias": BIAS}),
    "shape smaller than its data": crafted({"weight": entry(shape=(3,)), "bias": BIAS}),
    "no shape": crafted({"weight": {"dtype": "F32", "data_offsets": (0, 24)}}, 24),
    "unknown dtype": crafted({"weight": entry("F33")}, 24),
    "dtype of another size": crafted({"weight": entry("F64")}, 24),
    "dtype as number": crafted({"weight": entry(32)}, 24),
    "dtype as path": crafted({"weight": entry("../../os.system")}, 24),
    "an entry as number": crafted({"weight": 3}),
    "metadata as list": crafted({"__metadata__": [1, 2], "weight": entry()}, 24),
    "metadata as numbers": crafted({"__metadata__": {"a": 1}, "weight": entry()}, 24),
    "NaN in the header": crafted(b'{"weight":{"dtype":"F32","shape":[NaN,2],"data_offsets":[0,24]}}', 24),
    "only metadata": crafted({"__metadata__": {"format": "pt"}}, 0),
    "an empty header": crafted({}, 0),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"net\.safetensors ({DAMAGED}|holds no state dict)\n") as caught:
        load_state_dict(path)
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_key_that_stands_twice_is_refused_or_read_once(tmp_path: Path) -> None:
    one = json.dumps(entry())
    path = tmp_path / "net.safetensors"
    path.write_bytes(crafted(f'{{"weight":{one},"weight":{one}}}'.encode(), 24))
    try:
        assert list(load_state_dict(path)) == ["weight"]
    except CheckpointError as error:
        assert DAMAGED in str(error)


@pytest.mark.parametrize("share", [step / 20 for step in range(20)])
def test_any_file_cut_off_is_refused(tmp_path: Path, good: bytes, share: float) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good[: int(len(good) * share)])
    with pytest.raises(CheckpointError, match=rf"cut\.safetensors ({DAMAGED}|is empty)\n"):
        load_state_dict(path)


@pytest.mark.parametrize("beyond", [1, 8, 4096])
def test_any_file_with_more_behind_it_is_refused(tmp_path: Path, good: bytes, beyond: int) -> None:
    (tmp_path / "long.safetensors").write_bytes(good + bytes(beyond))
    with pytest.raises(CheckpointError, match=DAMAGED):
        load_state_dict(tmp_path / "long.safetensors")


@pytest.mark.parametrize("number", range(40))
def test_a_bit_flipped_in_the_header_is_refused_or_fits_all_the_same(tmp_path: Path, good: bytes, number: int) -> None:
    path, content = tmp_path / "flipped.safetensors", bytearray(good)
    content[number * (len(good) - DATA) // 40] ^= 1 << number % 8
    path.write_bytes(content)
    try:
        state = load_state_dict(path)
        load_into(nn.Linear(2, 3), state, path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))


@pytest.mark.parametrize("number", range(6))
def test_a_bit_flipped_in_the_values_changes_the_hash(tmp_path: Path, good: bytes, number: int) -> None:
    content = bytearray(good)
    content[-1 - number * 6] ^= 1 << number
    (tmp_path / "flipped.safetensors").write_bytes(content)
    load_state_dict(tmp_path / "flipped.safetensors")  # the format has no checksum: nothing to see here,
    assert file_hash(tmp_path / "flipped.safetensors") != file_hash(tmp_path / "good.safetensors")  # but here


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.safetensors"))


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "is no regular file"),
        (endless, "is no regular file"),
        (itself, "there is no checkpoint"),
        (nowhere, "there is no checkpoint"),
        (Path.mkdir, "is a folder"),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path: Path, suffix: str, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / f"net{suffix}")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
@pytest.mark.parametrize("name", ["a\x00b", "n" * 400, "é" * 200])
def test_names_that_no_file_can_have(suffix: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint|is no name for a file"):
        load_state_dict(f"{name}{suffix}")


NAMES = [
    "../outside.safetensors",
    "/etc/passwd",
    "/tmp/outside.safetensors",
    "sub/outside.safetensors",
    "..",
    ".",
    "",
    "..\\outside.safetensors",
    "C:\\outside.safetensors",
    "a\x00.safetensors",
    "a\x1b[2J.safetensors",
    "outside.py",
    "outside.safetensors.index.json",
    "./outside.safetensors",
    "outside.safetensors/",
    "~/outside.safetensors",
    "file:///tmp/outside.safetensors",
    "n" * 300 + ".safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_indices_do_not_lead_out_of_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_state_dict(STATE, place / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": name, "bias": "outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names a shard that it may not name\n  shard ") as caught:
        load_state_dict(index)
    assert str(caught.value).replace("\n", "").isprintable()


INDICES: dict[str, bytes] = {
    "no JSON": b"{weight_map: }",
    "cut off": b'{"weight_map": {"weight": "good.safe',
    "no text": b'{"weight_map": {"\xff": "good.safetensors"}}',
    "a mark of byte order": b'\xef\xbb\xbf{"weight_map": {"weight": "good.safetensors"}}',
    "twice": b'{"weight_map": {"weight": "good.safetensors", "weight": "good.safetensors"}}',
    "deep": b"[" * 100_000,
    "deep values": b'{"weight_map":' * 50_000,
    "a number of many digits": b'{"weight_map": ' + b"9" * 10_000 + b"}",
}
NO_INDICES: dict[str, object] = {
    "a list": [],
    "nothing": None,
    "no map": {"metadata": {}},
    "an empty map": {"weight_map": {}},
    "a map that is none": {"weight_map": ["good.safetensors"]},
    "a number as name": {"weight_map": {"weight": 3}},
    "nothing as name": {"weight_map": {"weight": None}},
    "a list as name": {"weight_map": {"weight": ["good.safetensors"]}},
}


@pytest.mark.parametrize("content", INDICES.values(), ids=INDICES.keys())
def test_indices_that_are_damaged(tmp_path: Path, good: bytes, content: bytes) -> None:
    (tmp_path / "good.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=DAMAGED):
        load_state_dict(tmp_path / "good.safetensors.index.json")


@pytest.mark.parametrize("content", NO_INDICES.values(), ids=NO_INDICES.keys())
def test_json_that_is_no_index(tmp_path: Path, good: bytes, content: object) -> None:
    (tmp_path / "good.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is no index of shards"):
        load_state_dict(tmp_path / "good.safetensors.index.json")


def test_an_index_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    monkeypatch.setattr(shards, "LARGEST_INDEX", 10)
    with pytest.raises(CheckpointError, match="an index of more than 10 bytes"):
        load_state_dict(tmp_path / "net.safetensors.index.json")


def sharded(folder: Path) -> tuple[Path, ...]:
    return save_sharded(STATE, folder / "net.safetensors", 24)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    *parts, index = sharded(tmp_path)
    assert load_state_dict(index).keys() == STATE.keys()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"a shard that is missing\n  shard   net-00002-of-00002\.safetensors"):
        load_state_dict(index)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    *parts, index = sharded(tmp_path)
    (tmp_path / "x").write_bytes(parts[0].read_bytes())
    parts[0].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"does not fit its shard net-00001-of-00002\.safetensors\n  missing "):
        load_state_dict(index)


def test_a_shard_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": print}, tmp_path / "evil.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "evil.bin"}}))
    with pytest.raises(CheckpointError, match=r"evil\.bin holds more than tensors"):
        load_state_dict(index)


def test_a_shard_cut_off_is_named(tmp_path: Path) -> None:
    *parts, index = sharded(tmp_path)
    parts[1].write_bytes(parts[1].read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"net-00002-of-00002\.safetensors {DAMAGED}"):
        load_state_dict(index)

"""What a file is by its first bytes, where it is not what its ending says: pointers, pages, archives, programs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from vfsurgery.checkpoints.files import WEIGHTS
from vfsurgery.checkpoints.refusals import printable

HEAD = 512
"""Bytes that are looked at."""

LARGEST_HEADER = 100 * 2**20
"""Bytes of a header that safetensors accepts."""

AGAIN = "download or copy it again"

SIGNATURES = {
    b"version https://git-lfs": (
        "a pointer of Git LFS, not the file it points to",
        "run git lfs pull where it is from",
    ),
    b"\x89HDF": ("an HDF5 file, as Keras writes them", "save the weights of a torch model"),
    b"\x93NUMPY": ("an array of NumPy", "save the weights of a torch model"),
    b"\x1f\x8b": ("compressed with gzip", "unpack it first"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it first"),
    b"7z\xbc\xaf": ("compressed with 7-Zip", "unpack it first"),
    b"Rar!": ("compressed with RAR", "unpack it first"),
    b"GGUF": ("a GGUF file", "save the weights of a torch model"),
}
"""First bytes; what has them; what to do."""


def kind_of(path: Path) -> tuple[str, str] | None:
    """What a file is that could not be read, and what to do; ``None`` where nothing is known of it.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "net.pt"
    >>> _ = file.write_text("<!DOCTYPE html><title>404</title>")
    >>> kind_of(file)
    ('it is a web page, as of a failed download', 'download or copy it again, and look at what comes')
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    for first, (kind, remedy) in SIGNATURES.items():
        if head.startswith(first):
            return f"it is {kind}", remedy
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if len(head) > 9 and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_HEADER and head[8:9] == b"{":
        return _kind_of_safetensors(path)
    text = _text(head)
    if text is None:
        return None
    if text.lower().startswith(("<!doctype html", "<html")):
        return "it is a web page, as of a failed download", f"{AGAIN}, and look at what comes"
    return f"it is text, which begins with {printable(text, 40)!r}", "name a file of weights"


def _kind_of_zip(path: Path) -> tuple[str, str] | None:
    """A zip is known by its end: what was cut off has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"it is cut off after {path.stat().st_size:,} bytes: the end of the archive is missing", AGAIN
    except Exception:  # other damage is told by the readers
        return None
    if any(name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in names):
        return (
            "it is a program of torch.export, not a file of weights",
            "torch.save(torch.export.load(FILE).state_dict, 'weights.pt') makes one, where you trust the file",
        )
    if any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        return None
    return f"it is a zip without a checkpoint, with {printable(', '.join(names[:3]), 80)}", "unpack it first"


def _kind_of_safetensors(path: Path) -> tuple[str, str] | None:
    """Its header says how long it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if path.suffix != WEIGHTS:
        return "it is a file of safetensors", f"name it {path.stem}{WEIGHTS}"
    try:
        entries = json.loads(header) if len(header) == length else {}
        ends = [int(entry["data_offsets"][1]) for key, entry in entries.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    expected = 8 + length + max(ends, default=0)
    return (
        (f"it is cut off: it has {size:,} bytes, and its header tells of {expected:,}", AGAIN)
        if size < expected
        else None
    )


def _text(head: bytes) -> str | None:
    """The first words, if that is what they are."""
    try:
        text = (head if len(head) < HEAD else head[:-4]).decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.strip() if all(letter.isprintable() or letter in "\r\n\t" for letter in text) else None

"""How files are refused: words shared by all that reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vfsurgery.errors import CheckpointError, explain


def printable(text: str, limit: int = 120) -> str:
    """Return text from a file as it may be printed: on one line, without control characters, cut to a length.

    >>> printable("conv\\x1b[2J.weight")
    'conv\ufffd[2J.weight'
    """
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def listing(names: Sequence[str], limit: int = 4) -> str:
    """The first few names as they may be printed, and how many there are more.

    >>> listing(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(printable(name, 80) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def refuse_damaged(path: Path, error: Exception | str, remedy: str = "save or copy it again") -> NoReturn:
    """Refuse a file that is not what its ending says.

    Raises:
        CheckpointError: Always.
    """
    cause = printable(str(error).partition("\n")[0]) or type(error).__name__
    raise CheckpointError(explain(f"{path} is damaged or no checkpoint", cause=cause, remedy=remedy)) from (
        error if isinstance(error, Exception) else None
    )


def refuse_code(path: Path, error: Exception) -> NoReturn:
    """Refuse a file that could be read only by running what it says.

    Raises:
        CheckpointError: Always.
    """
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    raise CheckpointError(
        explain(
            f"{path} holds more than tensors, and reading that would run code from the file",
            found=printable(found[1]) if found else "pickled objects",
            remedy="where you trust the file, load it and save its weights alone: "
            "torch.save(model.state_dict(), 'weights.pt') or safetensors.torch.save_file",
        )
    ) from None  # torch's own message recommends weights_only=False

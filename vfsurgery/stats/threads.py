"""Where torch computes, and with how many threads on the CPU: they decide how sums are cut, and so the last digits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from vfsurgery.errors import OptionError, explain


@contextmanager
def threads(count: int | None) -> Generator[None]:
    """Let torch use ``count`` threads meanwhile; ``None`` is as many as before.

    Where matrices are factored it is one: LAPACK's last digits always depend on the number, and one is hardly slower.

    >>> before = torch.get_num_threads()
    >>> with threads(3):
    ...     torch.get_num_threads()
    3
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str) -> torch.device:
    """The device of a name, if torch can compute on it; ``auto`` is CUDA where there is some, else the CPU.

    Raises:
        OptionError: it cannot.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        cause, remedy = str(error).partition("\n")[0], "auto takes CUDA where there is some, else cpu"
        raise OptionError(explain(f"cannot compute on device {name!r}", cause=cause, remedy=remedy)) from error

"""How many threads torch computes with on the CPU: how it cuts sums into parts depends on it, and so do the last digits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int | None) -> Generator[None]:
    """Let torch use ``count`` threads meanwhile; ``None`` is as many as before.

    Code on factorizations asks for one: LAPACK's results differ between one thread and several in nearly every digit
    that rounding leaves open, and on the matrices met here several are hardly faster.

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

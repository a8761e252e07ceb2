"""How many threads torch computes with on the CPU: it decides how sums are cut, and with it the last digits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


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

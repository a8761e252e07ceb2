"""Where torch computes, how much is spent there unasked, and with how many threads on the CPU.

Threads decide how sums are cut, and so the last digits.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from vfsurgery.errors import OptionError, explain

_MOST_FLOPS, _MOST_FLOPS_ELSEWHERE = {"cpu": 2e13}, 2e15


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first tensor lives; the CPU where it has none.

    >>> device_of(nn.Linear(2, 1))
    device(type='cpu')
    """
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def affordable_flops(device: torch.device) -> float:
    """Floating-point operations that are spent at most where nobody asked for them: some minutes.

    >>> affordable_flops(torch.device("cpu"))
    20000000000000.0
    """
    return _MOST_FLOPS.get(device.type, _MOST_FLOPS_ELSEWHERE)


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


def known_device(name: str) -> str:
    """A device's name as it was given, if it is one, whether it is there or not.

    Raises:
        OptionError: it is none.

    >>> known_device("cuda:1")
    'cuda:1'
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise OptionError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N")
    return name


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

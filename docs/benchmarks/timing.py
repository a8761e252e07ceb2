"""A stopwatch for the benchmark scripts, and the line that says what they ran on."""

from __future__ import annotations

import argparse
import platform
import time
from types import TracebackType

import torch


class Stopwatch:
    """Sums wall and CPU seconds (of all threads) over the ``with`` blocks it guards.

    >>> watch = Stopwatch()
    >>> with watch:
    ...     total = sum(range(10))
    >>> watch.wall > 0
    True
    """

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]

    def __str__(self) -> str:
        return f"{self.wall:.2f} s wall, {self.cpu:.2f} s CPU"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return an argument parser with what all benchmarks share: ``--threads`` and a description kept as written."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2, help="threads that torch may use (default: %(default)s)")
    return made


def begin(threads: int) -> None:
    """Set the number of threads and print what the figures depend on."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {threads} threads, {platform.machine()}")

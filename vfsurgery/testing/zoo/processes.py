"""Each model in a process of its own: its memory, time and crashes are not the next one's.

Processes are forked from a server that has the libraries loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

PRELOADED = ["torch", "timm", "torchvision.models", "vfsurgery.testing.zoo"]
GIB = 2**30
MEMORY = 8.0
"""GiB that the process of one model may allocate."""

Found = TypeVar("Found")


def in_processes(
    work: Callable[[str, float], Found], names: Sequence[str], memory: float, limit: float, jobs: int
) -> Iterator[tuple[str, Found | str]]:
    """Call ``work(name, memory)`` for every name; yields the results as they come, or why there is none.

    Args:
        work: A function at the top of a module.
        names: Models.
        memory: GiB that a process may allocate.
        limit: Seconds that it may take.
        jobs: Processes at a time.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_in_process, work, name, memory, limit): name for name in names}
        for future in as_completed(running):
            yield running[future], future.result()


def _in_process(work: Callable[[str, float], Found], name: str, memory: float, limit: float) -> Found | str:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, name, memory, sender), daemon=True)
    process.start()
    sender.close()  # so that a crash is seen as the end of the pipe
    try:
        if not receiver.poll(limit):
            return f"took longer than {limit:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process crashed ({process.exitcode})"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(work: Callable[[str, float], object], name: str, memory: float, sender: Connection) -> None:
    """In the model's own process: work under a memory limit and send the result, or why there is none."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIB), resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    with open(os.devnull, "w") as silence:  # libraries print and warn while they build models
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    try:
        result = work(name, memory)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, MemoryError) or "allocate memory" in text:
            text = f"needs more than its {memory:g} GiB of memory"
        result = text[:300]
    sender.send(result)

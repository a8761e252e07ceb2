"""How much longer ``import vfsurgery`` takes than ``import torch``: CPU seconds of fresh processes, the least of five.

python docs/benchmarks/imports.py
"""

import subprocess
import sys


def seconds(module: str) -> float:
    """CPU time of one import, in a process of its own."""
    code = f"import time; before = time.process_time(); import {module}; print(time.process_time() - before)"
    return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5))


torch, own = seconds("torch"), seconds("vfsurgery")
print(f"torch {torch:.2f} s, vfsurgery {own:.2f} s: {own / torch:.2f} times")

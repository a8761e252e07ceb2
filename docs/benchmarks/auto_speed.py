"""CPU seconds and accuracy of ``merge(a, b, data=...)`` with everything on auto, beside those of another commit.

Every merge runs in a process of its own: the other commit's from a git worktree that is made for it and removed again,
this one's from the folder that the script lies in, one right after the other, so that both see the same machine. CPU
seconds are those of all threads of the merge alone, without loading and scoring. The last column is this one's share of
the other's. Pairs: the trained ones of the shared folder, on 5,000 training images, scored on the 10,000 test images;
"resnet18 at 64" and "convnext_atto" are networks with random weights, on 200 images of 64 x 64 and 5,000 of 32 x 32,
of which only the time says anything.

    python docs/benchmarks/auto_speed.py --commit 796e40e
    python docs/benchmarks/auto_speed.py --commit 796e40e --pair "resnet18 at 64" --pair convnext_atto --threads 1
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from pairs import MERGES, ROOT, Images, folder_parser, is_there, load_images, load_pair
from torch import nn

import vfsurgery as surgery
from vfsurgery.networks.architectures import build_model

RANDOM = {"resnet18 at 64": ("torchvision:resnet18", 200, 64), "convnext_atto": ("timm:convnext_atto", 5000, 32)}
"""Networks with random weights: their name, and the number and size of images."""


def measure_here(pair: str, threads: int, shared: Path, cache: Path) -> dict[str, float | str]:
    """Merge once in this process."""
    torch.set_num_threads(threads)
    a, b, images = _random_pair(pair) if pair in RANDOM else (*load_pair(shared, pair), load_images(shared, cache))
    wall, cpu = time.perf_counter(), time.process_time()
    merged = surgery.merge(a, b, data=images.calibration, progress=False)
    found: dict[str, float | str] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    report = surgery.report_of(merged)
    found["way"] = " + ".join([report.matching, *report.renormalize])
    if images.test:
        found["accuracy"] = surgery.evaluate(merged, images.test, progress=False).accuracy
    return found


def _random_pair(pair: str) -> tuple[nn.Module, nn.Module, Images]:
    spec, count, size = RANDOM[pair]
    models: list[nn.Module] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build_model(spec, num_classes=10).eval())
    return models[0], models[1], Images(list(torch.randn(count, 3, size, size).split(500)), [])


@contextmanager
def worktree(commit: str) -> Generator[Path]:
    """The files of a commit, in a folder that is there as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "other"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), commit], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def run(code: Path, pair: str, threads: int, options: Namespace) -> dict[str, float | str]:
    """Measure with the package in ``code``, in a process of its own."""
    folders = ["--shared", str(options.shared), "--cache", str(options.cache)]
    here = ["--here", pair, "--threads", str(threads), *folders]
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *here]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    return json.loads(lines[-1])


def main() -> None:
    """Read the options and print one line per pair and number of threads."""
    made = folder_parser(__doc__)
    names = [*MERGES, *RANDOM]
    made.set_defaults(threads=0)
    made.add_argument("--commit", default="HEAD~1", help="what to compare with (default: %(default)s)")
    made.add_argument("--pair", action="append", choices=names, help="measure this pair; may be repeated")
    made.add_argument("--here", help="measure this pair in this process and print JSON; used by the script itself")
    options = made.parse_args()
    if not is_there(options.shared):
        return
    if options.here:
        print(json.dumps(measure_here(options.here, options.threads, options.shared, options.cache)))
        return
    load_images(options.shared, options.cache)  # decoded once, and not by what is measured
    print(f"torch {torch.__version__}; other: {options.commit}\n")
    print("| pair | threads | CPU s, other | CPU s | share | accuracy (%), other | accuracy (%) | kept |")
    print("|---|---|---|---|---|---|---|---|")
    with worktree(options.commit) as other:
        for pair in options.pair or MERGES:
            for threads in [options.threads] if options.threads else [1, 2]:
                theirs, ours = (run(code, pair, threads, options) for code in (other, ROOT))
                cpu = [float(found["cpu"]) for found in (theirs, ours)]
                accuracy = [f"{100 * float(found.get('accuracy', 'nan')):.2f}" for found in (theirs, ours)]
                figures = [f"{cpu[0]:.1f}", f"{cpu[1]:.1f}", f"{cpu[1] / cpu[0]:.2f}", *accuracy]
                print(f"| {pair} | {threads} | {' | '.join(figures)} | {ours['way']} |", flush=True)


if __name__ == "__main__":
    main()

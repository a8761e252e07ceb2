"""Checkpoints combined file to file, beside mergekit: wall time and peak memory on the same files, in one run.

    python docs/benchmarks/combining_files.py --mergekit VENV/bin/mergekit-pytorch

Makes a base and four experts of the size of ViT-L/16 (1.2 GB each in float32, random weights), combines them by TIES
and by a weighted sum, once with each tool, and deletes all. What is added is the peak less that of the same command on
files of a few kilobytes. Resident memory counts the pages of mapped files, which the system may take back; so what the
process has for itself alone is shown, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from vfsurgery.checkpoints.lazy import open_checkpoint
from vfsurgery.checkpoints.streams import Stream

EXPERTS = 4
POLL = 0.02


def shapes_of(blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """Those of timm's ``vit_large_patch16_224``, for 24 blocks of width 1024."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    for block in range(blocks):
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{block}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in layers.items():
            found[f"blocks.{block}.{name}.weight"] = (out * width, into * width)
            found[f"blocks.{block}.{name}.bias"] = (out * width,)
    return found


def make(folder: Path, blocks: int, width: int) -> list[Path]:
    """A base and experts that differ from it by a twentieth."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = shapes_of(blocks, width)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    paths = [folder / f"{name}.safetensors" for name in ("base", *(f"expert{n}" for n in range(EXPERTS)))]
    base, drawn = torch.Generator(), torch.Generator()
    for number, path in enumerate(paths):
        base.manual_seed(0)
        drawn.manual_seed(number)
        with Stream(path, state, {}, "benchmark") as stream:
            for name, shape in shapes.items():
                tensor = torch.randn(shape, generator=base) * 0.02
                if number:
                    tensor += torch.randn(shape, generator=drawn) * 0.001
                stream.write(name, 0, tensor)
                stream.close_tensor(name)
            stream.finish({})
    return paths


def measured(command: list[str]) -> tuple[float, float, int, int]:
    """Seconds on the clock and of processors, and the peaks of resident memory and of what is the process's own."""
    begun = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resident = own = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        status = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
        resident = max(resident, int(status.get("VmHWM", 0)) * 1024)
        own = max(own, int(status.get("RssAnon", 0)) * 1024)
        time.sleep(POLL)
    seconds = time.perf_counter() - begun
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, resident, own


def ours(paths: list[Path], out: Path, options: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "vfsurgery", "combine", *map(str, paths), "--quiet"),
        *(*options, "-o", str(out / "combined.safetensors")),
    ]


def theirs(tool: str, paths: list[Path], out: Path, method: str) -> list[str]:
    base, *experts = map(str, paths)
    options = {"weight": 1.0, "density": 0.2} if method == "ties" else {"weight": 1.0}
    content = {
        "merge_method": method,
        "models": [{"model": path, "parameters": options} for path in experts],
        "parameters": {"normalize": True},
        "dtype": "float32",
    }
    if method == "ties":
        content["base_model"] = base
    config = out / "config.yaml"
    config.write_text(json.dumps(content))  # which is YAML, too
    return [tool, str(config), str(out / "mergekit")]


def warm(paths: list[Path]) -> None:
    """Have all files in memory, as far as that goes, before each run."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def agreement(out: Path) -> str:
    """How far the two results are from each other."""
    files = [
        open_checkpoint(out / "combined.safetensors"),
        open_checkpoint(next((out / "mergekit").glob("*model*.safe*"))),
    ]
    largest, unlike, total = 0.0, 0, 0
    for name in files[0].state:
        a, b = (file.read(name, 0, file.state[name].numel()) for file in files)
        largest = max(largest, float((a - b).abs().max()))
        unlike += int(((a - b).abs() > 1e-6).sum())
        total += a.numel()
    return f"{unlike / total:.4%} of the numbers differ by more than 1e-6, at most by {largest:.1e}"


RUNS = {
    "linear": (("linear", ["--method", "mean"]),),
    "TIES": (("ties", ["--method", "ties"]), ("ties", ["--method", "ties", "--option", "scope=tensor"])),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="its mergekit-pytorch; without it only ours is measured")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/combining"))
    given = parser.parse_args()
    out = given.folder / "out"
    try:
        small = make(given.folder / "small", 1, 16)
        paths = make(given.folder / "large", given.blocks, given.width)
        out.mkdir()
        size, largest = paths[0].stat().st_size, max(map(_bytes, shapes_of(given.blocks, given.width).values()))
        print(f"base and {EXPERTS} experts of {size / 1e9:.2f} GB, largest tensor {largest / 2**20:.1f} MiB")
        heads = ("seconds", "CPU s", "peak MiB", "added", "own MiB", "added")
        print(" " * 42 + "".join(f"{head:>9}" for head in heads))
        for title, runs in RUNS.items():
            peer = None
            for method, options in runs:
                commands = [("vfsurgery " + " ".join(options[1:]), ours, options)]
                if given.mergekit and peer is None:
                    commands.insert(0, (f"mergekit {method}", theirs, method))
                for name, maker, what in commands:
                    leading = [given.mergekit] if maker is theirs else []
                    sources = (small, paths) if title == "TIES" else (small[1:], paths[1:])
                    if maker is ours and title == "linear":
                        what = [*what, "--no-base"]
                    elif maker is theirs:
                        sources = (small, paths)
                    before = measured(maker(*leading, sources[0], out, what))[2:]
                    warm(paths)
                    seconds, busy, *after = measured(maker(*leading, sources[1], out, what))
                    added = [(a - b) / 2**20 for a, b in zip(after, before, strict=True)]
                    row = (seconds, busy, after[0] / 2**20, added[0], after[1] / 2**20, added[1])
                    print(f"{name:<42}{seconds:>9.1f}{busy:>9.1f}" + "".join(f"{each:>9.0f}" for each in row[2:]))
                    if maker is theirs:
                        peer = row
                    elif peer:
                        shares = [mine / other for mine, other in zip(row, peer, strict=True)]
                        print(f"{'  of mergekit':<42}" + "".join(f"{share:>8.2f}x" for share in shares))
                        print(f"  {agreement(out)}")
                    sys.stdout.flush()
        sources = EXPERTS + 2
        print(f"bar for what is added: {sources} x largest + 64 MiB = {(sources * largest / 2**20) + 64:.0f} MiB")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


if __name__ == "__main__":
    main()

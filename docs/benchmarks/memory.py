"""Peak memory of a merge, beside the two sources, as a multiple of one model's size.

Each merge runs in a process of its own. When the sources are built, and one tiny merge has loaded what a first merge
loads, its resident memory is the base; the process's highest resident memory after the merge, less the base, is what
the merge took. That counts all allocators (torch, numpy, scipy) and the activations of the forward passes, which is why
merges with data take more and why the batch size matters. Expected without data and not in place: one model and the
largest similarity matrix, in float64. Resident memory is read from /proc: Linux only.

    python docs/benchmarks/memory.py
    python docs/benchmarks/memory.py --model torchvision:vgg16 --images 4
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import begin, parser

import vfsurgery as surgery
from vfsurgery.architectures import build_model

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One merge to measure."""

    name: str
    matching: str
    renormalize: str | None
    needs_data: bool
    inplace: bool


CASES = (
    Case("naive average", "identity", None, needs_data=False, inplace=False),
    Case("weights", "weights", None, needs_data=False, inplace=False),
    Case("weights, in place", "weights", None, needs_data=False, inplace=True),
    Case("activations, renormalized", "activations", "auto", needs_data=True, inplace=False),
)


def memory(field: str) -> int:
    """Return a figure of this process from /proc: ``VmRSS`` is resident now, ``VmHWM`` the most so far; in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_here(case: Case, spec: str, size: int, count: int, threads: int) -> dict[str, float]:
    """Merge once in this process and return sizes in MiB."""
    torch.set_num_threads(threads)
    _warm_up()
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build_model(spec).eval())
    images = torch.randn(count, 3, size, size)
    base = memory("VmRSS")
    merged = surgery.merge(
        *models,
        data=[images] if case.needs_data else None,
        example_inputs=images[:1],
        matching=case.matching,
        renormalize=case.renormalize,
        inplace=case.inplace,
        progress=False,
    )
    peak = memory("VmHWM")
    one = sum(tensor.numel() * tensor.element_size() for tensor in models[0].state_dict().values())
    units = max(group.size for group in surgery.report_of(merged).groups)
    return {"model": one / MIB, "peak": (peak - base) / MIB, "similarity": 8 * units**2 / MIB}


def _warm_up() -> None:
    """Load everything a first merge loads, on models that take no memory."""
    tiny = [torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)) for _ in range(2)]
    surgery.merge(*tiny, data=[torch.randn(8, 2)], progress=False)


def measure(case: Case, options: list[str]) -> None:
    """Measure one case in a process of its own and print it."""
    command = [sys.executable, __file__, *options, "--case", json.dumps(asdict(case))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    sizes = f"one model {found['model']:.1f}, largest similarity matrix {found['similarity']:.1f} MiB"
    print(f"{case.name:<26} peak {found['peak']:.1f} MiB, {found['peak'] / found['model']:.2f} models; {sizes}")


def main() -> None:
    """Read the options and print one line per case."""
    made = parser(__doc__)
    made.add_argument("--model", default="torchvision:resnet50", help="timm:NAME or torchvision:NAME (%(default)s)")
    made.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    made.add_argument("--images", type=int, default=8, help="calibration images, one batch (default: %(default)s)")
    made.add_argument("--case", help="measure this case in this process and print JSON; used by the script itself")
    options = made.parse_args()
    if options.case:
        case = Case(**json.loads(options.case))
        print(json.dumps(measure_here(case, options.model, options.size, options.images, options.threads)))
        return
    begin(options.threads)
    for case in CASES:
        measure(case, sys.argv[1:])


if __name__ == "__main__":
    main()

"""Peak memory of a merge, beside the two sources, as a multiple of one model's size.

Two figures, each from a process of its own per merge. *Tensors*: the most that torch had allocated at one time, from
its profiler, which sees every allocation, scratch inside ops included; similarity matrices for scipy are among them.
*Resident*: when the sources are built, and one tiny merge has loaded what a first merge loads, the process's resident
memory is the base; its highest resident memory after the merge, less the base, counts everything: also Python's
objects, code that libraries generate for the shapes they meet, and what the allocator keeps for later. Both hold the
activations of the forward passes, which is why merges with data take more and why the batch size matters. Expected
without data: one model and the largest similarity matrix, in float64. Resident memory is read from /proc: Linux only.

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
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vfsurgery as surgery
from vfsurgery.networks.architectures import build_model

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


def measure_here(case: Case, spec: str, size: int, count: int, threads: int, *, tensors: bool) -> dict[str, float]:
    """Merge once in this process and return sizes in MiB."""
    torch.set_num_threads(threads)
    _warm_up()
    models: list[nn.Module] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build_model(spec).eval())
    images = torch.randn(count, 3, size, size)
    if tensors:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            merged = _merge(case, models, images)
        peak = _most_allocated(record)
    else:
        base = memory("VmRSS")
        merged = _merge(case, models, images)
        peak = memory("VmHWM") - base
    one = sum(tensor.numel() * tensor.element_size() for tensor in models[0].state_dict().values())
    units = max(group.size for group in surgery.report_of(merged).groups)
    return {"model": one / MIB, "peak": peak / MIB, "similarity": 8 * units**2 / MIB}


def _merge(case: Case, models: list[nn.Module], images: torch.Tensor) -> nn.Module:
    return surgery.merge(
        models,
        data=[images] if case.needs_data else None,
        example_inputs=images[:1],
        matching=case.matching,
        renormalize=case.renormalize,
        inplace=case.inplace,
        progress=False,
    )


def _most_allocated(record: profile) -> int:
    """The largest running sum of all allocations and releases."""
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _warm_up() -> None:
    """Load everything a first merge loads, on models that take no memory."""
    tiny = [torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)) for _ in range(2)]
    surgery.merge(*tiny, data=[torch.randn(8, 2)], progress=False)


def measure(case: Case, options: list[str]) -> None:
    """Measure one case in processes of its own and print it."""
    resident, tensors = (_run(case, [*options, *extra]) for extra in ([], ["--tensors"]))
    peaks = [f"{name} {found['peak']:.1f} MiB = {found['peak'] / found['model']:.2f} models" for name, found in
             (("tensors", tensors), ("resident", resident))]  # fmt: skip
    sizes = f"one model {resident['model']:.1f}, largest similarity matrix {resident['similarity']:.1f} MiB"
    print(f"{case.name:<26} peak of {', '.join(peaks)}; {sizes}", flush=True)


def _run(case: Case, options: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *options, "--case", json.dumps(asdict(case))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def main() -> None:
    """Read the options and print one line per case."""
    made = parser(__doc__)
    made.add_argument("--model", default="torchvision:resnet50", help="timm:NAME or torchvision:NAME (%(default)s)")
    made.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    made.add_argument("--images", type=int, default=8, help="calibration images, one batch (default: %(default)s)")
    made.add_argument("--case", help="measure this case in this process and print JSON; used by the script itself")
    made.add_argument("--tensors", action="store_true", help="with --case: count tensors, not resident memory")
    options = made.parse_args()
    if options.case:
        case, shape = Case(**json.loads(options.case)), (options.size, options.images)
        print(json.dumps(measure_here(case, options.model, *shape, options.threads, tensors=options.tensors)))
        return
    begin(options.threads)
    for case in CASES:
        measure(case, sys.argv[1:])


if __name__ == "__main__":
    main()

"""What a step of AdaMerging costs beside the forward and backward passes that it cannot do without, and its memory.

Time: ``adapt`` runs twice, for few steps and for more, without looks in between; what the difference took is divided by
the steps. The same many batches go forward and backward through ordinary copies of the experts, all parameters with
gradients. Both are repeated in turns and the medians compared, in one process: seconds of the CPU, on one thread, so
that other work on the machine counts little. Memory: the most that torch had allocated at one time during two steps,
from its profiler, beyond what was there before: base and experts.

    python docs/benchmarks/multitask_cost.py
    python docs/benchmarks/multitask_cost.py --model test_resnet --size 160 --tasks 4 --batch 16
"""

from __future__ import annotations

import copy
import statistics
import time

import timm
import torch
from memory import MIB, _most_allocated
from timing import begin, parser
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vfsurgery.merging.multitask.adamerging import adapt

FEW = 2


def family(model: str, tasks: int, size: int) -> tuple[dict[str, Tensor], dict[str, nn.Module], list[str]]:
    """A base, experts near it with heads of their own, and the names of their trunk."""
    torch.manual_seed(0)
    base = timm.create_model(model, num_classes=10)
    experts: dict[str, nn.Module] = {}
    head = {f"{name}." for name, module in base.named_modules() if module is base.get_classifier()}
    trunk = [name for name in base.state_dict() if not name.startswith(tuple(head))]
    for number in range(tasks):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        experts[f"task{number}"] = expert.eval()
    return base.state_dict(), experts, trunk


def passes(experts: dict[str, nn.Module], data: dict[str, Tensor], batch: int, steps: int) -> float:
    """CPU seconds of a step's forward and backward passes."""
    twins = {name: copy.deepcopy(expert) for name, expert in experts.items()}
    started = time.process_time()
    for _ in range(steps):
        for name, twin in twins.items():
            twin.zero_grad()
            twin(data[name][:batch]).log_softmax(1).mean().backward()
    return (time.process_time() - started) / steps


def main() -> None:
    """Read the options and print both figures."""
    made = parser(__doc__)
    made.set_defaults(threads=1)
    made.add_argument("--model", default="vit_tiny_patch16_224", help="of timm (default: %(default)s)")
    made.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    made.add_argument("--tasks", type=int, default=3)
    made.add_argument("--batch", type=int, default=16, help="images of each task in a step (default: %(default)s)")
    made.add_argument("--steps", type=int, default=6, help="that are timed (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=5, help="of which the median is taken (default: %(default)s)")
    made.add_argument("--by", default="tensor")
    made.add_argument("--plus", action="store_true")
    options = made.parse_args()
    begin(options.threads)
    base, experts, trunk = family(options.model, options.tasks, options.size)
    data = {name: torch.randn(options.batch + 4, 3, options.size, options.size) for name in experts}

    def run(steps: int) -> float:
        started = time.process_time()
        adapt(base, experts, trunk, data, by=options.by, plus=options.plus, steps=steps, every=steps + 1,
              batch_size=options.batch, held_out=0.2, progress=False)  # fmt: skip
        return time.process_time() - started

    run(1)
    steps, bare = list[float](), list[float]()
    for _ in range(options.repeats):
        steps.append((run(FEW + options.steps) - run(FEW)) / options.steps)
        bare.append(passes(experts, data, options.batch, options.steps))
    step, least = statistics.median(steps), statistics.median(bare)
    print(f"{options.model}, {options.tasks} tasks of {options.batch} images at {options.size}: a step {step:.3f} s of "
          f"the CPU, forward and backward alone {least:.3f} s, ratio {step / least:.2f}", flush=True)  # fmt: skip
    few = {name: images[:10] for name, images in data.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        adapt(base, experts, trunk, few, by=options.by, plus=options.plus, steps=2, batch_size=1, progress=False)
    one = sum(tensor.numel() * tensor.element_size() for tensor in base.values())
    peak = _most_allocated(record)
    print(f"one model {one / MIB:.1f} MiB; beyond base and experts at most {peak / MIB:.1f} MiB = {peak / one:.2f} "
          "models, activations of a batch of one image per task and of looks included")  # fmt: skip


if __name__ == "__main__":
    main()

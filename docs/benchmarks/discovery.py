"""Seconds to trace networks and to find their permutation groups, from models that are built already.

python docs/benchmarks/discovery.py
python docs/benchmarks/discovery.py torchvision:resnet50 timm:convnext_tiny
"""

from __future__ import annotations

import torch
from timing import Stopwatch, begin, parser

import vfsurgery as surgery
from vfsurgery.architectures import build_model

MODELS = (
    "torchvision:resnet50",
    "torchvision:densenet201",
    "torchvision:vgg16",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:googlenet",
    "torchvision:inception_v3",
)


def measure(spec: str) -> None:
    """Print the seconds of both steps for one model."""
    torch.manual_seed(0)
    model = build_model(spec).eval()
    tracing, grouping = Stopwatch(), Stopwatch()
    with tracing:
        graph = surgery.trace(model)
    with grouping:
        groups = surgery.find_groups(graph)
    wall, cpu = tracing.wall + grouping.wall, tracing.cpu + grouping.cpu
    seconds = f"trace {tracing.wall:.2f}, groups {grouping.wall:.2f}, together {wall:.2f} s wall, {cpu:.2f} s CPU"
    print(f"{spec:<34} {seconds}; {len(groups)} groups, {groups.coverage:.0%} of parameters")


def main() -> None:
    """Read the options and print one line per model."""
    made = parser(__doc__)
    made.add_argument("models", nargs="*", metavar="MODEL", help="timm:NAME or torchvision:NAME (default: nine CNNs)")
    options = made.parse_args()
    begin(options.threads)
    surgery.find_groups(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(2, 2))  # what only a first call imports
    for spec in options.models or MODELS:
        measure(spec)


if __name__ == "__main__":
    main()

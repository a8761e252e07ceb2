"""Preserve-first merging of the two trained CIFAR-10 pairs: accuracy and cost at every boundary, and inference time.

Statistics come from 5,000 random training images, accuracy from the 10,000 test images. Matching is done once for all
boundaries: on activations, RESCALE for `vgg11_half`, RESET for `tv_resnet18`, or what `--renormalize` says. Times are
CPU seconds of one batch, the least of many interleaved runs, over those of one source. Beside them stand the ratio of
FLOPs and that of the time of the source's single ops, each counted as often as it runs; a second table has what each op
of the source takes. Where the folder with the pairs is missing, the script says so and stops.

    python docs/benchmarks/preserve.py --output preserve.json
    python docs/benchmarks/preserve.py --pair tv_resnet18 --draws 5
    python docs/benchmarks/preserve.py --renormalize regress
    python docs/benchmarks/preserve.py --times --threads 1
    python docs/benchmarks/preserve.py --times --threads 1 --channels-last --batch 1 --batch 128
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from pairs import folder_parser, is_there, load_images, load_pair
from timing import begin
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.passes.costs import Ledger
from vfsurgery.passes.cut import Boundaries
from vfsurgery.passes.preserve import Form

BOUNDARIES: dict[str, dict[int | str, str]] = {
    "vgg11_half": dict(
        zip(
            (0, 2, 3, 4, 5, 6, 7, 8, 9),
            ("71.4", "72.2", "72.8", "74.9", "76.7", "78.9", "80.4", "81.3", ""),
            strict=True,
        )
    ),
    "tv_resnet18": {0: "", "layer1": "71.5", "layer2": "76.7", "layer3": "80.3", "layer4": "81.2", "fc": ""},
}
"""Boundaries to measure, with the accuracy (%) that public codes reach there on these checkpoints."""

REPEATS = 25


def measure_accuracy(name: str, options: argparse.Namespace) -> surgery.PreserveCurve:
    """Merge at every boundary, once per set of images, and print the table's rows; return the first set's curve."""
    a, b = load_pair(options.shared, name)
    draws = [
        load_images(options.shared, options.cache, calibration=options.calibration, test=options.test, seed=seed)
        for seed in range(options.draws)
    ]
    curves = [
        surgery.preserve_curve(
            a, b, draws[0].test, calibration=draw.calibration, boundaries=list(BOUNDARIES[name]),
            renormalize=options.renormalize,
        )
        for draw in draws
    ]  # fmt: skip
    print(f"\n### {name}\n\n| preserved | layers | flops | params | accuracy (%) | public | agreement (%) |")
    print("|---|---|---|---|---|---|---|")
    for place, (point, public) in enumerate(zip(curves[0].points, BOUNDARIES[name].values(), strict=True)):
        points = [curve.points[place] for curve in curves]
        accuracy = mean_and_spread([100 * (each.accuracy or 0.0) for each in points])
        agreement = mean_and_spread([100 * each.agreement for each in points])
        print(
            f"| {point.boundary} | {point.layers} of {curves[0].depth} | {point.flops:.3f} | {point.parameters:.3f} "
            f"| {accuracy} | {public} | {agreement} |",
            flush=True,
        )
    return curves[0]


def mean_and_spread(figures: list[float]) -> str:
    """As in ``71.44`` or ``71.44 ± 0.20``."""
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.2f}{spread}"


@torch.no_grad()
def measure_times(name: str, size: int, options: argparse.Namespace) -> None:
    """Print a table of inference time over that of one source, for both forms, and one of the source's ops."""
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    a, b = (model.to(memory_format=memory_format) for model in load_pair(options.shared, name))  # merges keep it
    batch = torch.randn(size, 3, options.side, options.side).to(memory_format=memory_format)
    graph_module = surgery.trace(a, batch).eval()
    cuts, ledger = Boundaries(graph_module), Ledger.of(graph_module, (batch,))
    boundaries, forms = list(BOUNDARIES[name])[1:], get_args(Form)[1:]
    merged: dict[str, nn.Module] = {"source": a}
    for boundary in boundaries:
        for form in forms:
            with contextlib.suppress(surgery.SurgeryError):  # no grouped form
                merged[f"{boundary} {form}"] = surgery.merge(
                    a, b, preserve=surgery.Preserve(boundary=boundary, form=form), matching="identity",
                    renormalize=None, example_inputs=batch[:2], progress=False,
                )  # fmt: skip
    ops, seconds = op_seconds(graph_module, batch), least_seconds(merged, batch)
    title = f"{name}, {size} images of {options.side} x {options.side}, {memory_format}"
    print(f"\n### {title}, one source {seconds['source']:.4f} s\n")
    print("| preserved | flops | single ops | grouped | branches |\n|---|---|---|---|---|")
    for boundary in boundaries:
        cut = cuts.cut(boundary)
        single = sum(spent * (2 if op in cut.copied or op in cut.joined else 1) for op, spent in ops.items())
        figures = [(ledger.cost(cut, 2) / ledger.cost(cuts.cut(0), 2)).flops, single / sum(ops.values())]
        figures += [seconds.get(f"{boundary} {form}", math.nan) / seconds["source"] for form in forms]
        print(f"| {boundary} | {' | '.join(f'{figure:.3f}' for figure in figures)} |", flush=True)
    print_ops(graph_module, ops, ledger)


def print_ops(graph_module: fx.GraphModule, seconds: dict[str, float], ledger: Ledger) -> None:
    """What each kind of op of a network takes, of its time and of its FLOPs."""
    modules = dict(graph_module.named_modules())
    kinds: dict[str, list[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op.startswith("call"):
            kind = modules[str(node.target)] if node.op == "call_module" else node.target
            kinds.setdefault(getattr(kind, "__name__", type(kind).__name__), []).append(node.name)
    print("\n| ops of the source | time (%) | FLOPs (%) |\n|---|---|---|")
    for kind, names in kinds.items():
        shares = (sum(of.get(name, 0) for name in names) / sum(of.values()) for of in (seconds, ledger.flops))
        print(f"| {kind} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |", flush=True)


class Timer(fx.Interpreter):
    """Notes the least time of every op over several runs."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.least: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> object:
        """Run one op."""
        start = time.process_time()
        value = super().run_node(n)
        self.least[n.name] = min(self.least.get(n.name, float("inf")), time.process_time() - start)
        return value


def op_seconds(graph_module: fx.GraphModule, batch: Tensor) -> dict[str, float]:
    """The least time of every op of a network."""
    timer = Timer(graph_module)
    for _ in range(REPEATS):
        timer.run(batch)
    return timer.least


def least_seconds(models: dict[str, nn.Module], batch: Tensor) -> dict[str, float]:
    """The least time of each model; they take turns, so that what else the machine does hits all alike."""
    least = dict.fromkeys(models, float("inf"))
    for _ in range(REPEATS):
        for name, model in models.items():
            start = time.process_time()
            model(batch)
            least[name] = min(least[name], time.process_time() - start)
    return least


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and print one table per pair."""
    options = _parser().parse_args(arguments)
    if not is_there(options.shared):
        return
    begin(options.threads)
    for name in options.pair or BOUNDARIES:
        if options.times:
            for size in options.batch or [64]:
                measure_times(name, size, options)
            continue
        curve = measure_accuracy(name, options)
        if options.output:
            options.output.with_stem(f"{options.output.stem}_{name}").write_text(curve.to_json() + "\n")


def _parser() -> argparse.ArgumentParser:
    made = folder_parser(__doc__)
    made.add_argument(
        "--pair", action="append", choices=list(BOUNDARIES), help="measure this pair only; may be repeated"
    )
    made.add_argument("--calibration", type=int, default=5000, help="images for statistics (default: %(default)s)")
    made.add_argument("--test", type=int, default=10_000, help="test images (default: %(default)s)")
    made.add_argument("--draws", type=int, default=1, help="sets of images for statistics (default: %(default)s)")
    made.add_argument("--batch", type=int, action="append", help="images in a batch for times; may be repeated")
    made.add_argument("--times", action="store_true", help="measure inference time instead of accuracy")
    made.add_argument("--side", type=int, default=32, help="side of the images for times (default: %(default)s)")
    made.add_argument("--channels-last", action="store_true", help="time networks and images in this memory format")
    made.add_argument("--renormalize", default="auto", help="for example regress (default: by architecture)")
    made.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON, one file per pair")
    return made


if __name__ == "__main__":
    main()

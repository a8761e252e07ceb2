"""Coverage over whole model libraries: trace, group and verify every model, each in a process of its own.

Weights are random and nothing is downloaded. A process per model keeps one model's memory, time and crashes from the
next; its result is appended to a CSV file at once, so that a survey that was cut off goes on where it stopped.
``python -m vfsurgery.zoo MODEL`` surveys a single model and prints JSON.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vfsurgery.architectures import build_model
from vfsurgery.discovery import discover
from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.examples import example_inputs_of
from vfsurgery.tracing.tracer import trace_module
from vfsurgery.verification import prove

SOURCES = ("timm", "torchvision")
MARK = "vfsurgery-zoo-result "
GIB = 2**30


@dataclass(frozen=True)
class Survey:
    """What one model's survey found; ``failure`` says what went wrong, and where, if anything did.

    ``seconds`` is the time to trace and to find groups, ``verify_seconds`` that of the proof. ``nodes`` are those of
    the traced graph. ``unknown_ops`` and ``reasons`` say why axes are pinned, most frequent reasons first.
    """

    model: str
    groups: int = 0
    coverage: float = 0.0
    nodes: int = 0
    parameters: int = 0
    seconds: float = 0.0
    error: float = float("nan")
    control_error: float = float("nan")
    verified: bool = False
    verify_seconds: float = 0.0
    unknown_ops: str = ""
    reasons: str = ""
    failure: str = ""

    @staticmethod
    def of_row(row: Mapping[str, str]) -> Survey:
        """Read a row of the CSV file."""
        read: dict[str, Callable[[str], Any]] = {"bool": lambda text: text == "True", "int": int, "float": float}
        types = {field.name: str(field.type) for field in dataclasses.fields(Survey)}
        return Survey(**{name: read.get(types[name], str)(text) for name, text in row.items()})


def survey_model(spec: str) -> Survey:
    """Build one model with random weights, find its groups and verify them, here and now.

    All groups are permuted together, with negative controls; see :func:`vfsurgery.verification.prove`.
    """
    torch.manual_seed(0)
    model = build_model(spec).eval()
    inputs = example_inputs_of(model)
    started = time.perf_counter()
    graph_module = trace_module(model, inputs)
    groups = discover(graph_module)
    found = time.perf_counter()
    proof = prove(model, groups, inputs, each=False)
    reasons = Counter[str]()
    for pin in groups.pinned:
        reasons[pin.reason.partition(" (")[0]] += pin.count
    return Survey(
        model=spec,
        groups=len(groups),
        coverage=round(groups.coverage, 6),
        nodes=len(graph_module.graph.nodes),
        parameters=groups.parameter_count,
        seconds=round(found - started, 3),
        error=proof.error,
        control_error=proof.control_error,
        verified=bool(proof),
        verify_seconds=round(time.perf_counter() - found, 3),
        unknown_ops=" ".join(sorted({op.partition(" at node")[0] for op in groups.unknown_ops})),
        reasons="; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(4)),
        failure="" if proof else f"not verified: {proof.worst_group}",
    )


def model_names(sources: Sequence[str], pattern: str = "*") -> list[str]:
    """All names of the given libraries that match a shell pattern, as ``timm:NAME`` or ``torchvision:NAME``."""
    names: list[str] = []
    if "timm" in sources:
        import timm

        names += [f"timm:{name}" for name in timm.list_models()]
    if "torchvision" in sources:
        from torchvision import models

        names += [f"torchvision:{name}" for name in models.list_models()]
    found = [name for name in names if fnmatch.fnmatch(name.partition(":")[2], pattern)]
    if not found:
        raise OptionError(explain(f"no model of {', '.join(sources)} matches {pattern!r}", remedy="try '*resnet*'"))
    return found


def survey_zoo(
    names: Sequence[str],
    table: Path,
    *,
    memory: float = 8.0,
    limit: float = 300.0,
    jobs: int = 1,
    done: Callable[[Survey], None] = lambda survey: None,
) -> list[Survey]:
    """Survey many models, each in a process of its own; models that the table lists already are not run again.

    Args:
        names: Models as :func:`model_names` gives them.
        table: The CSV file, appended to after each model.
        memory: GiB that a model's process may allocate.
        limit: Seconds that it may take.
        jobs: Processes at a time.
        done: Called with every new result.

    Returns:
        The surveys of all ``names``, old and new, in their order.
    """
    known = {survey.model: survey for survey in read_table(table)} if table.exists() else {}
    columns = [field.name for field in dataclasses.fields(Survey)]
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file, ThreadPoolExecutor(jobs) as pool:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not table.stat().st_size:
            writer.writeheader()
        missing = [name for name in names if name not in known]
        running = [pool.submit(_in_process, name, memory, limit) for name in missing]
        for future in as_completed(running):
            survey = future.result()
            known[survey.model] = survey
            writer.writerow(dataclasses.asdict(survey))
            file.flush()
            done(survey)
    return [known[name] for name in names]


def read_table(path: Path) -> list[Survey]:
    """The surveys in a CSV file."""
    with path.open(newline="") as file:
        return [Survey.of_row(row) for row in csv.DictReader(file)]


def _in_process(name: str, memory: float, limit: float) -> Survey:
    command = [sys.executable, "-W", "ignore", "-m", "vfsurgery.zoo", name, str(memory)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Survey(name, failure=f"took longer than {limit:.0f} s")
    for line in ended.stdout.splitlines():
        if line.startswith(MARK):
            return Survey(**json.loads(line.removeprefix(MARK)))
    if ended.returncode < 0 or "MemoryError" in ended.stderr or "allocate memory" in ended.stderr:
        return Survey(name, failure=f"ran out of its {memory:g} GiB of memory, or crashed ({ended.returncode})")
    return Survey(name, failure=" ".join(ended.stderr.split())[-300:])


def page(surveys: Iterable[Survey]) -> str:
    """A Markdown page: totals on top, then what failed and why, then one line per model."""
    rows = list(surveys)
    good = [row for row in rows if row.verified]
    lines = [
        "# Coverage",
        "",
        "Every model below was built with random weights, traced, grouped and verified by `vfsurgery zoo`: in float64,",
        "with random normalization parameters and running statistics, all groups permuted at random at once, with",
        "negative controls. Coverage is the share of parameters that lie in a group.",
        "",
        "| source | models | verified | wrong | over 95 % of parameters grouped | median s to trace and group |",
        "|---|---|---|---|---|---|",
    ]
    for source in sorted({row.model.partition(":")[0] for row in rows}):
        mine = [row for row in rows if row.model.startswith(f"{source}:")]
        proven = [row for row in mine if row.verified]
        wrong = sum(row.failure.startswith("not verified") for row in mine)
        wide = sum(row.coverage > 0.95 for row in proven)
        seconds = sorted(row.seconds for row in proven)
        middle = f"{seconds[len(seconds) // 2]:.2f}" if seconds else ""
        lines.append(f"| {source} | {len(mine)} | {len(proven)} | {wrong} | {wide} | {middle} |")
    failed = [row for row in rows if not row.verified]
    if failed:
        lines += ["", "## Not verified", "", "| model | why |", "|---|---|"]
        lines += [f"| {row.model} | {_cell(row.failure)} |" for row in failed]
    short = [row for row in good if row.coverage <= 0.95]
    if short:
        lines += ["", "## Verified, with 95 % of parameters or fewer in groups", ""]
        lines += ["| model | coverage | indices pinned most, and ops without a rule |", "|---|---|---|"]
        lines += [f"| {row.model} | {row.coverage:.1%} | {_cell(row.reasons)} {row.unknown_ops} |" for row in short]
    lines += ["", "## Verified", "", "| model | groups | coverage | nodes | s | error |", "|---|---|---|---|---|---|"]
    for row in good:
        lines.append(
            f"| {row.model} | {row.groups} | {row.coverage:.2%} | {row.nodes} | {row.seconds:.2f} | {row.error:.0e} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(name: str, memory: float) -> None:
    """Survey one model under a memory limit and print the result as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIB), resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    print(MARK + json.dumps(dataclasses.asdict(survey_model(name))))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 8.0)

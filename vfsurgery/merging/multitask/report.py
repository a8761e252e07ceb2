"""What making a network of several tasks leaves to be read: the heads, and how near each task comes to its expert."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vfsurgery.data.batches import Batches
from vfsurgery.merging.multitask.adapted import Adapted
from vfsurgery.merging.multitask.joined import Multitask
from vfsurgery.passes.agreement import class_logits
from vfsurgery.records.report import MergeReport, Report
from vfsurgery.stats.precision import taken_by
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.values import judged


@dataclass(frozen=True)
class TaskRecord:
    """One task: its classes, its head and what told that it is one, and how it came about where that matters.

    ``agreement`` is the share of its images, 0 to 1, on which the largest logit is the expert's; ``None`` where there
    were none. It is that of the images given, which statistics may have seen.
    """

    task: str
    classes: int
    labels: tuple[str, ...] | None
    head: tuple[str, ...]
    signs: tuple[str, ...]
    route: str
    agreement: float | None

    def __str__(self) -> str:
        head = f"head {', '.join(self.head)} ({'; '.join(self.signs)})" if self.head else "head merged like the trunk"
        told = "" if self.agreement is None else f", agrees with its expert on {self.agreement:.1%} of its images"
        route = f"; {self.route}" if self.route else ""
        return f"{self.task}: {self.classes} classes, {head}{route}{told}"


@dataclass(frozen=True)
class MultitaskReport(Report):
    """All that happened when experts became one network; ``merge`` is what became of their trunks.

    ``batchnorm`` says whose statistics BatchNorm layers have; empty where there are none. ``learned`` is what
    AdaMerging found, where that was the method.
    """

    tasks: tuple[TaskRecord, ...]
    batchnorm: str
    merge: MergeReport
    learned: Adapted | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        plain = {"tasks": [asdict(task) for task in self.tasks], "batchnorm": self.batchnorm}
        learned = {} if self.learned is None else {"learned": self.learned.to_dict()}
        return {**plain, **learned, "merge": self.merge.to_dict()}

    def __str__(self) -> str:
        lines = [f"{len(self.tasks)} tasks in one network", *(f"  {task}" for task in self.tasks)]
        lines += [f"  BatchNorm statistics: {self.batchnorm}"] if self.batchnorm else []
        lines += [] if self.learned is None else [f"  {line}" for line in str(self.learned).splitlines()]
        return "\n".join([*lines, *(f"  {line}" for line in str(self.merge).splitlines())])


def agreement(network: Multitask, task: str, expert: nn.Module, images: Batches, every: int = 1) -> float:
    """The share of images on which a task's largest logit is its expert's; of one image in ``every``."""
    same, seen = 0.0, 0
    with eval_mode(network, expert):
        for batch, _ in images:
            batch = batch[::every]
            found, expected = judged(network(taken_by(network, batch), task=task)), class_logits(expert, batch)
            assert found is not None and expected is not None  # experts without logits were refused
            same += float(
                (found.argmax(1) == expected.argmax(1)).double().flatten(1 if expected.ndim > 2 else 0).mean()
            ) * len(batch)
            seen += len(batch)
    return same / max(seen, 1)


def fitted_temperature(network: Multitask, task: str, expert: nn.Module, images: Batches) -> float:
    """What to divide a task's logits by so that it is as sure, on average, as it agrees with its expert.

    Found by halving between 0.05 and 20.
    """
    wanted = agreement(network, task, expert, images)
    with eval_mode(network):
        each = [judged(network(taken_by(network, batch), task=task)) for batch, _ in images]
    logits = torch.cat([x.double().movedim(1, -1).flatten(0, -2) for x in each if x is not None])
    low, high = 0.05, 20.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        sure = float((logits / middle).softmax(1).amax(1).mean())
        low, high = (middle, high) if sure > wanted else (low, middle)
    return (low * high) ** 0.5

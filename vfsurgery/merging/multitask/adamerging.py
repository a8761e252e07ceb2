"""AdaMerging: how much of each task vector, learned on images without labels.

Published (Yang et al., ICLR 2024): ``theta^l = theta_0^l + sum_k lambda_k^l tau_k^l``, one coefficient for each task or
for each task and tensor, which minimize the entropy of the merged network's predictions, each task with its own head.
The authors' code holds the graph of the merge, all models and two backward graphs for each task, clamps coefficients in
the forward, so that one that has crossed the border stays there, and judges on the images that it learned from.

Here one network is in memory, and its gradients; coefficients are clamped after a step, if at all; and what is learned
is judged on images that were held out. Experts that are unsure make entropy a bad guide: it shuts their tasks down. So
by default the merged network learns what each expert says of the images of its task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import check_choice
from vfsurgery.data.batches import Data
from vfsurgery.data.holdout import First
from vfsurgery.data.progress import progress as with_bar
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.merging.multitask.adapted import Adapted, Look
from vfsurgery.merging.multitask.twins import Trunk, Twin
from vfsurgery.merging.multitask.vectors import Grouping, added, agreeing, entries_of, plain, rows_of, slopes
from vfsurgery.stats.precision import batches_for
from vfsurgery.stats.threads import device_of
from vfsurgery.stats.together import run_kept
from vfsurgery.tracing.values import judged

Objective: TypeAlias = Literal["experts", "entropy"]
AT_ONCE, LOOKED_AT = 128, 256
"""Images that run together where there is no backward pass, and those that statistics are estimated on on the way."""
COMMON = 0.75
"""A network that finds one class in all held-out images has collapsed if its expert finds that in fewer of them."""


@dataclass
class _Task:
    """Images to learn from and held-out ones, and what the expert says of them, ``(images, classes, ...)``."""

    twin: Twin
    images: Tensor
    goals: Tensor
    held: Tensor
    held_goals: Tensor
    generator: torch.Generator

    @property
    def unit(self) -> float:
        """The largest entropy that there is: tasks with many classes count no more than others."""
        return math.log(self.goals.shape[1])

    def draws(self, size: int) -> Iterator[Tensor]:
        """Places of images, without end: all of them in random order, then anew."""
        left = torch.empty(0, dtype=torch.int64)
        while True:
            while len(left) < size:
                left = torch.cat([left, torch.randperm(len(self.images), generator=self.generator)])
            yield left[:size]
            left = left[size:]


def adapt(
    base: Mapping[str, Tensor],
    experts: Mapping[str, nn.Module],
    trunk: Sequence[str],
    data: Mapping[str, Data],
    *,
    by: Grouping = "tensor",
    objective: Objective = "experts",
    plus: bool = False,
    start: float = 0.3,
    steps: int = 100,
    lr: float = 5e-3,
    clamp: tuple[float, float] | None = None,
    batch_size: int = 16,
    images: int = 1024,
    held_out: float = 0.2,
    every: int | None = None,
    patience: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Adapted:
    """Learn how much of each expert's task vector goes into one trunk.

    Args:
        base: Tensors of the checkpoint that all experts were fine-tuned from, the trunk's at least.
        experts: By task, networks whose trunks have the same names, each with its own head. They stay as they are.
        trunk: Names of the tensors that all have in common: parameters, and buffers if wanted.
        data: By task, images as for :func:`~vfsurgery.merge`; labels are not looked at.
        by: What has a coefficient for each task: the whole, each block, module, or tensor (the paper's "layer").
        objective: What is minimized: the cross-entropy to what each expert says, or the ``"entropy"`` of what the
            merged network says (published); both divided by the logarithm of the number of classes.
        plus: Take of each task vector only what TIES keeps and elects ("AdaMerging++").
        start: All coefficients at the beginning: task arithmetic of that scale.
        steps: Of Adam, each on ``batch_size`` images of every task.
        lr: Learning rate.
        clamp: Least and largest coefficient after each step.
        batch_size: Images of each task in a step.
        images: Of each task at most so many are read.
        held_out: Share of these that is not learned from, one in ``1 / held_out``.
        every: Steps between two looks at held-out images; by default a tenth of all.
        patience: After so many looks without a gain it ends.
        seed: Of the order of images.
        progress: Show a bar for work that takes over a second.

    Returns:
        The coefficients of the look that agreed best with the experts on held-out images, the start included, so they
        are never worse there than the start's. Looks at which a task collapses to one class are passed over.

    Raises:
        OptionError: an option is out of its range.
        DataError: there are no images for a task, or too few to hold some out.
        IncompatibleModelsError: the trunk differs between experts and base.

    All layers are in eval mode, except that the trunk's BatchNorm layers take the statistics of each batch of a step,
    and at looks those of the task's own images: both with the weights at hand, and no buffer changes. Memory beyond the
    experts: the trunk and its gradients, one task vector of one tensor (with ``plus`` those of all tasks), heads,
    images and the activations of one batch.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    >>> import copy
    >>> a, b = copy.deepcopy(net), copy.deepcopy(net)
    >>> with torch.no_grad():
    ...     _ = a[0].weight.add_(1), b[0].bias.sub_(1)
    >>> pictures = {"a": torch.randn(40, 4), "b": torch.randn(40, 4)}
    >>> found = adapt(net.state_dict(), {"a": a, "b": b}, ["0.weight", "0.bias"], pictures, steps=20, progress=False)
    >>> found.rows, found.chosen.mean >= found.looks[0].mean
    (('0.weight', '0.bias'), True)
    """
    _check(experts, data, by, objective, steps, clamp, held_out, batch_size, images)
    shared = Trunk.of(trunk, base, experts)
    states = [expert.state_dict(keep_vars=True) for expert in experts.values()]
    entries = entries_of(shared.leaves, base, states)
    vectors = agreeing([*entries.values()]) if plus else plain
    rows = rows_of(shared.leaves, next(iter(experts.values())), by)
    places = {row: place for place, row in enumerate(dict.fromkeys(rows.values()))}
    tasks = [
        _task(name, expert, shared, base, data[name], images, held_out, seed + number)
        for number, (name, expert) in enumerate(experts.items())
    ]
    coefficients = torch.full((len(places), len(tasks)), float(start), dtype=torch.float64)
    optimizer = torch.optim.Adam([coefficients], lr=lr)

    @torch.no_grad()
    def put(values: Tensor) -> None:
        for name, leaf in shared.leaves.items():
            leaf.copy_(added(entries[name], vectors, values[places[rows[name]]].tolist()))

    def step(batches: Sequence[Tensor]) -> None:
        for task, chosen in zip(tasks, batches, strict=True):
            chosen = chosen.to(task.images.device)
            with task.twin.on_batches() if len(chosen) > 1 else nullcontext():
                loss = _loss(task.twin.logits(task.images[chosen]), task.goals[chosen], objective) / task.unit
            if loss.requires_grad:
                loss.backward()
        gradient = torch.zeros_like(coefficients)
        for name, leaf in shared.leaves.items():
            if leaf.grad is not None:
                found, leaf.grad = slopes(entries[name], vectors, leaf.grad), None  # no longer in memory
                gradient[places[rows[name]]] += torch.tensor(found, dtype=torch.float64)
        coefficients.grad = gradient
        optimizer.step()
        if clamp is not None:
            coefficients.clamp_(*clamp)

    put(coefficients)
    looks, kept, without_gain = [_look(tasks, 0)], coefficients.clone(), 0
    best, every = looks[0], every or max(1, steps // 10)
    draws = zip(*(task.draws(min(batch_size, len(task.images))) for task in tasks), strict=True)
    for number, batches in with_bar(zip(range(1, steps + 1), draws, strict=False), "AdaMerging", steps, progress):
        step(batches)
        put(coefficients)
        if number % every and number < steps:
            continue
        looks.append(_look(tasks, number))
        if looks[-1].better_than(best) and set(looks[-1].collapsed) <= set(looks[0].collapsed):
            best, kept, without_gain = looks[-1], coefficients.clone(), 0
        elif (without_gain := without_gain + 1) >= patience:
            break
    put(kept)
    statistics = {task.twin.task: _estimated(task) for task in tasks}
    tensors: dict[str, Tensor] = {name: leaf.detach() for name, leaf in shared.leaves.items()}
    own = tasks[0].twin.model.state_dict()
    for name in shared.others:
        known = [each[name] for each in statistics.values() if name in each]
        tensors[name] = torch.stack(known).mean(0) if known else own[name].clone()
    members: dict[str, list[str]] = {row: [] for row in places}
    for name, row in rows.items():
        members[row].append(name)
    return Adapted(
        tuple(experts),
        tuple(places),
        tuple(map(tuple, kept.tolist())),
        members,
        tensors,
        statistics,
        tuple(looks),
        best.step,
        _why(looks, best, steps),
        "what experts say" if objective == "experts" else "entropy",
        tuple(len(task.held) for task in tasks),
        tuple(_notes(looks, tasks)),
    )


def _check(
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
    by: str,
    objective: str,
    steps: int,
    clamp: tuple[float, float] | None,
    held_out: float,
    batch_size: int,
    images: int,
) -> None:
    check_choice("by", by, get_args(Grouping))
    check_choice("objective", objective, get_args(Objective))
    if not experts:
        raise OptionError(explain("there is no expert", remedy='experts={"cars": model, ...}'))
    lacking = [name for name in experts if name not in data]
    foreign = [name for name in data if name not in experts]
    if lacking or foreign:
        raise DataError(
            explain(
                f"there are no images for task {lacking[0]!r}" if lacking else f"there is no expert for {foreign[0]!r}",
                tasks=", ".join(experts),
                data=", ".join(data),
                remedy='data={"task": images, ...} for each task of experts',
            )
        )
    if steps < 0 or batch_size < 1 or images < 2 or not 0 < held_out <= 0.5:
        raise OptionError(
            explain(
                "AdaMerging needs steps >= 0, batch_size >= 1, images >= 2 and held_out in (0, 0.5]",
                given=f"steps={steps}, batch_size={batch_size}, images={images}, held_out={held_out}",
            )
        )
    if clamp is not None and not clamp[0] < clamp[1]:
        raise OptionError(explain(f"clamp={clamp} leaves no coefficient", remedy="clamp=(0.0, 1.0), or None"))


def _task(
    name: str,
    expert: nn.Module,
    trunk: Trunk,
    base: Mapping[str, Tensor],
    data: Data,
    most: int,
    held_out: float,
    seed: int,
) -> _Task:
    batches = batches_for(expert, data, device_of(expert))
    images = torch.cat([*First(batches, most)])
    every = max(2, round(1 / held_out))
    held = torch.arange(len(images), device=images.device) % every == every - 1
    if not held.any():
        raise DataError(
            explain(
                f"task {name!r} has too few images to hold some out",
                images=len(images),
                expected=f"at least {every}: one in {every} is held out",
            )
        )
    twin = Twin(name, expert, trunk, base)
    said = [judged(run_kept(expert, (part,))) for part in images.split(AT_ONCE)]
    if any(each is None or each.ndim < 2 or each.shape[1] < 2 for each in said):
        raise DataError(explain(f"the expert of task {name!r} returns no logits of two classes or more"))
    logits = torch.cat([each for each in said if each is not None])
    goals = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    generator = torch.Generator().manual_seed(seed)
    return _Task(twin, images[~held], goals[~held], images[held], goals[held], generator)


def _loss(logits: Tensor, goals: Tensor, objective: str) -> Tensor:
    """Mean over images of the cross-entropy to the goals, or of the entropy, in nats."""
    logs = logits.log_softmax(1)
    shares = goals.to(logs) if objective == "experts" else logs.exp()
    return -torch.where(shares > 0, shares * logs, 0).sum(1).mean()


def _estimated(task: _Task, most: int | None = None) -> dict[str, Tensor]:
    images = task.images[:most]
    task.twin.estimate(images.tensor_split(-(-len(images) // AT_ONCE)))  # no batch is much smaller than others
    return task.twin.statistics()


@torch.no_grad()
def _look(tasks: Sequence[_Task], step: int) -> Look:
    agreement: list[float] = []
    losses: list[float] = []
    collapsed: list[str] = []
    for task in tasks:
        _estimated(task, LOOKED_AT)
        logits = torch.cat([task.twin.logits(part) for part in task.held.split(AT_ONCE)])
        found, expected = logits.argmax(1), task.held_goals.argmax(1)
        agreement.append(float((found == expected).double().mean()))
        losses.append(float(_loss(logits, task.held_goals, "experts")) / task.unit)
        only = found.unique()
        if len(only) == 1 and float((expected == only).double().mean()) < COMMON:
            collapsed.append(task.twin.task)
    loss = sum(losses) / len(losses)
    return Look(step, tuple(agreement), loss if math.isfinite(loss) else math.inf, tuple(collapsed))


def _why(looks: Sequence[Look], best: Look, steps: int) -> str:
    start, held = looks[0], "on held-out images"
    if best.step:
        ended = f", ended at {looks[-1].step}" if looks[-1].step < steps else ""
        return (
            f"coefficients of step {best.step} of {steps}{ended}: they agree with the experts on {best.mean:.1%} "
            f"{held}, {start.mean:.1%} at the start"
        )
    if len(looks) == 1:
        return f"the start was kept: no step was taken; it agrees with the experts on {start.mean:.1%} {held}"
    ahead = [look for look in looks[1:] if look.better_than(start)]
    if ahead:
        lost = next(task for task in ahead[0].collapsed if task not in start.collapsed)
        return f"the start was kept: wherever agreement was better, {lost!r} had collapsed to one class"
    most = max(looks[1:], key=lambda look: look.mean)
    return (
        f"the start was kept: it agrees with the experts on {start.mean:.1%} {held}, and on {most.mean:.1%} at best "
        "after that"
    )


def _notes(looks: Sequence[Look], tasks: Sequence[_Task]) -> Iterator[str]:
    for task in tasks:
        steps = [look.step for look in looks if task.twin.task in look.collapsed]
        if steps:
            yield (
                f"{task.twin.task!r} collapsed to one class for all of {len(task.held)} held-out images at step "
                f"{steps[0]}" + (f" and {len(steps) - 1} later looks" if len(steps) > 1 else "")
            )

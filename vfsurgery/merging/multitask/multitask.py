"""``multitask``: experts with different classes become one network with a trunk and a head for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from vfsurgery.combining.base import Combiner
from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import mixed
from vfsurgery.discovery.recording import record
from vfsurgery.errors import DataError, explain
from vfsurgery.merging.ancestry import Plan, Scale, check_data, fitting_to, plan_combining
from vfsurgery.merging.arguments import Matchings, matcher_of, warn_of_norms
from vfsurgery.merging.finished import report_on
from vfsurgery.merging.multitask.heads import Head, find_heads
from vfsurgery.merging.multitask.joined import Multitask
from vfsurgery.merging.multitask.joining import join
from vfsurgery.merging.multitask.labels import Labels
from vfsurgery.merging.multitask.learned import AdaMerging, learn, learning_of
from vfsurgery.merging.multitask.report import MultitaskReport, TaskRecord, agreement, fitted_temperature
from vfsurgery.merging.multitask.requests import (
    Images,
    checked_experts,
    classes_of,
    images_of,
    names_of,
)
from vfsurgery.merging.multitask.statistics import measure_apart, measure_joint
from vfsurgery.merging.multitask.trunks import Made, Trunks, grouped_twins
from vfsurgery.merging.multitask.unions import check_same_labels, join_rows
from vfsurgery.merging.prepared import Clock, Grouped, common_device
from vfsurgery.passes.normalizations import Renormalization
from vfsurgery.records.results import remember
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.stats.together import examples_of
from vfsurgery.tracing.bound import refuse_bound
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.selection import Leaf
from vfsurgery.tracing.sources import eval_mode


def multitask(
    experts: Mapping[str, nn.Module],
    *,
    base: nn.Module | Mapping[str, Tensor] | str | None = None,
    method: str | Combiner | AdaMerging = "mean",
    scale: Scale = None,
    weights: Sequence[float] | None = None,
    data: Images = None,
    heads: str = "keep",
    head: str | Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    batchnorm: str = "auto",
    matching: Matchings = "auto",
    renormalize: Renormalization = "auto",
    example_inputs: ExampleInputs | None = None,
    leaf: Leaf | Sequence[Leaf] = (),
    pins: str | Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Multitask:
    """Make one network of experts for different tasks: one trunk, merged, and behind it the head of each.

    Heads are found, and take no part in the merge: a mean of two lists of classes means nothing. The trunks are
    combined as :func:`~vfsurgery.merge` does; where they come of different seeds, their units are matched first, and
    each head reads them in the order that they then have. The experts stay as they are.

    Args:
        experts: At least two models by the name of their task, which is a file name, too. They may differ in their
            heads alone: in numbers of classes, or in layers.
        base: The checkpoint that all were fine-tuned from, a model or its state dict; its head may be any. Without one
            the experts come of different seeds, and are aligned.
        method: How trunks are combined: ``"mean"``, ``"task-arithmetic"``, ``"ties"``, ... as listed in
            docs/fine_tuned.md, a :class:`~vfsurgery.combining.Combiner`, or ``"auto"`` to try several with ``data``;
            ``"adamerging"``, or :class:`~vfsurgery.merging.multitask.learned.AdaMerging` with options, learns on
            ``data`` how much of each expert goes into each tensor.
        scale: What the combined differences are multiplied by; of several numbers the one is kept with which tasks
            agree best with their experts, on average, on every fifth image.
        weights: A number for each expert.
        data: Images without labels, of each task: ``{"cars": images, "pets": images}``; or of all together.
        heads: ``"keep"`` each expert's own; ``"same"`` for experts of equal classes, whose heads are merged, too;
            ``"union"``: classes of equal name in several tasks get the mean of their rows, and
            :func:`~vfsurgery.merging.multitask.unions.union_model` makes one plain model of all classes.
        head: Paths of modules, or names of tensors, that are the head, where it is not found.
        labels: Names of classes by task, where models do not say them (timm's ``label_names``, transformers'
            ``id2label``).
        batchnorm: ``"per-task"``: every task has running statistics of its own images, two numbers a unit, which is
            best where the task is known; ``"joint"``: statistics of all images together; ``"average"``: the mean of
            the experts'. ``"auto"`` is per task where there is ``data``, else the average.
        matching: As for :func:`~vfsurgery.merge`; units are reordered, or mapped by ``"zipit"`` and ``"cca"``.
        renormalize: As for :func:`~vfsurgery.merge`, for units that were aligned; ``"auto"`` is what suits the
            architecture, and where statistics of BatchNorm layers are measured, nothing else.
        example_inputs: As for :func:`~vfsurgery.trace`.
        leaf: As for :func:`~vfsurgery.trace`.
        pins: As for :func:`~vfsurgery.find_groups`.
        seed: Of random orders and draws.
        progress: Whether to show bars.

    Returns:
        The network, in eval mode. :func:`~vfsurgery.report_of` it says what was done, and how often each task agrees
        with its expert.

    Raises:
        IncompatibleModelsError: trunks differ, or no head is found.
        OptionError: an argument is not acceptable.
        DataError: images are missing for a task, or where something needs them.
        InvalidWeightsError: an expert holds NaN or infinite values.
        CertificateError: a reordering changed what an expert computes.

    >>> import torch
    >>> cars, pets = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (3, 2))
    >>> both = multitask({"cars": cars, "pets": pets}, example_inputs=torch.randn(2, 4), progress=False)
    >>> {task: tuple(logits.shape) for task, logits in both(torch.randn(5, 4)).items()}
    {'cars': (5, 3), 'pets': (5, 2)}
    >>> both.task("pets")[2].out_features
    2
    """
    tasks = checked_experts(experts, heads, batchnorm)
    models = [*tasks.values()]
    learning = learning_of(method, base, data, scale)
    combine = "task-arithmetic" if learning is not None or isinstance(method, AdaMerging) else method
    plan = plan_combining(len(models), base, combine, scale if learning is None else learning.start, weights)
    assert plan is not None  # a method is always named
    matching = fitting_to(plan, matching, 0.5)
    clock, device = Clock(), common_device(models)
    images = images_of(data, tasks, device)
    check_data(plan, bool(images))
    matcher = matcher_of(matching, bool(images))
    if batchnorm in ("joint", "per-task") and not images:
        raise DataError(
            explain(f"batchnorm={batchnorm!r} needs data", remedy='data={task: images, ...}; or batchnorm="average"')
        )
    with clock("trace and heads"):
        every = mixed([*images.values()]) if images else None
        inputs, every = examples_of(models[0], every, example_inputs)
        if every is not None and every.together > 1:
            images = {task: own.in_runs(every.together) for task, own in images.items()}
        graphs = [record(fresh(model, inputs), inputs, leaf) for model in models]
        for graph in graphs:
            refuse_bound(graph)
        state = plan.ancestry.base if isinstance(plan.ancestry.base, Mapping) else None
        known = {task: classes_of(task, model, inputs) for task, model in tasks.items()}
        names = names_of(tasks, known, labels)
        if heads == "same":
            check_same_labels(known, names)
            found = [Head({}) for _ in models]
        else:
            found = find_heads(models, graphs, state, head)
        joined = join(tasks, graphs, found)
    with clock("groups"):
        grouped = grouped_twins(tasks, joined, inputs, every, images, pins, seed, progress, clock)
    with grouped.running():
        settle = partial(_settle, images=images, heads=heads, batchnorm=batchnorm, plan=plan, grouped=grouped)
        made = Trunks(grouped, joined, plan, matcher, renormalize, tasks).best(images, names, known, settle)
    result, learned = made.result, None
    if learning is not None:
        assert isinstance(made.ancestry.base, Mapping)  # a base was asked for
        with clock("learn"):
            learned = learn(learning, result, made.ancestry.base, tasks, images, seed, progress)
    told = settle(result)
    for task, own in images.items():
        result.temperatures[task] = fitted_temperature(result, task, tasks[task], own)
    report = replace(_report(made, tasks, found, known, names, images, told), learned=learned)
    remember(result, report)
    return result


def _settle(
    result: Multitask, images: Mapping[str, Batches], heads: str, batchnorm: str, plan: Plan, grouped: Grouped
) -> str:
    """Join rows of heads, and give BatchNorm layers their statistics; in one word, which, empty without such layers."""
    if heads == "union":
        join_rows(result)
    norms = batch_norm_nodes(result.network)
    if not norms:
        return ""
    if batchnorm == "auto":
        batchnorm = "per-task" if images else "average"
    if batchnorm == "average":
        if plan.aligned and not images:
            warn_of_norms(result.network)
        return batchnorm
    with grouped.clock("statistics of tasks"), eval_mode(result):
        measure_joint(result, images, grouped.progress)
        if batchnorm == "per-task":
            result.hold(measure_apart(result, images, grouped.progress))
    return batchnorm


def _report(
    made: Made,
    tasks: Mapping[str, nn.Module],
    heads: Sequence[Head],
    classes: Mapping[str, int],
    labels: Mapping[str, Labels],
    images: Mapping[str, Batches],
    batchnorm: str,
) -> MultitaskReport:
    records = tuple(
        TaskRecord(
            task,
            classes[task],
            labels[task],
            tuple(found.layers),
            tuple(dict.fromkeys(found.signs.values())),
            found.route,
            agreement(made.result, task, tasks[task], images[task]) if images else None,
        )
        for task, found in zip(tasks, heads, strict=True)
    )
    merged = report_on(made.choice, made.notes, None, made.ancestry)
    merged = replace(merged, model=type(next(iter(tasks.values()))).__name__)
    return MultitaskReport(records, batchnorm, merged)

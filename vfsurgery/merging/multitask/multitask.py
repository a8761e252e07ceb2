"""``multitask``: experts with different classes become one network with a trunk and a head for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import Combiner, Kind
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.holdout import mixed
from vfsurgery.discovery import discover
from vfsurgery.discovery.maps import map_tensor
from vfsurgery.discovery.recording import record
from vfsurgery.errors import DataError, OptionError, SurgeryError, did_you_mean, explain, warn
from vfsurgery.matching import Matcher
from vfsurgery.merging.aligned import Certified, certify_sources, match_sources
from vfsurgery.merging.ancestry import Ancestry, Plan, Scale, check_data, fitting_to, plan_combining
from vfsurgery.merging.arguments import Matchings, matcher_of, warn_of_norms
from vfsurgery.merging.choosing import Choice
from vfsurgery.merging.combined import Combined, Terms, combine
from vfsurgery.merging.finished import report_on
from vfsurgery.merging.multitask.heads import Head, find_heads, skeleton
from vfsurgery.merging.multitask.joined import Multitask, Task
from vfsurgery.merging.multitask.joining import Joined, join
from vfsurgery.merging.multitask.labels import Labels, check_labels, labels_of
from vfsurgery.merging.multitask.report import MultitaskReport, TaskRecord, agreement
from vfsurgery.merging.multitask.statistics import measure_apart, measure_joint
from vfsurgery.merging.multitask.unions import check_same_labels, join_rows
from vfsurgery.merging.prepared import Clock, Grouped, common_device
from vfsurgery.merging.shares import equal_shares
from vfsurgery.merging.sparse import refuse_hooks
from vfsurgery.merging.surveyed import Surveyed, Way, plan_survey
from vfsurgery.passes import Pass
from vfsurgery.passes.agreement import class_logits
from vfsurgery.passes.normalizations import normalizations
from vfsurgery.records.results import remember
from vfsurgery.stats.batch_norms import batch_norm_nodes
from vfsurgery.stats.precision import batches_for
from vfsurgery.stats.together import examples_of, in_bound_runs
from vfsurgery.tracing.bound import refuse_bound
from vfsurgery.tracing.compatibility import check_weights
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.examples import ExampleInputs, normalization_of
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.selection import Leaf
from vfsurgery.tracing.sources import Source, canonical_state, eval_mode
from vfsurgery.tracing.wrappers import network

HEADS = ("keep", "same", "union")
BATCHNORM = ("auto", "joint", "per-task", "average")

Images: TypeAlias = Data | Mapping[str, Data] | None


def multitask(
    experts: Mapping[str, nn.Module],
    *,
    base: nn.Module | Mapping[str, Tensor] | str | None = None,
    method: str | Combiner = "mean",
    scale: Scale = None,
    weights: Sequence[float] | None = None,
    data: Images = None,
    heads: str = "keep",
    head: str | Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    batchnorm: str = "auto",
    matching: Matchings = "auto",
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
            docs/fine_tuned.md, a :class:`~vfsurgery.combining.Combiner`, or ``"auto"`` to try several with ``data``.
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

    >>> cars, pets = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (3, 2))
    >>> both = multitask({"cars": cars, "pets": pets}, example_inputs=torch.randn(2, 4), progress=False)
    >>> {task: tuple(logits.shape) for task, logits in both(torch.randn(5, 4)).items()}
    {'cars': (5, 3), 'pets': (5, 2)}
    >>> both.task("pets")[2].out_features
    2
    """
    tasks = _checked(experts, heads, batchnorm)
    models = [*tasks.values()]
    plan = plan_combining(len(models), base, method, scale, weights)
    assert plan is not None  # a method is always named
    matching = fitting_to(plan, matching, 0.5)
    clock, device = Clock(), common_device(models)
    images = _images(data, tasks, device)
    check_data(plan, bool(images))
    matcher = matcher_of(matching, bool(images))
    if batchnorm in ("joint", "per-task") and not images:
        raise DataError(
            explain(f"batchnorm={batchnorm!r} needs data", remedy='data={task: images, ...}; or batchnorm="average"')
        )
    with clock("trace and heads"):
        every = mixed([*images.values()]) if images else None
        inputs, every = examples_of(models[0], every, example_inputs)
        graphs = [record(fresh(model, inputs), inputs, leaf) for model in models]
        for graph in graphs:
            refuse_bound(graph)
        state = plan.ancestry.base if isinstance(plan.ancestry.base, Mapping) else None
        known = {task: _classes(task, model, inputs) for task, model in tasks.items()}
        names = _labels(tasks, known, labels)
        if heads == "same":
            check_same_labels(known, names)
            found = [Head({}) for _ in models]
        else:
            found = find_heads(models, graphs, state, head)
        joined = join(tasks, graphs, found)
    with clock("groups"):
        grouped = _grouped(tasks, joined, inputs, every, images, pins, seed, progress, clock)
    with grouped.running():
        made = _Merge(grouped, joined, plan, matcher, tasks).best(images, names, known)
    result = made.result
    if heads == "union":
        join_rows(result)
    told = _statistics(result, images, batchnorm, plan, progress, clock)
    report = _report(made, tasks, found, known, names, images, told)
    remember(result, report)
    return result


def _checked(experts: Mapping[str, nn.Module], heads: str, batchnorm: str) -> dict[str, nn.Module]:
    """The experts' networks by task.

    Raises:
        OptionError: names, numbers or choices are not acceptable.
    """
    if not isinstance(experts, Mapping):
        raise OptionError(
            explain(
                "experts are models by task", remedy='multitask({"cars": cars, "pets": pets}); for equal tasks merge'
            )
        )
    for name, given, accepted in (("heads", heads, HEADS), ("batchnorm", batchnorm, BATCHNORM)):
        if given not in accepted:
            raise OptionError(explain(f"unknown {name} {given!r}", remedy=did_you_mean(str(given), accepted)))
    check_tasks([*experts])
    models = {task: network(model, f"the expert {task!r}") for task, model in experts.items()}
    empty = next((task for task, model in models.items() if not any(True for _ in model.parameters())), None)
    if empty is not None:
        raise OptionError(f"the expert {empty!r}, a {type(models[empty]).__name__}, has no parameters")
    refuse_hooks([*models.values()])
    check_weights([*models.values()])
    configured = {task: normalization_of(model) for task, model in models.items()}
    differing = {said for said in configured.values() if said is not None}
    if len(differing) > 1:
        told = "; ".join(f"{task}: mean {said[0]}, std {said[1]}" for task, said in configured.items() if said)
        warn(
            "the experts expect differently normalized images, and one trunk sees them all: "
            f"{told}; normalize the images of each task as its expert expects, or fine-tune with equal settings"
        )
    return models


def check_tasks(names: Sequence[str]) -> None:
    """Refuse fewer than two tasks, and names that cannot be those of files, or are those of the same file.

    Raises:
        OptionError: names the task.

    >>> check_tasks(["cars", "../pets"])
    Traceback (most recent call last):
    vfsurgery.errors.OptionError: '../pets' is no name of a task
      remedy  letters, digits, dashes, underscores, dots and spaces: it names a file
    """
    if len(names) < 2:
        raise OptionError(
            explain(f"there are {len(names)} tasks", remedy="at least two: for one, the expert is all that is needed")
        )
    seen: dict[str, str] = {}
    for name in names:
        plain = isinstance(name, str) and name.strip() == name and name.replace("-", "").replace("_", "")
        allowed = plain and all(each.isalnum() or each in "-_. " for each in name) and not name.startswith(".")
        if not allowed:
            remedy = "letters, digits, dashes, underscores, dots and spaces: it names a file"
            raise OptionError(explain(f"{name!r} is no name of a task", remedy=remedy))
        other = seen.setdefault(name.casefold(), name)
        if list(names).count(name) > 1 or other != name:
            raise OptionError(
                explain(f"two tasks are called {name!r}", remedy="names that differ in more than upper and lower case")
            )


def _images(data: Images, tasks: Mapping[str, nn.Module], device: torch.device) -> dict[str, Batches]:
    """Images of each task; the same for all where they were not given apart.

    Raises:
        DataError: a task has none.
    """
    if data is None:
        return {}
    given = data if isinstance(data, Mapping) else dict.fromkeys(tasks, data)
    missing, unknown = [task for task in tasks if task not in given], [task for task in given if task not in tasks]
    if missing or unknown:
        fact = f"there are images of {unknown[0]!r}, which is no task" if unknown else f"{missing[0]!r} has no images"
        raise DataError(
            explain(fact, tasks=", ".join(tasks), remedy="data={task: images, ...}, one entry for each task")
        )
    return {task: batches_for(tasks[task], given[task], device) for task in tasks}


def _classes(task: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """How many classes an expert tells apart.

    Raises:
        OptionError: it returns no logits.
    """
    with eval_mode(model), torch.random.fork_rng([]):
        logits = class_logits(model, inputs[0]) if len(inputs) == 1 else None
    if logits is None:
        remedy = "experts that return logits (N, classes, ...) of one input, or a dict or tuple that begins with them"
        raise OptionError(explain(f"the expert {task!r} does not tell classes apart", remedy=remedy))
    return logits.shape[1]


def _labels(
    tasks: Mapping[str, nn.Module], classes: Mapping[str, int], given: Mapping[str, Sequence[str]] | None
) -> dict[str, Labels]:
    """The names of classes: those given, else those that models say."""
    unknown = next((task for task in given or {} if task not in tasks), None)
    if unknown is not None:
        raise OptionError(explain(f"labels are given for {unknown!r}", remedy=did_you_mean(str(unknown), tasks)))
    found: dict[str, Labels] = {}
    for task, model in tasks.items():
        own = (given or {}).get(task, labels_of(model, classes[task]))
        found[task] = None if own is None else check_labels(task, own, classes[task])
    return found


def _grouped(
    tasks: Mapping[str, nn.Module],
    joined: Joined,
    inputs: tuple[Tensor, ...],
    data: Batches | None,
    images: Mapping[str, Batches],
    pins: str | Sequence[str],
    seed: int,
    progress: bool,
    clock: Clock,
) -> Grouped:
    """The experts as sources of one architecture, that of the joined network: heads of others are zero in them.

    So heads have no say in matching: what is zero in one of two sources adds nothing to any pair of units. The graph
    of each source returns what its own task does.
    """
    twins = [_twin(task, model, joined) for task, model in tasks.items()]
    sources: list[Source] = []
    for task, twin in zip(tasks, twins, strict=True):
        own = put_over(twin, joined.graph_module)
        output = next(node for node in own.graph.nodes if node.op == "output")
        output.args = (output.args[0][task],)
        own.recompile()
        sources.append(Source.of(twin, own))
    groups = discover(joined.graph_module, pins=pins).only_ordered()
    modes = tuple(False for _ in twins[0].modules())
    data = in_bound_runs(data, joined.graph_module)
    return Grouped(
        twins[0], tuple(sources), inputs, data, modes, (), seed, progress, clock, own=(*images.values(),), groups=groups
    )


def _twin(task: str, model: nn.Module, joined: Joined) -> nn.Module:
    """The joined network with an expert's tensors, and zeros for the heads of other tasks."""
    twin = put_over(copied(joined.graph_module), joined.graph_module)
    own = {here: name for name, here in joined.places.names(task).items()}
    state = canonical_state(model)
    with torch.no_grad():
        for name, tensor in canonical_state(twin).items():
            if name in own:
                tensor.copy_(state[own[name]])
            elif name in state and name not in joined.places.in_heads:
                tensor.copy_(state[name])
            elif tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.zero_()
    return twin


@dataclass(frozen=True)
class _Made:
    """A network, and how it came about."""

    result: Multitask
    choice: Choice
    ancestry: Ancestry
    notes: tuple[str, ...] = ()


class _Merge:
    """Combines the trunks of matched sources in one way or another, and puts heads behind."""

    def __init__(
        self, grouped: Grouped, joined: Joined, plan: Plan, matcher: Matcher, tasks: Mapping[str, nn.Module]
    ) -> None:
        self.grouped, self.joined, self.plan, self.tasks = grouped, joined, plan, tasks
        traits = traits_of_graph(joined.graph_module)
        in_heads = joined.places.in_heads
        traits = {
            n: replace(t, kind=Kind.HEAD) if n in in_heads and t.kind is not Kind.FIXED else t
            for n, t in traits.items()
        }
        base = plan.ancestry.base
        if isinstance(base, Mapping):  # what it lacks is of heads, or nothing that training changes
            first = grouped.sources[0].state
            base = {name: base[name] if name in base and name not in in_heads else first[name] for name in first}
        self.ancestry = replace(plan.ancestry, base=base, traits=traits)
        self.passes = self._passes()
        self.surveyed: Surveyed = plan_survey(grouped, [Way(matcher, self.passes)])
        self.certified: Certified = certify_sources(self.surveyed, match_sources(self.surveyed, matcher))
        self.matcher = matcher

    def _passes(self) -> tuple[Pass, ...]:
        """What restores the statistics of units that were aligned; those of BatchNorm layers are measured later."""
        grouped = self.grouped
        if not self.plan.aligned or (grouped.data is not None and batch_norm_nodes(grouped.graph_module)):
            return ()
        return normalizations("auto", grouped.graph_module, grouped.groups, grouped.data is not None)

    def best(self, images: Mapping[str, Batches], labels: Mapping[str, Labels], classes: Mapping[str, int]) -> _Made:
        """The network, by the method and scale that agree best with the experts where there are several."""
        combiners = self.plan.combiners
        if len(combiners) > 1 and not images:
            if not self.plan.open:
                remedy = "data={task: images, ...}; or a single scale"
                raise OptionError(
                    explain(f"{len(combiners)} values of scale, and nothing to judge them by", remedy=remedy)
                )
            combiners = combiners[:1]
        if len(combiners) == 1:
            return self.made(combiners[0], labels, classes)
        scores: list[tuple[float, Combiner]] = []
        notes: list[str] = []
        for combiner in combiners:
            try:
                found = self.made(combiner, labels, classes).result
            except SurgeryError as error:
                notes.append(f"failed, {combiner}: {str(error).splitlines()[0]}")
                continue
            each = [agreement(found, task, self.tasks[task], own, every=5) for task, own in images.items()]
            scores.append((sum(each) / len(each), combiner))
            notes.append(f"tried {combiner}: agrees with the experts on {scores[-1][0]:.1%}")
        if not scores:
            return self.made(combiners[0], labels, classes)  # which raises what is wrong
        kept = max(scores, key=lambda score: score[0])[1]
        made = self.made(kept, labels, classes)
        return replace(made, notes=(*notes, f"kept {kept}"))

    def made(self, combiner: Combiner, labels: Mapping[str, Labels], classes: Mapping[str, int]) -> _Made:
        """The network by one method."""
        way = Way(self.matcher, self.passes, combiner)
        combined = self._combined(way)
        if combined.context.created_biases or combined.context.restructured:
            way = replace(way, passes=())  # experts have no such tensors: their models would not load them
            combined = self._combined(way)
        state = canonical_state(combined.model)
        for number, task in enumerate(self.tasks):
            own, orders = self.grouped.sources[number].state, self.certified.each[number].permutations
            for name in self.joined.places.names(task).values():
                state[name].copy_(map_tensor(name, own[name], self.grouped.groups, orders))
        network = put_over(combined.model, self.joined.graph_module)
        known = {
            task: Task(classes[task], labels[task], skeleton(fresh(model, self.grouped.inputs)))
            for task, model in self.tasks.items()
        }
        choice = Choice(way, self.surveyed, self.certified, combined)
        return _Made(Multitask(Joined(network, self.joined.places), known), choice, self.ancestry)

    def _combined(self, way: Way) -> Combined:
        shares = equal_shares(len(self.tasks)).over(self.grouped.graph_module)
        terms = Terms(shares, None, None, self.ancestry)
        return combine(self.surveyed, self.certified, way.passes, terms, None, way.combiner)


def _statistics(
    result: Multitask, images: Mapping[str, Batches], batchnorm: str, plan: Plan, progress: bool, clock: Clock
) -> str:
    """Give BatchNorm layers their statistics; which they have, in one word, empty where there are no such layers."""
    norms = batch_norm_nodes(result.network)
    if not norms:
        return ""
    if batchnorm == "auto":
        batchnorm = "per-task" if images else "average"
    if batchnorm == "average":
        if plan.aligned and not images:
            warn_of_norms(result.network)
        return batchnorm
    with clock("statistics of tasks"), eval_mode(result):
        measure_joint(result, images, progress)
        if batchnorm == "per-task":
            result.hold(measure_apart(result, images, progress))
    return batchnorm


def _report(
    made: _Made,
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
    return MultitaskReport(records, batchnorm, merged)

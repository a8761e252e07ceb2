"""What is asked for when experts are to become one network: checked, and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.errors import DataError, IncompatibleModelsError, OptionError, did_you_mean, explain, warn
from vfsurgery.merging.multitask.labels import Labels, check_labels, labels_of
from vfsurgery.merging.sparse import refuse_hooks
from vfsurgery.passes.agreement import class_logits
from vfsurgery.stats.precision import batches_for
from vfsurgery.tracing.compatibility import check_weights
from vfsurgery.tracing.examples import normalization_of
from vfsurgery.tracing.sources import canonical_state, eval_mode
from vfsurgery.tracing.wrappers import network

HEADS = ("keep", "same", "union")
BATCHNORM = ("auto", "joint", "per-task", "average")

Images: TypeAlias = Data | Mapping[str, Data] | None


def checked_experts(experts: Mapping[str, nn.Module], heads: str, batchnorm: str) -> dict[str, nn.Module]:
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
    _check_precisions(models)
    configured = {task: normalization_of(model) for task, model in models.items()}
    differing = {said for said in configured.values() if said is not None}
    if len(differing) > 1:
        told = "; ".join(f"{task}: mean {said[0]}, std {said[1]}" for task, said in configured.items() if said)
        warn(
            "the experts expect differently normalized images, and one trunk sees them all: "
            f"{told}; normalize the images of each task as its expert expects, or fine-tune with equal settings"
        )
    return models


def _check_precisions(models: Mapping[str, nn.Module]) -> None:
    """Refuse experts of different precisions.

    Raises:
        IncompatibleModelsError: names the first tensor that differs.
    """
    (first, one), *others = ((task, canonical_state(model)) for task, model in models.items())
    for task, state in others:
        name = next((name for name in state if name in one and state[name].dtype != one[name].dtype), None)
        if name is not None:
            raise IncompatibleModelsError(
                explain(
                    f"the experts {first!r} and {task!r} have different precisions",
                    parameter=name,
                    dtypes=f"{one[name].dtype}, {state[name].dtype}",
                    remedy="bring both to one: expert.to(torch.float32)",
                )
            )


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


def images_of(data: Images, tasks: Mapping[str, nn.Module], device: torch.device) -> dict[str, Batches]:
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


def classes_of(task: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
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


def names_of(
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

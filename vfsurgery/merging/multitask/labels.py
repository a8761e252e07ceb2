"""What classes are called: by the user, by timm, by transformers; and the union of several lists of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vfsurgery.errors import OptionError, explain

Labels = tuple[str, ...] | None
"""The names of a task's classes in their order; ``None`` where nobody says."""


def labels_of(model: nn.Module, classes: int) -> Labels:
    """The names that a model's configuration has for its classes, if there are as many.

    >>> net = nn.Linear(2, 2)
    >>> net.pretrained_cfg = {"label_names": ["cat", "dog"]}
    >>> labels_of(net, 2), labels_of(net, 3)
    (('cat', 'dog'), None)
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    names = config.get("label_names") if isinstance(config, dict) else None
    told: Any = getattr(getattr(model, "config", None), "id2label", None)
    if names is None and isinstance(told, Mapping):
        names = [told[number] for number in sorted(told)]
        if all(name == f"LABEL_{number}" for number, name in enumerate(names)):  # transformers' own, which say nothing
            names = None
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != classes:
        return None
    return tuple(map(str, names))


def check_labels(task: str, labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names of a task's classes as they were given.

    Raises:
        OptionError: there are more or fewer than classes, or a name is there twice.

    >>> check_labels("pets", ["cat", "dog"], 2)
    ('cat', 'dog')
    """
    names = tuple(map(str, labels))
    if isinstance(labels, str) or len(names) != classes:
        raise OptionError(
            explain(f"labels of {task!r} are {len(names)}, and its head has {classes} classes", remedy="one for each")
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise OptionError(
            explain(f"labels of {task!r} have {twice[0]!r} more than once", remedy="one name for each class")
        )
    return names


def places_in_union(labels: Mapping[str, Labels], classes: Mapping[str, int]) -> tuple[list[str], dict[str, list[int]]]:
    """All classes of all tasks, those of equal name once; and for each task where its classes are among them.

    Classes without names are called by their task and number, so they are never taken for one.

    >>> places_in_union({"a": ("cat", "dog"), "b": ("dog", "car"), "c": None}, {"a": 2, "b": 2, "c": 1})
    (['cat', 'dog', 'car', 'c 0'], {'a': [0, 1], 'b': [1, 2], 'c': [3]})
    """
    union: dict[str, int] = {}
    found: dict[str, list[int]] = {}
    for task, count in classes.items():
        names = labels.get(task) or tuple(f"{task} {number}" for number in range(count))
        found[task] = [union.setdefault(name, len(union)) for name in names]
    return [*union], found

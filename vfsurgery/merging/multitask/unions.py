"""One list of classes of several: rows of heads one below the other, those of classes of equal name joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.merging.multitask.heads import canonical_tensors, with_tensors
from vfsurgery.merging.multitask.joined import Multitask
from vfsurgery.merging.multitask.labels import Labels, places_in_union

COUNTS = ("out_features", "out_channels", "num_classes")
"""Attributes of modules that say how many classes there are."""


def check_same_labels(classes: Mapping[str, int], labels: Mapping[str, Labels]) -> None:
    """Refuse experts that do not have the same classes.

    Raises:
        OptionError: names the first that differs.
    """
    first = next(iter(classes))
    for task, count in classes.items():
        said = (labels[first], labels[task])
        if count != classes[first] or (None not in said and said[0] != said[1]):
            raise OptionError(
                explain(
                    f'heads="same", and {first!r} and {task!r} have different classes',
                    classes=f"{classes[first]} and {count}",
                    remedy='heads="keep", or "union"',
                )
            )


def join_rows(network: Multitask) -> None:
    """Give classes of equal name in several tasks the mean of their rows, in the heads of all of them.

    Raises:
        OptionError: heads are of more than rows of classes.
    """
    union, places = _places(network)
    for rows in _rows(network).values():
        total, count = _summed(rows, places, len(union))
        mean = total / count.view(-1, *[1] * (total.ndim - 1))
        with torch.no_grad():
            for task, tensor in rows.items():
                chosen = torch.tensor(places[task], device=mean.device)
                many = (count[chosen] > 1).nonzero().flatten()  # others stay to the last bit
                tensor[many] = mean[chosen[many]].to(tensor.dtype)


def union_model(network: Multitask) -> tuple[nn.Module, list[str]]:
    """A plain model of the first expert's class whose head has the classes of all tasks, and their names in order.

    Classes of equal name are one, the mean of their rows. Its logits are those of heads that were never trained
    against each other: see :meth:`~vfsurgery.merging.multitask.joined.Multitask.concat`. Running statistics are those
    that all tasks share.

    Raises:
        OptionError: heads are of more than rows of classes.

    >>> import vfsurgery as surgery
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> names = {"a": ["cat", "dog"], "b": ["dog", "car"]}
    >>> both = surgery.multitask({"a": a, "b": b}, labels=names, heads="union", example_inputs=torch.randn(2, 4))
    >>> model, classes = union_model(both)
    >>> model(torch.randn(1, 4)).shape, classes
    (torch.Size([1, 3]), ['cat', 'dog', 'car'])
    """
    union, places = _places(network)
    first = next(iter(network.tasks))
    shared = canonical_tensors(network.network)
    template = network.tasks[first].template
    rows = _rows(network)
    state = {name: shared[name].detach().clone() for name in canonical_tensors(template) if name not in rows}
    for name, each in rows.items():
        total, count = _summed(each, places, len(union))
        state[name] = (total / count.view(-1, *[1] * (total.ndim - 1))).to(each[first].dtype)
    model = with_tensors(template, state).to(next(iter(state.values())).device).eval()
    layers = {name.rpartition(".")[0] for name in rows}
    for path, module in model.named_modules():
        for attribute in COUNTS if path in layers or not path else ():
            if getattr(module, attribute, None) == network.tasks[first].classes:
                setattr(module, attribute, len(union))
    return model, union


def _places(network: Multitask) -> tuple[list[str], dict[str, list[int]]]:
    return places_in_union(network.labels(), {name: task.classes for name, task in network.tasks.items()})


def _rows(network: Multitask) -> dict[str, dict[str, Tensor]]:
    """The tensors of all heads by their names in the experts, then by task; every one has a row for each class."""
    tensors = canonical_tensors(network.network)
    found: dict[str, dict[str, Tensor]] = {}
    for task, known in network.tasks.items():
        for name, here in network.places.names(task).items():
            found.setdefault(name, {})[task] = tensors[here]
            if not tensors[here].ndim or len(tensors[here]) != known.classes:
                _refuse(f"{name} of {task!r} has the shape {tuple(tensors[here].shape)}")
    for name, each in found.items():
        if len(each) != len(network.tasks) or len({tuple(x.shape[1:]) for x in each.values()}) > 1:
            _refuse(f"{name} is not in all heads, or in different sizes")
    if not found:
        _refuse("heads were merged: all tasks have the same classes")
    return found


def _summed(rows: Mapping[str, Tensor], places: Mapping[str, list[int]], classes: int) -> tuple[Tensor, Tensor]:
    """The sum of the rows of each class of the union, in float64, and of how many tasks that is."""
    first: Any = next(iter(rows.values()))
    total = first.new_zeros((classes, *first.shape[1:]), dtype=torch.float64)
    count = first.new_zeros(classes, dtype=torch.float64)
    for task, tensor in rows.items():
        chosen = torch.tensor(places[task], device=tensor.device)
        total.index_add_(0, chosen, tensor.detach().double())
        count.index_add_(0, chosen, torch.ones(len(chosen), dtype=torch.float64, device=tensor.device))
    return total, count


def _refuse(reason: str) -> None:
    raise OptionError(
        explain(
            "the heads cannot be joined into one list of classes",
            because=reason,
            remedy='heads of rows of classes alone (one linear map or convolution) can; else heads="keep" and concat()',
        )
    )

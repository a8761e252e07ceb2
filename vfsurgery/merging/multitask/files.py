"""A network of several tasks in a folder: the trunk, a file for each head, and what is to be known about them.

``{**trunk, **heads/TASK}`` is the state dict of one task's model, so a folder is of use without this library::

    model = timm.create_model("resnet18", num_classes=37)
    model.load_state_dict({**load_file("both/trunk.safetensors"), **load_file("both/heads/pets.safetensors")})
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import file_hash, load_state_dict, save_state_dict, write_text
from vfsurgery.discovery.recording import record
from vfsurgery.errors import CheckpointError, OptionError, explain
from vfsurgery.merging.multitask.heads import NAMED, Head, canonical_tensors, skeleton
from vfsurgery.merging.multitask.joined import Multitask, Task
from vfsurgery.merging.multitask.joining import join
from vfsurgery.networks.architectures import build_model
from vfsurgery.records.report import version_of
from vfsurgery.records.results import report_of
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.tracing.wrappers import network

TRUNK, HEADS, CONTENTS = "trunk.safetensors", "heads", "multitask.json"
FORMAT = 1
LARGEST = 64 * 2**20
"""Bytes of a table of contents."""

Builder: TypeAlias = nn.Module | Callable[[int], nn.Module] | str


def save_multitask(model: Multitask, folder: str | Path, architecture: str | None = None) -> Path:
    """Write a network of several tasks into a folder.

    Args:
        model: What :func:`~vfsurgery.multitask` returned.
        folder: Made when missing; files of these names in it are written over.
        architecture: What builds its experts, as in ``"timm:resnet18"``; found by itself for models of timm.

    Returns:
        The folder.

    Raises:
        CheckpointError: a file cannot be written.
    """
    folder = Path(folder)
    states = {task: model.task(task).state_dict() for task in model.tasks}
    trunk = _trunk(model, next(iter(states.values())))
    save_state_dict(trunk, folder / TRUNK)
    entries: dict[str, Any] = {}
    for task, state in states.items():
        own = {key: x for key, x in state.items() if key not in trunk or not _equal(x, trunk[key])}
        path = folder / HEADS / f"{task}.safetensors"
        save_state_dict(own, path)
        known = model.tasks[task]
        entries[task] = {
            "file": f"{HEADS}/{path.name}",
            "sha256": file_hash(path),
            "classes": known.classes,
            "labels": known.labels,
            "head": list(model.places.heads[task].signs),
            "temperature": model.temperatures[task],
            "model": architecture or _architecture(known.template),
        }
    contents: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: version_of(name) for name in ("vfsurgery", "torch")},
        "trunk": {"file": TRUNK, "sha256": file_hash(folder / TRUNK)},
        "tasks": entries,
    }
    with contextlib.suppress(OptionError):  # it was loaded, or copied
        contents["report"] = report_of(model).to_dict()
    write_text(folder / CONTENTS, json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    return folder


def load_multitask(
    folder: str | Path,
    models: Mapping[str, Builder] | Builder | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> Multitask:
    """Read a network of several tasks from a folder that :meth:`~vfsurgery.Multitask.save` has written.

    Args:
        folder: The folder.
        models: What builds the models of the tasks: a function of the number of classes or a written name such as
            ``"timm:resnet18"``, for all tasks or by task, or a model for each task. Needed where they are not of timm.
            Models that are given stay as they are.
        example_inputs: As for :func:`~vfsurgery.trace`.

    Returns:
        The network, which computes what the saved one did.

    Raises:
        CheckpointError: the folder is not complete, or was changed.
        OptionError: nothing says how to build a model, or another one is built than was saved.
    """
    folder = Path(folder)
    contents = _read(folder)
    tasks: dict[str, nn.Module] = {}
    heads: list[Head] = []
    trunk = _state(folder, contents["trunk"])
    states: dict[str, dict[str, Tensor]] = {}
    for task, entry in contents["tasks"].items():
        given = models.get(task) if isinstance(models, Mapping) else models
        model = _built(task, entry, given)
        states[task] = {**trunk, **_state(folder, entry)}
        try:
            model.load_state_dict(states[task])
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            remedy = "models= what built the experts, with the options that they were built with"
            raise OptionError(
                explain(f"the model of {task!r} is not the one that was saved", cause=said, remedy=remedy)
            ) from error
        tasks[task] = model.eval()
        heads.append(Head(dict.fromkeys(entry["head"], NAMED)))
    inputs = example_inputs_of(next(iter(tasks.values())), example_inputs)
    graphs = [record(fresh(model, inputs), inputs) for model in tasks.values()]
    joined = join(tasks, graphs, heads)
    known = {
        task: Task(entry["classes"], None if entry["labels"] is None else tuple(entry["labels"]), skeleton(tasks[task]))
        for task, entry in contents["tasks"].items()
    }
    result = Multitask(joined, known, temperatures={task: e["temperature"] for task, e in contents["tasks"].items()})
    _fill(result, trunk, tasks)
    return result


def _fill(result: Multitask, trunk: Mapping[str, Tensor], tasks: Mapping[str, nn.Module]) -> None:
    """Write the trunk's own values into a network, and hold what tasks have in their place."""
    own: dict[str, dict[str, Tensor]] = {}
    in_heads = result.places.in_heads
    with torch.no_grad():
        shared = {name: x for name, x in canonical_tensors(result.network).items() if name not in in_heads}
        for name, tensor in shared.items():
            tensor.copy_(trunk[name])
        for task, model in tasks.items():
            state = canonical_state(model)
            own[task] = {
                name: state[name].clone() for name in shared if name in state and not _equal(state[name], trunk[name])
            }
    result.hold({task: each for task, each in own.items() if each})


def _trunk(model: Multitask, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that all tasks share, by all keys of a task's state dict that lead to them."""
    tensors = canonical_tensors(model.network)
    first = model.tasks[next(iter(model.tasks))].template
    own = set(model.places.heads[next(iter(model.tasks))].signs)
    names = {id(x): name for name, x in canonical_tensors(first).items()}
    every = first.state_dict(keep_vars=True)
    return {key: tensors[names[id(every[key])]].detach() for key in state if names[id(every[key])] not in own}


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())


def _architecture(template: nn.Module) -> str | None:
    """How timm builds a model; ``None`` for others."""
    config: Any = getattr(template, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    return f"timm:{name}" if isinstance(name, str) else None


def _read(folder: Path) -> dict[str, Any]:
    """The table of contents.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / CONTENTS
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("too large")
        contents = json.loads(path.read_text(encoding="utf-8"))
        if contents["format"] != FORMAT:
            raise ValueError(f"format {contents['format']}, and this version reads {FORMAT}")
        of_tasks = ("classes", "labels", "head", "temperature")
        for entry, needed in [(contents["trunk"], ()), *((each, of_tasks) for each in contents["tasks"].values())]:
            plain = Path(entry["file"])
            missing = next((key for key in needed if key not in entry), None)
            if missing is not None:
                raise KeyError(missing)
            if plain.is_absolute() or ".." in plain.parts or not isinstance(entry["sha256"], str):
                raise ValueError(f"it names {plain}")
        return contents
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)[:200]
        remedy = "the folder that save() of a network of several tasks has written"
        raise CheckpointError(
            explain(f"{folder} is no network of several tasks", cause=cause, remedy=remedy)
        ) from error


def _state(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / entry["file"]
    state = load_state_dict(path)
    if file_hash(path) != entry["sha256"]:
        raise CheckpointError(
            explain(
                f"{path} is not the file that was saved", remedy="save the network again; trunk and heads go together"
            )
        )
    return dict(state)


def _built(task: str, entry: Mapping[str, Any], given: Builder | None) -> nn.Module:
    given = entry.get("model") if given is None else given
    if given is None:
        remedy = 'models="timm:NAME", or a function of the number of classes, or {task: model, ...}'
        raise OptionError(explain(f"nothing says how to build the model of {task!r}", remedy=remedy))
    if isinstance(given, str):
        return build_model(given, entry["classes"])
    if isinstance(given, nn.Module):
        return copy.deepcopy(network(given))
    return network(given(entry["classes"]), f"what models= builds for {task!r}")

"""Groups of a model that cannot be recorded as a whole: those of its parts, with all that crosses their borders pinned.

The model runs once on the example. A *part* is a module that

- is called with tensors alone, and whose tensors are used only while it runs (nobody reads its weights from outside);
- hands out what it computes only by returning it (nothing that it has stored is read later);
- can be traced for each shape that it was called with, and has the same groups for all of them.

Inputs and outputs of a part are pinned, so its groups cannot depend on what happens around it. A module that is no part
is searched for parts inside; weights in no part are pinned.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vfsurgery.discovery.components import Components
from vfsurgery.discovery.recording import record
from vfsurgery.discovery.unification import INPUT, OUTPUT, Unification
from vfsurgery.errors import SurgeryError, TraceError
from vfsurgery.groups import GroupSet, PermutationGroup, PinnedAxis
from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.exported import first_line
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.selection import Pinned, chosen_pins

Shapes: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]

MOST_SHAPES = 8
"""A module called with more kinds of shapes than this is searched for parts inside."""


def find_partly(
    model: nn.Module, inputs: tuple[Tensor, ...], error: TraceError, pins: str | Sequence[str] = ()
) -> GroupSet:
    """The groups of all parts of a model that fails to trace with ``error``.

    Raises:
        TraceError: ``error`` itself, if the model does not run on ``inputs`` or has no part with a group.
    """
    pinned = chosen_pins(model, pins)
    try:
        run = watch(model, inputs)
    except Exception:
        raise error from None
    parts = dict(Search(run, pinned, canonical_parameters(model)).parts(model))
    found = _combined(model, parts, first_line(error), pinned)
    if not found.groups:
        raise error
    return found


@dataclass(frozen=True)
class Part:
    """A part of a model: its path, its groups under its own names, and what it was called with in the run."""

    path: str
    groups: GroupSet
    shapes: tuple[Shapes, ...]


def parts_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Part]:
    """The outermost parts of a model, each of which computes the same whatever order its groups have."""
    run = watch(model, inputs)
    found = Search(run, chosen_pins(model, ()), canonical_parameters(model)).parts(model)
    return [Part(path, groups, tuple(call for call in run.calls[path] if call is not None)) for path, groups in found]


@dataclass
class Run(TorchDispatchMode):
    """What happened while a model ran: which modules were called with what, and who used whose tensors.

    ``calls`` has the shapes of every call by module path, ``None`` for one with other arguments. ``readers`` has for
    every parameter or buffer the modules that were running whenever it was used. ``leaks`` are modules whose inner
    tensors were used after they had returned.
    """

    names: dict[StorageWeakRef, list[str]]
    calls: dict[str, list[Shapes | None]] = field(default_factory=dict[str, "list[Shapes | None]"])
    readers: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    leaks: set[str] = field(default_factory=set[str])
    stack: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        super().__init__()
        self.makers: dict[StorageWeakRef, frozenset[str]] = {}
        self.returned: dict[StorageWeakRef, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note whose tensors an op uses, and who makes its results."""
        given = [_storage(x) for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        for storage in given:
            for name in self.names.get(storage, ()):
                self.readers[name] = self.readers.get(name, set(self.stack)) & set(self.stack)
            gone = self.makers.get(storage, frozenset()) - set(self.stack)
            self.leaks |= gone - self.returned.get(storage, set())
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _storage(x) not in given:
                self.makers[_storage(x)] = frozenset(self.stack)
                self.returned.pop(_storage(x), None)
        return result

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module begins to run."""
        plain = not kwargs and all(isinstance(x, Tensor) for x in args)
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in args) if plain else None
        self.calls.setdefault(path, []).append(shapes)
        self.stack.append(path)

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A module returns; a view of a larger tensor does not count as returning all of it."""
        self.stack.pop()
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() == x.numel() * x.itemsize:
                self.returned.setdefault(_storage(x), set()).add(path)


def watch(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    """Run a copy of the model, which shares its parameters, once in eval mode."""
    twin = copied(fresh(model, inputs), {id(parameter): parameter for parameter in model.parameters()})
    set_mode(twin, False)
    canonical = canonical_parameters(twin)
    names: dict[StorageWeakRef, list[str]] = {}
    for tensor in twin.state_dict(keep_vars=True).values():
        names.setdefault(_storage(tensor), []).append(canonical[id(tensor)])
    devices = {parameter.device for parameter in twin.parameters() if parameter.device.type == "cuda"}
    run = Run(names)
    with _hooks(twin, run), torch.random.fork_rng(sorted(devices, key=str)), torch.no_grad(), run:
        twin(*inputs)
    return run


@contextmanager
def _hooks(model: nn.Module, run: Run) -> Generator[None]:
    hooks: list[Any] = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(partial(run.enter, path), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(run.leave, path), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """A key that no later tensor can have: an address alone would be given away again once the tensor is gone."""
    return StorageWeakRef(tensor.untyped_storage())


@dataclass(frozen=True)
class Search:
    """The search for parts: what was seen in the run, what users pinned, canonical names of tensors by ``id``."""

    run: Run
    pinned: Pinned
    names: dict[int, str]

    def parts(self, module: nn.Module, path: str = "") -> Iterator[tuple[str, GroupSet]]:
        """The outermost parts below a module, with their groups."""
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            groups = self.groups_of(child, inner) if inner in self.run.calls else None
            if groups is None:
                yield from self.parts(child, inner)
            else:
                yield inner, groups

    def groups_of(self, module: nn.Module, path: str) -> GroupSet | None:
        """The groups of a module if it is a part, else ``None``."""
        names = {local: self.names[id(tensor)] for local, tensor in module.state_dict(keep_vars=True).items()}
        read_outside = any(path not in self.run.readers.get(name, {path}) for name in names.values())
        shapes = dict.fromkeys(self.run.calls[path])
        if read_outside or path in self.run.leaks or None in shapes or len(shapes) > MOST_SHAPES:
            return None
        if self.pinned.pattern_of(path) is not None:
            return GroupSet(())
        pins = self._pins_inside(path, names)
        found: list[GroupSet] = []
        for call in shapes:
            inputs = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in call or ())
            try:
                found.append(Components(Unification(record(module, inputs), pins=pins)).group_set())
            except SurgeryError:
                return None
        return found[0] if all(other.groups == found[0].groups for other in found) else None

    def _pins_inside(self, path: str, names: dict[str, str]) -> Pinned:
        """What users pinned in a module, under the names that it has there."""
        chosen, prefix = self.pinned.parameters, f"{path}."
        parameters = {local: chosen[name] for local, name in names.items() if name in chosen}
        inside = {inner: why for inner, why in self.pinned.modules.items() if inner.startswith(prefix)}
        return Pinned(parameters, {inner.removeprefix(prefix): why for inner, why in inside.items()})


def _combined(model: nn.Module, parts: dict[str, GroupSet], reason: str, pinned: Pinned) -> GroupSet:
    """The groups of all parts under the model's names, and the pins of all weights."""
    canonical = canonical_parameters(model)
    state = model.state_dict(keep_vars=True)
    name = {key: canonical[id(tensor)] for key, tensor in state.items()}
    groups: list[PermutationGroup] = []
    axes: list[PinnedAxis] = []
    unknown: list[str] = []
    notes: list[str] = []
    for part, found in parts.items():
        notes += [f"{part}: {note}" for note in found.notes]
        numbers = {group.name: f"g{len(groups) + place}" for place, group in enumerate(found)} | {"": ""}
        for group in found:
            members = tuple(replace(member, parameter=name[f"{part}.{member.parameter}"]) for member in group.members)
            renamed = {"name": numbers[group.name], "outer": numbers[group.outer]}
            groups.append(replace(group, members=members, activations=(), **renamed))
        borders = {INPUT: f"input of {part}", OUTPUT: f"output of {part}"}
        for pin in found.pinned:
            why = borders.get(pin.reason, pin.reason)
            axes.append(replace(pin, parameter=name[f"{part}.{pin.parameter}"], reason=why))
        unknown += [f"{op} in {part}" for op in found.unknown_ops]
    known = {member.parameter for group in groups for member in group.members} | {pin.parameter for pin in axes}
    for key, tensor in state.items():
        if name[key] == key and key not in known:
            user = pinned.parameters.get(key)
            why = f"pinned by the user ({user})" if user else f"in no part that can be recorded: {reason}"
            axes += [PinnedAxis(key, dim, tensor.shape[dim], why) for dim in range(min(tensor.ndim, 2))]
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    grouped = {member.parameter for group in groups for member in group.members}
    covered = sum(size for key, size in sizes.items() if key in grouped)
    return GroupSet(tuple(groups), tuple(axes), tuple(unknown), sum(sizes.values()), covered, False, tuple(notes))

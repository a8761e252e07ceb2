"""Models beside the checkpoint that they were fine-tuned from: how far each moved, and how much alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import EMA_WRAPPERS, read_checkpoint
from vfsurgery.checkpoints.lazy import open_checkpoint
from vfsurgery.combining.adapters import read_adapter
from vfsurgery.combining.base import PART, InMemory, Kind, Store
from vfsurgery.combining.cautions import cautions_of, outlook
from vfsurgery.combining.comparison import Comparison, Differing, shape_text
from vfsurgery.combining.moved import Moved
from vfsurgery.combining.traits import traits_of_states
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, InvalidWeightsError, OptionError, explain
from vfsurgery.tracing.wrappers import network

Model: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path

POSITIONS = frozenset({"pos", "position", "positions", "positional", "posembed", "relative"})
"""Words in names of tables that have an entry for each place of an image."""


@dataclass(frozen=True)
class _Opened:
    """A model's tensors, or shapes of those that stay in files; ``averaged`` where a file says what they are."""

    state: Mapping[str, Tensor]
    store: Store
    averaged: bool | None = None


def compare(sources: Sequence[Model] | Mapping[str, Model], *, base: Model) -> Comparison:
    """Compare models with the checkpoint that they were fine-tuned from, before merging them.

    Looks at every number once; of files, a part of a tensor is read at a time. Which tensors are weights of layers is
    told by names and shapes.

    Args:
        sources: Models, state dicts, checkpoints or folders of LoRA adapters; or a mapping from names to these.
        base: What they were fine-tuned from.

    Raises:
        IncompatibleModelsError: a source is of another architecture.
        InvalidWeightsError: NaN or infinite values.
        CheckpointError: a file cannot be read.
        OptionError: there is no source.

    >>> base = nn.Linear(2, 2, bias=False).state_dict()
    >>> step = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> found = compare([{"weight": base["weight"] + step}, {"weight": base["weight"] - step}], base=base)
    >>> round(found.total.cosine(0, 1), 6), found.total.conflict
    (-1.0, 1.0)
    """
    named = _named(sources)
    told = Path(base).name if isinstance(base, str | Path) else "the base"
    if told in named and isinstance(base, str | Path):
        told = str(base)
    if told in named:
        raise OptionError(explain(f"{told} is a source and the base", remedy="leave it out of the sources"))
    opened = _read(base, told)
    read = {told: opened, **{name: _source(each, name, opened) for name, each in named.items()}}
    origin, *states = [opened.state for opened in read.values()]
    traits = traits_of_states([origin])
    kinds = {name: trait.kind.value for name, trait in traits.items()}
    trained = [name for name, trait in traits.items() if trait.kind in (Kind.MATRIX, Kind.REST)]
    if trained == sorted(trained):  # as in files; modules are numbered in the order in which they run
        trained.sort(key=lambda name: [(len(part), part) if part.isdigit() else (0, part) for part in name.split(".")])
    tensors: dict[str, Moved] = {}
    differing: list[Differing] = []
    for name in [*trained, *_new(origin, states)]:
        found = [state.get(name) for state in (origin, *states)]
        whole = [each for each in found if each is not None]
        if len(whole) == len(found) and len({each.shape for each in whole}) == 1:
            tensors[name] = reduce(add, _parts(read, name))
        else:
            differing.append(Differing(name, tuple(None if each is None else tuple(each.shape) for each in found)))
    if 2 * len(tensors) < len(trained) or not tensors:
        _refuse_architecture([*read], differing)
    tables = tuple(each for each in differing if _is_table(each))
    heads = tuple(each for each in differing if each not in tables)
    comparison = Comparison(told, tuple(named), tensors, kinds, heads, tables)
    averaged = {name: opened.averaged for name, opened in read.items()}
    warned = replace(comparison, cautions=tuple(cautions_of(comparison, averaged)))
    return replace(warned, outlook=outlook(warned))


def check_ancestor(sources: Sequence[Model] | Mapping[str, Model], *, base: Model) -> list[str]:
    """What speaks against merging these on this base, a sentence each; nothing where all is well.

    Raises:
        IncompatibleModelsError: a source is of another architecture.
        InvalidWeightsError: NaN or infinite values.
    """
    return [str(caution) for caution in compare(sources, base=base).cautions]


def _named(sources: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    """Sources by name: that of their files, with their paths where names are alike, or a number."""
    if isinstance(sources, Mapping):
        named = dict(sources)
    else:
        files = [Path(each) if isinstance(each, str | Path) else None for each in sources]
        short = [file and file.name for file in files]
        unique = [*filter(None, short)] == [*dict.fromkeys(filter(None, short))]
        told = short if unique else [file and str(file) for file in files]
        names = [file if file and told.count(file) == 1 else f"source {number}" for number, file in enumerate(told)]
        named = dict(zip(names, sources, strict=True))
    if not named or any(isinstance(each, Tensor) for each in named.values()):
        raise OptionError(explain("nothing to compare with the base", remedy="compare([model, ...], base=pretrained)"))
    return named


def _source(model: Model, name: str, base: _Opened) -> _Opened:
    """A source, which may be the folder of an adapter of the base."""
    if not isinstance(model, str | Path) or not Path(model).is_dir():
        return _read(model, name)
    folded = read_adapter(model).onto(base.store, {key: tuple(tensor.shape) for key, tensor in base.state.items()})
    state = {
        key: torch.empty(shape, dtype=base.state[key].dtype if key in base.state else torch.float32, device="meta")
        for key, shape in folded.shapes.items()
    }
    return _Opened(state, folded)


def _read(model: Model, name: str) -> _Opened:
    if isinstance(model, nn.Module | Mapping):
        state = network(model, name).state_dict() if isinstance(model, nn.Module) else model
        return _Opened(state, InMemory(state))
    try:
        found = open_checkpoint(model)
    except CheckpointError:
        whole = read_checkpoint(model)  # of torch's older format; what is wrong otherwise, is wrong here too
        return _Opened(whole.state, InMemory(whole.state), _is_average(whole.part))
    return _Opened(found.state, found, _is_average(found.part))


def _is_average(part: str) -> bool | None:
    return part.split(".")[0] in EMA_WRAPPERS if part else None


def _parts(read: Mapping[str, _Opened], name: str) -> Iterator[Moved]:
    """One tensor of all, the base first, a part at a time.

    Raises:
        InvalidWeightsError: NaN or infinite values.
    """
    count = next(iter(read.values())).state[name].numel()
    for start in range(0, max(count, 1), PART):
        parts = {who: opened.store.read(name, start, min(start + PART, count)) for who, opened in read.items()}
        for who, part in parts.items():
            if not bool(torch.isfinite(part).all()):
                remedy = "check that its training did not diverge"
                raise InvalidWeightsError(explain(f"{who} holds NaN or infinite values", parameter=name, remedy=remedy))
        base, *others = parts.values()
        yield Moved.of(base, others)


def _new(origin: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """Floating-point tensors of sources that the base lacks."""
    seen = {**origin}
    for state in states:
        for name in state:
            if name not in seen and state[name].is_floating_point():
                seen[name] = state[name]
                yield name


def _is_table(differing: Differing) -> bool:
    words = set(differing.name.replace(".", "_").lower().split("_"))
    shapes = [shape for shape in differing.shapes if shape is not None]
    return len(shapes) == len(differing.shapes) and not POSITIONS.isdisjoint(words)


def _refuse_architecture(names: Sequence[str], differing: Sequence[Differing]) -> NoReturn:
    first = differing[0] if differing else None
    shapes = zip(names, first.shapes, strict=True) if first else ()
    raise IncompatibleModelsError(
        explain(
            "base and sources are not of one architecture",
            differ=f"{len(differing)} tensors, more than half",
            first=first and first.name,
            shapes=", ".join(f"{who} {shape_text(shape)}" for who, shape in shapes),
            remedy="compare models of one architecture",
        )
    )

"""Checkpoints that are to be combined, as they lie in their files: opened, compared and checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints.fitting import fitted
from vfsurgery.checkpoints.lazy import LazyCheckpoint, open_checkpoint
from vfsurgery.checkpoints.refusals import listing, printable
from vfsurgery.checkpoints.streams import NAMES
from vfsurgery.combining.adapted import Adapted, read_adapters
from vfsurgery.combining.base import PART, Kind, Trait
from vfsurgery.combining.running import TRAINED, completed
from vfsurgery.combining.traits import traits_of_graph, traits_of_states, with_heads
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, InvalidWeightsError, explain
from vfsurgery.networks.architectures import build_model
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.sources import eval_mode

FEW = 8
"""Trained tensors that heads may have whatever the size of a network; else it is a tenth of all."""


Opened: TypeAlias = LazyCheckpoint | Adapted


@dataclass
class Checked:
    """A checkpoint whose numbers are looked at when they are read for the first time."""

    file: Opened
    name: str
    _seen: dict[str, int] = field(default_factory=dict[str, int], repr=False)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """As of any store.

        Raises:
            InvalidWeightsError: NaN or infinite values are among them.
        """
        found = self.file.read(name, start, stop)
        if self._seen.get(name, 0) <= start < stop:
            check_numbers(found, name, self.name)
            self._seen[name] = stop
        return found


def check_numbers(numbers: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinite values.

    Raises:
        InvalidWeightsError: names the tensor, and ``where`` that is.
    """
    if not numbers.is_floating_point() or torch.isfinite(numbers.sum(dtype=torch.float64)):
        return
    found = "NaN" if numbers.isnan().any() else "infinite"
    raise InvalidWeightsError(
        explain(f"{where} holds {found} values", tensor=printable(name), remedy="leave this model out, or mend it")
    )


@dataclass
class Inputs:
    """What is combined: a base, if there is one, and sources, with the same tensors in each.

    ``same`` are tensors that are one with another of the model, whose name they have as value.
    """

    base: LazyCheckpoint | None
    sources: list[Opened]
    traits: dict[str, Trait]
    same: dict[str, str]
    told_by: str
    notes: list[str]

    @property
    def files(self) -> list[Opened]:
        """All of them, the base first."""
        return [*([] if self.base is None else [self.base]), *self.sources]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Those of the base, and of the first source for what it lacks."""
        base = {} if self.base is None else self.base.state
        return {name: base.get(name, tensor).dtype for name, tensor in self.sources[0].state.items()}

    def close(self) -> None:
        """Close all files."""
        for each in self.files:
            each.close()


def open_inputs(
    base: Path | None,
    sources: Sequence[Path],
    keys: Sequence[str | None],
    *,
    ema: bool = True,
    model: nn.Module | str | None = None,
    num_classes: int | None = None,
    example_inputs: ExampleInputs | None = None,
) -> Inputs:
    """Open all files, and find out what each tensor is.

    Args:
        base: The checkpoint that all were fine-tuned from.
        sources: The others; folders of LoRA adapters among them are folded into the base.
        keys: Which network of each file, the base's first.
        ema: Whether to take moving averages of weights.
        model: The architecture, which need not hold weights; tells what tensors are.
        num_classes: Of the architecture, where that is a name.
        example_inputs: For the trace of the model, where it does not say what it takes.

    Raises:
        CheckpointError: A file cannot be read, or does not fit the model.
        IncompatibleModelsError: They have different tensors; file and tensor are named.
        InvalidWeightsError: A tensor is of a type that cannot be computed with.
    """
    paths = [*([] if base is None else [base]), *sources]
    adapters = read_adapters(sources, base)
    places = [n for n in range(len(paths)) if n - (base is not None) not in adapters]
    opened = [open_checkpoint(paths[n], ema=ema, key=keys[n]) for n in places]
    notes = [f"{each.path.name}: {each.note}" for each in opened if each.note]
    told, same = None, dict[str, str]()
    if model is not None:
        network = _hollow(model, num_classes)
        told = _told_by_graph(network, example_inputs)
        names = canonical_parameters(network)
        tensors = network.state_dict(keep_vars=True)
        same = {name: names[id(tensor)] for name, tensor in tensors.items() if names[id(tensor)] != name}
        opened = [_fitting(network, each, notes, is_base=base is not None and not n) for n, each in enumerate(opened)]
    elif adapters:
        same = opened[0].same_storage()
    first, plain = (None, opened) if base is None else (opened[0], opened[1:])
    others: list[Opened] = [*plain]
    for place, adapter in adapters.items():
        assert first is not None  # read_adapters refuses them without a base
        others.insert(place, found := Adapted.of(adapter, first, same))
        notes += found.folded.notes
    _check_same(others)
    files = [*([] if first is None else [first]), *others]
    for each in files:
        _check_types(each, first or others[0])
    state = others[0].state
    if told is None:
        same = _shared_in_all(files)
    same = {name: other for name, other in same.items() if {name, other} <= state.keys()}
    traits = traits_of_states([state])
    traits = {name: (told or {}).get(name, trait) for name, trait in traits.items() if name not in same}
    if first is not None:
        traits = with_heads(traits, state, first.state)
        notes += _check_base(first, others[0], traits)
        first = _completed(first, others[0], traits)
    inputs = Inputs(first, others, traits, same, "names and shapes" if told is None else "the model's graph", notes)
    inputs.notes += _differing_constants(inputs)
    if same:
        notes.append(f"{len(same)} tensors are one with another, and were combined once: {listing([*same])}")
    return inputs


def _hollow(model: nn.Module | str, num_classes: int | None) -> nn.Module:
    """The architecture without weights."""
    if isinstance(model, nn.Module):
        return model
    try:
        with torch.device("meta"):
            return build_model(model, num_classes)
    except (NotImplementedError, RuntimeError):  # constructors that look at what they have drawn
        return build_model(model, num_classes)


def _told_by_graph(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Trait]:
    with eval_mode(model):
        device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
        inputs = tuple(each.to(device) for each in example_inputs_of(model, example_inputs))
        return traits_of_graph(record_or_export(model, inputs))


def _fitting(model: nn.Module, file: LazyCheckpoint, notes: list[str], is_base: bool) -> LazyCheckpoint:
    """A checkpoint by the model's names; a base may have another head."""
    try:
        inside, said = fitted(model, file.state, file.path)
    except CheckpointError:
        if not is_base:
            raise
        return file
    notes += [f"{file.path.name}: {each}" for each in said]
    old = {id(tensor): name for name, tensor in file.state.items()}
    return file.renamed({new: old[id(tensor)] for new, tensor in inside.items()})


def _check_same(files: Sequence[Opened]) -> None:
    """Refuse sources with different tensors; all that are missing or left over are named."""
    first, *others = files
    for other in others:
        missing = [name for name in first.state if name not in other.state]
        more = [name for name in other.state if name not in first.state]
        unlike = [
            f"{printable(name)} {tuple(tensor.shape)} and {tuple(other.state[name].shape)}"
            for name, tensor in first.state.items()
            if name in other.state and other.state[name].shape != tensor.shape
        ]
        if missing or more or unlike:
            raise IncompatibleModelsError(
                explain(
                    f"{first.path} and {other.path} do not have the same tensors",
                    missing=f"in {other.path.name}: {listing(missing)}" if missing else None,
                    extra=f"in {other.path.name}: {listing(more)}" if more else None,
                    shapes="; ".join(unlike[:4]) + f" and {len(unlike) - 4} more" * (len(unlike) > 4) or None,
                    remedy="combine models of one architecture; different heads cannot be combined",
                )
            )


def _check_types(file: Opened, like: Opened) -> None:
    """Refuse numbers that cannot be computed with, and weights where others have integers."""
    for name, tensor in file.state.items():
        wanted = like.state.get(name, tensor).dtype
        alike = tensor.is_floating_point() == wanted.is_floating_point and tensor.is_complex() == wanted.is_complex
        if tensor.dtype not in NAMES or not alike:
            raise InvalidWeightsError(
                explain(
                    f"{file.path} holds a tensor that cannot be combined",
                    tensor=printable(name),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    other=None if alike else f"{str(wanted).removeprefix('torch.')} in {like.path}",
                    remedy="save weights in float32, float16 or bfloat16",
                )
            )


def _check_base(base: LazyCheckpoint, first: Opened, traits: Mapping[str, Trait]) -> list[str]:
    """Refuse a base that differs in more than heads; say what else differs."""
    trained = [name for name, trait in traits.items() if trait.kind in TRAINED]
    heads = [name for name, trait in traits.items() if trait.kind is Kind.HEAD]
    deep = [name for name in heads if (traits[name].depth or 0) < 1] if any(t.depth for t in traits.values()) else []
    if deep or (not trained and heads) or len(heads) > max(FEW, (len(trained) + len(heads)) // 10):
        name = (deep or heads)[0]
        theirs = base.state.get(name)
        raise IncompatibleModelsError(
            explain(
                f"{base.path} is not what {first.path} was fine-tuned from: they differ in more than a head",
                tensor=printable(name),
                shapes=f"{'absent' if theirs is None else tuple(theirs.shape)}, {tuple(first.state[name].shape)}",
                others=f"{len(heads) - 1} more tensors differ" if len(heads) > 1 else None,
                remedy="a base of the same architecture and image size",
            )
        )
    notes: list[str] = []
    if heads:
        notes.append(
            f"the base has them in another shape or not at all, so they are the sources' mean: {listing(heads)}"
        )
    more = [name for name in base.state if name not in first.state]
    if more:
        notes.append(f"left out, as no source has them: {listing(more)} of the base")
    return notes


def _completed(base: LazyCheckpoint, first: Opened, traits: Mapping[str, Trait]) -> LazyCheckpoint:
    state = completed(base.state, first.state, traits)
    lacking = [name for name, tensor in state.items() if tensor is first.state.get(name)]
    return base.with_those_of(first, lacking) if isinstance(first, LazyCheckpoint) else base


def _shared_in_all(files: Sequence[Opened]) -> dict[str, str]:
    """Tensors that are one in every file, where files can say that."""
    first, *others = (each.same_storage() for each in files)
    return {name: other for name, other in first.items() if all(each.get(name) == other for each in others)}


def _differing_constants(inputs: Inputs) -> Iterator[str]:
    """Say which counters and tables differ: those of the base are kept, or of the first source."""
    keeper, *others = inputs.files
    unlike: list[str] = []
    for name, trait in inputs.traits.items():
        if trait.kind is not Kind.FIXED:
            continue
        count = keeper.state[name].numel()
        starts = range(0, count, PART)
        for other in others:
            spans = ((start, min(start + PART, count)) for start in starts)
            if all(torch.equal(keeper.read(name, *span), other.read(name, *span)) for span in spans):
                continue
            if keeper.state[name].is_complex():
                raise InvalidWeightsError(
                    explain(f"{keeper.path} and {other.path} differ in complex numbers", tensor=printable(name),
                            remedy="no method combines these: save them as two real tensors")
                )  # fmt: skip
            unlike.append(name)
            break
    if unlike:
        yield f"not combined, so as in {keeper.path.name} though files differ: {listing(unlike)}"

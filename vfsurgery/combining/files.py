"""Checkpoints combined on disk: no model is ever held, only parts of tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfsurgery.checkpoints.files import write_text
from vfsurgery.checkpoints.provenance import FileRecord
from vfsurgery.checkpoints.shards import files_of
from vfsurgery.checkpoints.streams import NAMES, Stream
from vfsurgery.combining.base import COMBINERS, PART, Combiner
from vfsurgery.combining.inputs import Checked, Hashing, Inputs, check_numbers, open_inputs
from vfsurgery.combining.running import Combination, Listing, check_weights_of
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import CheckpointError, OptionError, did_you_mean, explain
from vfsurgery.records.report import Report, version_of
from vfsurgery.stats.threads import threads
from vfsurgery.tracing.examples import ExampleInputs

UNKNOWN = "0" * 64
"""Stands for a hash until that is known."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES if dtype.is_floating_point}


@dataclass(frozen=True)
class FileReport(Report):
    """What was combined into which files. Print it for a summary.

    Attributes:
        method: Name of the method.
        options: Its options, ``scale`` among them.
        weights: A number for each source.
        base: The checkpoint that the sources were fine-tuned from.
        sources: The files that were combined.
        output: What was written; the last one is the one to read.
        kinds: For each kind of tensor how many there are, and numbers in them.
        told_by: What told the kinds.
        notes: What else is to be known, a sentence each.
        seed: Of random draws.
        resumed: Tensors that an earlier run, which was interrupted, had left.
    """

    method: str
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    base: FileRecord | None
    sources: tuple[FileRecord, ...]
    output: tuple[str, ...]
    kinds: tuple[tuple[str, int, int], ...]
    told_by: str
    notes: tuple[str, ...]
    seed: int
    resumed: int
    versions: Mapping[str, str]
    seconds: float

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        kinds = ", ".join(f"{count} {kind} ({numbers:,} numbers)" for kind, count, numbers in self.kinds)
        weights = [f"{source}, weight {weight:g}" for source, weight in zip(self.sources, self.weights, strict=True)]
        return "\n".join(
            [
                f"combined {len(self.sources)} checkpoints by {self.method}: {options}",
                f"  base {self.base or 'none'}",
                *(f"  {each}" for each in weights),
                f"  tensors by {self.told_by}: {kinds}",
                *(f"  {note}" for note in self.notes),
                *([f"  went on after {self.resumed} tensors of an earlier run"] if self.resumed else []),
                f"  {self.seconds:.1f} s",
            ]
        )


def combine_files(
    base: str | Path | None,
    sources: Sequence[str | Path],
    output: str | Path,
    combine: str | Combiner = "ties",
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    model: nn.Module | str | None = None,
    num_classes: int | None = None,
    example_inputs: ExampleInputs | None = None,
    key: str | Sequence[str | None] | None = None,
    ema: bool = True,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> FileReport:
    """Combine checkpoints that were fine-tuned from one, file to file, without ever holding a model.

    Any state dicts will do, of vision models or not. The result is that of :func:`~vfsurgery.combining.combine_states`,
    bit for bit, in memory for a few parts of a tensor; methods for matrices need whole tensors, one at a time. One core
    works on parts, whatever the number of threads, while another takes the files' hashes. Beside
    the result lies ``NAME.report.json``. A run that was killed is gone on with by the next of the same work: it takes
    the tensors that are whole from a hidden file beside the output. Nothing of the output's name is there before all
    of it is.

    Args:
        base: The checkpoint that all sources were fine-tuned from; ``None`` for methods that need none.
        sources: ``.safetensors``, files of ``torch.save``, or ``.index.json`` of several, as for
            :func:`~vfsurgery.checkpoints.load_state_dict`.
        output: A file ending in ``.safetensors``; missing folders are made.
        combine: The method, or its name.
        weights: A number for each source, by default 1.
        scale: What the combined task vector is multiplied by; by default what the method says.
        model: The architecture, without weights, or its name as in ``"timm:resnet18"``: then its graph tells what each
            tensor is, and the result has its names. Without it names and shapes tell.
        num_classes: Of an architecture that is given by name.
        example_inputs: For an architecture that does not say what it takes.
        key: Which network of a file, for all files, or for each, the base's first.
        ema: Whether to take the moving average of weights where a file has one.
        dtype: Of the result, as in ``"bfloat16"``; by default the base's.
        max_shard_size: Bytes, or as in ``"5GB"``: larger results are written as several files and an index.
        seed: Of random draws.
        progress: Whether to show bars for what takes over a second.
        options: Of the method.

    Raises:
        CheckpointError: A file cannot be read or written, or would be overwritten.
        IncompatibleModelsError: Files have different tensors.
        InvalidWeightsError: A tensor holds NaN or infinite values, or such as no method combines.
        OptionError: The method cannot combine these, or an option is none of its own.

    >>> import tempfile
    >>> from vfsurgery.checkpoints import load_state_dict, save_state_dict
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in ("base", 0.0), ("a", 1.0), ("b", 3.0):
    ...     save_state_dict({"fc.weight": torch.full((1, 2), value)}, folder / f"{name}.safetensors")
    >>> files = [folder / f"{name}.safetensors" for name in "ab"]
    >>> report = combine_files(folder / "base.safetensors", files, folder / "ab.safetensors", "ties", density=1.0)
    >>> load_state_dict(folder / "ab.safetensors")
    {'fc.weight': tensor([[2., 2.]])}
    """
    begun = time.perf_counter()
    output, found = Path(output), None if base is None else Path(base)
    paths = [*([] if found is None else [found]), *map(Path, sources)]
    if not sources:
        raise OptionError(explain("there is nothing to combine", remedy="name the checkpoints beside their base"))
    combiner = combiner_of(combine, scale, options)
    numbers = check_weights_of(len(sources), weights)
    target = _dtype(dtype)
    keys = [key] * len(paths) if key is None or isinstance(key, str) else [*key]
    if len(keys) != len(paths):
        raise OptionError(explain(f"{len(keys)} keys were given for {len(paths)} files", remedy="one for each"))
    inputs = open_inputs(
        found,
        paths[-len(sources) :],
        keys,
        ema=ema,
        model=model,
        num_classes=num_classes,
        example_inputs=example_inputs,
    )
    with contextlib.closing(inputs):
        combination = _combination(inputs, combiner, numbers, seed, target, progress)
        recipe = {
            "combine": combiner.name,
            **dataclasses.asdict(combiner),  # pyright: ignore[reportArgumentType]
            "weights": numbers,
            "seed": seed,
            "dtype": dtype or "as the base",
            "tensors_by": inputs.told_by,
        }
        dtypes, shapes = combination.listing.dtypes, {n: t.shape for n, t in inputs.sources[0].state.items()}
        state = {
            name: torch.empty(shape, dtype=dtypes[inputs.same.get(name, name)], device="meta")
            for name, shape in shapes.items()
        }
        hashing = Hashing(paths)
        try:
            belongs_to = json.dumps([recipe, hashing.stamps, [*map(str, keys)], ema, str(model)[:200]])
            stream = Stream(
                output, state, _metadata(recipe, found is not None, [UNKNOWN] * len(paths)), belongs_to, max_shard_size
            )
            refuse_over([*stream.written, beside(output)], paths)
            with stream, threads(1 if combiner.elementwise else None):
                _run(combination, inputs, stream, progress)
                records = hashing.result()
                written = stream.finish(_metadata(recipe, found is not None, [each.sha256 for each in records]))
        finally:
            hashing.close()
    report = FileReport(
        combiner.name,
        dataclasses.asdict(combiner),  # pyright: ignore[reportArgumentType]
        numbers,
        None if found is None else records[0],
        tuple(records[-len(sources) :]),
        tuple(map(str, written)),
        _kinds(combination),
        inputs.told_by,
        tuple([*inputs.notes, *combination.notes]),
        seed,
        len(stream.done),
        _versions(),
        time.perf_counter() - begun,
    )
    write_text(beside(output), report.to_json() + "\n")
    return report


def combiner_of(combine: str | Combiner, scale: float | None, options: Mapping[str, Any]) -> Combiner:
    """A method from its name and options.

    Raises:
        OptionError: It is unknown, or has no such option.

    >>> combiner_of("ties", 0.5, {"density": 0.1})
    Ties(density=0.1, aggregate='mean', scope='model', scale=0.5)
    """
    given = options if scale is None else {**options, "scale": float(scale)}
    if isinstance(combine, Combiner):
        own, known = combine, {each.name for each in dataclasses.fields(combine)}  # pyright: ignore[reportArgumentType]
    else:
        own, known = None, {each.name for each in dataclasses.fields(COMBINERS[combine])}  # pyright: ignore[reportArgumentType]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        name = combine if isinstance(combine, str) else combine.name
        raise OptionError(
            explain(f"combining method {name!r} has no option {unknown!r}", remedy=did_you_mean(unknown, known))
        )
    return COMBINERS[str(combine)](**given) if own is None else dataclasses.replace(own, **given)  # pyright: ignore


def beside(output: Path) -> Path:
    """Where the report of a result lies."""
    return output.with_suffix(".report.json")


def refuse_over(written: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read.

    Raises:
        CheckpointError: names the file.
    """
    targets = {path.resolve() for path in written}
    for path in inputs:
        for file in files_of(path):
            if file.resolve() in targets or path.resolve() in targets:
                raise CheckpointError(
                    explain(f"{file} would be overwritten", remedy="name another file for the output")
                )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise OptionError(explain(f"weights cannot be written in {name!r}", remedy=did_you_mean(name, DTYPES)))
    return None if name is None else DTYPES[name]


def _combination(
    inputs: Inputs,
    combiner: Combiner,
    weights: tuple[float, ...],
    seed: int,
    target: torch.dtype | None,
    shown: bool,
) -> Combination:
    state, own = inputs.sources[0].state, inputs.dtypes
    dtypes = {
        name: own[name] if target is None or not own[name].is_floating_point else target for name in inputs.traits
    }
    listing = Listing({name: tuple(state[name].shape) for name in inputs.traits}, dtypes, inputs.traits)
    stores = [Checked(each, str(each.path)) for each in inputs.sources]
    base = None if inputs.base is None else Checked(inputs.base, str(inputs.base.path))
    return Combination(listing, stores, base, combiner, weights, seed, [], shown)


def _run(combination: Combination, inputs: Inputs, stream: Stream, shown: bool) -> None:
    """Write all tensors that are not there yet, each under all its names."""
    names: dict[str, list[str]] = {name: [name] for name in inputs.traits}
    for name, other in inputs.same.items():
        names[other].append(name)
    skip = frozenset(name for name, own in names.items() if stream.done.issuperset(own))
    sizes = {name: inputs.sources[0].state[name].numel() for name in inputs.traits if name not in skip}
    total = sum(max(1, -(-size // PART)) if combination.combiner.elementwise else 1 for size in sizes.values())
    parts = progress_bar(combination.parts(skip), f"{combination.combiner.name}: writing", total, shown)
    for name, start, part in parts:
        part = part.to(combination.listing.dtypes[name])
        check_numbers(part, name, "the result")
        for each in names[name]:
            stream.write(each, start, part)
        if start + part.numel() == sizes[name]:
            for each in names[name]:
                stream.close_tensor(each)


def _metadata(recipe: Mapping[str, Any], has_base: bool, hashes: Sequence[str]) -> dict[str, str]:
    """For the header: what was done to which files by which versions, and nothing that differs from run to run."""
    found = {"recipe": recipe, "sources": hashes[has_base:], "versions": _versions()}
    if has_base:
        found["base"] = hashes[0]
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for name, value in found.items()
    }


def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("vfsurgery", "torch")}


def _kinds(combination: Combination) -> tuple[tuple[str, int, int], ...]:
    counts: dict[str, tuple[int, int]] = {}
    for name, trait in combination.settled.items():
        tensors, numbers = counts.get(trait.kind.value, (0, 0))
        counts[trait.kind.value] = tensors + 1, numbers + math.prod(combination.listing.shapes[name])
    return tuple((kind, *count) for kind, count in counts.items())

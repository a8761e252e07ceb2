"""Checkpoints combined on disk: no model is ever held, only parts of tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfsurgery.checkpoints.files import write_text
from vfsurgery.checkpoints.streams import NAMES, Stream
from vfsurgery.combining.adapted import Adapted, files_behind
from vfsurgery.combining.adapter_files import WEIGHTS
from vfsurgery.combining.ancestor import doubts
from vfsurgery.combining.base import PART, Combiner
from vfsurgery.combining.forms import AsAdapter, Dense, Form
from vfsurgery.combining.hashing import Hashing
from vfsurgery.combining.inputs import Checked, Inputs, check_numbers, open_inputs
from vfsurgery.combining.named import combiner_of
from vfsurgery.combining.running import Combination, Listing, check_weights_of
from vfsurgery.combining.told import FileReport
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.errors import CheckpointError, OptionError, did_you_mean, explain, warn
from vfsurgery.records.report import version_of
from vfsurgery.stats.threads import threads
from vfsurgery.tracing.examples import ExampleInputs

UNKNOWN = "0" * 64
"""Stands for a hash until that is known."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES if dtype.is_floating_point}


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
    adapter_rank: int | None = None,
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
            :func:`~vfsurgery.checkpoints.load_state_dict`; or folders of LoRA adapters, as peft writes them.
        output: A file ending in ``.safetensors``, with ``adapter_rank`` a folder; missing folders are made.
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
        adapter_rank: Write a LoRA adapter of this rank, the nearest that there is, into the folder ``output``; all
            sources have to be adapters.
        seed: Of random draws.
        progress: Whether to show bars for what takes over a second.
        options: Of the method.

    Raises:
        CheckpointError: A file cannot be read or written, or would be overwritten.
        IncompatibleModelsError: Files have different tensors.
        InvalidWeightsError: A tensor holds NaN or infinite values, or such as no method combines.
        OptionError: The method cannot combine these, or an option is none of its own.

    Warns:
        SurgeryWarning: The base is not what the sources were fine-tuned from, with the figure that shows it.

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
    if adapter_rank is not None and max_shard_size is not None:
        raise OptionError(
            explain("adapter_rank= and max_shard_size= exclude each other", because="an adapter is one file")
        )
    folder, output = output, output if adapter_rank is None else output / WEIGHTS[0]
    if not sources:
        raise OptionError(explain("there is nothing to combine", remedy="name the checkpoints beside their base"))
    combiner = combiner_of(combine, options, scale)
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
        inputs.notes += _doubts(combination, inputs)
        recipe = {
            "combine": combiner.name,
            **dataclasses.asdict(combiner),  # pyright: ignore[reportArgumentType]
            "weights": numbers,
            "seed": seed,
            "dtype": dtype or "as the base",
            "tensors_by": inputs.told_by,
            **({} if adapter_rank is None else {"adapter_rank": adapter_rank}),
        }
        form = Dense(combination, inputs)
        if adapter_rank is not None:
            form = AsAdapter.of(combination, inputs, adapter_rank, folder)
        hashing = Hashing(paths)
        try:
            belongs_to = json.dumps([recipe, hashing.stamps, [*map(str, keys)], ema, str(model)[:200]])
            stream = Stream(
                output,
                form.state,
                _metadata(recipe, found is not None, [UNKNOWN] * len(paths)),
                belongs_to,
                max_shard_size,
            )
            refuse_over([*stream.written, beside(output), *form.beside], paths)
            with stream, threads(1 if combiner.elementwise else None):
                _run(combination, inputs, form, stream, progress)
                records = hashing.result()
                form.finish(partly=bool(stream.done))
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
        for file in files_behind(path):
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


def _doubts(combination: Combination, inputs: Inputs) -> list[str]:
    """Warn of a base that the sources do not come from; adapters say nothing of that, being folded into it."""
    if inputs.base is None or combination.base is None:
        return []
    given = [
        (each.path, store)
        for each, store in zip(inputs.sources, combination.stores, strict=True)
        if not isinstance(each, Adapted)
    ]
    alike = len({path.name for path, _ in given}) < len(given)
    stores = {f"{n}: {path}" if alike else path.name: store for n, (path, store) in enumerate(given)}
    listing = combination.listing
    found = doubts(combination.base, stores, listing.shapes, listing.traits, inputs.base.path.name)
    for each in found:
        warn(each)
    return found


def _run(combination: Combination, inputs: Inputs, form: Form, stream: Stream, shown: bool) -> None:
    """Write all tensors that are not there yet."""
    skip = frozenset(name for name in inputs.traits if stream.done.issuperset(form.keys(name)))
    sizes = {name: inputs.sources[0].state[name].numel() for name in inputs.traits if name not in skip}
    total = sum(max(1, -(-size // PART)) if combination.combiner.elementwise else 1 for size in sizes.values())
    parts = progress_bar(combination.parts(skip), f"{combination.combiner.name}: writing", total, shown)
    for name, start, part in parts:
        part = part.to(combination.listing.dtypes[name])
        check_numbers(part, name, "the result")
        form.write(stream, name, start, part)
        if start + part.numel() == sizes[name]:
            for each in form.keys(name):
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

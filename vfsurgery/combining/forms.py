"""In which form a result is written, as its tensors come: as weights, or as the factors of a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfsurgery.checkpoints import write_text
from vfsurgery.checkpoints.streams import Stream
from vfsurgery.combining.adapted import Adapted
from vfsurgery.combining.adapter_files import CONFIG, PREFIX
from vfsurgery.combining.base import Kind
from vfsurgery.combining.factoring import best_factors, check_rank, config_of
from vfsurgery.combining.inputs import Inputs
from vfsurgery.combining.running import Combination
from vfsurgery.errors import OptionError, explain


class Form(Protocol):
    """What is written of each tensor."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """All that is written, shapes and dtypes alone."""
        ...

    @property
    def beside(self) -> Sequence[Path]:
        """Other files."""
        ...

    def keys(self, name: str) -> Sequence[str]:
        """What is written of a tensor, if anything."""
        ...

    def write(self, stream: Stream, name: str, start: int, part: Tensor) -> None:
        """Take the numbers of a tensor from ``start`` on; they come in their order."""
        ...

    def finish(self, partly: bool) -> None:
        """Once all tensors have come, or, ``partly``, those that an earlier run had not written."""
        ...


class Dense:
    """Weights, each under all its names."""

    def __init__(self, combination: Combination, inputs: Inputs) -> None:
        dtypes = combination.listing.dtypes
        self.beside: Sequence[Path] = ()
        self.state = {
            name: torch.empty(tensor.shape, dtype=dtypes[inputs.same.get(name, name)], device="meta")
            for name, tensor in inputs.sources[0].state.items()
        }
        self._names = {name: [name] for name in inputs.traits}
        for name, other in inputs.same.items():
            self._names[other].append(name)

    def keys(self, name: str) -> Sequence[str]:
        """See :class:`Form`."""
        return self._names[name]

    def write(self, stream: Stream, name: str, start: int, part: Tensor) -> None:
        """See :class:`Form`."""
        for each in self._names[name]:
            stream.write(each, start, part)

    def finish(self, partly: bool) -> None:
        """See :class:`Form`."""


@dataclass
class AsAdapter:
    """Factors of what a result adds to its base, for what the sources have factors of; else what they have, whole.

    One tensor is held at a time.
    """

    combination: Combination
    folder: Path
    ranks: Mapping[str, int]
    state: dict[str, Tensor]
    config: Mapping[str, Any]
    _keys: Mapping[str, Sequence[str]] = field(repr=False)
    _whole: Tensor | None = field(default=None, repr=False)
    _lost: float = 0.0
    _total: float = 0.0

    @classmethod
    def of(cls, combination: Combination, inputs: Inputs, rank: int, folder: Path) -> AsAdapter:
        """What is going to be written.

        Raises:
            OptionError: ``rank`` is none, or a source is no adapter.
        """
        check_rank(rank)
        adapted = [each for each in inputs.sources if isinstance(each, Adapted)]
        if len(adapted) < len(inputs.sources):
            other = next(each for each in inputs.sources if not isinstance(each, Adapted))
            raise OptionError(
                explain(
                    f"{other.path} is no adapter, and changes more than factors can say",
                    remedy="leave adapter_rank out; of models in memory save_adapter writes one, with the rest beside",
                )
            )
        settled, whole = combination.settled, set[str]()
        factored: set[str] = set()
        for each in adapted:  # what peft adds twice, or turned, is written whole
            for path, parts in each.adapter.parts.items():
                name = f"{path}.weight"
                turned = name in each.folded.weights and each.folded.weights[name].turned
                (whole if parts.doubled or turned else factored).add(name)
        targets = {name for name in factored - whole if name in settled and settled[name].kind is Kind.MATRIX}
        shapes, dtypes = combination.listing.shapes, combination.listing.dtypes
        ranks: dict[str, int] = {}
        keys: dict[str, Sequence[str]] = {}
        state: dict[str, Tensor] = {}
        for name in settled:
            if not any(name in each.folded.changed for each in adapted):
                continue
            path, _, last = name.rpartition(".")
            if name in targets:
                rows, *rest = shapes[name]
                ranks[name] = own = min(rank, rows, torch.Size(rest).numel())
                keys[name] = [f"{PREFIX}{path}.lora_{factor}.weight" for factor in "AB"]
                for key, shape in zip(keys[name], ((own, *rest), (rows, own, *[1] * (len(rest) - 1))), strict=True):
                    state[key] = torch.empty(shape, dtype=dtypes[name], device="meta")
            else:
                attached = f"{path}.weight" in targets
                keys[name] = [f"{PREFIX}{path}.base_layer.{last}" if attached else f"{PREFIX}{name}"]
                state[keys[name][0]] = torch.empty(shapes[name], dtype=dtypes[name], device="meta")
        saved = {module for each in adapted for module in each.adapter.config.get("modules_to_save") or ()}
        named = next((each.adapter.base_name for each in adapted if each.adapter.base_name), None)
        modules = {name: name.removesuffix(".weight") for name in ranks}
        config = config_of(ranks, modules, sorted(saved), named)
        return cls(combination, folder, ranks, state, config, keys)

    @property
    def beside(self) -> Sequence[Path]:
        """See :class:`Form`."""
        return [self.folder / CONFIG]

    def keys(self, name: str) -> Sequence[str]:
        """See :class:`Form`."""
        return self._keys.get(name, ())

    def write(self, stream: Stream, name: str, start: int, part: Tensor) -> None:
        """See :class:`Form`."""
        keys, shape = self._keys[name], self.combination.listing.shapes[name]
        if name not in self.ranks:
            stream.write(keys[0], start, part)
            return
        count = torch.Size(shape).numel()
        if part.numel() < count:
            whole = part.new_empty(count) if self._whole is None else self._whole
            whole[start : start + part.numel()] = part
            self._whole = whole if start + part.numel() < count else None
            if self._whole is not None:
                return
            part = whole
        assert self.combination.base is not None  # adapters are folded into one
        origin = self.combination.base.read(name, 0, count).reshape(shape)
        down, up, lost, total = best_factors(part.reshape(shape), origin, self.ranks[name])
        self._lost, self._total = self._lost + lost, self._total + total
        for key, factor in zip(keys, (down, up), strict=True):
            stream.write(key, 0, factor.reshape(-1))

    def finish(self, partly: bool) -> None:
        """See :class:`Form`."""
        share = 1 - self._lost / self._total if self._total else 1.0
        told = "" if partly else f", which have {share:.2%} of the squared norm of their changes"
        ranks = sorted({*self.ranks.values()}) or [0]
        self.combination.notes.append(
            f"written as an adapter: {len(self.ranks)} weights of rank {ranks[0]} to {ranks[-1]}{told}"
        )
        write_text(self.folder / CONFIG, json.dumps(self.config, indent=2, sort_keys=True) + "\n")

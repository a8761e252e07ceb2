"""What a comparison of models with their base holds, and how it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, Literal, TypeAlias

from vfsurgery.combining.base import Kind
from vfsurgery.combining.moved import Moved
from vfsurgery.shown import Drawn

Fault: TypeAlias = Literal[
    "wrong base", "other ancestor", "new layers", "moving average", "image size", "equal to base", "equal sources"
]


@dataclass(frozen=True)
class Caution:
    """Something that a merge should not be made with unseen.

    Attributes:
        fault: What kind of thing.
        text: A sentence with the figure.
        sources: Those whom it concerns.
        figure: The number that shows it, where there is one.
    """

    fault: Fault
    text: str
    sources: tuple[str, ...]
    figure: float | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Differing:
    """A tensor that is not of one shape everywhere: shapes of the base and the sources, ``None`` where it is absent."""

    name: str
    shapes: tuple[tuple[int, ...] | None, ...]

    @property
    def classes(self) -> tuple[int | None, ...]:
        """How many outputs the base and the sources have there."""
        return tuple(shape[0] if shape else None for shape in self.shapes)


@dataclass(frozen=True)
class Comparison(Drawn):
    """What :func:`compare` found; print it for a table.

    Attributes:
        base: What the base is called.
        sources: What the sources are called.
        tensors: All trained tensors that the base and all sources have alike.
        kinds: What each tensor of the base is.
        heads: Trained tensors that differ in shape, or are not everywhere.
        tables: Of these, tables of positions, which depend on the size of images.
        cautions: What is wrong, by the figure that shows it.
        outlook: What merging these is likely to do, in a sentence.
    """

    base: str
    sources: tuple[str, ...]
    tensors: Mapping[str, Moved] = field(repr=False)
    kinds: Mapping[str, str] = field(repr=False)
    heads: tuple[Differing, ...] = ()
    tables: tuple[Differing, ...] = ()
    cautions: tuple[Caution, ...] = ()
    outlook: str = ""

    @cached_property
    def total(self) -> Moved:
        """Over all tensors."""
        return reduce(add, self.tensors.values())

    @cached_property
    def weights(self) -> Mapping[str, Moved]:
        """Of linear layers and convolutions, by name of the tensor."""
        found = {name: moved for name, moved in self.tensors.items() if self.kinds[name] == Kind.MATRIX.value}
        return found or self.tensors

    @cached_property
    def layers(self) -> Mapping[str, Moved]:
        """By the path of the module that has the tensors, in the order of the base."""
        found: dict[str, Moved] = {}
        for name, moved in self.tensors.items():
            layer = name.rpartition(".")[0] or name
            found[layer] = found[layer] + moved if layer in found else moved
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; what is not a finite number is ``None``."""
        return {
            "base": self.base,
            "sources": [*self.sources],
            "outlook": self.outlook,
            "cautions": [
                {"fault": each.fault, "text": each.text, "sources": [*each.sources], "figure": each.figure}
                for each in self.cautions
            ],
            "heads": [{"name": each.name, "shapes": [*each.shapes]} for each in (*self.heads, *self.tables)],
            "total": _figures(self.total),
            "layers": {name: _figures(moved) for name, moved in self.layers.items()},
            "tensors": {name: {"kind": self.kinds[name], **_figures(moved)} for name, moved in self.tensors.items()},
        }

    def to_json(self) -> str:
        """The values of :meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def lines(self) -> Iterator[str]:
        """A row for each source, pair and layer, and what there is to say."""
        total, names = self.total, self.sources
        yield f"{len(names)} source{'s' * (len(names) > 1)} beside {self.base}: {len(self.tensors)} tensors, " + (
            f"{total.numbers:,} numbers, {', '.join(self._shares())}"
        )
        width = max(map(len, ["source", *names]))
        yield f"{'source':<{width}}  norm/base  cosine to base"
        for source, name in enumerate(names):
            yield f"{name:<{width}}  {_cell(total.ratio(source), 9)}  {_cell(total.kept(source), 14)}"
        pairs = {f"{names[a]}, {names[b]}": total.cosine(a, b) for a, b in total.pairs}
        if pairs:
            width = max(map(len, ["task vectors", *pairs]))
            yield f"{'task vectors':<{width}}  cosine"
            yield from (f"{pair:<{width}}  {_cell(cosine, 6, 3)}" for pair, cosine in pairs.items())
            yield f"signs conflict at {total.conflict:.1%} of the numbers that more than one source moves"
        width = max(map(len, ["layer", *self.layers]))
        yield f"{'layer':<{width}}  norm/base  cosine  conflicts"
        for layer, moved in self.layers.items():
            conflict = "–" if math.isnan(moved.conflict) else f"{moved.conflict:.1%}"
            yield (
                f"{layer:<{width}}  {_cell(moved.mean_ratio, 9)}  {_cell(moved.mean_cosine, 6, 3)}  {conflict:>9}"
            ).rstrip()
        for head in self.heads:
            shapes = zip((self.base, *names), head.shapes, strict=True)
            yield f"{head.name} is kept apart: {', '.join(f'{who} {shape_text(shape)}' for who, shape in shapes)}"
        yield from (f"caution: {caution}" for caution in self.cautions)
        yield self.outlook

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _shares(self) -> Iterator[str]:
        for kind in dict.fromkeys(self.kinds[name] for name in self.tensors):
            numbers = sum(moved.numbers for name, moved in self.tensors.items() if self.kinds[name] == kind)
            yield f"{numbers / max(self.total.numbers, 1):.1%} {kind}"


def _figures(moved: Moved) -> dict[str, Any]:
    own = range(moved.sources)
    return {
        "numbers": moved.numbers,
        "norms": [moved.norm(source) for source in own],
        "norms_relative_to_base": [_plain(moved.ratio(source)) for source in own],
        "cosines_to_base": [_plain(moved.kept(source)) for source in own],
        "cosines": {f"{a},{b}": _plain(moved.cosine(a, b)) for a, b in moved.pairs},
        "sign_conflicts": _plain(moved.conflict),
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"


def _cell(value: float, width: int, digits: int = 4) -> str:
    return f"{'–' if math.isnan(value) else f'{value:.{digits}f}':>{width}}"

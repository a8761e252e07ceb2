"""The sections of a recipe that are no stages, frozen and strict: data and sources; and types of values for all.

Some values are more than a number or text: matchers and passes with options, shares, boundaries, files. They are
checked when a recipe is read, and kept as plain values, so that it can be written again.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema
from torch import Tensor, nn

from vfsurgery.checkpoints import ONNX, PROGRAM, WEIGHTS, check_same_classes, load_state_dict
from vfsurgery.data import Splits
from vfsurgery.data.datasets import DATA, OPTIONS, check_options, load_for
from vfsurgery.errors import CheckpointError, refuse_unknown
from vfsurgery.matching.base import SYMMETRIES
from vfsurgery.merging.shares import plan_shares
from vfsurgery.merging.written import (
    build_combiner,
    build_matcher,
    build_normalizations,
    check_boundary,
    check_normalizations,
    several,
)
from vfsurgery.networks.architectures import build_model
from vfsurgery.passes.mask import CHOICES
from vfsurgery.passes.registry import build_passes
from vfsurgery.pruning import PRUNERS, Pruner
from vfsurgery.records.options import build

# YAML has lists only; a frozen value needs tuples
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
"""Names become file names, so they hold letters, digits, ``_``, ``.`` and ``-`` only."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=4)]
Patterns = Annotated[tuple[str, ...], AsTuple]
Options = dict[str, bool | int | float | str]
"""Keyword arguments of a model."""

FORMATS = (WEIGHTS, PROGRAM, ONNX)
NONE = "none"
"""Stands for no normalization."""
CHECKPOINTS = (WEIGHTS, ".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".json")
"""How files of weights end; any other text names a model."""


class Section(BaseModel):
    """A mapping of a recipe: frozen, with no keys but its fields, and no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


@dataclass(frozen=True)
class Built:
    """Marks an option that stands for what is built of it: matchers, pruners, passes."""

    by: Callable[[Any], Any]


def build_pruner(method: str, options: Mapping[str, Any] | None = None) -> Pruner:
    """A pruner by its name.

    >>> build_pruner("magnitude").name
    'magnitude'
    """
    return build(cast("type[Pruner]", PRUNERS[method]), options or {}, "pruner")


def _normalizations(value: Any) -> Any:
    if value in ("auto", NONE, None):
        return value if value == "auto" else []
    check_normalizations(several(value))
    return several(value)


def _applied(value: Any) -> Any:
    for one in build_passes(several(value)):
        if one.needs_sources:
            raise ValueError(f"{one.name} compares with the sources of a merge: write it into renormalize of the merge")
    return several(value)


def _checked(check: Callable[[Any], object]) -> BeforeValidator:
    """Keeps a value as it is written, once ``check`` has made of it what it stands for."""

    def kept(value: Any) -> Any:
        check(value)
        return value

    return BeforeValidator(kept)


def _one_of(kind: str, known: Iterable[str]) -> AfterValidator:
    def kept(name: str) -> str:
        refuse_unknown(kind, (name,), known)
        return name

    return AfterValidator(kept)


def _file_name(name: str) -> str:
    """Refuse names of files that would lie elsewhere, or are of no format that networks are written in."""
    if not name.endswith(FORMATS):
        raise ValueError(f"networks are written into files that end in {', '.join(FORMATS)}; found {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{,99}", name):
        raise ValueError(f"{name!r} is no plain file name: letters, digits, _ . and -; folders are given by --output")
    return name


_NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
_NUMBERS = [_NUMBER, {"type": "array"}]
_SHARES = [*_NUMBERS, {"type": "object", "additionalProperties": {"anyOf": _NUMBERS}}]
_NULL = {"type": "null"}
_PASS = [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]
_PASSES = [*_PASS, {"type": "array", "items": {"anyOf": _PASS}}]
_LIMITS = {name: {"type": "number", "minimum": 1} for name in ("flops", "params")}
_BUDGET = {"type": "object", "additionalProperties": False, "properties": _LIMITS}


def _any_of(*members: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*members]})


Alpha = Annotated[Any, _checked(lambda value: plan_shares(2, value, None)), _any_of(*_SHARES)]
Weights = Annotated[Any, _any_of(*_SHARES, _NULL)]
CombinerEntry = Annotated[Any, _checked(build_combiner), Built(build_combiner), _any_of(*_PASS)]
MatcherEntry = Annotated[Any, _checked(build_matcher), Built(build_matcher), _any_of(*_PASS)]
Boundary = Annotated[Any, _checked(check_boundary), _any_of({"type": "integer", "minimum": 0}, _PASS[0], _BUDGET)]
Normalizations = Annotated[
    Any,
    BeforeValidator(_normalizations),
    Built(build_normalizations),
    PlainSerializer(lambda entries: entries or NONE),
    _any_of(*_PASSES, _NULL),
]
Passes = Annotated[Any, BeforeValidator(_applied), Built(build_passes), _any_of(*_PASSES)]
Symmetries = Annotated[str, _one_of("choice of symmetries", SYMMETRIES)]
Masks = Annotated[str, _one_of("choice of masks", CHOICES)]
PrunerName = Annotated[str, _one_of("pruner", PRUNERS), Built(build_pruner)]
FileNames = Annotated[tuple[Annotated[str, AfterValidator(_file_name)], ...], AsTuple, BeforeValidator(several)]


def _known_data(name: str) -> str:
    if ":" not in name:
        refuse_unknown("data set", (name,), DATA)
    return name


class Images(Section):
    """Images for training, calibration and the test; see :mod:`vfsurgery.data.datasets` for names.

    ``size``, ``mean`` and ``std`` take the place of what the model's source says of them, where the data holds pictures
    that are to be made tensors of.
    """

    name: Annotated[str, AfterValidator(_known_data)] = "digits"
    seed: Seed = 0
    size: Count | None = None
    path: str | None = None
    train: Count | None = None
    calibration: Count | None = None
    test: Count | None = None
    mean: Annotated[Channels | None, AsTuple] = None
    std: Annotated[Channels | None, AsTuple] = None
    options: Options = {}

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_options(self.name, self.model_dump(include={*OPTIONS}, exclude_none=True))
        return self

    def load(self, spec: str, build: Callable[[], nn.Module]) -> Splits:
        """Return the splits.

        Args:
            spec: The name of the model that the images are for.
            build: Makes that model; it is asked where the data holds pictures.

        Raises:
            DataError: there are no such images, or nobody knows what the model expects of pictures.
        """
        given: dict[str, Any] = self.model_dump(include={*OPTIONS}, exclude_none=True)
        return load_for(self.name, {**given, **self.options}, spec, build, self.seed)


class Source(Section):
    """One network to begin with: its architecture, and where its weights come from.

    ``model``, ``options`` and ``input_size`` are those of the source before where they are left out; the seed counts
    from 0. With ``ema`` moving averages are taken from a checkpoint that has some, and ``key`` says which of its
    networks, where it has several. ``input_size`` is the shape of one image, for models that do not say it where there
    is no data.
    """

    name: Name
    model: str
    options: Options = {}
    seed: Seed = 0
    checkpoint: str | None = None
    pretrained: bool = False
    ema: bool = True
    key: str | None = None
    input_size: Annotated[tuple[Count, Count, Count] | None, AsTuple] = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("weights come from a checkpoint or are pretrained: leave one of the two out")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For editors: a source may be text, and leaves out what the one before says."""
        section = handler.resolve_ref_schema(handler(core))
        section.pop("required", None)
        return {"anyOf": [{"type": "string"}, section]}

    def build(self, *, pretrained: bool | None = None) -> nn.Module:
        """The network, with published weights or those of its random initialization."""
        options: dict[str, Any] = self.options
        return build_model(self.model, pretrained=self.pretrained if pretrained is None else pretrained, **options)

    def untrained(self) -> nn.Module:
        """The network with random weights, wherever its weights come from."""
        return self.build(pretrained=False)

    def weights(self) -> dict[str, Tensor]:
        """What the checkpoint holds.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return load_state_dict(str(self.checkpoint), ema=self.ema, key=self.key)


@contextmanager
def fitting(sources: Iterable[Source]) -> Generator[None]:
    """Where a checkpoint does not fit, say first whether the files only tell other numbers of classes apart."""
    try:
        yield
    except CheckpointError:
        check_same_classes({str(each.checkpoint): each.weights() for each in sources if each.checkpoint is not None})
        raise


def complete_sources(given: Any) -> Any:
    """Sources as they may be written, each with the keys that it leaves out.

    >>> complete_sources(["timm:resnet18", {"checkpoint": "b.pt"}])[1]
    {'name': 'b', 'model': 'timm:resnet18', 'seed': 1, 'checkpoint': 'b.pt'}
    """
    if not isinstance(given, list | tuple):
        return given
    completed: list[Any] = []
    inherited: dict[str, Any] = {}
    for place, entry in enumerate(cast("list[Any]", given)):
        section = entry
        if isinstance(entry, str):
            section = {"checkpoint" if entry.endswith(CHECKPOINTS) else "model": entry}
        if isinstance(section, Mapping):
            name = string.ascii_lowercase[place] if place < 26 else f"s{place}"
            section = {"name": name, **inherited, "seed": place, **cast("Mapping[str, Any]", section)}
            inherited = {key: section[key] for key in ("model", "options", "input_size") if key in section}
        completed.append(section)
    return tuple(completed)

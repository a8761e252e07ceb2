"""What stands in a recipe's ``sources`` and ``stages``."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema
from torch import Tensor, nn

from vfsurgery.checkpoints import ONNX, PROGRAM, WEIGHTS, load_state_dict
from vfsurgery.errors import OptionError
from vfsurgery.merging.shares import plan_shares
from vfsurgery.networks.architectures import build_model
from vfsurgery.passes import PASSES, pass_options
from vfsurgery.passes.mask import CHOICES
from vfsurgery.pruning import PRUNERS, Pruner
from vfsurgery.pruning.schedule import check_scope, read_pattern, read_sparsity
from vfsurgery.recipes.expectations import Expectation
from vfsurgery.recipes.pruning_sections import PrunerName, check_pruner_options
from vfsurgery.recipes.sections import (
    AsTuple,
    Count,
    FrozenDict,
    Name,
    Options,
    Section,
    Seed,
    Training,
    refuse_unknown,
)
from vfsurgery.recipes.stages.entries import NONE, Alpha, Boundary, MatcherEntry, Normalizations, Passes, Weights

CHECKPOINTS = (WEIGHTS, ".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".json")
"""How files of weights end; any other text names a model."""
FORMATS = (WEIGHTS, PROGRAM, ONNX)
Patterns = Annotated[tuple[str, ...], AsTuple]


class Source(Section):
    """One network to begin with: its architecture, and where its weights come from.

    ``model``, ``options`` and ``input_size`` are those of the source before where they are left out; the seed counts
    from 0. With ``ema`` moving averages are taken from a checkpoint that has some, and ``key`` says which of its
    networks, where it has several. ``input_size`` is the shape of one
    image, for models that do not say it where there is no data.
    """

    name: Name
    model: str
    options: Options = FrozenDict()
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

    def build(self) -> nn.Module:
        """The network, with published weights or those of its random initialization."""
        options: dict[str, Any] = self.options
        return build_model(self.model, pretrained=self.pretrained, **options)

    def weights(self) -> dict[str, Tensor]:
        """What the checkpoint holds.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return load_state_dict(str(self.checkpoint), ema=self.ema, key=self.key)

    def untrained(self) -> nn.Module:
        """The network with random weights, wherever its weights come from."""
        options: dict[str, Any] = self.options
        return build_model(self.model, **options)


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


def _known_choice(masks: str) -> str:
    refuse_unknown("choice of masks", (masks,), CHOICES)
    return masks


class Prune(Section):
    """Options of :func:`vfsurgery.prune`."""

    sparsity: float | Annotated[dict[str, float], AfterValidator(FrozenDict)] | None = None
    method: PrunerName = "magnitude"
    scope: Literal["global", "layer", "row"] | None = None
    pattern: str | None = None
    exclude: Patterns = ()
    options: Options = FrozenDict()

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_pruner_options(self.method, self.options)
        if self.sparsity is None and self.pattern is None:
            raise ValueError("write sparsity, as in 0.9, or pattern, as in 2:4 within quotes")
        check_scope(self.scope, self.pattern)
        read_pattern(self.pattern)
        if self.sparsity is not None:
            read_sparsity(self.sparsity)
        return self

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`vfsurgery.prune`; the pruner is made anew each time."""
        options: dict[str, Any] = self.options
        pruner: Pruner = PRUNERS[self.method](**options)
        given = self.model_dump(include={"sparsity", "scope", "pattern"})
        return {**given, "exclude": self.exclude, "method": pruner}


class Merge(Section):
    """Options of :func:`vfsurgery.merge` that no other stage has."""

    alpha: Alpha = 0.5
    weights: Weights = None
    masks: Annotated[str, AfterValidator(_known_choice)] | None = None
    pins: Patterns = ()
    leaf: Patterns = ()


class Evaluate(Section):
    """Which images to classify, whether to count what the sources had right and the result has not, what to expect."""

    data: Literal["train", "calibration", "test"] = "test"
    flips: bool = False
    expect: Patterns = ()

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """What ``expect`` says."""
        return tuple(Expectation.parse(text) for text in self.expect)

    @model_validator(mode="after")
    def _can_be_checked(self) -> Self:
        if any(expected.points is not None for expected in self.expectations):
            raise ValueError("nothing is published for stages: write LABEL < LABEL, or LABEL < NUMBER")
        return self


class Diagnose(Section):
    """The page that shows where features vanish."""

    page: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.html$", max_length=100)] = "diagnosis.html"


def file_name(name: str) -> str:
    """Refuse names of files that would lie elsewhere, or are of no format that networks are written in."""
    known = ", ".join(FORMATS)
    if not name.endswith(FORMATS):
        raise ValueError(f"networks are written into files that end in {known}; found {name!r}")
    if not name[0].isalnum() or set(name) - set(string.ascii_letters + string.digits + "_.-") or len(name) > 100:
        raise ValueError(f"{name!r} is no plain file name: letters, digits, _ . and -; folders are given by --output")
    return name


FileName = Annotated[str, AfterValidator(file_name)]
FileNames = Annotated[
    tuple[FileName, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), AsTuple
]

BARE = ("train", "merge", "evaluate", "diagnose")
"""Stages that may be written as their name alone."""


class Stage(Section):
    """One entry of ``stages``: a single key says what is done, and its value how."""

    train: Training | None = None
    prune: Prune | None = None
    match: MatcherEntry = None
    merge: Merge | None = None
    preserve: Boundary = None
    renormalize: Normalizations = None
    apply: Passes = None
    evaluate: Evaluate | None = None
    diagnose: Diagnose | None = None
    export: FileNames | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_key(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {given: None}
        if not isinstance(given, Mapping) or len(cast("Mapping[Any, Any]", given)) != 1:
            raise ValueError(
                "a stage is its name, or one key with its options; every stage has a dash of its own, as in "
                "'- train: {epochs: 5}'"
            )
        ((name, options),) = cast("Mapping[Any, Any]", given).items()
        if name in PASSES and name not in cls.model_fields:
            return {"apply": name if options is None else {name: options}}
        if options is None and name in BARE:
            return {name: {}}
        if options is None and name == "renormalize":
            return {name: NONE}
        if options is None and name in cls.model_fields:
            raise ValueError(f"the stage {name!r} needs a value")
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For editors: one key, of a stage or a pass, or the name of one that needs no options."""
        section = handler.resolve_ref_schema(handler(core))
        own = {key: _without_null(value) for key, value in section["properties"].items()}
        section |= {"properties": {**_pass_schemas(), **own}, "minProperties": 1, "maxProperties": 1}
        names = {"type": "string", "enum": [*BARE, *(name for name in _passes_alone() if name not in own)]}
        return {"anyOf": [names, section]}

    @model_serializer(mode="wrap")
    def _as_one_key(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        entries = {key: value for key, value in handler(self).items() if value is not None}
        return {key: NONE if key == "renormalize" and not value else value for key, value in entries.items()}

    @property
    def kind(self) -> str:
        """The key."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def value(self) -> Any:
        """What stands under the key."""
        return getattr(self, self.kind)

    def __str__(self) -> str:
        return self.kind


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a stage's value, for which ``None`` only says that it is another stage."""
    kept = {key: value for key, value in schema.items() if key != "default"}
    members = [member for member in kept.get("anyOf", ()) if member != {"type": "null"}]
    return kept if not members else members[0] if len(members) == 1 else {**kept, "anyOf": members}


def _passes_alone() -> list[str]:
    """Passes that go by no sources, and so may be stages."""
    return [name for name in PASSES if not PASSES[name].needs_sources]


def _pass_schemas() -> dict[str, Any]:
    """The options of every pass that may be a stage, by its name."""
    return {
        name: {
            "type": ["object", "null"],
            "description": (PASSES[name].__doc__ or "").partition("\n")[0],
            "properties": {option.name: option.schema() for option in pass_options(name)},
            "required": [option.name for option in pass_options(name) if option.required],
            "additionalProperties": False,
        }
        for name in _passes_alone()
    }


def check_weights(weights: Any, count: int, where: str) -> None:
    """Refuse shares of another number of sources."""
    try:
        plan_shares(count, 0.5, weights)
    except OptionError as error:
        raise ValueError(f"{where}: {error}") from None

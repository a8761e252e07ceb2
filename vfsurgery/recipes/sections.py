"""The plain sections of a recipe, frozen and strict: data and sources; and the types that all sections are made of."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema
from torch import Tensor, nn

from vfsurgery.checkpoints import WEIGHTS, check_same_classes, load_state_dict
from vfsurgery.data import Splits
from vfsurgery.data.datasets import DATA, OPTIONS, find_data, load_for, needs, options_of
from vfsurgery.errors import CheckpointError, did_you_mean
from vfsurgery.networks.architectures import build_model

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

CHECKPOINTS = (WEIGHTS, ".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".json")
"""How files of weights end; any other text names a model."""


def refuse_unknown(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known, and offer the nearest spelling."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; {did_you_mean(name, known)}")


def refuse_repeated(kind: str, names: Sequence[str]) -> None:
    """Refuse two entries of one name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two entries have the {kind} name {repeated[0]!r}")


class Section(BaseModel):
    """A mapping of a recipe: frozen, with no keys but its fields, and no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


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
        if ":" in self.name and not self.name.startswith("torchvision:"):
            return self  # code is imported when it is run, not when it is read
        factory = find_data(self.name)
        own = options_of(factory)
        for option in OPTIONS:
            if option not in own and getattr(self, option) is not None:
                raise ValueError(f"{self.name} has no {option}; accepted: {', '.join(sorted({'name', 'seed', *own}))}")
        if needs(factory, "path") and self.path is None:
            raise ValueError(f"{self.name} needs path, the folder that holds it")
        return self

    @property
    def image(self) -> tuple[int, int, int] | None:
        """The shape of an image, as far as it is known without reading one; else the model's configuration says it."""
        if self.name == "digits":
            return (1, self.size or 8, self.size or 8)
        if self.name in ("cifar10", "cifar100"):
            return (3, 32, 32)
        return None if self.size is None else (3, self.size, self.size)

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

"""The sections of a recipe, frozen and strict: data, training, merges, pairs of models, and their reduced form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from torch import nn

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.data import Splits
from vfsurgery.data.datasets import DATA, OPTIONS, find_data, load_for, needs, options_of
from vfsurgery.errors import did_you_mean
from vfsurgery.matching import MATCHERS
from vfsurgery.networks.architectures import build_model
from vfsurgery.passes import NORMALIZATIONS
from vfsurgery.passes.mask import CHOICES
from vfsurgery.recipes.expectations import Expectation, is_number
from vfsurgery.recipes.ratio_rows import PREFIX, RatioRow
from vfsurgery.training import OptimizerName

# YAML has lists only; a frozen value needs tuples
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
"""Names become file names, so they hold letters, digits, ``_``, ``.`` and ``-`` only."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Threads = Annotated[int, Field(ge=1, le=1024)]

Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=4)]
Share = Annotated[float, Field(ge=0, le=1)]
V = TypeVar("V")


class FrozenDict(dict[str, V]):
    """A mapping that is hashed by what it holds, since sections are values."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))


Frozen = AfterValidator(FrozenDict)
Options = Annotated[dict[str, bool | int | float | str], Frozen]
"""Keyword arguments of a model."""
Published = Annotated[dict[str, float], Frozen]
"""Accuracies (%) and ratios as printed in the paper, by the label of their row."""


SOURCES = ("source a", "source b", "ensemble")
BARRIERS = ("barrier naive", "barrier aligned", "barrier renormalized")
"""Rows that every table has; a barrier is that of the accuracy, in percentage points."""


def _known_steps(steps: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(steps, str):
        refuse_unknown("renormalization", (steps,), ["auto", *NORMALIZATIONS])
    else:
        refuse_unknown("renormalization", steps, NORMALIZATIONS)
    return steps


Steps = Annotated[str | tuple[str, ...], AfterValidator(_known_steps)]
"""The name of a normalization, ``"auto"``, or names of several to run in order."""


def _known_data(name: str) -> str:
    if ":" not in name:
        refuse_unknown("data set", (name,), DATA)
    return name


DataName = Annotated[str, AfterValidator(_known_data)]


class Section(BaseModel):
    """A mapping of a recipe: frozen, with no keys but its fields, and no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Images(Section):
    """Images for training, calibration and the test; see :mod:`vfsurgery.data.datasets` for names.

    ``size``, ``mean`` and ``std`` take the place of what the model's source says of them, where the data holds pictures
    that are to be made tensors of.
    """

    name: DataName = "digits"
    seed: Seed = 0
    size: Count | None = None
    path: str | None = None
    train: Count | None = None
    calibration: Count | None = None
    test: Count | None = None
    mean: Annotated[Channels | None, AsTuple] = None
    std: Annotated[Channels | None, AsTuple] = None
    options: Options = FrozenDict()

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


class Training(Section):
    """Options of :func:`vfsurgery.training.train`."""

    epochs: Annotated[int, Field(ge=1)] = 20
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Annotated[int, Field(ge=1)] = 64
    optimizer: OptimizerName = "sgd"
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    nesterov: bool = True
    milestones: Annotated[tuple[Count, ...] | None, AsTuple] = None
    warmup: Annotated[int, Field(ge=0)] = 0
    augment: bool = False

    @model_validator(mode="after")
    def _warmup_has_steps(self) -> Self:
        if self.warmup and self.milestones is None:
            raise ValueError("warmup comes with milestones: a learning-rate cycle rises by itself")
        return self


class Merge(Section):
    """One row of the table: options of :func:`vfsurgery.merge`, under ``label`` or a name made from them."""

    matching: str = "auto"
    renormalize: Annotated[Steps | None, AsTuple] = "auto"
    preserve: Annotated[int, Field(ge=0)] | str = 0
    masks: str | None = None
    alpha: Share | None = None
    label: str | None = None

    @field_validator("matching")
    @classmethod
    def _matching_exists(cls, matching: str) -> str:
        refuse_unknown("matching", (matching,), ["auto", *MATCHERS])
        return matching

    @field_validator("masks")
    @classmethod
    def _choice_exists(cls, masks: str | None) -> str | None:
        refuse_unknown("choice of masks", () if masks is None else (masks,), CHOICES)
        return masks

    @property
    def row(self) -> str:
        """The label, or as in ``activations + rescale``."""
        steps = (self.renormalize,) if isinstance(self.renormalize, str) else self.renormalize or ()
        kept = (f"preserve {self.preserve}",) if self.preserve else ()
        zeros = () if self.masks is None else (f"masks {self.masks}",)
        at = () if self.alpha is None else (f"alpha {self.alpha:g}",)
        return self.label or " + ".join([self.matching, *steps, *kept, *zeros, *at])

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`vfsurgery.merge`; ``alpha`` only where this row has one of its own."""
        given = self.model_dump(include={"matching", "renormalize", "preserve", "masks"})
        return given if self.alpha is None else {**given, "alpha": self.alpha}


class Experiment(Section):
    """A network to train or to load, and what is expected of the table; subclasses say what is done with it."""

    name: Name
    model: str
    options: Options = FrozenDict()
    training: Training = Training()
    expect: Annotated[tuple[str, ...], AsTuple] = ()

    ENDINGS: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    """What follows the name in those of the files that are written."""

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """What ``expect`` says."""
        return tuple(Expectation.parse(text) for text in self.expect)

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of all files that come of it."""
        return tuple(self.name + ending for ending in self.ENDINGS)

    def build(self) -> nn.Module:
        """Return one untrained model."""
        options: dict[str, Any] = self.options
        return build_model(self.model, **options)

    @property
    def files(self) -> tuple[str, ...]:
        """Checkpoints that are loaded in place of a training."""
        return ()

    def check_bands(self, published: Iterable[str]) -> None:
        """Refuse bands around what is not published."""
        for expectation in self.expectations:
            if expectation.points is not None and expectation.rows[0] not in published:
                raise ValueError(f"nothing is published for {expectation.rows[0]!r}, so it can be in no band around it")


class Pair(Experiment):
    """Two models of one architecture from two seeds, and the merges to compare; the last one is written out."""

    seeds: Annotated[tuple[Seed, Seed], AsTuple] = (0, 1)
    checkpoints: Annotated[tuple[str, str] | None, AsTuple] = None
    merges: Annotated[tuple[Merge, ...], AsTuple, Field(min_length=1)] = (Merge(),)
    alphas: Annotated[int, Field(ge=3)] = 11
    published: Published = FrozenDict()

    ENDINGS: ClassVar[tuple[str, ...]] = (WEIGHTS, "_barrier.png", ".html")

    @field_validator("alphas")
    @classmethod
    def _midpoint_is_there(cls, alphas: int) -> int:
        if alphas % 2 == 0:
            raise ValueError(f"alphas is {alphas}: only odd numbers of points have the midpoint among them")
        return alphas

    @model_validator(mode="after")
    def _rows_differ(self) -> Self:
        refuse_repeated("merge", [merge.row for merge in self.merges])
        last = self.merges[-1]
        if last.preserve:
            raise ValueError("the last merge has preserve, but its weights are written: put one without it last")
        if last.alpha is not None:
            raise ValueError("the last merge has alpha, but the line is measured for it: put one without it last")
        return self

    @model_validator(mode="after")
    def _labels_are_rows(self) -> Self:
        _refuse_unknown_rows(tuple(self.published), self.merges)
        for expectation in self.expectations:
            _refuse_unknown_rows([row for row in expectation.rows if not is_number(row)], self.merges)
        self.check_bands(self.published)
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of all rows of the table, in their order, and the barriers behind them."""
        return _rows(self.merges)

    @property
    def files(self) -> tuple[str, ...]:
        """The checkpoints of both sources."""
        return self.checkpoints or ()

    @property
    def ratios(self) -> tuple[RatioRow, ...]:
        """Rows ``ratio LABEL`` that expectations name, each once; they cost a pass over the calibration data."""
        merges = [merge.row for merge in self.merges]
        named = dict.fromkeys(row for expectation in self.expectations for row in expectation.rows)
        found = (RatioRow.parse(row, merges) for row in named if row not in self.rows)
        return tuple(row for row in found if row is not None)


def _rows(merges: Sequence[Merge]) -> tuple[str, ...]:
    curves = BARRIERS if merges[-1].renormalize is not None else BARRIERS[:-1]
    return (*SOURCES, *(merge.row for merge in merges), *curves)


def _is_row(label: str, merges: Sequence[Merge]) -> bool:
    return label in _rows(merges) or RatioRow.parse(label, [merge.row for merge in merges]) is not None


def _refuse_unknown_rows(labels: Sequence[str], merges: Sequence[Merge]) -> None:
    for label in labels:
        if not _is_row(label, merges):
            merge = label.removeprefix(PREFIX)
            if merge != label:
                refuse_unknown("merge", (merge,), [merge.row for merge in merges])
            refuse_unknown("row", (label,), _rows(merges))


def given(section: Section) -> dict[str, Any]:
    """The keys that change something, as plain values; a null further down, as of ``renormalize``, stays."""
    return {key: value for key, value in section.model_dump(mode="json").items() if value is not None}


class ReducedPair(Section):
    """What the reduced form changes in the pair of this name; a key that is given replaces the whole section."""

    name: Name
    options: Options | None = None
    training: Training | None = None
    merges: Annotated[Annotated[tuple[Merge, ...], Field(min_length=1)] | None, AsTuple] = None
    alphas: int | None = None
    expect: Annotated[tuple[str, ...] | None, AsTuple] = None

    def changed(self, pair: Pair) -> dict[str, Any]:
        """The pair as it is in the reduced form.

        Bands around published accuracies are left out, since those are of the full form, and so are the given
        checkpoints, since they are of full width.
        """
        changes = given(self)
        full = pair.model_dump(mode="json", exclude={"checkpoints"})
        full["expect"] = [expected.text for expected in pair.expectations if expected.points is None]
        merges = self.merges or pair.merges
        full["published"] = {label: figure for label, figure in pair.published.items() if _is_row(label, merges)}
        return full | changes


def refuse_unknown(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known, and offer the nearest spelling."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; {did_you_mean(name, known)}")


def refuse_repeated(kind: str, names: list[str]) -> None:
    """Refuse two entries of one name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two entries have the {kind} name {repeated[0]!r}")

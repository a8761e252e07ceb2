"""What a stage is: one class with its name, its options, what it needs, and what it does; one decorator enters it.

All else goes by these classes: how a list of stages is read and written, its schema, its checks, plans and runs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.json_schema import models_json_schema
from pydantic_core import InitErrorDetails
from torch import nn

from vfsurgery.errors import did_you_mean
from vfsurgery.passes import PASSES
from vfsurgery.recipes.bench import Bench, Net, Told
from vfsurgery.recipes.sections import AsTuple, Built, Patterns, Section
from vfsurgery.records.options import schema_of
from vfsurgery.registry import Registry
from vfsurgery.scoring.evaluation import ENSEMBLE
from vfsurgery.scoring.expectations import Expectation, Outcome, check_rows

S = TypeVar("S", bound="type[Stage]")

MERGED = "merged"
"""Name of the network that there is after a merge."""
RESERVED = (MERGED, ENSEMBLE)
"""Names that no source can have."""
STAGES: Registry[type[Stage]] = Registry("stage")
"""What a list of stages may have, by name; packages add to it."""
MOVED = {
    "match": "it is an option of merge now: write merge: {matching: ...}",
    "preserve": "it is an option of merge now: write merge: {preserve: ...}",
}
"""Stages that there were, and what took their place."""


class Misplaced(ValueError):
    """Something that is wrong at ``location``, below where it was found."""

    def __init__(self, error: object, *above: int | str) -> None:
        super().__init__(str(error))
        self.location = (*above, *getattr(error, "location", ()))


@dataclass(frozen=True)
class Place:
    """What there is at some point of a list of stages, as far as it is known before it runs.

    ``imagined`` says that there are imagined images, ``pruned`` that the networks come from a pruner, ``preserved``
    that they are not of their class any more, and ``files`` are the names of those that are written by then.
    """

    run: str
    sources: tuple[str, ...]
    networks: tuple[str, ...]
    data: bool
    imagined: bool = False
    pruned: bool = False
    preserved: bool = False
    files: tuple[str, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether there is one network made of several."""
        return self.networks == (MERGED,)

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of all scores that can be taken here: sources, their ensemble, and what was made of them."""
        several = (ENSEMBLE,) if len(self.sources) > 1 else ()
        return (*self.sources, *several, *(self.networks if self.merged else ()))

    def writing(self, files: Iterable[str]) -> Place:
        """With more files, each written once."""
        written = (*self.files, *files)
        if repeated := next((file for file in written if written.count(file) > 1), None):
            raise ValueError(f"{repeated} would be written twice: give one of them another name")
        return replace(self, files=written)

    def writing_each(self, files: Iterable[str]) -> Place:
        """With files of all networks."""
        return self.writing(file_of(file, name, self.networks) for file in files for name in self.networks)


def file_of(file: str, name: str, networks: Iterable[str]) -> str:
    """A file's name, with that of the network where there are several.

    >>> file_of("x.onnx", "a", ["a", "b"]), file_of("x.onnx", "merged", ["merged"])
    ('x_a.onnx', 'x.onnx')
    """
    path = Path(file)
    return file if len([*networks]) == 1 else f"{path.stem}_{name}{path.suffix}"


class Stage(Section):
    """One entry of ``stages``; its fields are its options, and :func:`stage` declares the rest."""

    name: ClassVar[str]
    changes: ClassVar[bool] = False
    """Whether there are other networks afterwards."""
    joins: ClassVar[bool] = False
    """Whether it makes one network of all, which so have to be of one architecture."""
    reports: ClassVar[bool] = True
    """Whether the networks that it makes have reports of it."""
    needs_report: ClassVar[bool] = False
    """Whether it needs to know how its networks were made, and by what."""
    kept: ClassVar[bool] = True
    """Whether what it gives is kept for a run that goes on."""
    needs_images: ClassVar[bool] = True
    """Whether it needs some, whatever its parts need."""
    without_labels: ClassVar[bool] = False
    """Whether imagined ones do."""
    decides: ClassVar[bool] = False
    """Whether stages behind it give something else because of it, though the networks are the same."""
    branches: ClassVar[bool] = False
    """Whether it chooses one of several ways, whose stages then run behind it."""
    whole: ClassVar[str | None] = None
    """The option that the value of the stage is, where it is no mapping of options."""

    def built(self) -> dict[str, Any]:
        """What is built of its options, by their names: matchers, pruners and passes, made anew each time."""
        options = type(self).model_fields.items()
        marks = [(name, mark) for name, option in options for mark in option.metadata if isinstance(mark, Built)]
        return {name: mark.by(getattr(self, name)) for name, mark in marks}

    def arguments(self) -> dict[str, Any]:
        """Its options as functions of the library take them."""
        return {name: getattr(self, name) for name in type(self).model_fields} | self.built()

    def parts(self) -> Sequence[Any]:
        """Matchers, pruners and passes that it uses: their code decides what it gives, and they may need images."""
        lists = [each if isinstance(each, list) else [each] for each in self.built().values()]
        return [part for each in lists for part in each if part is not None and part != "auto"]

    def follow(self, at: Place) -> Place:
        """What there is behind it.

        Raises:
            ValueError: it cannot stand here.
        """
        return at

    @abstractmethod
    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        """Do it: the networks that it makes by name, and what it says."""

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        """The bench with what it has made and measured, just now or in an earlier run."""
        made = {
            name: bench.networks[name].become(model, **self.known(bench.networks[name]))
            for name, model in models.items()
        }
        shown = bench.shown.once_changed(bench.ends) if made else bench.shown
        return replace(bench, networks={**bench.networks, **made}, shown=shown).wrote(*told.writes)

    def known(self, before: Net) -> dict[str, Any]:
        """What is known of a network that it has changed, besides its weights."""
        return {}

    def way(self, told: Told) -> Sequence[Stage]:
        """The stages that run behind it, by what it has found."""
        return ()

    def behind(self, bench: Bench, told: Told) -> Bench:
        """The bench at the end of that way, with what it has measured."""
        return bench

    def outcomes(self, told: Told) -> list[Outcome]:
        """Which expectations hold."""
        return []

    def notes(self, at: Place, cost: Callable[..., list[str]]) -> list[str]:
        """What a plan says of it; ``cost`` knows what a merge with given arguments costs."""
        return []

    def checked(self, at: Place) -> Place:
        """As :meth:`follow`, once it is known that there is the data that it needs."""
        needed = any(getattr(part, "needs_data", False) for part in self.parts())
        if self.needs_images and not self.without_labels and not at.data:
            raise ValueError(f"{self.name} needs data")
        if (needed or self.needs_images) and not (at.data or at.imagined or self.imagines()):
            raise ValueError(f"{self.name} needs data, or the stage imagine before it")
        return self.follow(at)

    def imagines(self) -> bool:
        """Whether it imagines images where there are none."""
        return False

    def dump(self) -> Any:
        """What stands behind its name in a recipe, every option written down."""
        options = self.model_dump(mode="json")
        return options[self.whole] if self.whole else options

    def words(self) -> str:
        """What a recipe says beyond defaults, in its own words."""
        fields, values = type(self).model_fields, self.model_dump(mode="json")
        given = [key for key in values if getattr(self, key) != fields[key].get_default()]
        return ", ".join(str(values[key]) if key == self.whole else f"{key} {values[key]}" for key in given)

    def __str__(self) -> str:
        return self.name


def followed(stages: Sequence[Stage], at: Place, *above: int | str) -> Iterator[tuple[Stage, Place, Place]]:
    """Each of a list of stages, with what there is before and behind it.

    Raises:
        Misplaced: one cannot stand where it stands; located by its place, below ``above``.
    """
    for number, one in enumerate(stages):
        try:
            behind = one.checked(at)
        except ValueError as error:
            raise Misplaced(error, *above, number, one.name) from None
        yield one, at, behind
        at = behind


class Table(Stage):
    """A stage with a table of its own, of which something may be expected, with published figures beside."""

    published: dict[str, float] = {}
    expect: Patterns = ()

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """What ``expect`` says."""
        return tuple(Expectation.parse(text) for text in self.expect)

    @property
    def figures(self) -> Mapping[str, float]:
        """Published ones by row."""
        return self.published

    def outcomes(self, told: Told) -> list[Outcome]:
        return [expected.check(told.rows, self.figures) for expected in self.expectations]

    def check_rows(self, rows: Sequence[str], merges: Sequence[str] = ()) -> None:
        """Refuse what is said of other rows; ``merges`` may have ratios of features, too."""
        check_rows(self.expectations, self.figures, rows, merges)


def stage(name: str, **declared: Any) -> Callable[[S], S]:
    """Enter a class of stages under the name that recipes have for it, with what it declares of itself.

    >>> @stage("nothing", kept=False)
    ... class Nothing(Stage):
    ...     def work(self, bench):
    ...         return {}, Told()
    >>> str(read("nothing")), STAGES._entries.pop("nothing") is Nothing
    ('nothing', True)
    """

    def enter(one: S) -> S:
        for key, value in {"name": name, **declared}.items():
            setattr(one, key, value)
        STAGES.register(name)(one)
        return one

    return enter


def read(entry: Any) -> Stage:
    """One entry of a list of stages: a name, or one key with its options; passes are stages by their own names."""
    if isinstance(entry, Stage):
        return entry
    written = cast("Mapping[Any, Any]", {entry: None} if isinstance(entry, str) else entry)
    if not isinstance(written, Mapping) or len(written) != 1:
        raise ValueError(
            "a stage is its name, or one key with its options; every stage has a dash of its own, as in "
            "'- train: {epochs: 5}'"
        )
    ((name, value),) = written.items()
    if name in MOVED:
        raise Misplaced(f"there is no stage {name!r} any more: {MOVED[name]}", name)
    if isinstance(name, str) and name in PASSES and name not in STAGES:
        name, value = "apply", name if value is None else {name: value}
    if not isinstance(name, str) or name not in STAGES:
        raise Misplaced(f"unknown stage {name!r}; {did_you_mean(str(name), [*STAGES, *passes_alone()])}", str(name))
    kind = STAGES[name]
    if value is None and not _alone(kind):
        raise Misplaced(f"the stage {name!r} needs a value", name)
    try:
        return kind.model_validate({kind.whole: value} if kind.whole and value is not None else value or {})
    except ValidationError as error:
        raise relocated(error, name, skip=kind.whole) from None


def relocated(error: ValidationError, *above: int | str, skip: str | None = None) -> ValidationError:
    """The same problems, below ``above``."""
    problems: list[InitErrorDetails] = []
    for problem in error.errors():
        place = (*above, *(step for step in problem["loc"] if step != skip))
        context = problem.get("ctx", {})
        problems.append({"type": problem["type"], "loc": place, "input": problem["input"], "ctx": context})
    return ValidationError.from_exception_data(error.title, problems)


SCHEMA = {"title": "Stage"}
"""Stands in a schema where :func:`schemas` has the one of stages."""
_One = Annotated[
    Stage, PlainValidator(read), PlainSerializer(lambda one: {one.name: one.dump()}), WithJsonSchema(SCHEMA)
]
Stages = Annotated[tuple[_One, ...], AsTuple]
_LIST: TypeAdapter[tuple[Stage, ...]] = TypeAdapter(Stages)


def read_stages(entries: Any, *above: int | str) -> tuple[Stage, ...]:
    """A list of stages, or one of them.

    Raises:
        ValidationError: one is wrong; located by its place, below ``above``.
    """
    try:
        return _LIST.validate_python(entries if isinstance(entries, list | tuple) else [entries])
    except ValidationError as error:
        raise relocated(error, *above) from None


def schemas() -> dict[str, Any]:
    """For editors: of an entry of ``stages``, and of what its schema refers to."""
    kinds = {name: STAGES[name] for name in STAGES}
    pairs, common = models_json_schema(
        [(kind, "validation") for kind in kinds.values()], ref_template="#/$defs/{model}"
    )
    own = {
        name: common["$defs"][kind.__name__]["properties"][kind.whole] if kind.whole else pairs[kind, "validation"]
        for name, kind in kinds.items()
    }
    alone = [*(name for name, kind in kinds.items() if _alone(kind)), *(n for n in passes_alone() if n not in own)]
    known = {**{name: schema_of(PASSES[name]) for name in passes_alone()}, **own}
    one = {"type": "object", "properties": known, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {**common["$defs"], "Stage": {"anyOf": [{"type": "string", "enum": alone}, one]}}


def _alone(kind: type[Stage]) -> bool:
    """Whether it may be written as its name alone."""
    return not any(option.is_required() for option in kind.model_fields.values())


def passes_alone() -> list[str]:
    """Passes that go by no sources, and so may be stages."""
    return [name for name in PASSES if not PASSES[name].needs_sources]

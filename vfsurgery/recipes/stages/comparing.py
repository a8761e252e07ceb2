"""The stage that tries several ways, tables them, and goes on with one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Self, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from torch import nn

from vfsurgery.checkpoints.plain import changed
from vfsurgery.errors import RecipeError, refuse_repeated, refuse_unknown
from vfsurgery.matching import Given
from vfsurgery.merging.merge import match
from vfsurgery.pruning import prune_each
from vfsurgery.recipes.bench import Bench, Lab, Told, Write
from vfsurgery.recipes.running import Done
from vfsurgery.recipes.sections import AsTuple
from vfsurgery.recipes.stage import Misplaced, Place, Stage, followed, read_stages, stage
from vfsurgery.recipes.stages.looking import Scoring
from vfsurgery.recipes.stages.surgery import Merge, Prune
from vfsurgery.scoring.diagnosis import diagnose
from vfsurgery.scoring.evaluation import evaluate
from vfsurgery.scoring.expectations import ratio_rows
from vfsurgery.scoring.measured import Measured
from vfsurgery.scoring.sweeps import Sweep
from vfsurgery.scoring.tables import scores_of

LAST, GAIN = "last", "gain"
_AXIS = re.compile(r"\{(\w+)(%?)\}")


def _way(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value) or len(value) != 1:
        raise ValueError("a way is its label with stages, as in '- repaired: [merge: {renormalize: repair}]'")
    return value


def _axis(value: Any) -> Any:
    """The values of an axis by the text that labels have for them."""
    if isinstance(value, list | tuple):
        value = {f"{each:g}" if isinstance(each, float) else str(each): each for each in cast("list[Any]", value)}
    if not isinstance(value, Mapping):
        raise ValueError("the grid has lists of values, or values by the text that stands for them in labels")
    return {str(text): each for text, each in cast("Mapping[Any, Any]", value).items()}


_ONE_KEY = {"type": "object", "minProperties": 1, "maxProperties": 1}
Ways = Annotated[tuple[Annotated[Any, BeforeValidator(_way), WithJsonSchema(_ONE_KEY)], ...], AsTuple]
Axis = Annotated[Any, BeforeValidator(_axis), WithJsonSchema({"type": ["array", "object"]})]
Figures = Annotated[tuple[float | None, ...], AsTuple]


@dataclass(frozen=True)
class Row:
    """One network of the table.

    ``where`` is its way in the recipe, ``base`` the row that it goes on from, and ``curve`` the one that it is a point
    of, where there are columns and it has a place in one.
    """

    label: str
    stages: tuple[Stage, ...]
    where: tuple[str, int, str]
    base: str | None
    curve: str | None

    def follow(self, at: Place) -> Place:
        """What there is at the end of it.

        Raises:
            ValueError: its stages cannot stand there.
        """
        for number, one in enumerate(self.stages):
            if not one.changes:
                error = f"{one} looks at networks and makes none: put it behind compare"
                raise Misplaced(error, *self.where, number, one.name)
        *_, behind = (at, *(behind for _, _, behind in followed(self.stages, at, *self.where)))
        if len(behind.networks) > 1:
            raise Misplaced(f"it leaves {len(behind.networks)} networks: a way ends in one, as by a merge", *self.where)
        return behind


@stage("compare", branches=True)
class Compare(Scoring):
    """Several ways from here on, a row for each; one of them goes on.

    ``grid`` has values by their path in the stages of a way. A way whose label has ``{alpha}`` runs once for each value
    of the axis whose path ends in ``alpha``; ``{alpha%}`` writes it in percent. ``then`` adds a row to every row, with
    more stages. ``columns`` names the axis that goes to the right. The one that goes on is the ``last``, one by its
    label, or by ``gain`` the one that is lifted most by ``then``.
    """

    ways: Annotated[Ways, Field(min_length=1)]
    grid: dict[str, Axis] = {}
    then: Ways = ()
    columns: str | None = None
    goes_on: str = LAST
    published: dict[str, float | Figures] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _rows_are_there(self) -> Self:
        refuse_repeated("axis", [*self.axes])
        refuse_unknown("axis", () if self.columns is None else (self.columns,), self.axes)
        if not all(isinstance(value, float | int) for value in self.values.values()):
            raise ValueError(f"columns are numbers, and {self.columns} has other values")
        for way in (*self.ways, *self.then):
            refuse_unknown("axis", [found[1] for label in way for found in _AXIS.finditer(label)], self.axes)
        refuse_repeated("row", self.labels)
        if self.goes_on == GAIN and not self.then:
            raise ValueError("goes_on: gain chooses by what then brings, and there is no then")
        refuse_unknown("row", (self.goes_on,), [LAST, GAIN, *self.labels])
        for label, figures in self.published.items():
            if isinstance(figures, tuple):
                refuse_unknown("curve", (label,), self.curves)
                if len(figures) != len(self.values):
                    wanted = f"{len(figures)} values for {len(self.values)} of {self.columns}"
                    raise ValueError(f"published {label!r} has {wanted}")
        return self

    @cached_property
    def axes(self) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
        """Path and values of every axis, by the name that labels have for it."""
        return {path.rpartition(".")[2]: (path, values) for path, values in self.grid.items()}

    @property
    def values(self) -> Mapping[str, Any]:
        """Of the columns, by their text."""
        return {} if self.columns is None else self.axes[self.columns][1]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows behind those of the sources, in the order in which they are made."""
        return tuple(self._expanded())

    @property
    def labels(self) -> list[str]:
        """Those of the rows."""
        return [row.label for row in self.rows]

    @property
    def curves(self) -> Mapping[str, Sequence[Row]]:
        """The rows that are points of curves, column by column."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.curve is not None:
                found.setdefault(row.curve, []).append(row)
        return found

    def _expanded(self) -> Iterator[Row]:
        for number, way in enumerate(self.ways):
            ((name, written),) = way.items()
            used = [*dict.fromkeys(found[1] for found in _AXIS.finditer(name))]
            for values in product(*(self.axes[axis][1].items() for axis in used)):
                texts = dict(zip(used, values, strict=True))
                stages: Any = written if isinstance(written, list) else [written]
                for axis, (_, value) in texts.items():
                    try:
                        stages = changed(stages, {self.axes[axis][0]: value})
                    except RecipeError as error:
                        raise Misplaced(error, "grid", self.axes[axis][0]) from None
                where, label, curve = ("ways", number, name), _filled(name, texts), None
                if self.columns in texts:
                    curve = " ".join(_filled(name, {**texts, self.columns: ("", None)}).split())
                own = read_stages(stages, *where)
                yield Row(label, own, where, None, curve)
                for place, then in enumerate(self.then):
                    ((more, further),) = then.items()
                    where = ("then", place, more)
                    behind = (*own, *read_stages(further, *where))
                    yield Row(f"{label} {more}", behind, where, label, curve and f"{curve} {more}")

    @property
    def figures(self) -> Mapping[str, float]:
        found: dict[str, float | None] = {}
        for label, figures in self.published.items():
            points = [row.label for row in self.curves.get(label, ())]
            found |= dict(zip(points, figures, strict=True)) if isinstance(figures, tuple) else {label: figures}
        return {row: figure for row, figure in found.items() if figure is not None}

    def parts(self) -> Sequence[Any]:
        return [part for row in self.rows for one in row.stages for part in one.parts()]

    def follow(self, at: Place) -> Place:
        rows = (*at.rows, *self.labels)
        refuse_repeated("row", rows)
        self.check_rows(rows, self.labels)
        behind = {row.label: row.follow(at) for row in self.rows}
        last = behind[self.labels[-1] if self.goes_on in (LAST, GAIN) else self.goes_on]
        self.check_flips(last)
        return last.writing([f"{at.run}_sweep.png"] if self.columns else ())

    def notes(self, at: Place, cost: Callable[..., list[str]]) -> list[str]:
        return [
            " | ".join([row.label, *(note for one in row.stages for note in one.notes(at, cost))]) for row in self.rows
        ]

    def words(self) -> str:
        return f"{len(self.rows)} ways, goes on with {self.goes_on}"

    def row(self, label: str | None) -> Row:
        """The row of a label."""
        return next(row for row in self.rows if row.label == label)

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        lab, bench = bench.lab, replace(bench, keep=None)
        ahead = {LAST: self.labels[-1], GAIN: None}.get(self.goes_on, self.goes_on)
        shared = Shared([one for row in self.rows if row.label != ahead for one in row.stages])
        told = Told(scores=bench.score(self.data))
        ratios = ratio_rows(self.expectations, self.labels)  # each costs a pass over the calibration data
        asked, found = {ratio.merge for ratio in ratios}, dict[str, Any]()
        chain, best = list[Done](), 0.0
        for row in self.rows:
            # what goes on is made with nothing shared: its report is to say all of itself
            alone = row.label == ahead
            chain = _along(row, bench if alone else replace(bench, shared=shared), () if alone else chain)
            (net,) = chain[-1].bench.networks.values()
            score = told.scores[row.label] = evaluate(net.model, lab.part(self.data), progress=lab.progress)
            if row.label in asked:
                images = lab.part("calibration")
                found[row.label] = diagnose(net.model, net.origins, images, progress=lab.progress)
            gain = 0.0 if row.base is None else score.accuracy - told.scores[row.base].accuracy
            if row.label == ahead or (ahead is None and row.base and (told.goes_on is None or gain > best)):
                told.goes_on, told.chain, best = row.label, chain, gain
        told.rows = bounds = {ratio.label: found[ratio.merge].bound_at(ratio.depth) for ratio in ratios}
        plain = {label: diagnosis.to_dict() for label, diagnosis in found.items()}
        curves = {label: {key: one[key] for key in ("state", "depths", "curves")} for label, one in plain.items()}
        told.values = {"goes_on": told.goes_on, "ratios": bounds, "diagnoses": curves}
        sweep = self._sweep(told)
        lines = scores_of(told.scores, bench.first, self.figures, bounds) if sweep is None else sweep.lines()
        self.scored(told, told.chain[-1].bench, [*lines])
        return {}, told

    def way(self, told: Told) -> Sequence[Stage]:
        return self.row(told.goes_on).stages

    def behind(self, bench: Bench, told: Told) -> Bench:
        # all rows are shown with the network of the way, its own one only as long as it stays
        (name,) = bench.networks
        row, sweep, scores = self.row(told.goes_on), self._sweep(told), told.scores
        if sweep is not None:  # a page has the others as a figure
            scores = {label: scores[label] for label in (*sweep.first, row.base, row.label) if label is not None}
            bench = bench.wrote(Write(f"{bench.lab.run}_sweep.png", sweep.plot, f"accuracy over {self.columns}"))
        figures = {"flips": told.flips, "sweep": sweep}
        return replace(bench, shown=Measured(told.rows, scores, self.figures, {name: row.label}, figures))

    def _sweep(self, told: Told) -> Sweep | None:
        if self.columns is None:
            return None
        curves = {curve: [row.label for row in rows] for curve, rows in self.curves.items()}
        bases = {curve: str(self.row(rows[0].base).curve) for curve, rows in self.curves.items() if rows[0].base}
        return Sweep.of(self.columns, map(float, self.values.values()), told.scores, curves, bases, self.published)


def _along(row: Row, start: Bench, before: Sequence[Done]) -> list[Done]:
    """Run the stages of a row; a beginning that the row before has too is taken from there."""
    done: list[Done] = []
    for number, one in enumerate(row.stages):
        if number < len(before) and before[number].stage == one:
            done.append(before[number])
        else:
            before = ()
            done.append(Done.of(one, done[-1].bench if done else start))
    return done


@dataclass(frozen=True)
class Shared:
    """What several ways have in common and is costly: a matching of one name, the saliencies of one pruner.

    ``stages`` are those of all ways; ``found`` has what is shared, with the models that it is of, so that no other has
    their ids.
    """

    stages: Sequence[Stage]
    found: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def matching(self, merge: Merge, models: Sequence[nn.Module], lab: Lab) -> Given | None:
        """What several merges ask for, found once; ``"auto"`` chooses for each merge anew."""
        alike = [one for one in self.stages if isinstance(one, Merge) and _matched(one) == _matched(merge)]
        if merge.matching == "auto" or merge.masks or len(alike) < 2:
            return None
        key = _matched(merge), *map(id, models)
        if key not in self.found:
            options: dict[str, Any] = {"pins": merge.pins, "leaf": merge.leaf, **lab.common}
            options["example_inputs"] = lab.example(models[0])
            self.found[key] = Given(match([*models], matching=merge.built()["matching"], **options)), models
        return self.found[key][0]

    def pruned(self, prune: Prune, model: nn.Module, lab: Lab) -> nn.Module | None:
        """The next one of what a pruner makes for several sparsities, in the order in which they are asked for."""
        key = _pruned(prune), id(model)
        if key not in self.found:
            asked = [one.sparsity for one in self.stages if isinstance(one, Prune) and _pruned(one) == key[0]]
            wanted = [*dict.fromkeys(share for share in asked if isinstance(share, float))]
            if len(wanted) < 2 or not all(isinstance(share, float) and share for share in asked) or prune.pattern:
                return None
            self.found[key] = wanted, prune_each(model, [*wanted], **prune.arguments(), **lab.common), model
        wanted, each, _ = self.found[key]
        if not wanted or wanted.pop(0) != prune.sparsity:
            wanted.clear()
            return None
        return next(each)


def _matched(merge: Merge) -> Merge:
    return Merge(matching=merge.matching, pins=merge.pins, leaf=merge.leaf, masks=merge.masks)


def _pruned(prune: Prune) -> Prune:
    return prune.model_copy(update={"sparsity": None})


def _filled(label: str, texts: Mapping[Any, tuple[str, Any]]) -> str:
    """A label with the values of axes.

    >>> _filled("{method} {sparsity%}", {"method": ("x", "x"), "sparsity": ("0.8", 0.8)})
    'x 80%'
    """

    def fill(found: re.Match[str]) -> str:
        text, value = texts[found[1]]
        return f"{100 * value:.4g}%" if found[2] and isinstance(value, float | int) else text

    return _AXIS.sub(fill, label)

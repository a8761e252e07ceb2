"""From the stages of a recipe to the steps that run: neighbouring stages of one merge are one call of ``merge``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.matching import MATCHERS
from vfsurgery.recipes.expectations import is_number
from vfsurgery.recipes.sections import refuse_unknown
from vfsurgery.recipes.stages.entries import build_matcher, build_normalizations, build_passes
from vfsurgery.recipes.stages.sections import Stage
from vfsurgery.scoring.evaluation import ENSEMBLE

MERGING = ("match", "preserve", "merge")
"""Stages that one merge is made of, in any order; a ``renormalize`` right behind belongs to it as well."""
MERGED = "merged"
"""Name of the network that there is after a merge."""
RESERVED = (MERGED, ENSEMBLE)
"""Names that no source can have."""


@dataclass(frozen=True)
class Step:
    """What runs at once, the stages that say so, and the place of the first one in the recipe, from 0.

    ``networks`` are the names of those that it works on.
    """

    kind: str
    stages: tuple[Stage, ...]
    place: int
    networks: tuple[str, ...]

    @property
    def value(self) -> Any:
        """What stands under the key of the stage that gives the step its name."""
        return next(stage.value for stage in self.stages if stage.kind == self.kind)

    @property
    def changes_networks(self) -> bool:
        """Whether there are other networks afterwards."""
        return self.kind not in ("evaluate", "diagnose", "export")

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the networks that there are afterwards."""
        return (MERGED,) if self.kind == "merge" else self.networks

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the files that it has written."""
        if self.kind == "export":
            return files_of(self.value, self.networks)
        return files_of((self.value.page,), self.networks) if self.kind == "diagnose" else ()

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without images."""
        if self.kind == "prune":
            return bool(getattr(self.value.arguments()["method"], "needs_data", False))
        if self.kind == "apply":
            return any(each.needs_data for each in build_passes(self.value))
        if self.kind == "merge":
            options = self.merge_arguments()
            matching, steps = options.get("matching", "auto"), options.get("renormalize")
            if isinstance(matching, str) and matching != "auto":
                matching = MATCHERS[matching]()
            chosen = [matching, *(steps if isinstance(steps, list) else ())]
            return any(getattr(each, "needs_data", False) for each in chosen)
        return self.kind in ("train", "renormalize", "evaluate", "diagnose")

    def find(self, kind: str) -> Any:
        """What stands under a key, ``None`` where no stage has it."""
        return next((stage.value for stage in self.stages if stage.kind == kind), None)

    def merge_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`vfsurgery.merge`, those of its defaults left out.

        >>> written = ({"match": "weights"}, "merge", {"preserve": {"flops": 1.2}})
        >>> next(steps_of([Stage.model_validate(stage) for stage in written], ["a", "b"])).merge_arguments()
        {'matching': 'weights', 'max_flops': 1.2}
        """
        merge = self.value
        given: dict[str, Any] = {
            key: value for key, value in merge if value != type(merge).model_fields[key].get_default()
        }
        if (matching := self.find("match")) is not None:
            given["matching"] = build_matcher(matching)
        boundary = self.find("preserve")
        if isinstance(boundary, Mapping):
            given |= {f"max_{name}": limit for name, limit in boundary.items()}
        elif boundary is not None:
            given["preserve"] = boundary
        if (entries := self.find("renormalize")) is not None:
            given["renormalize"] = build_normalizations(entries) or None
        return given

    def __str__(self) -> str:
        return " + ".join(stage.kind for stage in self.stages)


def steps_of(stages: Sequence[Stage], names: Sequence[str]) -> Iterator[Step]:
    """The steps that stages become.

    Args:
        stages: As the recipe has them.
        names: Of the sources.

    Raises:
        ValueError: stages stand in an order that cannot run.
    """
    networks, pruned = tuple(names), False
    place = 0
    while place < len(stages):
        block = _block(stages, place)
        step = Step("merge" if stages[place].kind in MERGING else stages[place].kind, block, place, networks)
        _check(step, names, pruned)
        yield step
        pruned = pruned or step.kind == "prune"
        if step.kind == "merge":
            networks, pruned = (MERGED,), False
        place += len(block)


def file_of(file: str, name: str, networks: Collection[str]) -> str:
    """A file's name, with that of the network where there are several.

    >>> file_of("x.onnx", "a", ["a", "b"]), file_of("x.onnx", "merged", ["merged"])
    ('x_a.onnx', 'x.onnx')
    """
    path = Path(file)
    return file if len(networks) == 1 else f"{path.stem}_{name}{path.suffix}"


def files_of(files: Sequence[str], networks: Sequence[str]) -> tuple[str, ...]:
    """Names of the files of all networks."""
    return tuple(file_of(file, name, networks) for file in files for name in networks)


def check_files(steps: Sequence[Step], outputs: Sequence[str]) -> None:
    """Refuse files that would be written twice, and those of weights for networks that are not of their class any more.

    Raises:
        ValueError: names the file and the stage.
    """
    written: set[str] = set()
    preserved = False
    for step in steps:
        preserved = preserved or bool(step.find("preserve"))
        _check_files(step.writes, written, preserved, f"stages[{step.place}]: ")
    if steps:
        _check_files(files_of(outputs, steps[-1].made), written, preserved, "")


def _check_files(files: Sequence[str], written: set[str], preserved: bool, where: str) -> None:
    for file in files:
        if file in written:
            raise ValueError(f"{where}{file} would be written twice: give one of them another name")
        if preserved and file.endswith(WEIGHTS):
            raise ValueError(f"{where}with preserve the network itself is another one: write {file} as .pt2 or .onnx")
        written.add(file)


def rows_of(step: Step, names: Sequence[str]) -> tuple[str, ...]:
    """Labels of the rows that an evaluation has: the sources, their ensemble, and what was made of them."""
    several = (ENSEMBLE,) if len(names) > 1 else ()
    return (*names, *several, *(() if step.networks == tuple(names) else step.networks))


def _block(stages: Sequence[Stage], place: int) -> tuple[Stage, ...]:
    """The stages that run together, from this place on."""
    if stages[place].kind not in MERGING:
        return (stages[place],)
    end = place
    while end < len(stages) and stages[end].kind in MERGING:
        end += 1
    if end < len(stages) and stages[end].kind == "renormalize":
        end += 1
    return tuple(stages[place:end])


def _check(step: Step, names: Sequence[str], pruned: bool) -> None:
    where = f"stages[{step.place}]"
    if step.kind == "merge":
        kinds = [stage.kind for stage in step.stages]
        repeated = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if "merge" not in kinds:
            raise ValueError(f"{where}: {kinds[0]} says how to merge, but no merge stands beside it")
        if repeated:
            raise ValueError(f"{where}: {repeated} stands twice around one merge")
        if step.networks == (MERGED,):
            raise ValueError(f"{where}: there is one network left, and nothing to merge it with")
        if len(names) < 2:
            raise ValueError(f"{where}: a merge needs two sources, and there is one")
        if step.value.weights is None and len(names) > 2 and step.value.alpha != 0.5:
            raise ValueError(f"{where}: alpha is for two sources, not {len(names)}: write weights")
    if step.kind == "renormalize" and not pruned:
        raise ValueError(f"{where}: renormalize stands behind a merge, or behind prune: else nothing says to what")
    if step.kind == "renormalize" and not step.value:
        raise ValueError(f"{where}: behind prune, renormalize none changes nothing: leave it out")
    if step.kind == "apply":
        for one in build_passes(step.value):
            if one.needs_sources:
                raise ValueError(f"{where}: {one.name} goes by the sources: such passes stand in renormalize")
    if step.kind == "evaluate":
        if step.value.flips and step.networks != (MERGED,):
            raise ValueError(f"{where}: flips are counted between sources and what they were merged into")
        known = rows_of(step, names)
        for expected in step.value.expectations:
            refuse_unknown(f"row in {where}", [row for row in expected.rows if not is_number(row)], known)
    if step.kind == "diagnose" and step.networks != (MERGED,) and not pruned:
        raise ValueError(
            f"{where}: diagnose compares a network with what it was made from: put it behind merge or prune"
        )

"""What a recipe would do and what it would cost, from shapes alone: no weights are made, read or changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vfsurgery.checkpoints import WEIGHTS, check_fit, read_shapes
from vfsurgery.data.datasets import DATA, image_of
from vfsurgery.hub.cards import CARD
from vfsurgery.hub.loading import CONFIG
from vfsurgery.merging.sketched import NetworkPlan, Sketch
from vfsurgery.recipes.recipe import STEPS, Recipe
from vfsurgery.recipes.sections import FORMATS, Source, fitting
from vfsurgery.recipes.stage import MERGED
from vfsurgery.tracing.compatibility import check_same_architecture


@dataclass(frozen=True)
class StepPlan:
    """One step: what it does, on which networks, and notes on its cost."""

    name: str
    networks: tuple[str, ...]
    options: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name} ({', '.join(self.networks)}): {self.options}".removesuffix(": ")]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class RecipePlan:
    """What a recipe would do; print it. ``memory`` is an estimate of the most that its weights take, in MiB."""

    name: str
    data: str
    networks: tuple[NetworkPlan, ...]
    steps: tuple[StepPlan, ...]
    memory: float
    writes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        lines = [f"{self.name}: data {self.data}", "", "networks"]
        lines += [f"  {line}" for network in self.networks for line in str(network).splitlines()]
        lines += ["", "steps"]
        for number, step in enumerate(self.steps, start=1):
            first, *rest = str(step).splitlines()
            lines += [f"  {number} {first}", *(f"    {line}" for line in rest)]
        lines += ["", f"weights take about {self.memory:,.0f} MiB at most, besides activations of a batch"]
        lines.append(f"writes {', '.join(self.writes)}")
        return "\n".join(lines)


def plan(recipe: Recipe) -> RecipePlan:
    """Say what a recipe would do.

    Networks are built of shapes alone, so that the plan of a large merge takes seconds and hardly any memory. Headers
    of safetensors are compared with them; other checkpoints are only looked for.

    Raises:
        SurgeryError: the recipe cannot run: a model cannot be built or traced, a boundary or budget cannot be met, a
            checkpoint is missing or of another shape, sources differ.

    >>> recipe = Recipe.from_yaml('''
    ... name: tiny
    ... sources: [{model: "vfsurgery.networks.demo:TinyConvNet", input_size: [1, 8, 8]}, {seed: 7}]
    ... stages: [merge]
    ... ''')
    >>> found = plan(recipe)
    >>> found.networks[0].parameters, found.steps[0].networks
    (287722, ('a', 'b'))
    """
    return _plan(recipe, whole=False)


def check(recipe: Recipe) -> RecipePlan:
    """As :func:`plan`, and look at all that the recipe reads: checkpoints whole, data so far that it can be opened.

    Pictures are listed, not read. Data of your own is code, which is not run for that, and nothing is downloaded.

    Raises:
        SurgeryError: as for :func:`plan`; or a checkpoint does not fit, the data is not there, or nobody knows what the
            model expects of pictures.
    """
    found = _plan(recipe, whole=True)
    data, first = recipe.data, recipe.parts[0].sources[0]
    known = data is not None and (data.name in DATA or data.name.startswith("torchvision:"))
    if data is not None and known and not data.options.get("download"):
        data.load(first.model, partial(_untrained, first))
    return found


def _plan(recipe: Recipe, whole: bool) -> RecipePlan:
    networks, steps, memory = list[NetworkPlan](), list[StepPlan](), 0.0
    places = [*recipe.follow()]
    size = recipe.data and image_of(recipe.data.name, recipe.data.size)
    for run in recipe.parts:
        above = f"{run.name}/" * bool(recipe.runs)
        stages = [(stage, at) for part, stage, at, _ in places if part is run]
        models = [_untrained(source) for source in run.sources]
        with fitting(run.sources):
            for source, model in zip(run.sources, models, strict=True):
                if source.checkpoint is not None:
                    held = source.weights() if whole else read_shapes(source.checkpoint)
                    if held is not None:
                        check_fit(model, held, source.checkpoint)
        joined = any(stage.joins for stage, _ in stages)
        if joined:
            check_same_architecture(models)
        kinds: dict[str, list[tuple[Source, nn.Module]]] = {}
        for source, model in zip(run.sources, models, strict=True):
            kinds.setdefault(f"{source.model} {source.options}", []).append((source, model))
        sketches: list[Sketch] = []
        for (first, model), *others in kinds.values():
            sketches.append(Sketch.of(first.model, model, first.input_size or size))
            names = [above + source.name for source in (first, *(source for source, _ in others))]
            networks.append(sketches[-1].plan(names, getattr(torch, recipe.dtype)))
        for stage, at in stages:
            does = f"{stage.words()}{f' -> {MERGED}' if stage.joins else ''}".strip()
            notes = stage.notes(at, sketches[0].merge_notes)
            steps.append(StepPlan(str(stage), tuple(above + name for name in at.networks), does, tuple(notes)))
        megabytes = networks[-len(sketches)].megabytes
        memory = max(memory, (len(run.sources) + (1.4 if joined else 1)) * megabytes)
    files = places[-1][-1].files
    files = (*files, *_beside(files, recipe.parts[0].sources[0].model.startswith("timm:")), f"{STEPS}/")
    data = "none" if recipe.data is None else " in ".join(filter(None, (recipe.data.name, recipe.data.path)))
    return RecipePlan(recipe.name, data, tuple(networks), tuple(steps), memory, files)


def _beside(files: Sequence[str], of_timm: bool) -> tuple[str, ...]:
    """What is written beside networks: a report, a card, and for a single network of timm what timm knows it by."""
    networks = [file for file in files if file.endswith(FORMATS) and not file.endswith(f"_masks{WEIGHTS}")]
    config = (CONFIG,) if of_timm and len(networks) == 1 and networks[0].endswith(WEIGHTS) else ()
    return ("report.json", *config, CARD)


def _untrained(source: Source) -> nn.Module:
    with torch.device("meta"):
        return source.untrained()

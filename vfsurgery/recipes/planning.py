"""What a recipe would do and what it would cost, from shapes alone: no weights are made, read or changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from vfsurgery.checkpoints import WEIGHTS, check_fit, read_shapes
from vfsurgery.data.datasets import DATA
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import ExampleInputError, RecipeError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.hub.cards import CARD
from vfsurgery.hub.loading import CONFIG
from vfsurgery.merging.budget import Budget, plan_prefix
from vfsurgery.passes.costs import cost_of
from vfsurgery.recipes.entries import FORMATS
from vfsurgery.recipes.recipe import STEPS, Recipe
from vfsurgery.recipes.sections import Source, fitting
from vfsurgery.recipes.stage import MERGED
from vfsurgery.tracing.compatibility import check_same_architecture
from vfsurgery.tracing.examples import BATCH, example_inputs_of
from vfsurgery.tracing.sources import eval_mode

MIB = 2**20


@dataclass(frozen=True)
class NetworkPlan:
    """One architecture: its size, cost, and permutation groups. ``flops`` are those of one image.

    What needs an image is ``None`` where nobody says how large one is.
    """

    model: str
    networks: tuple[str, ...]
    parameters: int
    megabytes: float
    image: tuple[int, ...] | None = None
    flops: float | None = None
    groups: int | None = None
    largest_group: int | None = None
    coverage: float | None = None

    def __str__(self) -> str:
        size = f"{self.parameters:,} parameters, {self.megabytes:,.1f} MiB"
        lines = [f"{', '.join(self.networks)}: {self.model}, {size}"]
        if self.flops is None or self.image is None:
            lines.append("  nobody says how large its images are: no groups and no FLOPs")
        else:
            shape = "x".join(map(str, self.image))
            lines.append(f"  {self.flops / 1e6:,.1f} MFLOPs per image of {shape}")
            groups = f"{self.groups} permutation groups, the largest of {self.largest_group} units"
            lines.append(f"  {groups}, {self.coverage:.1%} of the parameters")
        return "\n".join(lines)


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
    for run in recipe.parts:
        above = f"{run.name}/" * bool(recipe.runs)
        models = [_untrained(source) for source in run.sources]
        with fitting(run.sources):
            for source, model in zip(run.sources, models, strict=True):
                if source.checkpoint is not None:
                    held = source.weights() if whole else read_shapes(source.checkpoint)
                    if held is not None:
                        check_fit(model, held, source.checkpoint)
        joined = any(stage.joins for part, stage, _, _ in places if part is run)
        if joined:
            check_same_architecture(models)
        sketches: dict[str, Sketch] = {}
        named: dict[str, list[str]] = {}
        for source, model in zip(run.sources, models, strict=True):
            kind = f"{source.model} {source.options}"
            named.setdefault(kind, []).append(above + source.name)
            if kind not in sketches:
                size = source.input_size or (recipe.data and recipe.data.image)
                sketches[kind] = Sketch.of(source.model, model, size)
        own = [sketch.plan(named[kind], getattr(torch, recipe.dtype)) for kind, sketch in sketches.items()]
        for part, stage, at, _ in places:
            if part is run:
                does = f"{stage.words()}{f' -> {MERGED}' if stage.joins else ''}".strip()
                notes = stage.notes(at, next(iter(sketches.values())).merge_notes)
                steps.append(StepPlan(str(stage), tuple(above + name for name in at.networks), does, tuple(notes)))
        networks += own
        memory = max(memory, (len(run.sources) + (1.4 if joined else 1)) * own[0].megabytes)
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


@dataclass(frozen=True)
class Sketch:
    """A network of shapes, with inputs, its trace and its groups where it is known how large its images are."""

    spec: str
    model: nn.Module
    inputs: tuple[Tensor, ...] = ()
    graph_module: fx.GraphModule | None = None
    groups: GroupSet | None = None

    @classmethod
    def of(cls, spec: str, model: nn.Module, size: Sequence[int] | None) -> Self:
        """Trace a model on the meta device; ``size`` is the shape of an image, where somebody says it."""
        with eval_mode(model):
            try:
                given = None if size is None else torch.empty(BATCH, *size, device="meta")
                inputs = tuple(each.to("meta") for each in example_inputs_of(model, given))
            except ExampleInputError:
                return cls(spec, model)
            graph_module = record_or_export(model, inputs)
            return cls(spec, model, inputs, graph_module, discover(graph_module))

    @property
    def largest_group(self) -> int:
        """Its units; 0 where there is no group."""
        return max((group.size for group in self.groups or ()), default=0)

    def plan(self, names: Sequence[str], dtype: torch.dtype) -> NetworkPlan:
        """What a plan says of it; ``names`` are those of all networks like it."""
        tensors = self.model.state_dict().values()
        size = sum(each.numel() * (dtype if each.is_floating_point() else each.dtype).itemsize for each in tensors)
        found = NetworkPlan(self.spec, tuple(names), sum(each.numel() for each in self.model.parameters()), size / MIB)
        if self.groups is None:
            return found
        return replace(
            found,
            image=tuple(self.inputs[0].shape[1:]),
            flops=cost_of(self.model, self.inputs).flops,
            groups=len(self.groups),
            largest_group=self.largest_group,
            coverage=self.groups.coverage,
        )

    def merge_notes(self, options: Mapping[str, Any], sources: int) -> list[str]:
        """What a merge of such networks preserves and what that costs, and how large its assignments are."""
        notes: list[str] = []
        budget, preserve = Budget(options.get("max_flops"), options.get("max_params")), options.get("preserve", 0)
        if preserve or budget != Budget():
            if self.graph_module is None:
                raise RecipeError(
                    explain("what to preserve depends on how large images are", remedy="give sources an input_size")
                )
            kept = plan_prefix(self.graph_module, self.inputs, sources, preserve, budget)
            notes += [] if kept is None else [str(kept[1])]
        if self.groups is not None:
            size = f"{8 * self.largest_group**2 / MIB:.1f} MiB"
            notes.append(f"largest assignment: {self.largest_group} units, {size}")
        return notes

"""What a recipe would do and what it would cost, from shapes alone: no weights are made, read or changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfsurgery.checkpoints import WEIGHTS, check_fit, check_same_classes, load_state_dict
from vfsurgery.data.datasets import DATA
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import CheckpointError, ExampleInputError, RecipeError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.hub.cards import CARD
from vfsurgery.hub.loading import CONFIG
from vfsurgery.merging.budget import Budget, plan_prefix
from vfsurgery.passes.costs import cost_of
from vfsurgery.recipes.recipe import STEPS, Recipe
from vfsurgery.recipes.sections import Experiment, Images, Pair
from vfsurgery.recipes.stages.bench import DTYPES
from vfsurgery.recipes.stages.entries import plain
from vfsurgery.recipes.stages.sections import FORMATS, Source
from vfsurgery.recipes.stages.steps import MERGED, Step
from vfsurgery.tracing.examples import BATCH, example_inputs_of
from vfsurgery.tracing.sources import check_same_architecture, eval_mode

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
    image: tuple[int, ...] | None
    flops: float | None
    groups: int | None
    largest_group: int | None
    coverage: float | None

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
        return json.loads(json.dumps(dataclasses.asdict(self)))

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


@dataclass(frozen=True)
class _Sketch:
    """A network of shapes, and its trace where an image is known."""

    model: nn.Module
    inputs: tuple[Tensor, ...] | None
    graph_module: fx.GraphModule | None
    groups: GroupSet | None


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
    if recipe.stages:
        return _plan_stages(recipe)
    networks: list[NetworkPlan] = []
    steps: list[StepPlan] = []
    data = recipe.data or Images()
    for experiment in recipe.experiments:
        sketch = _sketch(experiment.build, _image_size(data))
        networks.append(_network(experiment.model, (experiment.name,), sketch, torch.float32))
        for path in experiment.files:
            _check_file(Path(path), sketch.model)
        steps.append(_experiment(experiment))
    memory = max(4 * network.megabytes for network in networks)
    files = [file for experiment in recipe.experiments for file in experiment.writes]
    timms = [_is_of_timm(experiment.model) for experiment in recipe.experiments]
    return RecipePlan(
        recipe.name, _data(data), tuple(networks), tuple(steps), memory, (*files, *_beside(files, any(timms)))
    )


def _plan_stages(recipe: Recipe) -> RecipePlan:
    size = _image_size(recipe.data)
    sketches = [_sketch(source.untrained, source.input_size or size) for source in recipe.sources]
    try:
        for source, sketch in zip(recipe.sources, sketches, strict=True):
            if source.checkpoint is not None:
                _check_file(Path(source.checkpoint), sketch.model)
    except CheckpointError:
        loaded = [source for source in recipe.sources if source.checkpoint is not None]
        check_same_classes({str(source.checkpoint): source.weights() for source in loaded})
        raise
    if any(step.kind == "merge" for step in recipe.steps):
        check_same_architecture([sketch.model for sketch in sketches])
    dtype = DTYPES[recipe.dtype]
    named: dict[tuple[str, Any], list[str]] = {}
    for source in recipe.sources:
        named.setdefault((source.model, source.options), []).append(source.name)
    models = {(source.model, source.options): sketch for source, sketch in zip(recipe.sources, sketches, strict=True)}
    networks = tuple(_network(key[0], tuple(names), models[key], dtype) for key, names in named.items())
    steps = tuple(_step(step, sketches[0], len(recipe.sources)) for step in recipe.steps)
    copies = len(recipe.sources) + (1.4 if any(step.kind == "merge" for step in recipe.steps) else 1)
    data = "none" if recipe.data is None else _data(recipe.data)
    writes = (*recipe.writes, *_beside(recipe.writes, _is_of_timm(recipe.sources[0].model)), f"{STEPS}/")
    return RecipePlan(recipe.name, data, networks, steps, copies * networks[0].megabytes, writes)


def _is_of_timm(spec: str) -> bool:
    return spec.startswith("timm:")


def _beside(files: Sequence[str], of_timm: bool) -> tuple[str, ...]:
    """What is written beside networks: a report, a card, and for a single network of timm what timm knows it by."""
    networks = [file for file in files if file.endswith(FORMATS) and not file.endswith(f"_masks{WEIGHTS}")]
    config = (CONFIG,) if of_timm and len(networks) == 1 and networks[0].endswith(WEIGHTS) else ()
    return ("report.json", *config, CARD)


def check(recipe: Recipe) -> RecipePlan:
    """As :func:`plan`, and look at all that the recipe reads: checkpoints whole, data so far that it can be opened.

    Pictures are listed, not read. Data of your own is code, which is not run for that, and nothing is downloaded.

    Raises:
        SurgeryError: as for :func:`plan`; or a checkpoint does not fit, the data is not there, or nobody knows what the
            model expects of pictures.
    """
    found = plan(recipe)
    named = [source for source in recipe.sources if source.checkpoint is not None]
    try:
        for source in named:
            check_fit(_untrained(source.untrained), source.weights(), str(source.checkpoint))
    except CheckpointError:
        if len(named) > 1:
            check_same_classes({str(source.checkpoint): source.weights() for source in named})
        raise
    for experiment in recipe.experiments:
        for path in experiment.files:
            check_fit(_untrained(experiment.build), load_state_dict(path), path)
    _check_data(recipe)
    return found


def _untrained(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data is None or not (data.name in DATA or data.name.startswith("torchvision:")) or data.options.get("download"):
        return
    first = recipe.sources[0] if recipe.stages else recipe.experiments[0]
    build = first.untrained if isinstance(first, Source) else first.build
    data.load(first.model, lambda: _untrained(build))


def _sketch(build: Callable[[], nn.Module], size: Sequence[int] | None) -> _Sketch:
    model = _untrained(build)
    with eval_mode(model):
        try:
            given = None if size is None else torch.empty(BATCH, *size, device="meta")
            inputs = tuple(each.to("meta") for each in example_inputs_of(model, given))
        except ExampleInputError:
            return _Sketch(model, None, None, None)
        graph_module = record_or_export(model, inputs)
        return _Sketch(model, inputs, graph_module, discover(graph_module))


def _network(spec: str, names: tuple[str, ...], sketch: _Sketch, dtype: torch.dtype) -> NetworkPlan:
    state = sketch.model.state_dict()
    kept = sum(
        value.numel() * (dtype.itemsize if value.is_floating_point() else value.itemsize) for value in state.values()
    )
    parameters = sum(parameter.numel() for parameter in sketch.model.parameters())
    if sketch.inputs is None or sketch.groups is None:
        return NetworkPlan(spec, names, parameters, kept / MIB, None, None, None, None, None)
    return NetworkPlan(
        spec,
        names,
        parameters,
        kept / MIB,
        tuple(sketch.inputs[0].shape[1:]),
        cost_of(sketch.model, sketch.inputs).flops,
        len(sketch.groups),
        max((group.size for group in sketch.groups), default=0),
        sketch.groups.coverage,
    )


def _step(step: Step, sketch: _Sketch, sources: int) -> StepPlan:
    if step.kind != "merge":
        return StepPlan(str(step), step.networks, _options(step))
    notes: list[str] = []
    options = step.merge_arguments()
    budget = Budget(options.get("max_flops"), options.get("max_params"))
    preserve = options.get("preserve", 0)
    if preserve or budget != Budget():
        if sketch.graph_module is None or sketch.inputs is None:
            raise RecipeError(
                explain("what to preserve depends on how large images are", remedy="give sources an input_size")
            )
        kept = plan_prefix(sketch.graph_module, sketch.inputs, sources, preserve, budget)
        notes += [] if kept is None else [str(kept[1])]
    if sketch.groups is not None:
        largest = max((group.size for group in sketch.groups), default=0)
        notes.append(f"largest assignment: {largest} units, {8 * largest**2 / MIB:.1f} MiB")
    return StepPlan(str(step), step.networks, f"{_options(step)} -> {MERGED}".strip(), tuple(notes))


def _options(step: Step) -> str:
    """What the recipe says beyond defaults, in its own words."""
    parts: list[str] = []
    for stage in step.stages:
        value = stage.value
        if hasattr(value, "model_dump"):
            value = {key: plain(each) for key, each in value if each != type(value).model_fields[key].get_default()}
            parts += [f"{key} {each}" for key, each in value.items()]
        else:
            parts.append(f"{stage.kind} {plain(value) if value else 'none'}")
    return ", ".join(parts)


def _experiment(experiment: Experiment) -> StepPlan:
    epochs = 0 if experiment.files else experiment.training.epochs
    trained = f"{epochs} epochs of training each" if epochs else "loaded"
    rows = (
        (merge.row for merge in experiment.merges) if isinstance(experiment, Pair) else getattr(experiment, "rows", ())
    )
    return StepPlan(type(experiment).__name__.lower(), (experiment.name,), trained, tuple(rows))


def _data(data: Images) -> str:
    return data.name if data.path is None else f"{data.name} in {data.path}"


def _image_size(data: Images | None) -> tuple[int, int, int] | None:
    """What is known of the images without reading them; else the model's configuration says it."""
    if data is None:
        return None
    if data.name == "digits":
        return (1, data.size or 8, data.size or 8)
    if data.name in ("cifar10", "cifar100"):
        return (3, 32, 32)
    return None if data.size is None else (3, data.size, data.size)


def _check_file(path: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that is not there, or whose header has other keys or shapes than the model."""
    if not path.is_file():
        raise CheckpointError(explain(f"there is no checkpoint {path}", folder=path.parent.resolve()))
    if path.suffix != WEIGHTS:
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(explain(f"cannot read {path}", cause=error)) from error
    check_fit(model, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, path)

"""What the proof of a large model runs on: the model itself where that is quick, else a smaller twin of it.

Groups are properties of parameters, so a proof on small images is a proof of the same groups, as long as the network
takes such images. Where it does not (a table of positions fits one size only), the same constructor makes a twin for
small images, which is traced and grouped in its own right and counts only if its groups are those of the model. A model
too large to be run gets a twin of fewer layers.

Models are built with random weights that are cheap, since filling large matrices with truncated normal numbers takes
longer than all the rest, and that are never faint: an error must be seen at the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vfsurgery.discovery import discover
from vfsurgery.discovery.partial import parts_of
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.discovery.verification import outputs_of
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet
from vfsurgery.networks.architectures import build_model
from vfsurgery.tracing.chance import several
from vfsurgery.tracing.examples import example_inputs_of

BYTES = 26
"""Bytes of memory that the proof of a model takes for each number that it holds."""
ONE_IMAGE_FROM = 60_000_000
"""Parameters from which on a proof takes a batch of one."""
LARGE_INPUT = 500_000
"""Numbers in one image or video from which on a proof takes a batch of one."""
SIDES = (96, 128, 64)
"""Sides of the images tried, the first that the network takes wins."""
SIDE_NAMES = ("img_size", "image_size")
"""What constructors call the side of the images that a network is made for."""
SHRINKS: tuple[dict[str, Any], ...] = (
    {"depth": 2}, {"depths": (2, 2, 2, 2)}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {"depths": (2, 2, 2)},
)  # fmt: skip
"""Constructor arguments tried to make a shallow twin."""
DRAWS = frozenset(["uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "div_", "add_", "sub_", "clamp_"])
"""What initializers do to a matrix that they fill with random numbers."""


class TooLargeError(SurgeryError):
    """A model holds more numbers than may be verified."""


class DeferredDraws(TorchFunctionMode):
    """Skips the random initialization of matrices; :meth:`fill` makes up for it.

    Raises:
        TooLargeError: more than ``most`` numbers were allocated.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.most = most
        self.allocated = 0
        self._skipped: dict[int, nn.Parameter] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        target = args[0] if args else None
        if name in DRAWS and isinstance(target, nn.Parameter) and target.ndim > 1:
            self._skipped[id(target)] = target
            return target
        result = func(*args, **(kwargs or {}))
        if name in ("zero_", "fill_"):
            self._skipped.pop(id(target), None)
        if name == "empty" and isinstance(result, Tensor):
            self.allocated += result.numel()
            if self.allocated > self.most:
                raise TooLargeError(f"the model holds more than {self.most:,} numbers")
        return result

    @torch.no_grad()
    def fill(self) -> None:
        """Uniform numbers as torch draws them by default: with bounds of ``1 / sqrt(fan in)``."""
        for parameter in self._skipped.values():
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
            bound = 1 / math.sqrt(fan_in)
            parameter.uniform_(-bound, bound)


def build_quickly(spec: str, *, most: float = math.inf, seed: int = 0, **options: Any) -> nn.Module:
    """Build a model in eval mode with cheap random weights.

    Raises:
        TooLargeError: the model holds more than ``most`` numbers.
    """
    torch.manual_seed(seed)
    mode = DeferredDraws(most)
    with mode:
        model = build_model(spec, **options)
    mode.fill()
    return model.eval()


def build_hollow(spec: str) -> nn.Module:
    """Build a model in eval mode without weights: on the meta device, or else in memory that is never touched."""
    try:
        with torch.device("meta"):
            return build_model(spec).eval()
    except Exception:  # constructors that compute with what they have drawn
        with DeferredDraws():
            return build_model(spec).eval()


def image_inputs(model: nn.Module, side: int | None = None, batch: int = 2) -> tuple[Tensor, ...]:
    """The model's example inputs, cut to ``batch`` images and to squares of ``side`` where that is smaller."""
    inputs = example_inputs_of(model)
    if side is not None:
        inputs = tuple(x[..., :side, :side] for x in inputs)
    return tuple(x[:batch].contiguous() for x in inputs)


@dataclass(frozen=True)
class Subject:
    """What a proof runs on: a model, its groups, and inputs; ``name`` says what it is to the model surveyed."""

    name: str
    model: nn.Module
    groups: GroupSet
    inputs: tuple[Tensor, ...]


def subjects(spec: str, model: nn.Module, groups: GroupSet) -> Iterator[Subject]:
    """What proves the groups of a model, cheapest first."""
    own = image_inputs(model)
    batch = 1 if groups.parameter_count > ONE_IMAGE_FROM or own[0][0].numel() > LARGE_INPUT else 2
    sides = _sides_below(own)
    for side in sides:
        inputs = image_inputs(model, side, batch)
        if all(runs(model, inputs, training) for training in ((False, True) if groups.in_training else (False,))):
            yield Subject(f"{side}x{side} images", model, groups, inputs)
            break
    else:
        chosen = [(name, side) for name in SIDE_NAMES for side in sides]
        twins = (_twin(spec, f"{name}={side} twin", [side], batch, **{name: side}) for name, side in chosen)
        yield from (twin for twin in twins if twin is not None and _places(twin.groups) == _places(groups))
    yield Subject("own size", model, groups, image_inputs(model, batch=batch))


def part_subjects(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[Subject]:
    """The parts of a model that cannot be recorded whole; all of its groups are proven if those of each part are."""
    for part in parts_of(model, inputs):
        if part.groups.groups:
            seeds = (torch.Generator().manual_seed(seed) for seed in range(len(part.shapes[0])))
            given = tuple(
                torch.randn(shape, generator=seed) for (shape, *_), seed in zip(part.shapes[0], seeds, strict=True)
            )
            yield Subject(part.path, model.get_submodule(part.path), part.groups, given)


def _sides_below(inputs: tuple[Tensor, ...]) -> list[int]:
    return [side for side in SIDES if side < min(inputs[0].shape[-2:])]


def runs(model: nn.Module, inputs: tuple[Tensor, ...], training: bool = False) -> bool:
    """Whether a model takes such inputs, in eval mode or in training; it stays as it is."""
    try:
        outputs_of(model, {}, several(inputs) if training else inputs, training=training)
    except Exception:
        return False
    return True


def shallow_twins(spec: str, most: float) -> Iterator[Subject]:
    """The same network with fewer layers and no more than ``most`` numbers, if its constructor knows how."""
    for shrink in SHRINKS:
        name = ", ".join(f"{key}={value}" for key, value in shrink.items())
        twin = _twin(spec, f"{name} twin", [*SIDES, None], 1, most=most, **shrink)
        if twin is not None:
            yield twin


def _twin(spec: str, name: str, sides: Sequence[int | None], batch: int, **options: Any) -> Subject | None:
    """The model with other constructor arguments, on the first images that it takes; ``None`` if there is none."""
    try:
        model = build_quickly(spec, **options)
    except Exception:  # whatever a constructor says to an argument that it does not know
        return None
    for side in sides:
        inputs = image_inputs(model, side, batch)
        if runs(model, inputs):
            return Subject(name, model, discover(record_or_export(model, inputs)), inputs)
    return None


def _places(groups: GroupSet) -> set[tuple[str, int, str]]:
    """Where groups lie, apart from their sizes, which may depend on the size of images."""
    return {(group.name, member.dim, member.parameter) for group in groups for member in group.members}

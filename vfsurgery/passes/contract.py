"""What passes declare about themselves, and how that is held against what they do.

``after`` and ``before`` are checked and not sorted by: a list of passes runs as it is written, or not at all. Whether a
pass preserves the function is measured, before and after it, on the example inputs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vfsurgery.discovery.verification import TOLERANCE, outputs_of, relative_error
from vfsurgery.errors import CertificateError, DataError, OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.stats.precision import image_dtype
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.excerpts import Runner, describe_node
from vfsurgery.tracing.precision import Precise, is_inexact, raised, real
from vfsurgery.tracing.sources import canonical_state, eval_mode
from vfsurgery.tracing.values import tensors_of

HALF = 8
"""Relative error allowed in half precision, in units of its last place."""
ROUNDING_FACTOR = 10
"""How many times the effect of a change of all weights in their last place rounding may explain."""
SAMPLES = 64
"""Entries of each value that are kept to compare it with what it is after a pass."""
RAISED = partial(raised, dtype=torch.float64)


def check_order(passes: Sequence[Pass]) -> None:
    """Refuse an order of passes that one of them excludes.

    Where a pass that ``after`` names is in the list, one must come earlier; where one that ``before`` names is, one
    must come later. Passes that are not in the list do not count.

    Raises:
        OptionError: names both passes and how they must stand.
    """
    names = [step.name for step in passes]
    for place, step in enumerate(passes):
        earlier, later = names[:place], names[place + 1 :]
        late = next((name for name in step.after if name in later and name not in earlier), None)
        early = next((name for name in step.before if name in earlier and name not in later), None)
        if late is not None or early is not None:
            word, place_of = ("after", "behind") if late is not None else ("before", "in front of")
            raise OptionError(
                explain(
                    f"pass {step.name!r} must run {word} {late or early!r}",
                    order=", ".join(names),
                    remedy=f"move {step.name!r} {place_of} {late or early!r}",
                )
            )


def check_needs(step: Pass, context: Context) -> None:
    """Refuse to run a pass without what it says it needs.

    Raises:
        DataError: it needs data and there is none.
        OptionError: it needs sources and there are none.
    """
    if step.needs_data and context.data is None:
        raise DataError(
            explain(f"pass {step.name!r} needs calibration data", remedy="pass data=, any iterable of images")
        )
    if step.needs_sources and not context.sources:
        raise OptionError(
            explain(
                f"pass {step.name!r} needs sources: the networks whose statistics or weights it goes by",
                remedy="pass sources=, for example [the network before pruning]",
            )
        )


@dataclass(frozen=True)
class Value:
    """What is kept of one node's value: enough to tell whether it is another one."""

    shape: tuple[int, ...]
    samples: Tensor  # (up to SAMPLES,) float64
    size: float

    @staticmethod
    def of(value: Tensor) -> Value:
        """Entries at even distances, and the largest absolute one."""
        flat = value.detach().reshape(-1)
        flat = flat if flat.is_floating_point() else flat.double()  # masks have no absolute value
        chosen = flat[:: max(len(flat) // SAMPLES, 1)][:SAMPLES].double().clone()
        return Value(tuple(value.shape), chosen, float(flat.abs().max()) if len(flat) else 0.0)

    def agrees(self, other: Value, tolerance: float) -> bool:
        """Whether both may be the same value, computed in another way."""
        if self.shape != other.shape:
            return False
        bound = tolerance * max(self.size, other.size)
        return bool((self.samples - other.samples).abs().le(bound).all()) and abs(self.size - other.size) <= bound


class Recorder(Runner):
    """Runs a graph in float64, or as it is, and keeps a little of every node's tensors.

    Weights are raised node by node: a second model is never in memory.
    """

    def __init__(self, graph_module: fx.GraphModule, exact: bool) -> None:
        super().__init__(graph_module)
        self.exact = exact
        self.values: dict[str, list[Value]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep some of its value at once: a later op may overwrite it."""
        if not self.exact:
            value = super().run_node(n)
        elif n.op == "call_module":
            with borrowed(self.fetch_attr(str(n.target)), {}, RAISED):
                value = super().run_node(n)
        else:
            value = super().run_node(n)
            if n.op == "get_attr" and isinstance(value, Tensor):
                value = RAISED(value)
        self.values[n.name] = [Value.of(tensor) for tensor in tensors_of(value) if not tensor.is_complex()]
        return value


@dataclass(frozen=True)
class Behaviour:
    """What a graph computes on the example inputs, in float64: what its arithmetic rounds is no pass's doing.

    A graph that does not run in float64, since it makes tensors of other types itself, is run as it is.
    """

    outputs: tuple[Tensor, ...]
    values: Mapping[str, list[Value]]

    @staticmethod
    def of(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Behaviour:
        """Run the graph in eval mode, with random numbers that are the same every time."""
        recorder = Recorder(graph_module, exact=True)
        with eval_mode(graph_module), _repeatable(inputs):
            try:
                with Precise(torch.float64):
                    result = recorder.run(*(RAISED(x.clone()) for x in inputs))
            except Exception:  # whatever an op says to two types of numbers
                recorder, dtype = Recorder(graph_module, exact=False), image_dtype(graph_module)
                examples = (x.to(dtype, copy=True) if x.is_floating_point() else x.clone() for x in inputs)
                result = recorder.run(*examples)
        return Behaviour(tuple(tensors_of(result)), recorder.values)


@contextmanager
def _repeatable(inputs: Sequence[Tensor]) -> Generator[None]:
    devices = [x.device for x in inputs if x.device.type == "cuda"][:1]
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn] if devices else []
    before = [backend.allow_tf32 for backend in backends]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        try:
            for backend in backends:
                backend.allow_tf32 = False
            yield
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed


def check_preserved(name: str, before: Behaviour, graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Refuse a pass that changed what a network computes though it declares that it does not.

    Both are computed in float64, so that only weights have been rounded. What that explains is allowed: the output
    error of a change of every weight in its last place, ten times.

    Args:
        name: The pass.
        before: What the network computed before.
        graph_module: The network after the pass.
        inputs: The example inputs.

    Returns:
        The relative error of the outputs.

    Raises:
        CertificateError: names the pass, the error, and the first node whose value is not what it was.
    """
    after = Behaviour.of(graph_module, inputs)
    shapes = [[tuple(tensor.shape) for tensor in each.outputs] for each in (before, after)]
    error = relative_error(_floats(after), _floats(before)) if shapes[0] == shapes[1] else float("inf")
    dtype = _coarsest(graph_module)
    tolerance = TOLERANCE.get(dtype, HALF * torch.finfo(dtype).eps)
    if error <= tolerance:
        return error
    tolerance = max(tolerance, ROUNDING_FACTOR * _rounding(graph_module, inputs))
    if error <= tolerance:
        return error
    if shapes[0] != shapes[1]:
        difference = f"shapes {shapes[1]} instead of {shapes[0]}"
    else:
        difference = f"{error:.2e} relative, tolerance {tolerance:.0e} in {str(dtype).removeprefix('torch.')}"
    node = _first_difference(before, after, graph_module, tolerance)
    raised = CertificateError(
        explain(
            f"pass {name!r} declares that it preserves the function, and does not",
            outputs=difference,
            node=None if node is None else f"{node.name} is the first whose value differs",
            remedy="mend the pass, or declare preserves_function=False",
        )
    )
    if node is not None:
        raised.add_note(describe_node(node, graph_module))
    raise raised


def _floats(behaviour: Behaviour) -> tuple[Tensor, ...]:
    return tuple(raised(x, torch.float64) for x in behaviour.outputs)


def _first_difference(
    before: Behaviour, after: Behaviour, graph_module: fx.GraphModule, tolerance: float
) -> fx.Node | None:
    """The first node whose value is neither its own from before nor that of a node that is gone, whose place it took.

    After a norm is folded into a convolution, say, the convolution gives what the norm gave.
    """
    gone = [value for name, values in before.values.items() if name not in after.values for value in values]
    everything = [value for values in before.values.values() for value in values]
    suspect: fx.Node | None = None
    for node in graph_module.graph.nodes:
        own = before.values.get(node.name)
        for place, value in enumerate(after.values[node.name]):
            earlier = everything if own is None else [*own[place : place + 1], *gone]
            if any(value.agrees(other, tolerance) for other in earlier):
                continue
            if own is not None:
                return suspect or node
            suspect = suspect or node  # a new node may compute a step in between: what comes after it tells
        if own:
            suspect = None
    return suspect


def _rounding(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """The relative output error when every weight is off in its last place."""
    state, inputs = canonical_state(graph_module), tuple(RAISED(x) for x in inputs)
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        if not is_inexact(tensor):
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * 2 - 1
        return tensor + tensor * signs * torch.finfo(tensor.dtype).eps

    with _repeatable(inputs):
        states = state, {name: moved(tensor) for name, tensor in state.items()}
        expected, found = (
            outputs_of(graph_module, {name: RAISED(tensor) for name, tensor in each.items()}, inputs, torch.float64)
            for each in states
        )
    return relative_error(found, expected)


def _coarsest(graph_module: fx.GraphModule) -> torch.dtype:
    """The lowest precision of a model's parameters, which a pass that writes into them cannot exceed."""
    dtypes = {real(parameter.dtype) for parameter in graph_module.parameters() if is_inexact(parameter)}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

"""Whether one network can be the reference of another that was made from it."""

from __future__ import annotations

from torch import Tensor, fx, nn

from vfsurgery.discovery.recording import record_or_export
from vfsurgery.errors import IncompatibleModelsError, InvalidWeightsError, OptionError, TraceError, explain
from vfsurgery.pruning.renormalizing.pairing import Pairing, Unpaired
from vfsurgery.stats.precision import image_dtype
from vfsurgery.stats.threads import device_of
from vfsurgery.tracing.compatibility import check_finite
from vfsurgery.tracing.computed import is_plain, plain_copy
from vfsurgery.tracing.copies import fresh
from vfsurgery.tracing.sources import Source, canonical_state
from vfsurgery.tracing.values import VALUE

FEWEST = 0.5
"""Share of the layers that must have a partner; with fewer, the reference is of another architecture."""


def check_reference(compressed: nn.Module, reference: nn.Module, inplace: bool) -> None:
    """Refuse what can be no compressed model and its reference, before anything is traced.

    Raises:
        OptionError: one has no parameters, or both are the same object.
        InvalidWeightsError: one holds NaN or infinite values, or ``inplace`` would change the reference.
        IncompatibleModelsError: they live on different devices.
    """
    for name, model in (("the compressed model", compressed), ("the reference", reference)):
        if not any(True for _ in model.parameters()):
            raise OptionError(f"{name}, a {type(model).__name__}, has no parameters")
    if compressed is reference:
        raise OptionError(
            explain(
                "the compressed model and its reference are the same object",
                remedy="keep the dense network: prune a copy of it, copy.deepcopy(model)",
            )
        )
    states = {
        name: canonical_state(m) for name, m in (("the compressed model", compressed), ("the reference", reference))
    }
    for name, state in states.items():
        check_finite(name, state)
    if device_of(compressed) != device_of(reference):
        raise IncompatibleModelsError(
            explain(
                "the compressed model and its reference live on several devices",
                devices=f"{device_of(compressed)}, {device_of(reference)}",
                remedy="move them to one, for example with model.to('cuda')",
            )
        )
    mine, theirs = (
        {tensor.data_ptr(): name for name, tensor in state.items() if tensor.numel()} for state in states.values()
    )
    shared = [name for pointer, name in mine.items() if pointer in theirs]
    if inplace and shared:
        raise InvalidWeightsError(
            explain(
                "inplace=True would change the reference: it shares the storage of a parameter",
                parameter=shared[0],
                remedy="compress a copy of the reference, copy.deepcopy(model), or leave inplace out",
            )
        )


def trace_reference(reference: nn.Module, inputs: tuple[Tensor, ...]) -> Source:
    """The reference as it is, or a copy of it where it computes weights, on ``inputs`` of the compressed model.

    Raises:
        IncompatibleModelsError: it cannot run on them.
    """
    model = reference if is_plain(reference) else plain_copy(reference).model
    dtype = image_dtype(model)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    try:
        model = fresh(model, inputs)
        graph_module = record_or_export(model, inputs)
    except TraceError as error:
        raise IncompatibleModelsError(
            f"the reference cannot run on what the compressed model takes\n{error}"
        ) from error
    return Source.of(model, graph_module)


def check_outputs(ours: fx.GraphModule, theirs: fx.GraphModule) -> None:
    """Refuse a reference whose outputs have other shapes than the compressed model's, traced on the same input.

    Raises:
        IncompatibleModelsError: says both.
    """
    shapes = [_output_shapes(graph_module) for graph_module in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise IncompatibleModelsError(
            explain(
                "the compressed model and its reference have outputs of different shapes",
                compressed=shapes[0],
                reference=shapes[1],
                remedy="pass the network that the compressed one was made from: were they made for different classes?",
            )
        )


def check_pairing(pairing: Pairing, compressed: nn.Module, reference: nn.Module) -> None:
    """Refuse a reference in which too few layers have a partner.

    Raises:
        IncompatibleModelsError: names the first layer that has none, and why.
    """
    if pairing.coverage >= FEWEST:
        return
    first = pairing.unpaired[0] if pairing.unpaired else Unpaired("", "it has no layer that can be corrected")
    raise IncompatibleModelsError(
        explain(
            "the reference is not the network that the compressed model was made from",
            classes=f"{type(compressed).__name__}, {type(reference).__name__}",
            layer=first.layer or None,
            because=first.reason,
            paired=f"{len(pairing.pairs)} of {len(pairing.pairs) + len(pairing.unpaired)} layers",
            remedy="pass the dense network itself, with the weights that were compressed",
        )
    )


def _output_shapes(graph_module: fx.GraphModule) -> str:
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    values = [node.meta.get(VALUE) for node in output.all_input_nodes]
    return ", ".join(str(getattr(value, "shape", value)) for value in values)

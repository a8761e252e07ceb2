"""Whether models can be the sources of one merge: finite weights, the same parameters, the same computation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import IncompatibleModelsError, InvalidWeightsError, explain
from vfsurgery.tracing.constants import check_constants, check_whole_numbers
from vfsurgery.tracing.followers import FOLLOWS_MODE, in_eval_mode
from vfsurgery.tracing.modes import in_training, not_followed
from vfsurgery.tracing.precision import as_real, is_inexact
from vfsurgery.tracing.sources import Source, canonical_state
from vfsurgery.tracing.values import VALUE

TRAINING_ONLY = re.compile(r"\b(p|drop_prob|momentum|inplace)=[^,)]*,? ?")
"""Settings of modules that do not change what a trained model computes; sources may differ in them."""


def check_weights(models: Sequence[nn.Module]) -> None:
    """Refuse models with NaN or infinite values, and different models that share storage.

    Raises:
        InvalidWeightsError: names the source and the parameter.
    """
    states = [canonical_state(model) for model in models]
    for number, state in enumerate(states):
        check_finite(f"source {number}", state)
    owners: dict[int, int] = {}
    for number, state in enumerate(states):
        for name, tensor in state.items():
            owner = owners.setdefault(tensor.data_ptr(), number) if tensor.numel() else number
            if owner != number:
                raise InvalidWeightsError(
                    explain(
                        f"sources {owner} and {number} share the storage of a parameter",
                        parameter=name,
                        remedy="give each source tensors of its own, for example by copy.deepcopy(model)",
                    )
                )


def check_finite(name: str, state: dict[str, Tensor]) -> None:
    """Refuse NaN and infinite values in a model's state.

    Raises:
        InvalidWeightsError: names the model, as it was called, and the parameter.
    """
    bad = first_not_finite(state)
    if bad is None:
        return
    raise InvalidWeightsError(
        explain(
            f"{name} holds NaN or infinite values",
            parameter=bad,
            count=int((~torch.isfinite(state[bad])).sum()),
            remedy="check that its checkpoint was loaded completely and its training did not diverge",
        )
    )


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinite values, or ``None``."""
    floats = {name: as_real(tensor) for name, tensor in state.items() if is_inexact(tensor) and tensor.numel()}
    # NaN spreads into both ends of the range, so no mask of a tensor's size is needed
    finite = {name: torch.isfinite(torch.stack(torch.aminmax(tensor))).all() for name, tensor in floats.items()}
    if not finite or bool(torch.stack([*finite.values()]).all()):  # a single wait for the device
        return None
    return next(name for name, verdict in finite.items() if not verdict)


def check_same_architecture(models: Sequence[nn.Module]) -> None:
    """Refuse models that do not have the same parameters.

    Raises:
        IncompatibleModelsError: names the first parameter that differs, and both shapes or dtypes.
    """
    first = canonical_state(models[0])
    for number, model in enumerate(models[1:], start=1):
        other = canonical_state(model)
        for name in [*first, *other]:
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (first, other)]
            if shapes[0] != shapes[1]:
                raise IncompatibleModelsError(
                    explain(
                        f"sources 0 and {number} are not the same architecture",
                        classes=f"{type(models[0]).__name__}, {type(model).__name__}",
                        parameter=name,
                        shapes=f"{shapes[0]}, {shapes[1]}",
                        remedy=_remedy(first, other, name),
                    )
                )
            if first[name].dtype != other[name].dtype:
                dtypes = [str(state[name].dtype).removeprefix("torch.") for state in (first, other)]
                raise IncompatibleModelsError(
                    explain(
                        f"sources 0 and {number} have different precisions",
                        parameter=name,
                        dtypes=", ".join(dtypes),
                        remedy="bring both to one: b.to(torch.float32), or the dtype that the result shall have",
                    )
                )


def _remedy(first: dict[str, Tensor], other: dict[str, Tensor], name: str) -> str:
    return differing_heads(first, other) or "only networks of one architecture can be merged unit by unit"


def differing_heads(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """What to say of two networks that are the same but for the number of outputs of one layer, else ``None``.

    >>> differing_heads({"fc.weight": torch.ones(10, 4)}, {"fc.weight": torch.ones(7, 4)})[:56]
    'only fc differs, with 10 and 7 outputs: trained on other'
    """
    differing = [key for key in first if key in other and first[key].shape != other[key].shape]
    layers = {key.rpartition(".")[0] for key in differing}
    shapes = [(first[key].shape, other[key].shape) for key in differing]
    lengths = {(mine[:1], theirs[:1]) for mine, theirs in shapes}
    same_inputs = all(mine[1:] == theirs[1:] for mine, theirs in shapes)
    if first.keys() != other.keys() or len(layers) != 1 or len(lengths) != 1 or not same_inputs:
        return None
    (layer,), ((mine, theirs),) = layers, lengths
    return (
        f"only {layer} differs, with {mine[0]} and {theirs[0]} outputs: trained on other numbers of classes, the "
        f"sources have no head in common; give both a new {layer} of one size, merge, and train it anew"
    )


def check_same_graph(sources: Sequence[Source]) -> None:
    """Refuse models whose forwards differ although their parameters agree (another stride, another activation).

    Rates of dropout may differ.

    Raises:
        IncompatibleModelsError: names the first node that differs.
    """
    for number, source in enumerate(sources[1:], start=1):
        _compare(sources[0], source, number, "")
        check_whole_numbers(sources[0], source, number)
        training = in_training(sources[0].graph_module), in_training(source.graph_module)
        if training[0] is not None and training[1] is not None:
            mine, theirs = replace(sources[0], graph_module=training[0]), replace(source, graph_module=training[1])
            _compare(mine, theirs, number, " in training")
        elif training != (None, None) and not any(not_followed(each.graph_module) for each in (sources[0], source)):
            raise IncompatibleModelsError(
                explain(
                    f"sources 0 and {number} compute different things in training",
                    because=f"source {number if training[1] is None else 0} computes there what it does in eval mode",
                    remedy="build all sources with the same constructor arguments",
                )
            )


def _compare(first: Source, other: Source, number: int, mode: str) -> None:
    """Refuse a difference between the graphs of the first source and another one, or between their constants."""
    graphs = first.graph_module, other.graph_module
    nodes = [[node for node in each.graph.nodes if FOLLOWS_MODE not in node.meta] for each in graphs]
    pairs = zip(*nodes, strict=False)
    differing = next((pair for pair in pairs if _step(pair[0], graphs[0]) != _step(pair[1], graphs[1])), None)
    if differing is None and len(nodes[0]) == len(nodes[1]):
        check_constants(first, other, number)
        return
    steps = ("end of the graph",) * 2
    if differing is not None:
        steps = (_step(differing[0], graphs[0]), _step(differing[1], graphs[1]))
    raise IncompatibleModelsError(
        explain(
            f"sources 0 and {number} have equal parameter shapes but compute different things{mode}",
            node=differing[0].name if differing else len(min(nodes, key=len)),
            **{"source 0": steps[0], f"source {number}": steps[1]},
            remedy="build all sources with the same constructor arguments",
        )
    )


def _step(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """What a node computes in eval mode, in words: its target, its arguments, and the settings of its module."""
    args, kwargs = in_eval_mode((node.args, node.kwargs))
    described = f"{node.op} {getattr(node.target, '__name__', node.target)} {args} {kwargs}"
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return f"{described} {TRAINING_ONLY.sub('', repr(module))}"  # with all modules inside
    return f"{described} {node.meta.get(VALUE)}" if node.op == "placeholder" else described

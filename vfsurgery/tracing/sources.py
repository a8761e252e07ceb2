"""The source models of a merge: checked against each other, read under canonical names, never changed."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import IncompatibleModelsError, InvalidWeightsError, explain
from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import copied, forget_kept, plain_tensors
from vfsurgery.tracing.dataflow import reaching_output
from vfsurgery.tracing.followers import FOLLOWS_MODE, in_eval_mode
from vfsurgery.tracing.modes import in_training, not_followed
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.precision import as_real, is_inexact
from vfsurgery.tracing.tracer import put_over
from vfsurgery.tracing.values import VALUE

TRAINING_ONLY = re.compile(r"\b(p|drop_prob|momentum|inplace)=[^,)]*,? ?")
"""Settings of modules that do not change what a trained model computes; sources may differ in them."""


@dataclass(frozen=True)
class Source:
    """A model with its trace, and its parameters and persistent buffers by canonical ``state_dict`` key."""

    model: nn.Module
    graph_module: fx.GraphModule
    state: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module, graph_module: fx.GraphModule) -> Source:
        """Read a traced model."""
        return Source(model, graph_module, canonical_state(model))

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return next(iter(self.state.values())).device

    def clone(self) -> Source:
        """A deep copy, with the graph over the copy's own tensors."""
        model = copied(self.model)
        return Source.of(model, put_over(model, self.graph_module))


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, detached, each once under its first ``state_dict`` key."""
    names = canonical_parameters(model)
    return {
        name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if names[id(tensor)] == name
    }


def write_into(model: nn.Module, other: nn.Module, created_biases: Sequence[str]) -> None:
    """Copy the values of ``other`` into the tensors of ``model``, which keep their storage; add created biases.

    What the model's forward has kept of its old weights is dropped.
    """
    for path in created_biases:
        owner, _, name = path.rpartition(".")
        bias = other.get_parameter(path)
        model.get_submodule(owner).register_parameter(name, nn.Parameter(bias.detach(), bias.requires_grad))
    state = canonical_state(other)
    for name, tensor in canonical_state(model).items():
        tensor.copy_(state[name])
    forget_kept(model, other)


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
        _check_whole_numbers(sources[0], source, number)
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
        _check_constants(first, other, number)
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


def _check_constants(first: Source, other: Source, number: int) -> None:
    """Refuse sources whose forwards read different constants: tensors that are in no checkpoint."""
    constants = [_constants(source) for source in (first, other)]
    for name, mine in constants[0].items():
        theirs = constants[1].get(name)
        if theirs is None or not same_values(mine, theirs):
            raise _different_constants(number, _place(first, name, mine), mine, theirs)


def whole_numbers(source: Source) -> set[str]:
    """Saved tensors of integers or truth values that the outputs depend on: indices, masks, numbers of something."""
    names, reaching = canonical_parameters(source.graph_module), reaching_output(source.graph_module.graph)
    read = [node for node in source.graph_module.graph.nodes if node.op == "get_attr" and node.name in reaching]
    tensors = [operator.attrgetter(str(node.target))(source.graph_module) for node in read]
    return {names[id(x)] for x in tensors if isinstance(x, Tensor) and id(x) in names and not is_inexact(x)}


def _check_whole_numbers(first: Source, other: Source, number: int) -> None:
    """Refuse sources that compute with different saved integers or truth values, of which there is no mean."""
    for name in sorted(whole_numbers(first)):
        if not same_values(first.state[name], other.state[name]):
            raise _different_whole_numbers(number, name, first.state[name], other.state[name])


def check_saved_whole_numbers(models: Sequence[nn.Module], read: Callable[[], Collection[str] | None]) -> None:
    """Refuse models that compute with different saved integers or truth values, of which there is no mean.

    For models that are averaged without a trace. Numbers of batches that norm layers have seen may differ.

    Args:
        models: Of one architecture.
        read: Names what outputs depend on; ``None`` if nobody can say. Asked only where something differs.

    Raises:
        IncompatibleModelsError: names the first that differs.
    """
    states = [canonical_state(model) for model in models]
    differing = {
        name: number
        for number, other in reversed([*enumerate(states)][1:])
        for name, tensor in states[0].items()
        if not is_inexact(tensor) and not name.endswith("num_batches_tracked") and not same_values(tensor, other[name])
    }
    names = read() if differing else None
    for name, number in sorted(differing.items()):
        if names is None or name in names:
            hint = "; or pass calibration= images, which show what no output depends on" if names is None else ""
            raise _different_whole_numbers(number, name, states[0][name], states[number][name], hint)


def _different_whole_numbers(
    number: int, name: str, mine: Tensor, theirs: Tensor, hint: str = ""
) -> IncompatibleModelsError:
    return IncompatibleModelsError(
        explain(
            f"sources 0 and {number} compute with different integers or masks, which cannot be averaged",
            buffer=name,
            **{"source 0": described(mine), f"source {number}": described(theirs)},
            remedy=f"give both the same values, as in b.{name}.copy_(a.{name}), if the difference means "
            f"nothing; networks that were trained with different ones cannot be merged{hint}",
        )
    )


def _different_constants(
    number: int, where: str | None, mine: Tensor | None, theirs: Tensor | None
) -> IncompatibleModelsError:
    same = "the same values" if where is None else f"the same values, as in b.{where} = a.{where},"
    return IncompatibleModelsError(
        explain(
            f"sources 0 and {number} compute with different constants, which no checkpoint holds",
            constant=where or "made in the forward of what is no tensor: a NumPy array or a list of numbers",
            **{"source 0": described(mine), f"source {number}": described(theirs)},
            remedy=f"give both {same} if the difference means nothing; what was "
            "drawn at random and trained with belongs to its network, and such networks cannot be merged",
        )
    )


def check_unsaved(models: Sequence[nn.Module]) -> None:
    """Refuse models that hold different tensors which no checkpoint has, whether their forwards read them or not.

    For models that are averaged without a trace.

    Raises:
        IncompatibleModelsError: names the first that differs.
    """
    unsaved = [unsaved_tensors(model) for model in models]
    for number, other in enumerate(unsaved[1:], start=1):
        for name in [*unsaved[0], *other]:
            mine, theirs = unsaved[0].get(name), other.get(name)
            if mine is None or theirs is None or not same_values(mine, theirs):
                raise _different_constants(number, name, mine, theirs)


def unsaved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not persistent, and plain tensors, by path."""
    known = canonical_parameters(model)
    held = [
        *model.named_buffers(),
        *((plain.path, tensor) for plain in plain_tensors(model) for tensor in plain.tensors),
    ]
    return {name: tensor for name, tensor in held if id(tensor) not in known}


def _constants(source: Source) -> dict[str, Tensor]:
    """Tensors that the traced forward reads and that are no state, by their path in the graph module."""
    known = canonical_parameters(source.graph_module)
    found: dict[str, Tensor] = {}
    for node in source.graph_module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(source.graph_module)
            if isinstance(value, Tensor) and id(value) not in known:
                found[str(node.target)] = value
        if node.op == "call_module":
            module = source.graph_module.get_submodule(str(node.target))
            inside = unsaved_tensors(module)
            found |= {f"{node.target}.{name}": value for name, value in inside.items() if id(value) not in known}
    return found


def _place(source: Source, name: str, constant: Tensor) -> str | None:
    """Where the user's model has a constant of the trace; ``None`` where it holds no such tensor."""
    unsaved = unsaved_tensors(source.model)
    return name if name in unsaved else next((p for p, value in unsaved.items() if same_values(value, constant)), None)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN at the same places included.

    >>> same_values(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    equal = a == b
    return bool((equal | ((a != a) & (b != b))).all())


def described(tensor: Tensor | None) -> str:
    """Shape, dtype and the first values of a constant."""
    if tensor is None:
        return "absent"
    values = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:4].tolist())
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}: {values}{', ...' * (tensor.numel() > 4)}"


def _step(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """What a node computes in eval mode, in words: its target, its arguments, and the settings of its module."""
    args, kwargs = in_eval_mode((node.args, node.kwargs))
    described = f"{node.op} {getattr(node.target, '__name__', node.target)} {args} {kwargs}"
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return f"{described} {TRAINING_ONLY.sub('', repr(module))}"  # with all modules inside
    return f"{described} {node.meta.get(VALUE)}" if node.op == "placeholder" else described


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Generator[None]:
    """Put modules into eval mode without gradients, and give every submodule its own mode back at the end."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            set_mode(root, False)
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

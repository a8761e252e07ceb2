"""Which tensors of an expert are its head: what belongs to its own classes, and is no part of what experts share.

No single sign tells. Shapes differ only where numbers of classes do; timm's configuration names the classifier alone,
and not the norm or the hidden layer that come new with it; a layer that was begun anew shows in its angle to the base,
where there is one. So a tensor is of the head if any of them says so. Where none says anything, it is the last layer
with weights before the output.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vfsurgery.combining.base import Kind
from vfsurgery.combining.running import FEWEST, FOREIGN, SAMPLE, TRUSTED
from vfsurgery.combining.traits import RUNNING, traits_of_graph
from vfsurgery.errors import IncompatibleModelsError, explain
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.ops import canonical_parameters
from vfsurgery.tracing.selection import chosen_tensors, listed
from vfsurgery.tracing.sources import canonical_state

NAMED = "was named"
SHAPES = "shapes differ"
CONFIGURED = "timm's classifier"
RECREATED = "reset_classifier makes it anew"
BEGUN = "begun anew after the base"
LAST = "last layer before the output"
NEAR = 0.5
"""Distance to the base, over its length, below which a layer has been fine-tuned and not begun anew."""


@dataclass(frozen=True)
class Head:
    """The tensors of one expert's head, each with what tells that it is one.

    ``route`` says, where it matters, by which of timm's two ways the head was made.
    """

    signs: Mapping[str, str]
    route: str = ""

    @property
    def layers(self) -> list[str]:
        """Paths of the modules that the tensors are in, or names of tensors that are in none."""
        return list(dict.fromkeys(name.rpartition(".")[0] or name for name in self.signs))

    def __str__(self) -> str:
        return ", ".join(self.layers) + (f" ({self.route})" if self.route else "")


def find_heads(
    models: Sequence[nn.Module],
    graphs: Sequence[fx.GraphModule],
    base: Mapping[str, Tensor] | None = None,
    named: str | Sequence[str] = (),
) -> list[Head]:
    """The head of each of several experts.

    Args:
        models: The experts.
        graphs: Their traces.
        base: State dict of the checkpoint that they were fine-tuned from, if there is one.
        named: Paths of modules, names of tensors or patterns of them, that are the heads; nothing else is then asked
            but shapes.

    Raises:
        IncompatibleModelsError: an expert has no head that could be found.
        OptionError: what was named is not there.

    >>> import timm, vfsurgery as surgery
    >>> experts = [timm.create_model("test_vit", num_classes=k).eval() for k in (5, 5)]
    >>> [str(head) for head in find_heads(experts, [surgery.trace(expert) for expert in experts])]
    ['head', 'head']
    """
    states = [canonical_state(model) for model in models]
    foreign = _differing(states, base)
    found: list[Head] = []
    for number, (model, graph, state) in enumerate(zip(models, graphs, states, strict=True)):
        signs: dict[str, str] = {}
        for pattern in listed(named):
            signs |= dict.fromkeys(chosen_tensors(model, pattern, "head"), NAMED)
        extra: set[str] = set()
        if not named:
            signs |= dict.fromkeys(_configured(model, state), CONFIGURED)
            renewed = _recreated(model)
            extra = {name for name in renewed if name in state and name not in signs}
            signs |= dict.fromkeys((name for name in renewed if name in state and name not in signs), RECREATED)
            if base is not None:
                signs |= dict.fromkeys((name for name in _begun(graph, state, base) if name not in signs), BEGUN)
        signs |= dict.fromkeys((name for name in state if name in foreign and name not in signs), SHAPES)
        if not signs:
            signs = dict.fromkeys(_last(graph), LAST)
        if not any(state[name].is_floating_point() for name in signs):
            raise IncompatibleModelsError(
                explain(
                    f"no head can be found in expert {number}, a {type(model).__name__}",
                    because="it ends in no linear map or convolution, and nothing names a classifier",
                    remedy='head="fc", the path of the module that is one',
                )
            )
        signs = {name: sign for name in state for sign in [signs.get(name)] if sign is not None}
        found.append(Head(signs, _route(extra, state, base)))
    return found


def _differing(states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> set[str]:
    """Names that some model lacks, or has in another shape; for the base, of floating-point tensors alone."""
    every = list(dict.fromkeys(name for state in states for name in state))
    shapes = {name: {state[name].shape if name in state else None for state in states} for name in every}
    found = {name for name, each in shapes.items() if len(each) > 1}
    if base is not None:
        first = states[0]
        found |= {
            name
            for name in first
            if first[name].is_floating_point() and (name not in base or base[name].shape != first[name].shape)
        }
    return found


def _configured(model: nn.Module, state: Iterable[str]) -> list[str]:
    """Tensors in the layers that timm's configuration calls the classifier."""
    config = getattr(model, "pretrained_cfg", None)
    layers = config.get("classifier") if isinstance(config, dict) else None
    layers = [layer for layer in listed(layers or ()) if isinstance(layer, str)]
    return [name for name in state if any(name.startswith(f"{layer}.") for layer in layers)]


def _recreated(model: nn.Module) -> list[str]:
    """Tensors that the model's own ``reset_classifier`` makes anew; none where it has no such method or that fails."""
    if not callable(getattr(model, "reset_classifier", None)):
        return []
    twin = skeleton(model)
    before = twin.state_dict(keep_vars=True)
    classes = max(int(getattr(model, "num_classes", 1) or 1), 1)
    try:
        with torch.random.fork_rng([]):
            twin.reset_classifier(classes)  # pyright: ignore[reportCallIssue]
    except Exception:  # whatever a model's own method may raise
        return []
    after, names = twin.state_dict(keep_vars=True), canonical_parameters(model)
    own = model.state_dict(keep_vars=True)
    return [names[id(own[name])] for name, tensor in before.items() if after.get(name) is not tensor]


def _begun(graph_module: fx.GraphModule, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """Tensors of layers whose matrices have nothing to do with the base's, while most are nearly parallel to it."""
    cosines: dict[str, float] = {}
    for name, trait in traits_of_graph(graph_module).items():
        known = trait.kind is Kind.MATRIX and name in base and base[name].shape == state[name].shape
        if known and state[name].numel() >= FEWEST:
            mine, its = (x.detach().reshape(-1)[:SAMPLE].double() for x in (state[name], base[name].to(state[name])))
            cosines[name] = float(torch.cosine_similarity(mine, its, dim=0))
    if not cosines or statistics.median(cosines.values()) < TRUSTED:
        return []
    layers = {name.rpartition(".")[0] for name, cosine in cosines.items() if cosine < FOREIGN}
    return [name for name in state if name.rpartition(".")[0] in layers]


def _last(graph_module: fx.GraphModule) -> list[str]:
    """Tensors of the layers nearest to the output: matrices, and all that comes behind them."""
    matrices = {name for name, trait in traits_of_graph(graph_module).items() if trait.kind is Kind.MATRIX}
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    reads = tensors_read(graph_module)
    waiting, seen, found = [*output.all_input_nodes], set[fx.Node](), dict[str, None]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        given = [each for each in node.all_input_nodes if each.op == "get_attr"]
        read = [name for each in (node, *given) for name in reads[each]]
        found |= dict.fromkeys(read)
        if matrices.isdisjoint(read):
            waiting += node.all_input_nodes
    return [*found] if not matrices.isdisjoint(found) else []


def tensors_read(graph_module: fx.GraphModule) -> dict[fx.Node, list[str]]:
    """Parameters and persistent buffers that each node itself reads, in its module or alone, by canonical name.

    >>> import vfsurgery as surgery
    >>> graph_module = surgery.trace(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 2))
    >>> [name for names in tensors_read(graph_module).values() for name in names]
    ['0.weight', '0.bias']
    """
    state = graph_module.state_dict(keep_vars=True)
    names = canonical_parameters(graph_module)
    within: dict[str, list[str]] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            within.setdefault(".".join(parts[:length]), []).append(names[id(tensor)])
    return {
        node: within.get(str(node.target), []) if node.op in ("call_module", "get_attr") else []
        for node in graph_module.graph.nodes
    }


def _route(extra: Iterable[str], state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> str:
    """Which of timm's two ways made the head: they differ where more than the classifier is made anew by one.

    What came from the base is still near it. Running statistics say nothing: they follow the features either way.
    """
    if base is None:
        return ""
    distances: dict[str, float] = {}
    for name in extra:
        mine, its = state[name], base.get(name)
        if its is None or its.shape != mine.shape or not mine.is_floating_point() or name.endswith(RUNNING):
            continue
        size = float(its.double().norm())
        if size:
            distances[name] = float((mine.double() - its.to(mine).double()).norm()) / size
    if not distances:
        return ""
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in distances))
    if statistics.fmean(distances.values()) < NEAR:
        return f"made by create_model(num_classes=...): {layers} came from the base"
    return f"made by reset_classifier: {layers} began anew"


def skeleton(model: nn.Module) -> nn.Module:
    """A copy whose parameters and persistent buffers have shapes and no values.

    >>> [str(tensor.device) for tensor in skeleton(nn.Linear(2, 1)).state_dict().values()]
    ['meta', 'meta']
    """
    return with_tensors(model, {name: tensor.to("meta") for name, tensor in canonical_state(model).items()})


def with_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other parameters and buffers, by canonical name; tied ones stay tied.

    >>> tuple(with_tensors(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)})(torch.ones(1, 2))[0])
    (tensor(3., grad_fn=<UnbindBackward0>),)
    """
    memo: dict[int, object] = {}
    for name, tensor in canonical_tensors(model).items():
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(state[name], tensor.requires_grad) if is_parameter else state[name]
    return copied(model, memo)


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """As :func:`canonical_state`, the very parameters and buffers."""
    names = canonical_parameters(model)
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if names[id(x)] == name}

"""BatchNorm layers on the statistics of the batch at hand, and what becomes of the statistics of all batches.

A layer is never switched to training for that. Its running statistics are exchanged for those of what it is given and
it runs in eval mode: so it computes what it would in training, whatever its class adds (an activation, casts), updates
nothing, and ``nn.SyncBatchNorm`` asks for no process group.

A layer that a forward calls several times (a head shared by all levels of a pyramid, a step that is repeated) has one
set of running statistics for all its calls. They are what training leaves behind: torch updates them call by call, so
every call counts once, however many positions it sees, a later one more than an earlier one by what the momentum
forgets; and the variance is that within the calls, without the distance of their means.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import DataError, explain
from vfsurgery.stats.moments import Moments, add_batch
from vfsurgery.stats.prefix import Prefix
from vfsurgery.tracing.excerpts import at_node
from vfsurgery.tracing.ops import canonical_key
from vfsurgery.tracing.values import PRESERVED, floats_per_image, takes_single_images

BatchNorm = nn.modules.batchnorm._BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE = 2**19
"""Numbers of one image's output, 2 MiB of float32, from which on a convolution is computed image by image."""


class OnBatches(Prefix):
    """Runs a graph with BatchNorm layers on the statistics of each batch, and gathers what they are given.

    Args:
        graph_module: A graph in eval mode.
        norms: The layers, by the name of their node; others keep their running statistics.

    Nodes behind the last of them are not run. ``moments`` has for every node those of its input, over all batches.
    """

    def __init__(self, graph_module: fx.GraphModule, norms: Mapping[str, BatchNorm]) -> None:
        super().__init__(graph_module, dict.fromkeys(norms, _look_on))
        self.norms = norms
        self.moments: dict[str, Moments] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a BatchNorm with the statistics of its input."""
        norm = self.norms.get(n.name)
        if norm is None:
            if n.op == "call_module" and _is_large(n, layer := self.fetch_attr(str(n.target))):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                with at_node(n, self.module):
                    return _image_by_image(layer, next(iter((*args, *kwargs.values()))))
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value: Tensor = next(iter((*args, *kwargs.values())))
        batch = Moments.of(value, dim=1)
        if batch.count < 2:
            raise DataError(
                explain(
                    "a batch is too small for BatchNorm statistics: it has one value per channel",
                    layer=str(n.target),
                    input=tuple(value.shape),
                    remedy="use larger batches, and drop a last batch of one image",
                )
            )
        add_batch(self.moments, n.name, batch)
        if n.op == "call_module":
            with statistics_exchanged(norm, batch.mean, batch.var):
                return super().run_node(n)
        given = _statistics_given(n)
        own = [self.env[node] for node in given]
        self.env |= {node: new.to(old) for node, new, old in zip(given, (batch.mean, batch.var), own, strict=True)}
        try:
            return super().run_node(n)
        finally:
            self.env |= zip(given, own, strict=True)


def _is_large(node: fx.Node, layer: nn.Module) -> bool:
    """Whether a node is a plain convolution of many numbers per image; without hooks, which count calls."""
    if type(layer) not in CONVOLUTIONS or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if torch.get_num_threads() == 1 or next(layer.parameters()).device.type != "cpu":
        return False
    return floats_per_image(node) >= LARGE and takes_single_images(node.graph)


def _image_by_image(layer: nn.Module, images: Tensor) -> Tensor:
    """What a convolution makes of a batch, to the last bit.

    On several threads the CPU's convolutions lay input and output out anew, in as much memory again: here of one image.
    """
    first = layer(images[:1])
    out = first.new_empty((len(images), *first.shape[1:]))
    out[:1] = first
    for place in range(1, len(images)):
        out[place] = layer(images[place : place + 1])[0]
    return out


def _look_on(value: Tensor) -> None:
    """Leave a node's value as it is."""


@contextmanager
def statistics_exchanged(norm: BatchNorm, mean: Tensor, var: Tensor) -> Generator[None]:
    """Other running statistics for a while; the layer's own buffers come back untouched."""
    own = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    try:
        norm.running_mean, norm.running_var = mean.to(own[0]), var.to(own[1])
        yield
    finally:
        norm.running_mean, norm.running_var = own


def set_running(norm: BatchNorm, calls: Sequence[Moments]) -> None:
    """Write what training leaves in a layer's running statistics whose calls, in order, see inputs of such moments.

    With momentum ``m``, call ``k`` of ``K`` weighs ``(1 - m)^(K - k)``; without one (``momentum=None``, the cumulative
    average that ``torch.optim.swa_utils.update_bn`` takes) all calls weigh the same.

    >>> norm, layer = nn.BatchNorm1d(1, momentum=None), nn.BatchNorm1d(1, momentum=None)
    >>> first, second = torch.randn(50, 1), 3 + torch.randn(20, 1)
    >>> set_running(norm, [Moments.of(first, dim=1), Moments.of(second, dim=1)])
    >>> _ = layer(first), layer(second)
    >>> torch.allclose(norm.running_mean, layer.running_mean), torch.allclose(norm.running_var, layer.running_var)
    (True, True)
    """
    momentum = norm.momentum or 0.0
    shares = [(1 - momentum) ** (len(calls) - 1 - place) for place in range(len(calls))]
    means = torch.stack([share * call.mean for share, call in zip(shares, calls, strict=True)])
    spreads = [call.squares / max(call.count - 1, 1) for call in calls]
    variances = torch.stack([share * spread for share, spread in zip(shares, spreads, strict=True)])
    cast(Tensor, norm.running_mean).copy_(means.sum(0) / sum(shares))
    cast(Tensor, norm.running_var).copy_(variances.sum(0) / sum(shares))


def is_batch_norm(module: nn.Module | None) -> TypeGuard[BatchNorm]:
    """Whether a module normalizes over the batch and keeps running statistics."""
    return isinstance(module, BatchNorm)


def batch_norm_nodes(graph_module: fx.GraphModule) -> dict[str, BatchNorm]:
    """The BatchNorm layers that keep running statistics, by the names of their nodes, in graph order.

    Those of preserved prefixes keep the statistics of their source and are left out.
    """
    found: dict[str, BatchNorm] = {}
    entered: dict[str, BatchNorm] = {}  # one for all calls
    for node in graph_module.graph.nodes:
        if PRESERVED in node.meta or not calls_batch_norm(node, graph_module):
            continue
        if node.op == "call_module":
            module = cast(BatchNorm, graph_module.get_submodule(str(node.target)))
        else:
            path, _ = _inside(node)
            module = entered[path] = entered.get(path) or _stand_in(node, graph_module.get_submodule(path))
        if module.running_var is not None:
            found[node.name] = module
    return found


def calls_batch_norm(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a node calls a BatchNorm layer, or is the call inside one: a trace enters those with computed weights."""
    if node.op == "call_module":
        return is_batch_norm(graph_module.get_submodule(str(node.target)))
    if not _statistics_given(node):
        return False
    _, kind = _inside(node)
    return isinstance(kind, type) and issubclass(kind, BatchNorm)


def _inside(node: fx.Node) -> tuple[str, Any]:
    """Path and class of the module whose forward made a node; its path in ``nn_module_stack`` also counts the calls."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {"": ("", nn.Module)}
    return next(reversed(stack.values()))


def _statistics_given(node: fx.Node) -> list[fx.Node]:
    """The running mean and variance that a call of ``batch_norm`` is given, where they are buffers of its module."""
    if node.op != "call_function" or canonical_key(node.target) != "batch_norm":
        return []
    given = [argument for argument in node.args[1:3] if isinstance(argument, fx.Node)]
    path, _ = _inside(node)
    own = [f"{path}.{name}" for name in ("running_mean", "running_var")]
    return (
        given if [(buffer.op, str(buffer.target)) for buffer in given] == [("get_attr", name) for name in own] else []
    )


def _stand_in(node: fx.Node, holder: nn.Module) -> BatchNorm:
    """A layer with the running statistics and the momentum of one whose forward a trace has entered."""
    momentum, weight = node.kwargs.get("momentum"), node.kwargs.get("weight")
    layer = nn.BatchNorm1d(0, momentum=cast(float, momentum), affine=weight is not None)
    layer.running_mean, layer.running_var = cast(Tensor, holder.running_mean), cast(Tensor, holder.running_var)
    return layer


def calls_of(norms: Mapping[str, BatchNorm]) -> dict[BatchNorm, list[str]]:
    """Every layer once, with the names of all nodes that call it, in graph order."""
    calls: dict[BatchNorm, list[str]] = {}
    for name, norm in norms.items():
        calls.setdefault(norm, []).append(name)
    return calls

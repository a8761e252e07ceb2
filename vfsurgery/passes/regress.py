"""Least-squares merging: fit each layer of the merged model to what its sources compute there, on what it gets itself.

Averaged weights see other inputs than the sources' did, and layer after layer their outputs drift away. REPAIR puts the
mean and the spread of every unit right; the rest of the error stays. Here each layer's weights are fitted, first layer
first: with ``x`` the merged model's own input to the layer and ``z`` the sources' aligned pre-activations, averaged and
brought to the sources' mean and standard deviation,

``min over W, b of  E |W x + b - z|^2 + ridge * |W - W_0|^2``,

where ``W_0`` is the average of the weights, rescaled unit by unit. It is RegMean's regression (Jin et al., "Dataless
knowledge fusion by merging weights of language models", 2023, Eq. 2) on aligned units, with REPAIR's goals (Jordan et
al., 2023) and with the inputs that the merged model really has. No labels are needed, nothing is trained: one linear
solve per layer. The ridge, in units of the mean variance of ``x``, is chosen for each layer on held-out batches.

BatchNorm layers are recalibrated on the way, on the merged model's exact statistics. Layers that are no dense matrix
(depthwise and grouped convolutions, scales of other norms) get REPAIR's two numbers per unit instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from vfsurgery.batches import progress
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.maps import map_units
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.fold import fold_affine, tensor_of
from vfsurgery.passes.producers import CONV, LINEAR, Producer, find_producers
from vfsurgery.passes.recalibrate import batch_norm_nodes, set_running
from vfsurgery.passes.renormalize import Affine, Repair, unit_ratio
from vfsurgery.stats.correlation import Centred, CrossMoments
from vfsurgery.stats.lockstep import Lockstep, live_bytes
from vfsurgery.stats.moments import Moments, add_batch, weighted_goal
from vfsurgery.threads import threads
from vfsurgery.tracing.ops import Op, OpReader

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
HELD_OUT = 5
"""Every which batch is held out to choose the ridge."""
SAMPLES, LEAST_SAMPLES = 10, 20_000
"""Samples per column of a layer's matrix that are looked at, and how many at least, where there are as many."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Regress(Pass):
    """Fit the layers of the merged model to its sources' averaged pre-activations, one after the other.

    ``images`` are used at most, fewer where their activations would take more than ``memory`` GiB. ``ridge`` is chosen
    for each layer unless it is given.
    """

    name: ClassVar[str] = "regress"
    needs_data: ClassVar[bool] = True
    fills_zeros: ClassVar[bool] = True
    needs_sources: ClassVar[bool] = True
    images: int = 4000
    memory: float = 4.0
    ridge: float | None = None

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Fit all layers.

        Raises:
            OptionError: there is no layer to fit.
            DataError: there are too few images.
        """
        batches = self._batches(graph_module, context)
        producers = {producer.node: producer for producer in find_producers(graph_module, context.groups)}
        norms = batch_norm_nodes(graph_module)
        ops = {op.node.name: op for op in OpReader(graph_module)}
        steps = [node.name for node in graph_module.graph.nodes if node.name in producers or node.name in norms]
        dense = {name for name in producers if _is_dense(ops[name])}
        if not dense:
            raise OptionError(explain("regress found no layer to fit", remedy="use renormalize='repair' or 'reset'"))
        fit = _Fit(graph_module, context, batches, self.ridge)
        for name in progress(steps, "regression of the layers", len(steps), context.progress):
            if name in norms:
                fit.reset(name, norms[name])
            elif name in dense:
                fit.solve(producers[name], ops[name])
            elif not producers[name].feeds_norm:
                fit.repair(producers[name])
        used = sum(len(images) for images in batches)
        context.notes.append(
            f"regress: {len(dense)} layers on {used} images; ridge {min(fit.ridges):.2g} to {max(fit.ridges):.2g}"
        )
        return graph_module

    def flops(self, graph_module: fx.GraphModule, groups: GroupSet) -> float:
        """About how many floating-point operations the fits take, runs of the networks not counted."""
        ops = {op.node.name: op for op in OpReader(graph_module)}
        total = 0.0
        for producer in find_producers(graph_module, groups):
            if _is_dense(ops[producer.node]):
                columns = tensor_of(graph_module, producer.weight)[0].numel()
                shape = ops[producer.node].output.shape
                positions = torch.Size(shape).numel() // (shape[0] * producer.units)
                samples = min(self.images * positions, _wanted(columns) + self.images)
                total += 2.0 * samples * (columns + producer.units) ** 2 + len(RIDGES) * columns**3 / 3
        return total

    def _batches(self, graph_module: fx.GraphModule, context: Context) -> list[Tensor]:
        live = live_bytes(graph_module) * (len(context.sources) + 1)
        most = max(min(self.images, int(self.memory * GIB / max(live, 1))), 1)
        batches: list[Tensor] = []
        for images in context.images("images for the regression"):
            batches.append(images[: most - sum(map(len, batches))])
            if sum(map(len, batches)) >= most:
                break
        if len(batches) < 2:
            batches = [part for batch in batches for part in batch.chunk(HELD_OUT)]
        if len(batches) < 2:
            raise DataError(explain("regress needs at least two images", remedy="pass more data"))
        return batches


class _Fit:
    """The merged model and its sources, run node by node on the same images."""

    def __init__(
        self, graph_module: fx.GraphModule, context: Context, batches: Sequence[Tensor], ridge: float | None
    ) -> None:
        self.graph_module, self.context = graph_module, context
        self.merged = Lockstep(graph_module, batches)
        self.sources = [Lockstep(source.graph_module, batches) for source in context.sources]
        self.candidates = RIDGES if ridge is None else (ridge,)
        self.ridges: list[float] = []
        self.generator = torch.Generator().manual_seed(0)  # of the positions that are looked at

    def reset(self, name: str, norm: nn.modules.batchnorm._BatchNorm) -> None:
        """Set a BatchNorm's running statistics to those of its input."""
        node = self.merged.run_before(name)
        set_running(norm, _moments(self.merged.of(cast(fx.Node, node.args[0])), 1))

    def repair(self, producer: Producer) -> None:
        """Bring a layer's output units to the sources' mean and standard deviation."""
        goals = weighted_goal(
            [self._source_moments(source, producer) for source in range(len(self.sources))],
            self.context.weights_of(producer.weight),
        )
        node = self.merged.run_through(producer.node)
        affine = Affine(*Repair().correct(_moments(self.merged.of(node), producer.dim), *goals), producer.dim)
        created = fold_affine(self.graph_module, producer, affine)
        if created is not None:
            self.context.created_biases.append(created)
        for values in self.merged.values:
            values[node] = affine(values[node])

    def _source_moments(self, source: int, producer: Producer) -> Moments:
        node, orders = self.sources[source].run_through(producer.node), self.context.permutations[source]
        values = (producer.aligned(value, self.context.groups, orders) for value in self.sources[source].of(node))
        return _moments(values, producer.dim)

    def solve(self, producer: Producer, op: Op) -> None:
        """Fit a dense layer's weight and bias."""
        node = self.merged.run_before(producer.node)
        targets = [source.run_through(producer.node) for source in self.sources]
        weight = tensor_of(self.graph_module, producer.weight)
        columns, shares = weight[0].numel(), self.context.weights_of(producer.weight)
        statistics: dict[bool, CrossMoments] = {}  # of the batches held out, and of those fitted on
        goals: dict[int, Moments] = {}
        count = sum(len(images) for images in self.merged.batches)
        for number, inputs in enumerate(self.merged.of(cast(fx.Node, node.args[0]))):
            outputs = [values.values[number][target] for values, target in zip(self.sources, targets, strict=True)]
            places = self._places(outputs[0], producer.dim, _wanted(columns) // count + 1)
            rows = [
                self._aligned(_units(value, producer.dim, places), producer, source)
                for source, value in enumerate(outputs)
            ]
            for source, value in enumerate(rows):
                add_batch(goals, source, Moments.of(value, dim=1))
            mean = torch.stack([w * z for w, z in zip(shares, rows, strict=True)]).sum(0)
            x = _patches(inputs, op, places) if op.key not in LINEAR else _units(inputs, -1, places)
            held_out = number % HELD_OUT == HELD_OUT - 1 or number == len(self.merged.batches) - 1
            both = Centred.of(torch.cat([x, mean], 1), None, 1)
            add_batch(statistics, held_out, CrossMoments.of(both, both))
        solution = _Solution(statistics[False], statistics[True], columns)
        goal = None if producer.is_output else weighted_goal([*goals.values()], shares)
        found, shift, ridge = solution.solve(weight.flatten(1), goal, self.candidates)
        self.ridges.append(ridge)
        weight.copy_(found.view_as(weight))
        self._set_bias(producer, shift)

    def _aligned(self, rows: Tensor, producer: Producer, source: int) -> Tensor:
        """A source's output, ``(samples, units)``, in the units of the merged model."""
        orders = self.context.permutations[source]
        return map_units(rows.T, producer.weight, producer.rows, self.context.groups, orders).T

    def _places(self, value: Tensor, dim: int, per_image: int) -> Tensor:
        """Random positions of a layer's output, flattened over all dims but those of images and units."""
        positions = value[0].numel() // value.shape[dim]
        return torch.randperm(positions, generator=self.generator)[:per_image].to(value.device)

    def _set_bias(self, producer: Producer, shift: Tensor) -> None:
        if producer.bias is not None:
            tensor_of(self.graph_module, producer.bias).copy_(shift)
        elif not producer.feeds_norm:
            nothing = Affine(torch.ones_like(shift), shift, producer.dim)
            created = fold_affine(self.graph_module, producer, nothing)
            if created is not None:
                self.context.created_biases.append(created)


@dataclass
class _Solution:
    """Ridge regression from the moments of inputs and goals together, the first ``columns`` of them inputs."""

    fitted: CrossMoments
    held_out: CrossMoments
    columns: int

    def solve(
        self, average: Tensor, goal: tuple[Tensor, Tensor] | None, ridges: Sequence[float]
    ) -> tuple[Tensor, Tensor, float]:
        """Weight ``(units, columns)``, bias ``(units,)`` and the ridge that does best on the held-out batches."""
        n = self.columns
        covariance, held_out = (moments.products / moments.a.count for moments in (self.fitted, self.held_out))
        c, cross = covariance[:n, :n], covariance[n:, :n]
        spread = covariance.diagonal()[n:].sqrt()
        goal_std = spread if goal is None else goal[1]
        scale = unit_ratio(goal_std, spread)[:, None]
        start = average.double()
        start = start * unit_ratio(goal_std, ((start @ c) * start).sum(1).clamp_min(0).sqrt())[:, None]
        missing = scale * cross - start @ c
        unit = c.diagonal().mean()
        eye = torch.eye(n, dtype=c.dtype, device=c.device)
        best, lowest, chosen = start, float("inf"), ridges[0]
        for ridge in ridges:
            with threads(1):
                factor, failed = torch.linalg.cholesky_ex(c + ridge * unit * eye)
                if bool(failed):
                    continue
                found = start + torch.cholesky_solve(missing.T, factor).T
            error = ((found @ held_out[:n, :n] - 2 * scale * held_out[n:, :n]) * found).sum(1)
            error = float((error / goal_std.square().clamp_min(torch.finfo(torch.float64).tiny)).sum())
            if error < lowest:
                best, lowest, chosen = found, error, ridge
        joint = self.fitted.merge(self.held_out)
        if goal is not None:
            everything = joint.products[:n, :n] / joint.a.count
            best = best * unit_ratio(goal_std, ((best @ everything) * best).sum(1).clamp_min(0).sqrt())[:, None]
        mean = joint.a.mean[n:] if goal is None else goal[0]
        return best, mean - best @ joint.a.mean[:n], chosen


def _wanted(columns: int) -> int:
    """How many samples a matrix of so many columns is fitted on."""
    return max(SAMPLES * columns, LEAST_SAMPLES)


def _is_dense(op: Op) -> bool:
    """Whether a layer is one matrix from inputs to units: linear, or a convolution of one group."""
    return op.key in LINEAR or (op.key in CONV and op.argument("groups", 6, 1) == 1)


def _moments(batches: Iterator[Tensor], dim: int) -> Moments:
    first, *rest = (Moments.of(value, dim=dim) for value in batches)
    for moments in rest:
        first = first.merge(moments)
    return first


def _units(value: Tensor, dim: int, places: Tensor) -> Tensor:
    """A layer's output at some places, ``(images * places, units)`` float."""
    dim = dim % value.ndim
    rows = value.movedim(dim, -1).flatten(1, -2) if value.ndim > 2 else value[:, None]
    rows = rows[:, places].flatten(0, 1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _patches(value: Tensor, op: Op, places: Tensor) -> Tensor:
    """What a convolution sees at some places of its output, ``(images * places, channels * kernel)`` float."""
    weight = op.param("weight", 1)
    assert weight is not None
    kernel, spatial = weight.shape[2:], len(weight.shape) - 2
    stride, dilation = (_per_dim(op.argument(*option), spatial) for option in (("stride", 3, 1), ("dilation", 5, 1)))
    value = _padded(value, op, kernel, dilation)
    for place in range(spatial):
        reach = dilation[place] * (kernel[place] - 1) + 1
        value = value.unfold(2 + place, reach, stride[place])[..., :: dilation[place]]
    shape = value.shape[2 : 2 + spatial]  # value: (images, channels, positions..., kernel...)
    picked = torch.unravel_index(places, shape)
    patches = value[(slice(None), slice(None), *picked)].movedim(2, 1)  # (images, places, channels, kernel...)
    return patches.flatten(2).flatten(0, 1).to(torch.promote_types(value.dtype, torch.float32))


def _padded(value: Tensor, op: Op, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    padding: Any = op.argument("padding", 4, 0)
    if padding == "valid":
        return value
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        amounts = [(total // 2, total - total // 2) for total in totals]
    else:
        amounts = [(amount, amount) for amount in _per_dim(padding, len(kernel))]
    mode = op.argument("padding_mode", 99, "zeros")
    flat = list(itertools.chain.from_iterable(reversed(amounts)))
    return functional.pad(value, flat, mode="constant" if mode == "zeros" else mode) if any(flat) else value


def _per_dim(given: Any, dims: int) -> tuple[int, ...]:
    return tuple(given) * (dims if len(given) == 1 else 1) if isinstance(given, tuple | list) else (given,) * dims

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

BatchNorm layers are recalibrated on the way, on the merged model's exact statistics; one that is called several times
when its first call comes, by looking ahead as far as the last, with the layers in between as they are then, their norms
on the statistics of each batch. Layers that are no dense matrix (depthwise and grouped convolutions, scales of other
norms) get REPAIR's two numbers per unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from vfsurgery.data.progress import progress
from vfsurgery.discovery.maps import map_units
from vfsurgery.errors import DataError, OptionError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes.affine import Affine, fold_affine, tensor_of
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.producers import CONV, LINEAR, Producer, find_producers
from vfsurgery.passes.renormalize import Repair
from vfsurgery.passes.ridge import Solution
from vfsurgery.stats.batch_norms import BatchNorm, OnBatches, batch_norm_nodes, calls_of, set_running
from vfsurgery.stats.lockstep import Lockstep, live_bytes
from vfsurgery.stats.moments import Moments, add_batch, weighted_goal
from vfsurgery.stats.patches import Box, Geometry, PatchSums
from vfsurgery.stats.threads import threads
from vfsurgery.tracing.ops import Op, OpReader

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
HELD_OUT = 5
"""Every which batch is held out to choose the ridge."""
SAMPLES, LEAST_SAMPLES = 10, 20_000
"""Samples per column of a layer's matrix that are looked at, and how many at least, where there are as many."""
WORTH_DIVIDING = 1024
"""Columns of a layer's matrix from which on its products are computed on several threads: small ones only wait."""
TRIED = 3
"""Ridges that are tried for a layer, about."""
IMAGES_AT_A_PLACE = 128
"""Images that are looked at in the same place, where only a part of a layer's outputs is looked at."""
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
    images: int = 2000
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
        layers = {calls[0]: (norm, calls) for norm, calls in calls_of(norms).items()}
        producers = {name: p for name, p in producers.items() if name not in norms and _is_fitted(p)}
        steps = [node.name for node in graph_module.graph.nodes if node.name in producers or node.name in layers]
        dense = {name for name in producers if _is_dense(ops[name])}
        if not dense:
            raise OptionError(explain("regress found no layer to fit", remedy="use renormalize='repair' or 'reset'"))
        fit = _Fit(graph_module, context, batches, self.ridge)
        for name in progress(steps, "regression of the layers", len(steps), context.progress):
            if name in layers:
                fit.reset(*layers[name])
            elif name in dense:
                fit.solve(producers[name], ops[name])
            elif not producers[name].feeds_norm:
                fit.repair(producers[name])
        used = sum(len(images) for images in batches)
        context.notes.append(
            f"regress: {len(dense)} layers on {used} images; ridge {min(fit.ridges):.2g} to {max(fit.ridges):.2g}"
        )
        return graph_module

    def applies(self, graph_module: fx.GraphModule, groups: GroupSet) -> bool:
        """Whether there are layers to fit."""
        ops = {op.node.name: op for op in OpReader(graph_module)}
        return any(_is_dense(ops[p.node]) and _is_fitted(p) for p in find_producers(graph_module, groups))

    def flops(self, graph_module: fx.GraphModule, groups: GroupSet) -> float:
        """About how many floating-point operations the fits take, runs of the networks not counted."""
        ops = {op.node.name: op for op in OpReader(graph_module)}
        total = 0.0
        for producer in find_producers(graph_module, groups):
            if _is_dense(ops[producer.node]) and _is_fitted(producer):
                columns = tensor_of(graph_module, producer.weight)[0].numel()
                shape = ops[producer.node].output.shape
                positions = torch.Size(shape).numel() // (shape[0] * producer.units)
                samples = min(self.images * positions, _wanted(columns) + self.images)
                shifted = 1 if ops[producer.node].key in LINEAR else Geometry.of(ops[producer.node]).kernel[0]
                total += 2.0 * samples * columns * (columns / shifted + producer.units)
                total += TRIED * columns**2 * (columns / 3 + 4 * producer.units)
        return total

    def _batches(self, graph_module: fx.GraphModule, context: Context) -> list[Tensor]:
        live = live_bytes(graph_module) * (len(context.sources) + 1)
        together = 1 if context.data is None else context.data.together
        most = max(min(self.images, int(self.memory * GIB / max(live, 1))) // together, 1) * together
        batches: list[Tensor] = []
        for images in context.images("images for the regression"):
            batches.append(images[: most - sum(map(len, batches))])
            if sum(map(len, batches)) >= most:
                break
        if len(batches) < 2:
            batches = [part for batch in batches for part in _parts(batch, together)]
        if len(batches) < 2:
            raise DataError(explain("regress needs at least two images", remedy="pass more data"))
        return batches


def _parts(batch: Tensor, together: int) -> Sequence[Tensor]:
    """A batch in so many parts as there are to choose on, none of which tears apart images that belong together."""
    return batch.split(max(-(-len(batch) // HELD_OUT) // together, 1) * together)


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
        self._place = len(self.candidates) // 2
        self.generator = torch.Generator().manual_seed(0)  # of the positions that are looked at

    def reset(self, norm: BatchNorm, calls: Sequence[str]) -> None:
        """Set a BatchNorm's running statistics to those of what its calls are given; the first one comes next."""
        node = self.merged.run_before(calls[0])
        if len(calls) == 1:
            set_running(norm, [_moments(self.merged.of(node.all_input_nodes[0]), 1)])
        else:
            norms = list(batch_norm_nodes(self.graph_module).items())
            first, last = ([name for name, _ in norms].index(calls[place]) for place in (0, -1))
            between = {layer for _, layer in norms[first : last + 1]}  # layers that end before have theirs by now
            ahead = OnBatches(self.graph_module, {name: layer for name, layer in norms[: last + 1] if layer in between})
            for images in self.merged.batches:
                ahead.run(images)
            set_running(norm, [ahead.moments[call] for call in calls])

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
        shares = self.context.weights_of(producer.weight)
        fitted, held_out, goals = self._gather(producer, op, cast(fx.Node, node.args[0]), targets)
        solution = Solution(fitted.moments(), held_out.moments())
        goal = None if producer.is_output else weighted_goal(goals, shares)
        found, shift, place = solution.solve(weight.flatten(1), goal, self.candidates, self._place)
        self.ridges.append(self.candidates[place])
        self._place = place
        weight.copy_(found.view_as(weight))
        self._set_bias(producer, shift)

    def _gather(
        self, producer: Producer, op: Op, origin: fx.Node, targets: Sequence[fx.Node]
    ) -> tuple[PatchSums, PatchSums, list[Moments]]:
        """What the layer reads and should put out, on the batches fitted on and those held out, and its sources'."""
        geometry = Geometry() if op.key in LINEAR else Geometry.of(op)
        spatial = len(geometry.kernel)
        shares, weight = self.context.weights_of(producer.weight), tensor_of(self.graph_module, producer.weight)
        inputs = [_channels_first(value, op) for value in self.merged.of(origin)]
        outputs = [
            [_units_first(value, producer.dim, spatial) for value in source.of(target)]
            for source, target in zip(self.sources, targets, strict=True)
        ]
        shapes = [(value.shape, (0, 0, *made.shape[2:])) for value, made in zip(inputs, outputs[0], strict=True)]
        fitted, held_out = PatchSums(geometry, shapes), PatchSums(geometry, shapes)
        goals: dict[int, Moments] = {}
        per_image = _wanted(weight[0].numel()) // sum(map(len, inputs)) + 1
        for number, value in enumerate(inputs):
            last = number == len(inputs) - 1
            sums = held_out if number % HELD_OUT == HELD_OUT - 1 or last else fitted
            for part, box in self._boxes(len(value), outputs[0][number].shape[2:], per_image):
                mean = None
                for source, share in enumerate(shares):
                    aligned = self._aligned(_boxed(outputs[source][number][:, part], box), producer, source)
                    add_batch(goals, source, Moments.of(aligned))
                    mean = share * aligned if mean is None else mean.add_(aligned, alpha=share)
                assert mean is not None
                with threads(1 if weight[0].numel() < WORTH_DIVIDING else None):
                    sums.add(value[part], mean, box)
        return fitted, held_out, [*goals.values()]

    def _aligned(self, units: Tensor, producer: Producer, source: int) -> Tensor:
        """A source's output, ``(units, ...)`` float, in the units of the merged model."""
        orders = self.context.permutations[source]
        mapped = map_units(units, producer.weight, producer.rows, self.context.groups, orders)
        return mapped.to(torch.promote_types(mapped.dtype, torch.float32))

    def _boxes(self, images: int, positions: Sequence[int], per_image: int) -> Iterator[tuple[slice, Box]]:
        """Which outputs of which images are looked at: all, or as many as are wanted at random places.

        They extend along the first dim first, where neighbours share most of the work.
        """
        sizes: list[int] = []
        left = per_image
        for size in positions:
            sizes.append(min(size, left))
            left = -(-left // sizes[-1])
        together = images if sizes == [*positions] else IMAGES_AT_A_PLACE
        for start in range(0, images, together):
            firsts = (
                int(torch.randint(whole - size + 1, (), generator=self.generator))
                for whole, size in zip(positions, sizes, strict=True)
            )
            yield slice(start, start + together), tuple(zip(firsts, sizes, strict=True))

    def _set_bias(self, producer: Producer, shift: Tensor) -> None:
        if producer.bias is not None:
            tensor_of(self.graph_module, producer.bias).copy_(shift)
        elif not producer.feeds_norm:
            nothing = Affine(torch.ones_like(shift), shift, producer.dim)
            created = fold_affine(self.graph_module, producer, nothing)
            if created is not None:
                self.context.created_biases.append(created)


def _wanted(columns: int) -> int:
    """How many samples a matrix of so many columns is fitted on."""
    return max(SAMPLES * columns, LEAST_SAMPLES)


def _is_fitted(producer: Producer) -> bool:
    """Whether a layer can be given what it should put out, its mean included where no norm undoes that."""
    return not producer.inside and (producer.takes_shift or producer.feeds_norm)


def _is_dense(op: Op) -> bool:
    """Whether a layer is one matrix from inputs to units: linear, or a convolution of one group."""
    return op.key in LINEAR or (op.key in CONV and op.argument("groups", 6, 1) == 1)


def _moments(batches: Iterator[Tensor], dim: int) -> Moments:
    first, *rest = (Moments.of(value, dim=dim) for value in batches)
    for moments in rest:
        first = first.merge(moments)
    return first


def _channels_first(value: Tensor, op: Op) -> Tensor:
    """A layer's input, ``(images, channels, spatial...)``; a linear layer's places lie along one dim."""
    if op.key not in LINEAR:
        return value
    return value.movedim(-1, 1).flatten(2) if value.ndim > 2 else value[:, :, None]


def _units_first(value: Tensor, dim: int, spatial: int) -> Tensor:
    """A layer's output, ``(units, images, spatial...)``, a linear layer's places along one dim."""
    value = value.movedim(dim, 0)
    return value if value.ndim == 2 + spatial else value.flatten(2) if value.ndim > 2 else value[:, :, None]


def _boxed(value: Tensor, box: Box) -> Tensor:
    """What lies in a box, ``(units, first dim, images, other dims)``."""
    return value[(slice(None), slice(None), *(slice(first, first + size) for first, size in box))].movedim(2, 1)
